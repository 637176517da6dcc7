"""Deletion and insertion: what the detection's score does while pixels go, or come, in the order of a map.

Deletion fills the best pixels first, insertion starts from the filled picture and restores them. A faithful map makes
the first fall fast and the second rise fast (Petsiuk, Das & Saenko 2018). The score is the best IoU × class score over
all predictions before NMS, so that a box may shift or shrink without a jump.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from detxai.attribution import baselines
from detxai.inputs.letterbox import map_to_source
from detxai.values import Letterbox, Map, Pixels, Target

#: What takes the place of a pixel: nothing at all, and what a blurred eye would see there.
FILLS = ("black", "blur")
MODES = ("deletion", "insertion")
#: The step between two whose scores are as close as this is taken to lie between them: most of a curve is flat.
FLAT = 0.01

Scores = NDArray[np.float64]
#: (batch, 3, rows, columns) and pins (row, target) -> (pins,) scores.
Score = Callable[[Tensor, Sequence[tuple[int, Target]]], Tensor]


@dataclass(frozen=True, eq=False)
class Scene:
    """A picture as the network sees it: `x` (3, rows, columns) float32 in [0, 1], and its filled versions by name."""

    x: Tensor
    box: Letterbox
    fills: dict[str, Tensor]

    @classmethod
    def of(cls, canvas: Pixels, box: Letterbox, device: torch.device) -> Scene:
        """The scene of a letterboxed picture (rows, columns, 3) uint8; the padding stays as it is in every fill."""
        x = baselines.picture(canvas, device)
        return cls(x, box, {fill: baselines.baseline(fill, x, box) for fill in FILLS})


@dataclass(frozen=True, eq=False)
class PixelOrder:
    """One order of pixels, and the targets whose score is followed along it. `rank`: (height, width) of the inner
    picture in letterbox pixels, 0 for the pixel that goes first."""

    rank: NDArray[np.int32]
    targets: tuple[Target, ...]


def shares(steps: int) -> NDArray[np.float64]:
    """The shares of the picture's area at which curves are taken, from 0 to 1: squares of equal steps.

    A detected item often covers one or two per cent of the picture. Sixteen equal steps of area would delete it whole
    in the first; squares see it go, and the area under the curve is still taken over area.
    """
    return np.linspace(0, 1, steps + 1) ** 2


def ranking(values: Map, box: Letterbox, ties: Map, sigma: float = 0.0) -> NDArray[np.int32]:
    """Rank of the letterbox pixels of the picture by a signed map in source pixels, greatest first.

    `sigma`: standard deviation of a Gaussian over the map beforehand, in letterbox pixels. Equal values, such as the
    zeros of a clamped map, go in the order of `ties` (source pixels as well), which should know nothing: row by row
    would favour whatever lies at the top.
    """
    inner, other = (_to_letterbox(v, box) for v in (values, ties))
    if sigma > 0:
        inner = cv2.GaussianBlur(inner, (0, 0), sigma, borderType=cv2.BORDER_REFLECT)
    order = np.lexsort((-other.ravel(), -inner.ravel()))
    rank = np.empty(len(order), np.int32)
    rank[order] = np.arange(len(order), dtype=np.int32)
    return rank.reshape(box.inner_height, box.inner_width)


def _to_letterbox(values: Map, box: Letterbox) -> Map:
    """`values` (height, width) respread over the picture's place in the letterbox: `map_to_source`, the other way."""
    back = Letterbox((0, 0), box.inner_width, box.inner_height, 1.0, 0, 0, box.width, box.height)
    return map_to_source(values, back)


@dataclass(frozen=True, eq=False)
class _Picture:
    """One forward: pixels of `rank` below `count` are the fill (deletion) or all that is not (insertion)."""

    case: int
    fill: str
    mode: str
    step: int
    rank: Tensor
    count: int


