"""What the studies share: how well a number tells right from wrong, and how sure that is.

Labels are 1 for what should score high. Detections of one photo are not independent, so everything here that
resamples or splits does it by group (the photo), never by detection.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Numbers = NDArray[np.float64]
#: (labels, scores, weights) -> (resamples,): one figure a row of weights.
Measure = Callable[[NDArray[np.bool_], Numbers, Numbers], Numbers]

RESAMPLES = 2000
FOLDS, INNER_FOLDS, REPEATS = 5, 4, 5
#: Inverse strengths of the ridge penalty among which each training part chooses by its own cross-validation.
PENALTIES = (0.001, 0.01, 0.1, 1.0)
#: Most ranks that are told apart in a column.
QUANTILES = 100


# -- one figure -----------------------------------------------------------------------------------


def auroc(labels: ArrayLike, scores: ArrayLike) -> float:
    """Area under the ROC curve: how often a positive scores above a negative, ties half."""
    return _plain(weighted_auroc, labels, scores)


def average_precision(labels: ArrayLike, scores: ArrayLike) -> float:
    """Σ (recall step × precision) over the thresholds, ties taken together; no interpolation."""
    return _plain(weighted_average_precision, labels, scores)


def _plain(measure: Measure, labels: ArrayLike, scores: ArrayLike) -> float:
    y, s = np.asarray(labels, bool), np.asarray(scores, float)
    return float(measure(y, s, np.ones((1, len(y))))[0])


def weighted_auroc(labels: NDArray[np.bool_], scores: Numbers, weights: Numbers) -> Numbers:
    """AUROC for each row of `weights` (resamples, n); NaN where a row holds one label only."""
    positive, negative = _by_threshold(labels, scores, weights)
    above = np.cumsum(positive, 1) - positive / 2
    with np.errstate(invalid="ignore"):
        return (negative * above).sum(1) / (positive.sum(1) * negative.sum(1))


def weighted_average_precision(labels: NDArray[np.bool_], scores: Numbers, weights: Numbers) -> Numbers:
    """Average precision for each row of `weights` (resamples, n); NaN where a row holds no positive."""
    positive, negative = _by_threshold(labels, scores, weights)
    true, false = np.cumsum(positive, 1), np.cumsum(negative, 1)
    with np.errstate(invalid="ignore"):
        precision = true / np.maximum(true + false, 1e-12)
        return (positive * precision).sum(1) / positive.sum(1)


def _by_threshold(labels: NDArray[np.bool_], scores: Numbers, weights: Numbers) -> tuple[Numbers, Numbers]:
    """Weights of positives and of negatives at each distinct score, highest first."""
    if not np.isfinite(scores).all():
        raise ValueError("Scores must be finite: fill or drop what is missing first.")
    order = np.argsort(-scores, kind="stable")
    starts = np.flatnonzero(np.diff(-scores[order], prepend=-np.inf))
    drawn = weights[:, order]
    positive, negative = drawn * labels[order], drawn * ~labels[order]
    return np.add.reduceat(positive, starts, axis=1), np.add.reduceat(negative, starts, axis=1)


# -- how sure -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Interval:
    """A figure and its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} ({self.low:.3f} to {self.high:.3f})"

    @property
    def above_zero(self) -> bool:
        """The whole interval lies above zero."""
        return self.low > 0


def resampled(groups: Sequence[Any] | NDArray[Any], times: int = RESAMPLES, seed: int = 0) -> Numbers:
    """(times, n): how often each row was drawn when whole groups are drawn with replacement."""
    _, index = np.unique(np.asarray(groups), return_inverse=True)
    count = int(index.max()) + 1
    drawn = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=times)
    return drawn[:, index].astype(float)


def estimate(
    labels: ArrayLike, scores: ArrayLike, groups: Sequence[Any], measure: Measure = weighted_auroc, seed: int = 0
) -> Interval:
    """`measure` of the scores, with its bootstrap interval by group."""
    y, s = np.asarray(labels, bool), np.asarray(scores, float)
    return _interval(_plain(measure, y, s), measure(y, s, resampled(groups, seed=seed)))


def difference(
    labels: ArrayLike,
    new: ArrayLike,
    old: ArrayLike,
    groups: Sequence[Any],
    measure: Measure = weighted_auroc,
    seed: int = 0,
) -> Interval:
    """`measure` of `new` − that of `old` on the same detections, with its paired bootstrap interval by group."""
    y, a, b = np.asarray(labels, bool), np.asarray(new, float), np.asarray(old, float)
    weights = resampled(groups, seed=seed)
    return _interval(_plain(measure, y, a) - _plain(measure, y, b), measure(y, a, weights) - measure(y, b, weights))


