"""A signed map in numbers, counted once: sums over the cells of a box, and where it is strongest. Source pixels."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from detxai.values import Attribution, Box, Map
from detxai.vocabulary import EDGES

#: Cells a side of the grid over a box.
GRID = 8
#: The peak is sought after smoothing over about this part of the image's longer side.
PEAK_SMOOTHING = 1 / 128
#: Larger images are summed in blocks first: smoothing 12 megapixels for each map takes too long.
PEAK_SIDE = 1024
#: Share of the box's pixels whose part of the positive attribution is the concentration.
TOP_PIXELS = 0.05


@dataclass(frozen=True, eq=False)
class MapSums:
    """What one map says of one box: record, evidence and typicality all take it from here.

    `cells` (8, 8) float64 sum to `net_inside`; `net` and `positive` are sums over the whole picture, `positive_inside`
    that over the box; `concentration`, `peak` and `near_edge` (of an edge's own map) are None where there is nothing.
    """

    cells: NDArray[np.float64]
    net: float
    positive: float
    net_inside: float
    positive_inside: float
    area_share: float
    concentration: float | None
    peak: tuple[float, float] | None
    near_edge: float | None

    @property
    def inside_share(self) -> float | None:
        """Positive attribution in the box / all of it."""
        return ratio(self.positive_inside, self.positive)


def map_sums(a: Attribution, box: Box) -> MapSums:
    """The sums of the map of `a` over `box` (xyxy, source pixels)."""
    positive = np.maximum(a.map, 0)
    whole, net = (float(m.sum(dtype=np.float64)) for m in (positive, a.map))
    cells = grid(a.map, box)
    return MapSums(
        cells=cells,
        net=net,
        positive=whole,
        net_inside=float(cells.sum()),
        positive_inside=min(float(grid(positive, box, 1).sum()), whole),
        area_share=_area_share(box, a.map.shape),
        concentration=concentration(positive, box),
        peak=peak(positive),
        near_edge=near_edge(a.map, box, a.target.kind) if a.target.kind in EDGES else None,
    )


def ratio(part: float, whole: float) -> float | None:
    """`part` / `whole`; None where there is no whole."""
    return part / whole if whole > 0 else None


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
    import cv2  # not at the top: who reads records draws nothing

    block = -(-max(positive.shape) // PEAK_SIDE)
    smooth = positive.astype(np.float64)
    for axis in (0, 1) if block > 1 else ():
        smooth = np.add.reduceat(smooth, np.arange(0, positive.shape[axis], block), axis)
    side = 2 * round(max(smooth.shape) * PEAK_SMOOTHING) + 1
    for _ in range(2):
        smooth = cv2.boxFilter(smooth, -1, (side, side), normalize=False, borderType=cv2.BORDER_CONSTANT)
    top, left = (block * at for at in divmod(int(smooth.argmax()), smooth.shape[1]))
    part = positive[top : top + block, left : left + block]
    row, col = divmod(int(part.argmax()), part.shape[1])
    return left + col + 0.5, top + row + 0.5


def near_edge(values: Map, box: Box, edge: str) -> float | None:
    """Share of |attribution| in the third of `box` that is nearest to its `edge`: 1/3 where all parts count alike.

    Of a map (height, width) of that edge's place, summed over 9 x 9 cells first; None where there is none.
    """
    cells = np.abs(grid(values, box, 9))
    third = {"left": cells[:, :3], "top": cells[:3], "right": cells[:, 6:], "bottom": cells[6:]}[edge]
    return ratio(float(third.sum()), float(cells.sum()))


def _area_share(box: Box, shape: tuple[int, ...]) -> float:
    height, width = shape
    x, y = np.clip(box[::2], 0, width), np.clip(box[1::2], 0, height)
    return float((x[1] - x[0]) * (y[1] - y[0]) / (height * width))


def concentration(positive: Map, box: Box) -> float | None:
    """Share of `positive` (height, width) that the TOP_PIXELS of the box's pixels hold; None where there is none."""
    left, top = (max(math.floor(v), 0) for v in box[:2])
    part = positive[top : math.ceil(box[3]), left : math.ceil(box[2])].ravel()
    total = float(part.sum(dtype=np.float64))
    if total <= 0:
        return None
    count = max(1, round(TOP_PIXELS * part.size))
    some = part[part > 0]  # nothing is gained by sorting what has none, mostly half of the box
    most = np.partition(some, -count)[-count:] if count < len(some) else some
    return float(most.sum(dtype=np.float64)) / total
