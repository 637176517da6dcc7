"""A signed map in numbers: sums over cells of a box, and where it is strongest. All frames are source pixels."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from detxai.values import Box, Map

#: Cells a side of the grid over a box.
GRID = 8
#: The peak is sought after smoothing over about this part of the image's longer side.
PEAK_SMOOTHING = 1 / 128
#: Larger images are summed in blocks first: smoothing 12 megapixels for each map takes too long.
PEAK_SIDE = 1024


def grid(values: Map, box: Box, cells: int = GRID) -> NDArray[np.float64]:
    """Sums of `values` (height, width) over `cells` x `cells` equal parts of `box` in the image.

    A pixel that a border cuts counts by the area on each side, so the parts sum to the box's whole.
    """
    height, width = values.shape
    left, right = np.clip((box[0], box[2]), 0, width)
    top, bottom = np.clip((box[1], box[3]), 0, height)
    rows, row_weights = _overlaps(top, bottom, cells)
    cols, col_weights = _overlaps(left, right, cells)
    part = values[rows, cols].astype(np.float64)
    # Not `@`: the sums of a threaded BLAS may differ in the last bit from run to run.
    bands: NDArray[np.float64] = np.einsum("rc,jc->rj", part, col_weights)
    sums: NDArray[np.float64] = np.einsum("ir,rj->ij", row_weights, bands)
    return sums


def _overlaps(start: float, end: float, cells: int) -> tuple[slice, NDArray[np.float64]]:
    """The pixels from `start` to `end`, and the length that each shares with each of the parts."""
    first, last = math.floor(start), math.ceil(end)
    edges = np.linspace(start, end, cells + 1)[:, None]
    pixels = np.arange(first, last, dtype=np.float64)[None]
    shared = np.minimum(edges[1:], pixels + 1) - np.maximum(edges[:-1], pixels)
    return slice(first, last), np.maximum(shared, 0)


def peak(positive: Map) -> tuple[float, float] | None:
    """(x, y) of the pixel's centre where `positive` (height, width) is greatest after smoothing.

    Smoothed by a triangle, so that a lone pixel stays its own peak; zero outside the image. In
    large images the best block is found so, and in it the greatest pixel.
    """
    if not positive.any():
        return None
    block = -(-max(positive.shape) // PEAK_SIDE)
    smooth = positive.astype(np.float64)
    for axis in (0, 1):
        smooth = np.add.reduceat(smooth, np.arange(0, positive.shape[axis], block), axis)
    radius = round(max(smooth.shape) * PEAK_SMOOTHING)
    for axis in (0, 0, 1, 1):
        smooth = _box_sum(smooth, radius, axis)
    top, left = (block * at for at in divmod(int(smooth.argmax()), smooth.shape[1]))
    part = positive[top : top + block, left : left + block]
    row, col = divmod(int(part.argmax()), part.shape[1])
    return left + col + 0.5, top + row + 0.5


def _box_sum(values: NDArray[np.float64], radius: int, axis: int) -> NDArray[np.float64]:
    """Sums over the 2 * `radius` + 1 neighbours along `axis`."""
    count = values.shape[axis]
    total = np.insert(values.cumsum(axis), 0, 0.0, axis)
    index = np.arange(count)
    upper = total.take(np.minimum(index + radius + 1, count), axis)
    sums: NDArray[np.float64] = upper - total.take(np.maximum(index - radius, 0), axis)
    return sums