def _interval(value: float, draws: Numbers) -> Interval:
    low, high = np.nanpercentile(draws, (2.5, 97.5))
    return Interval(value, float(low), float(high))


def wilson(successes: int, count: int) -> Interval:
    """A proportion with Wilson's score interval."""
    z, p = 1.959964, successes / count
    centre, scale = p + z * z / (2 * count), 1 + z * z / count
    half = z * math.sqrt(p * (1 - p) / count + z * z / (4 * count * count))
    return Interval(p, (centre - half) / scale, (centre + half) / scale)


# -- many numbers together ------------------------------------------------------------------------


def folds(groups: Sequence[Any], count: int = FOLDS, seed: int = 0) -> Iterator[tuple[NDArray[Any], NDArray[Any]]]:
    """(train, test) row numbers: every group is in one test part, all of it."""
    from sklearn.model_selection import GroupKFold

    rows = np.zeros((len(groups), 1))
    yield from GroupKFold(count, shuffle=True, random_state=seed).split(rows, groups=np.asarray(groups))


def cross_validated(
    features: Numbers | Callable[[NDArray[Any], int], Numbers],
    labels: ArrayLike,
    groups: Sequence[Any],
    repeats: int = REPEATS,
    *,
    centred: bool = False,
) -> Numbers:
    """(n,) log-odds from ridge logistic regressions that never saw the row's group, mean over `repeats` splits.

    `features` (n, k), or a function of the training rows and a seed that gives them (for features that are
    themselves learned). Missing values become the training median, and columns the normal scores of their ranks among
    the training rows, so that heavy tails do not decide. `centred`: less the log-odds of the training part's own share,
    which is high where that of the rows that it does not hold is low: with few labels this alone ranks below chance.
    """
    y = np.asarray(labels, bool)
    total = np.zeros(len(y))
    for repeat in range(repeats):
        for train, test in folds(groups, seed=repeat):
            x = features(train, repeat) if callable(features) else features
            model = _regression(x[train], y[train], np.asarray(groups)[train])
            share = y[train].mean()
            total[test] += model.decision_function(x[test]) - centred * np.log(share / (1 - share))
    return total / repeats


def _regression(x: Numbers, y: NDArray[np.bool_], groups: NDArray[Any]) -> Any:
    """A ridge logistic regression on (n, k), its penalty chosen by log loss over inner folds by group."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import log_loss
    from sklearn.pipeline import make_pipeline

    def fitted(penalty: float, ranks: Numbers, right: NDArray[np.bool_]) -> Any:
        return LogisticRegression(C=penalty, max_iter=1000).fit(ranks, right)

    losses = dict.fromkeys(PENALTIES, 0.0)
    for a, b in folds(groups.tolist(), min(INNER_FOLDS, len(set(groups)))):
        if 0 < y[a].sum() < len(a):
            ranks = _ranks(x[a])
            seen, unseen = ranks.transform(x[a]), ranks.transform(x[b])
            for penalty in PENALTIES:
                chance = fitted(penalty, seen, y[a]).predict_proba(unseen)[:, 1]
                losses[penalty] += log_loss(y[b], chance, labels=[False, True], normalize=False)
    ranks = _ranks(x)
    return make_pipeline(ranks, fitted(min(losses, key=losses.__getitem__), ranks.transform(x), y))


def _ranks(x: Numbers) -> Any:
    """What makes columns like those of x (n, k) normal scores of standard deviation 1, fitted on x."""
    from sklearn.impute import SimpleImputer
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import QuantileTransformer, StandardScaler

    scores = QuantileTransformer(n_quantiles=min(QUANTILES, len(x)), output_distribution="normal")
    return make_pipeline(SimpleImputer(strategy="median", keep_empty_features=True), scores, StandardScaler()).fit(x)


# -- records --------------------------------------------------------------------------------------


def numbers(tree: Any, prefix: str = "") -> dict[str, float]:
    """Every number below a JSON value by its dotted name; lists, texts and nulls are left out, true is 1."""
    if isinstance(tree, Mapping):
        figures: dict[str, float] = {}
        for name, value in tree.items():
            figures |= numbers(value, f"{prefix}.{name}" if prefix else str(name))
        return figures
    if isinstance(tree, (bool, int, float)) and math.isfinite(tree):
        return {prefix: float(tree)}
    return {}


def table(rows: Sequence[Sequence[Any]], head: Sequence[str]) -> str:
    """A Markdown table."""
    lines = [list(head), ["---"] * len(head), *[[str(cell) for cell in row] for row in rows]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
