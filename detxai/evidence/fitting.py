"""Fits a calibration on judged detections of labelled images, few or many: what few labels cannot say the defaults do.

Trust starts from the model's score as a probability, thresholds from the defaults; labels move both, the more the more
there are (ridge and shrinkage: MAP estimates under Gaussian priors). How strong the priors are was chosen by
`scripts/studies/study_few_labels.py` on generated X-rays.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from detxai.errors import UsageError
from detxai.evidence.calibration import FEATURES, Bin, Feature, Gain, Quality, Usual, calibration_error, vector
from detxai.evidence.maps import GRID
from detxai.evidence.measures import sigmoid
from detxai.evidence.typicality import typicality, unit
from detxai.evidence.verdict import DEFAULTS, RULES, Numbers
from detxai.statistics import Moments, ranks

#: Precision of the prior of a coefficient, on standardised features and in logits: that of the logit has its mean where
#: trust is the score, all others at 0.
PRIOR = 30.0
#: Precision of the prior of the intercept: a score that is off by a constant is soon put right.
PRIOR_INTERCEPT = 1.0
#: Right detections that a default threshold counts as.
PRIOR_BOXES = 50
FOLDS = 10
#: Right and wrong detections, and images, without which nothing can be fitted.
FEWEST = 3
#: Shares of right detections that may be called weak or worse, and unsupported.
ALARMS = (0.05, 0.01)
#: Measures without a default threshold: below what they can be nothing is flagged.
UNLIMITED = {"one_sidedness": -1.0, "coherence": 0.0, "typicality": -1.0}
#: Bins of the reliability diagram.
BINS = 10
#: A logit is taken as it is, within these.
WIDEST = 30.0

Table = NDArray[np.float64]


@dataclass(frozen=True)
class LabelledDetection:
    """One detection on a labelled image: its `evidence` by name, (8, 8) `grid`, and whether it is `right`."""

    image: str
    class_id: int
    class_name: str
    logit: float
    evidence: Numbers
    grid: Sequence[Sequence[float]]
    right: bool


@dataclass(frozen=True)
class Fitted:
    """What a calibration holds beside what names its model."""

    intercept: float
    features: tuple[Feature, ...]
    thresholds: dict[str, tuple[float, float]]
    classes: tuple[Usual, ...]
    quality: Quality


def fit(rows: Sequence[LabelledDetection], images: int, boxes: float = PRIOR_BOXES, prior: float = PRIOR) -> Fitted:
    """The regression, thresholds and usual grids of `rows`, its quality cross-validated by image.

    `boxes` and `prior`: the strength of the priors. Raises UsageError where there are too few right or wrong
    detections or images.
    """
    right = np.array([row.right for row in rows], bool)
    groups = np.array([row.image for row in rows])
    if min(right.sum(), (~right).sum(), len(set(groups))) < FEWEST:
        raise UsageError(
            f"{right.sum()} right and {(~right).sum()} wrong detections on {len(set(groups))} images are too few"
            f" to calibrate with: at least {FEWEST} of each are needed, on {FEWEST} images.",
            "Give more labelled images, or a lower --conf.",
        )
    held_out = np.zeros(len(rows))
    for train, test in folds(groups):
        usual = _usual([rows[i] for i in train])
        intercept, features = _regression(_table([rows[i] for i in train], usual, seen=True), right[train], prior)
        held_out[test] = _probability(intercept, features, _table([rows[i] for i in test], usual, seen=False))
    usual = _usual(rows)
    table = _table(rows, usual, seen=True)
    intercept, features = _regression(table, right, prior)
    likeness = table[:, FEATURES.index("typicality")]
    good = [dict(row.evidence) | {"typicality": t} for row, t in zip(rows, likeness, strict=True) if row.right]
    quality = _quality(rows, right, groups, held_out, images)
    return Fitted(intercept, features, thresholds(good, boxes), _classes(rows, usual), quality)


def folds(groups: NDArray[Any], count: int = FOLDS) -> Iterator[tuple[NDArray[np.intp], NDArray[np.intp]]]:
    """(train, test) row numbers: every group is in one test part, all of it; one group a part where there are few."""
    names, which = np.unique(groups, return_inverse=True)
    part = np.random.default_rng(0).permutation(len(names))[which] % min(count, len(names))
    for k in range(min(count, len(names))):
        yield np.flatnonzero(part != k), np.flatnonzero(part == k)


def _quality(
    rows: Sequence[LabelledDetection], right: NDArray[np.bool_], groups: NDArray[Any], trust: Table, images: int
) -> Quality:
    """How well the held-out `trust` did, beside the score."""
    scores = np.array([sigmoid(row.logit) for row in rows])
    return Quality(
        images=images,
        right=int(right.sum()),
        wrong=int((~right).sum()),
        auroc=auroc(right, trust),
        auroc_score=auroc(right, scores),
        gain=gain(log_losses(right, scores) - log_losses(right, trust), groups),
        calibration_error=calibration_error(right, trust),
        calibration_error_score=calibration_error(right, scores),
        reliability=tuple(reliability(right, trust)),
    )


def log_losses(right: NDArray[np.bool_], probability: Table) -> Table:
    """(n,): −log of the probability that was given to what is the case, in nats."""
    return np.asarray(-np.log(np.clip(np.where(right, probability, 1 - probability), 1e-9, 1)))


def gain(better: Table, groups: NDArray[Any]) -> Gain:
    """Mean of the cross-validated `better` (n,) with its 95 % interval over `groups`, whose rows are not independent.

    Fits on overlapping parts err together: the variance is that of Nadeau and Bengio (2003, Machine Learning 52, 239).
    A few groups often make most of it: Student's t has as much freedom as there are groups that do, less one.
    """
    from scipy.stats import t

    _, which = np.unique(groups, return_inverse=True)
    value, count = float(better.mean()), int(which.max()) + 1
    squares = np.bincount(which, better - value) ** 2
    total, parts = float(squares.sum()), min(FOLDS, count)
    if total == 0:
        return Gain(value=value, low=value, high=value)
    freedom = max(total**2 / float((squares**2).sum()) - 1, 1.0)
    variance = (1 + parts / (parts - 1)) * count / (count - 1) * total / len(better) ** 2
    half = float(t.ppf(0.975, freedom)) * math.sqrt(variance)
    return Gain(value=value, low=value - half, high=value + half)


def reliability(right: NDArray[np.bool_], trust: Table) -> Iterator[Bin]:
    """Of each tenth of the range of `trust` with a detection in it: how many, their mean trust, the share right."""
    which = np.minimum((trust * BINS).astype(int), BINS - 1)
    for b in np.unique(which):
        own = which == b
        yield Bin(detections=int(own.sum()), trust=float(trust[own].mean()), right=float(right[own].mean()))


def _usual(rows: Sequence[LabelledDetection]) -> dict[int, Moments]:
    """The unit grids of the right detections of each class."""
    sums: dict[int, Moments] = {}
    for row in rows:
        one = unit(row.grid)
        if row.right and one is not None:
            sums.setdefault(row.class_id, Moments((GRID, GRID))).add(one)
    return sums


def _table(rows: Sequence[LabelledDetection], usual: Mapping[int, Moments], *, seen: bool) -> Table:
    """(rows, features); `seen`: a right detection is left out of the grids that it is compared with."""
    table = []
    for row in rows:
        sums, one = usual.get(row.class_id), unit(row.grid)
        count = sums.count - (seen and row.right) if sums is not None and one is not None else 0
        like = None
        if sums is not None and one is not None and count > 0:
            like = typicality(one, (sums.mean * sums.count - (one if count < sums.count else 0)).tolist())
        table.append(vector({**row.evidence, "logit": row.logit, "typicality": like}))
    return np.array(table)


def _regression(table: Table, right: NDArray[np.bool_], prior: float) -> tuple[float, tuple[Feature, ...]]:
    """The intercept and the features of the trust that `table` (rows, features) says most for."""
    features, columns = [], []
    for name, column in zip(FEATURES, table.T, strict=True):
        known = column[~np.isnan(column)]
        if not len(known) or np.ptp(known) == 0:
            continue
        quantiles = (-WIDEST, WIDEST) if name == "logit" else np.quantile(known, (0.01, 0.99))
        low, high = (float(v) for v in quantiles)
        clipped = np.clip(known, low, high)
        mean, scale = float(clipped.mean()), float(clipped.std()) or 1.0
        features.append((name, low, high, mean, scale))
        columns.append(np.nan_to_num((np.clip(column, low, high) - mean) / scale, nan=0.0))
    # With no labels at all, intercept + weight · (logit − mean) / scale is the logit.
    start = [float(np.mean(table[:, FEATURES.index("logit")]))]
    start += [scale if name == "logit" else 0.0 for name, *_, scale in features]
    strength = np.array([PRIOR_INTERCEPT, *[prior] * len(features)])
    ones = np.ones(len(table))
    intercept, *weights = logistic(np.stack([ones, *columns], 1), right, np.array(start), strength).tolist()
    return intercept, tuple(
        Feature(name=name, low=low, high=high, mean=mean, scale=scale, weight=weight)
        for (name, low, high, mean, scale), weight in zip(features, weights, strict=True)
    )


def logistic(x: Table, y: NDArray[np.bool_], mean: Table, precision: Table) -> Table:
    """(k,): the coefficients with the least log loss on x (n, k), y (n,) + ½ Σ precision · (coefficient − mean)².

    Newton's method with steps halved until they help; the loss is convex, and strictly so.
    """

    def loss(w: Table) -> float:
        total = x @ w
        return float(np.logaddexp(0, np.where(y, -total, total)).sum() + (precision * (w - mean) ** 2).sum() / 2)

    w = mean.copy()
    for _ in range(100):
        p = 1 / (1 + np.exp(-np.clip(x @ w, -WIDEST, WIDEST)))
        slope = x.T @ (p - y) + precision * (w - mean)
        step = np.linalg.solve((x * (p * (1 - p))[:, None]).T @ x + np.diag(precision), slope)
        share, now = 1.0, loss(w)
        while loss(w - share * step) > now and share > 1e-6:
            share /= 2
        w = w - share * step
        if np.abs(step).max() < 1e-8:
            break
    return w


def _probability(intercept: float, features: Sequence[Feature], table: Table) -> Table:
    total = np.full(len(table), intercept)
    for f in features:
        values = (np.clip(table[:, FEATURES.index(f.name)], f.low, f.high) - f.mean) / f.scale
        total += f.weight * np.nan_to_num(values, nan=0.0)
    return np.array([sigmoid(v) for v in total])


def auroc(right: NDArray[np.bool_], scores: Table) -> float:
    """How often a right detection scores above a wrong one, ties half."""
    count = int(right.sum())
    return (float(ranks(scores)[right].sum()) - count * (count + 1) / 2) / (count * (len(right) - count))


def thresholds(right: Sequence[Numbers], boxes: float = PRIOR_BOXES) -> dict[str, tuple[float, float]]:
    """(weak, unsupported) by measure: quantiles of `right` detections, drawn towards the defaults as if by `boxes`.

    Of the quantiles one share is taken for all measures, the largest with which no more than ALARMS of `right` have any
    measure beyond its own.
    """
    columns = {
        rule.measure: (-1.0 if rule.high else 1.0)
        * np.array([row[rule.measure] for row in right if row.get(rule.measure) is not None], np.float64)
        for rule in RULES
        if rule.fitted
    }
    columns = {name: column for name, column in columns.items() if len(column)}
    limits = [_limits(right, columns, budget) for budget in ALARMS]
    fitted = {}
    for rule in RULES:
        if rule.measure in columns:
            side, count = -1.0 if rule.high else 1.0, len(columns[rule.measure])
            before = DEFAULTS.get(rule.measure) or (UNLIMITED[rule.measure],) * 2
            seen = (side * limit[rule.measure] for limit in limits)
            weak, bad = ((count * s + boxes * d) / (count + boxes) for s, d in zip(seen, before, strict=True))
            fitted[rule.measure] = (weak, bad)
    return {**DEFAULTS, **fitted}


def _limits(right: Sequence[Numbers], columns: Mapping[str, Table], budget: float) -> dict[str, float]:
    sides = {rule.measure: -1.0 if rule.high else 1.0 for rule in RULES}

    def beyond(row: Numbers, name: str, limit: float) -> bool:
        value = row.get(name)
        return value is not None and sides[name] * value < limit

    share = budget
    while True:
        limits = {name: float(np.quantile(column, share, method="lower")) for name, column in columns.items()}
        flagged = sum(any(beyond(row, name, limit) for name, limit in limits.items()) for row in right)
        if flagged <= budget * len(right) or share < 1e-6:
            return limits
        share *= 0.8


def _classes(rows: Sequence[LabelledDetection], usual: Mapping[int, Moments]) -> tuple[Usual, ...]:
    names = {row.class_id: row.class_name for row in rows}
    return tuple(
        Usual(
            class_id=class_id,
            class_name=names[class_id],
            count=sums.count,
            mean=tuple(map(tuple, sums.mean.tolist())),
            spread=tuple(map(tuple, sums.std.tolist())),
        )
        for class_id, sums in sorted(usual.items())
    )
