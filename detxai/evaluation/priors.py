"""Maps that look at nothing the network computes: what an attribution has to beat before it means anything."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

from detxai.values import Box, Map

#: Cells of the random map along the longer side.
CELLS = 16


def random_map(height: int, width: int, seed: int) -> Map:
    """(height, width) seeded signed noise, smooth over a sixteenth of the longer side."""
    cell = max(height, width) / CELLS
    shape = max(2, round(height / cell)) + 1, max(2, round(width / cell)) + 1
    coarse = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    return np.asarray(cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC), np.float32)


def box_map(height: int, width: int, box: Box) -> Map:
    """(height, width): 1 at the centre of `box` (xyxy), 0 on its edge, falling on outside; its level sets are boxes."""
    ys, xs = _distance(height, box[1], box[3]), _distance(width, box[0], box[2])
    return np.asarray(1 - np.maximum(ys[:, None], xs[None, :]), np.float32)


def _distance(count: int, low: float, high: float) -> NDArray[np.float64]:
    """Distance of pixel centres from the middle of [low, high], in halves of its length."""
    away = np.abs(np.arange(count, dtype=np.float64) + 0.5 - (low + high) / 2)
    return np.asarray(away / max((high - low) / 2, 0.5), np.float64)