@torch.no_grad()
def curves(
    score: Score, scene: Scene, cases: Sequence[PixelOrder], steps: int, rows: int
) -> list[dict[tuple[str, str], NDArray[np.float64]]]:
    """For every case (fill, mode) -> scores (steps + 1, targets), `rows` pictures a forward.

    The whole and the filled pictures are scored once for all cases, equal orders once for all that have them. Quarters
    of the steps come first, then halves between those that differ by more than FLAT. `score` is called from several
    threads.
    """
    merged, at = _merged(cases)
    ends = _ends(score, scene, list(dict.fromkeys(t for _, targets in merged for t in targets)))
    tables = [
        {(f, m): np.zeros((steps + 1, len(targets))) for f in scene.fills for m in MODES} for _, targets in merged
    ]
    for (_, targets), table in zip(merged, tables, strict=True):
        for (fill, mode), values in table.items():
            whole, filled = ([ends[name][t] for t in targets] for name in ("", fill))
            values[0], values[-1] = (whole, filled) if mode == "deletion" else (filled, whole)
    ranks = [torch.from_numpy(order).to(scene.x.device) for order, _ in merged]
    counts = np.rint(shares(steps) * merged[0][0].size).astype(int).tolist() if merged else []

    @torch.no_grad()
    def scored(pack: list[_Picture]) -> list[float]:
        pictures = torch.stack([_drawn(scene, p) for p in pack]).contiguous(memory_format=torch.channels_last)
        pins = [(row, t) for row, p in enumerate(pack) for t in merged[p.case][1]]
        answers: list[float] = score(pictures, pins).double().cpu().tolist()
        return answers

    with _workers(scene.x.device, rows) as (pool, share):
        for wave in _waves(steps):
            asked = (
                _Picture(index, fill, mode, step, ranks[index], counts[step])
                for index, table in enumerate(tables)
                for (fill, mode), values in table.items()
                for step in _unknown(values, wave)
            )
            packs = list(_packs(list(asked), share))
            for pack, answers in zip(packs, pool.map(scored, packs), strict=True):
                replies = iter(answers)
                for p in pack:
                    tables[p.case][p.fill, p.mode][p.step] = [next(replies) for _ in merged[p.case][1]]
    return [{key: values[:, columns] for key, values in tables[i].items()} for i, columns in at]


def _merged(
    cases: Sequence[PixelOrder],
) -> tuple[list[tuple[NDArray[np.int32], list[Target]]], list[tuple[int, list[int]]]]:
    """Different orders with all targets asked of each; for every case its order and the columns of its targets."""
    known: dict[bytes, int] = {}
    merged: list[tuple[NDArray[np.int32], list[Target]]] = []
    at = []
    for case in cases:
        index = known.setdefault(case.rank.tobytes(), len(merged))
        if index == len(merged):
            merged.append((case.rank, []))
        targets = merged[index][1]
        targets += [t for t in case.targets if t not in targets]
        at.append((index, [targets.index(t) for t in case.targets]))
    return merged, at


def _unknown(values: NDArray[np.float64], wave: Sequence[tuple[int, int, int]]) -> Iterator[int]:
    """The steps of a curve that have to be scored; where it is flat between two others, they are filled in."""
    steps = len(values) - 1
    for before, step, after in wave:
        if after - before < steps and np.abs(values[after] - values[before]).max() <= FLAT:
            values[step] = _between(values, before, step, after, shares(steps))
        else:
            yield step


@contextlib.contextmanager
def _workers(device: torch.device, rows: int) -> Iterator[tuple[ThreadPoolExecutor, int]]:
    """Threads to score packs in, and the rows of a pack.

    Two halves of a CPU, each at a pack of its own, do about a fifth more than both at one.
    """
    threads = torch.get_num_threads()
    workers = 2 if device.type == "cpu" and threads > 1 and rows > 1 else 1
    torch.set_num_threads(threads // workers)
    try:
        with ThreadPoolExecutor(workers) as pool:
            yield pool, rows // workers
    finally:
        torch.set_num_threads(threads)


def _ends(score: Score, scene: Scene, targets: list[Target]) -> dict[str, dict[Target, float]]:
    """Scores of the picture ('') and of each fill alone."""
    pictures = {"": scene.x, **scene.fills}
    ends = {}
    for name, picture in pictures.items():
        values = score(picture[None].contiguous(memory_format=torch.channels_last), [(0, t) for t in targets])
        ends[name] = dict(zip(targets, values.double().cpu().tolist(), strict=True))
    return ends


def _waves(steps: int) -> Iterator[list[tuple[int, int, int]]]:
    """Every step between the ends once, as (known before, step, known after): quarters at once, then halves."""
    known = sorted({round(k * steps / 4) for k in range(5)})
    yield [(0, step, steps) for step in known[1:-1]]
    while wave := [(a, (a + b) // 2, b) for a, b in pairwise(known) if b - a > 1]:
        yield wave
        known = sorted([*known, *(step for _, step, _ in wave)])


def _between(values: Scores, before: int, step: int, after: int, at: Scores) -> Scores:
    """The row `step` of scores (steps + 1, targets) on the line between two known ones, over the shares `at`."""
    way = (at[step] - at[before]) / (at[after] - at[before])
    return np.asarray(values[before] + way * (values[after] - values[before]), np.float64)


def _packs(pictures: Sequence[_Picture], rows: int) -> Iterator[list[_Picture]]:
    return (list(pictures[start : start + rows]) for start in range(0, len(pictures), rows))


def _drawn(scene: Scene, picture: _Picture) -> Tensor:
    first, rest = scene.fills[picture.fill], scene.x
    if picture.mode == "insertion":
        first, rest = rest, first
    box, result = scene.box, rest.clone()
    place = (slice(None), slice(box.top, box.top + box.inner_height), slice(box.left, box.left + box.inner_width))
    result[place] = torch.where(picture.rank < picture.count, first[place], rest[place])
    return result
