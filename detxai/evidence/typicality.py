"""How the evidence of a class usually looks, cell by cell, and how alike another grid is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike, NDArray

from detxai.evidence.maps import GRID


@dataclass
class GridSums:
    """Running mean and squared deviations of (8, 8) grids (Welford)."""

    count: int = 0
    mean: NDArray[np.float64] = field(default_factory=lambda: np.zeros((GRID, GRID)))
    squares: NDArray[np.float64] = field(default_factory=lambda: np.zeros((GRID, GRID)))

    def add(self, grid: ArrayLike) -> None:
        """Count one more grid (8, 8)."""
        values = np.asarray(grid, np.float64)
        self.count += 1
        before = values - self.mean
        self.mean = self.mean + before / self.count
        self.squares = self.squares + before * (values - self.mean)

    @property
    def spread(self) -> NDArray[np.float64]:
        """Standard deviation of each cell; zero for a single grid."""
        return np.asarray(np.sqrt(self.squares / max(self.count - 1, 1)))


def unit(grid: ArrayLike) -> NDArray[np.float64] | None:
    """A grid scaled to length 1, so that strong and weak detections of a class can be compared; None for zeros."""
    values = np.asarray(grid, np.float64)
    length = math.sqrt(float((values**2).sum()))
    return values / length if length > 0 else None


def typicality(grid: ArrayLike, mean: Sequence[Sequence[float]]) -> float | None:
    """Cosine of a grid and the mean unit grid of its class, in [-1, 1]; None where one of them is zero."""
    one, other = unit(grid), unit(mean)
    return None if one is None or other is None else float(np.clip((one * other).sum(), -1, 1))
