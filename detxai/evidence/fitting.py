"""Fits a calibration on judged detections of labelled images. Needs scikit-learn: the extra `calibrate`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from detxai.errors import UsageError
from detxai.evidence.calibration import FEATURES, Feature, Quality, Usual, calibration_error, vector
from detxai.evidence.maps import GRID
from detxai.evidence.measures import sigmoid
from detxai.evidence.typicality import typicality, unit
from detxai.evidence.verdict import DEFAULTS, RULES, Numbers
from detxai.statistics import Moments

#: Inverse strength of the ridge penalty on standardised features.
PENALTY = 0.1
FOLDS = 5
#: Right and wrong detections without which nothing can be fitted.
FEWEST = 10
#: Shares of right detections that may be called weak or worse, and unsupported.
ALARMS = (0.05, 0.01)

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


def fit(rows: Sequence[LabelledDetection], images: int) -> Fitted:
    """The regression, thresholds and usual grids of `rows`, its quality cross-validated by image.

    Raises UsageError where there are too few right or wrong detections or images, or no scikit-learn.
    """
    right = np.array([row.right for row in rows], bool)
    groups = np.array([row.image for row in rows])
    if min(right.sum(), (~right).sum()) < FEWEST or len(set(groups)) < 2:
        raise UsageError(
            f"{right.sum()} right and {(~right).sum()} wrong detections on {len(set(groups))} images are too few"
            f" to calibrate with: at least {FEWEST} of each are needed.",
            "Give more labelled images, or a lower --conf.",
        )
    logistic, folds = _sklearn()
    held_out = np.zeros(len(rows))
    for train, test in folds(min(FOLDS, len(set(groups)))).split(right, right, groups):
        usual = _usual([rows[i] for i in train])
        inner = _table([rows[i] for i in train], usual, seen=True)
        intercept, features = _regression(logistic, inner, right[train])
        held_out[test] = _probability(intercept, features, _table([rows[i] for i in test], usual, seen=False))
    usual = _usual(rows)
    table = _table(rows, usual, seen=True)
    intercept, features = _regression(logistic, table, right)
    scores = np.array([sigmoid(row.logit) for row in rows])
    quality = Quality(
        images=images,
        right=int(right.sum()),
        wrong=int((~right).sum()),
        auroc=auroc(right, held_out),
        auroc_score=auroc(right, scores),
        calibration_error=calibration_error(right, held_out),
        calibration_error_score=calibration_error(right, scores),
    )
    likeness = table[:, FEATURES.index("typicality")]
    good = [dict(row.evidence) | {"typicality": t} for row, t in zip(rows, likeness, strict=True) if row.right]
    return Fitted(intercept, features, thresholds(good), _classes(rows, usual), quality)


def _sklearn() -> tuple[Any, Any]:
    try:
        from sklearn.linear_model import LogisticRegression
        from sklearn.model_selection import GroupKFold
    except ImportError as error:
        raise UsageError(
            "`detxai calibrate evidence` needs scikit-learn.", "Install it: pip install scikit-learn"
        ) from error
    return LogisticRegression, GroupKFold


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


def _regression(logistic: Any, table: Table, right: NDArray[np.bool_]) -> tuple[float, tuple[Feature, ...]]:
    features, columns = [], []
    for name, column in zip(FEATURES, table.T, strict=True):
        known = column[~np.isnan(column)]
        if not len(known) or np.ptp(known) == 0:
            continue
        low, high = (float(v) for v in np.quantile(known, (0.01, 0.99)))
        clipped = np.clip(known, low, high)
        mean, scale = float(clipped.mean()), float(clipped.std()) or 1.0
        features.append((name, low, high, mean, scale))
        columns.append(np.nan_to_num((np.clip(column, low, high) - mean) / scale, nan=0.0))
    model = logistic(C=PENALTY, max_iter=1000).fit(np.stack(columns, 1), right)
    return float(model.intercept_[0]), tuple(
        Feature(name=name, low=low, high=high, mean=mean, scale=scale, weight=float(weight))
        for (name, low, high, mean, scale), weight in zip(features, model.coef_[0], strict=True)
    )


def _probability(intercept: float, features: Sequence[Feature], table: Table) -> Table:
    total = np.full(len(table), intercept)
    for f in features:
        values = (np.clip(table[:, FEATURES.index(f.name)], f.low, f.high) - f.mean) / f.scale
        total += f.weight * np.nan_to_num(values, nan=0.0)
    return np.array([sigmoid(v) for v in total])


def auroc(right: NDArray[np.bool_], scores: Table) -> float:
    """How often a right detection scores above a wrong one, ties half."""
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(right, scores))


def thresholds(right: Sequence[Numbers]) -> dict[str, tuple[float, float]]:
    """(weak, unsupported) by measure: quantiles of `right` detections, one share of them for all measures.

    The largest share is taken with which no more than ALARMS of them have any measure beyond its threshold.
    """
    columns = {
        rule.measure: (-1.0 if rule.high else 1.0)
        * np.array([row[rule.measure] for row in right if row.get(rule.measure) is not None], np.float64)
        for rule in RULES
        if rule.fitted
    }
    columns = {name: column for name, column in columns.items() if len(column) >= FEWEST}
    limits = [_limits(right, columns, budget) for budget in ALARMS]
    fitted = {}
    for rule in RULES:
        if rule.measure in columns:
            side = -1.0 if rule.high else 1.0
            weak, bad = (side * limit[rule.measure] for limit in limits)
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
