"""What a map or a curve is worth, as one number each: pure numpy, source pixels, nothing min-max scaled.

Maps are signed, (height, width). "Positive part" is max(a, 0); a number is None where its map has none.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from detxai.evidence.maps import grid
from detxai.values import Box, Map

#: Resamples of a bootstrap interval, and how many are held in memory at a time.
RESAMPLES, AT_ONCE = 4000, 250

Interval = tuple[float, float, float]


def area_under(shares: ArrayLike, scores: ArrayLike) -> float:
    """Area under a curve of `scores` over `shares` of the picture in [0, 1], by the trapezoid rule.

    Deletion and insertion as in Petsiuk, Das & Saenko 2018 (RISE, arXiv:1806.07421).
    """
    at, value = np.asarray(shares, np.float64), np.asarray(scores, np.float64)
    return float((np.diff(at) * (value[1:] + value[:-1]) / 2).sum())


def pointing(values: Map, box: Box) -> float | None:
    """Whether the greatest positive value lies in `box` (xyxy): 1 or 0, the share of them where several are equal.

    Pointing game: Zhang et al. 2018 (arXiv:1608.00507). A pixel is in the box when its centre is.
    """
    top = float(values.max(initial=0))
    if top <= 0:
        return None
    y, x = np.nonzero(values == top)
    inside = (x + 0.5 >= box[0]) & (x + 0.5 <= box[2]) & (y + 0.5 >= box[1]) & (y + 0.5 <= box[3])
    return float(inside.mean())


def energy(values: Map, box: Box) -> float | None:
    """Positive part inside `box` / all of it (energy-based pointing game: Wang et al. 2020, arXiv:1910.01279)."""
    positive = np.maximum(values, 0)
    whole = float(positive.sum(dtype=np.float64))
    return min(float(grid(positive, box, 1).sum()) / whole, 1.0) if whole > 0 else None


def gini(values: ArrayLike) -> float | None:
    """Gini index of |a|: 0 where all pixels count alike, towards 1 where few count (Chalasani et al. 2020)."""
    sizes = np.sort(np.abs(np.asarray(values, np.float64)).ravel())
    total, n = float(sizes.sum()), len(sizes)
    if not total:
        return None
    return float(((2 * np.arange(1, n + 1) - n - 1) * sizes).sum() / (n * total))


def part_shares(values: Map, parts: NDArray[np.uint8], box: Box) -> dict[int, tuple[float, float]] | None:
    """(share of the positive part, share of the area) within `box` of every part k ≥ 1 of `parts` (height, width).

    A ratio of the two above 1 means that the map favours the part. Only pixels with their centre in the box count.
    """
    height, width = values.shape
    rows = slice(max(0, int(np.ceil(box[1] - 0.5))), min(height, int(np.floor(box[3] - 0.5)) + 1))
    cols = slice(max(0, int(np.ceil(box[0] - 0.5))), min(width, int(np.floor(box[2] - 0.5)) + 1))
    positive, where = np.maximum(values[rows, cols], 0).astype(np.float64), parts[rows, cols]
    whole = float(positive.sum())
    if whole <= 0:
        return None
    numbers = np.unique(where[where > 0]).tolist()
    return {k: (float(positive[where == k].sum()) / whole, float((where == k).mean())) for k in numbers}


def bootstrap(values: Sequence[float], seed: int = 0, level: float = 0.95) -> Interval | None:
    """Mean of `values` (one an image) and its percentile bootstrap interval (Efron 1979); None without values."""
    data = np.asarray(values, np.float64)
    if not len(data):
        return None
    generator = np.random.default_rng(seed)
    means = np.empty(RESAMPLES)
    for start in range(0, RESAMPLES, AT_ONCE):
        picked = generator.integers(0, len(data), (min(AT_ONCE, RESAMPLES - start), len(data)))
        means[start : start + AT_ONCE] = data[picked].mean(1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(data.mean()), float(low), float(high)
