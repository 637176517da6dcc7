"""How the evidence of a class usually looks, cell by cell, and how alike another grid is."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray


def unit(grid: ArrayLike) -> NDArray[np.float64] | None:
    """A grid scaled to length 1, so that strong and weak detections of a class can be compared; None for zeros."""
    values = np.asarray(grid, np.float64)
    length = math.sqrt(float((values**2).sum()))
    return values / length if length > 0 else None


def typicality(grid: ArrayLike, mean: Sequence[Sequence[float]]) -> float | None:
    """Cosine of a grid and the mean unit grid of its class, in [-1, 1]; None where one of them is zero."""
    one, other = unit(grid), unit(mean)
    return None if one is None or other is None else float(np.clip((one * other).sum(), -1, 1))
