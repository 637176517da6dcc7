"""Running moments and rank correlation: the little statistics that several rooms share. Numpy alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Self

import numpy as np
from numpy.typing import ArrayLike, NDArray


class Moments:
    """Number, mean and summed squared deviations of arrays of one `shape`, one array at a time (Welford 1962)."""

    def __init__(self, shape: int | Sequence[int]) -> None:
        self.count = 0
        self.mean, self.squares = np.zeros(shape), np.zeros(shape)

    def add(self, values: ArrayLike) -> Self:
        """Take in one array."""
        row = np.asarray(values, np.float64)
        self.count += 1
        away = row - self.mean
        self.mean = self.mean + away / self.count
        self.squares = self.squares + away * (row - self.mean)
        return self

    def without(self, part: Moments) -> Moments:
        """The moments of the arrays that are not in `part`, a subset (Chan, Golub & LeVeque 1983)."""
        rest = Moments(self.mean.shape)
        rest.count = self.count - part.count
        if rest.count:
            rest.mean = (self.count * self.mean - part.count * part.mean) / rest.count
            between = (part.mean - rest.mean) ** 2 * (part.count * rest.count / self.count)
            rest.squares = np.maximum(self.squares - part.squares - between, 0)
        return rest

    @property
    def std(self) -> NDArray[np.float64]:
        """Standard deviation of a sample (n − 1); 0 for less than two arrays."""
        return np.asarray(np.sqrt(self.squares / max(self.count - 1, 1)))


def ranks(values: ArrayLike) -> NDArray[np.float64]:
    """Rank of each value (flattened), from 1; equal values share the mean of their ranks."""
    _, place, counts = np.unique(np.asarray(values).ravel(), return_inverse=True, return_counts=True)
    last = counts.cumsum()
    return np.asarray((last - (counts - 1) / 2)[place], np.float64)


def rank_correlation(a: ArrayLike, b: ArrayLike) -> float | None:
    """Spearman's rank correlation of two arrays of one shape; None where one of them is constant."""
    x, y = (r - r.mean() for r in (ranks(a), ranks(b)))
    scale = math.sqrt(float((x**2).sum()) * float((y**2).sum()))
    return float((x * y).sum()) / scale if scale > 0 else None
