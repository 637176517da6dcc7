"""Trials: what the network says when parts of the picture, or fine detail in all of it, are not there.

Deletion and preservation in the sense of Fong & Vedaldi (2017, arXiv:1704.03296): a part is *necessary* where its
loss takes the score away, and *sufficient* where it alone keeps it. What the class owes to single pixels goes when the
picture is softened, and shows up late on the path from the baseline.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from detxai.attribution.points import Point, Reply, Segment
from detxai.values import Box, InputShape, Target
from detxai.vocabulary import FADED, ONLY_BOX, SOFTENED, WITHOUT_BOX, WITHOUT_TOP

#: Trials come by the dozen: they fill packs of their own.
FIELD = "trial"
#: Share of the box's pixels that are its top-attributed part.
TOP_SHARE = 0.2
#: The map is smoothed over this share of the box's side first: single pixels are noise to a network.
TOP_SMOOTHING = 0.04
#: Boxes tried at a time, so that memory stays bounded however many an image has.
BOXES_AT_ONCE = 16


@dataclass(frozen=True, eq=False)
class Case:
    """A box (xyxy letterbox pixels), what is read at it in every trial, and the maps whose top parts are tried."""

    box: Box
    targets: tuple[Target, ...]
    maps: tuple[Tensor, ...]


@dataclass(frozen=True)
class TrialOutcome:
    """The class logits by class id after `what` became `fill`; `map`: the number of the map, if one chose the part."""

    what: str
    fill: str
    logits: Mapping[int, float]
    map: int | None = None


def pixels(box: Box, shape: InputShape) -> tuple[slice, slice]:
    """The rows and columns, of those of `shape`, that a box (xyxy letterbox pixels) touches, at least one of each."""
    (rows, columns), (left, top, right, bottom) = shape, box
    return _touched(top, bottom, rows), _touched(left, right, columns)


def _touched(start: float, end: float, count: int) -> slice:
    first = min(max(int(start), 0), count - 1)
    return slice(first, min(max(-int(-end // 1), first + 1), count))


def within(box: Box, like: Tensor) -> Tensor:
    """(rows, columns) bool, as large as the picture or map `like`: the pixels that a box touches, at least one.

    `box`: xyxy letterbox pixels.
    """
    inside = torch.zeros(like.shape[-2:], dtype=torch.bool, device=like.device)
    inside[pixels(box, (like.shape[-2], like.shape[-1]))] = True
    return inside


def top_part(values: Tensor, box: Box) -> Tensor:
    """(rows, columns) bool: the TOP_SHARE of the pixels in `box` with the greatest smoothed `values`, of that shape."""
    own = pixels(box, (values.shape[-2], values.shape[-1]))
    inside = within(box, values)
    count = math.prod(at.stop - at.start for at in own)
    reach = max(1, round(TOP_SMOOTHING * count**0.5))
    # What lies further from the box than the smoothing reaches makes no difference.
    near = tuple(slice(max(at.start - 2 * reach, 0), at.stop + 2 * reach) for at in own)
    smooth = values[near].float()[None, None]
    for _ in range(2):
        smooth = avg_pool2d(smooth, (2 * reach + 1, 1), stride=1, padding=(reach, 0))
        smooth = avg_pool2d(smooth, (1, 2 * reach + 1), stride=1, padding=(0, reach))
    masked = smooth[0, 0].masked_fill(~inside[near], -torch.inf)
    best = masked.flatten().topk(max(1, round(TOP_SHARE * count))).indices
    part = torch.zeros_like(inside)
    part[near] = torch.zeros_like(masked, dtype=torch.bool).flatten().index_fill(0, best, True).view_as(masked)
    return part


def trials(
    x: Tensor,
    fills: Mapping[str, Tensor],
    softened: Tensor,
    cases: Sequence[Case],
    dtype: torch.dtype = torch.float32,
    thorough: int = 1,
) -> Generator[list[Point], list[Reply], list[list[TrialOutcome]]]:
    """Coroutine: the trials of every case, for each of `fills` (name -> picture like `x`, (3, rows, columns)).

    The whole picture is tried as `softened`. The top part is replaced by, and the picture faded into, the first
    `thorough` fills only.
    """
    few = dict(islice(fills.items(), thorough))
    outcomes: list[list[TrialOutcome]] = []
    for start in range(0, len(cases), BOXES_AT_ONCE):
        part = cases[start : start + BOXES_AT_ONCE]
        asked: list[tuple[int, str, str, int | None]] = []
        points: list[Point] = []
        for index, case in enumerate(part):
            inside = within(case.box, x)
            hidden: list[tuple[str, Tensor, int | None]] = [(WITHOUT_BOX, inside, None), (ONLY_BOX, ~inside, None)]
            tops = [(WITHOUT_TOP, top_part(values, case.box), k) for k, values in enumerate(case.maps)]
            for fill, picture in fills.items():
                path = Segment(x, picture)
                for what, mask, k in hidden + (tops if fill in few else []):
                    asked.append((index, what, fill, k))
                    points.append(Point(path, 1.0, case.targets, False, dtype, hidden=mask, field=FIELD))
        together = tuple(target for case in part for target in case.targets)
        whole = [
            (SOFTENED, "gaussian", Point(Segment(x, x), 1.0, together, False, dtype, picture=softened, field=FIELD))
        ]
        for fill, picture in few.items():
            way = Segment(x, picture)
            whole += [(what, fill, Point(way, at, together, False, dtype, field=FIELD)) for what, at in FADED.items()]
        replies = yield points + [point for _, _, point in whole]
        rows: list[list[TrialOutcome]] = [[] for _ in part]
        for (index, what, fill, k), reply in zip(asked, replies, strict=False):
            ids = (target.class_id for target in part[index].targets)
            rows[index].append(TrialOutcome(what, fill, dict(zip(ids, reply.values, strict=True)), k))
        for (what, fill, _), reply in zip(whole, replies[len(points) :], strict=True):
            values = iter(reply.values)
            for row, case in zip(rows, part, strict=True):
                row.append(TrialOutcome(what, fill, {target.class_id: next(values) for target in case.targets}))
        outcomes += rows
    return outcomes


def without_neighbours(
    x: Tensor, fill: Tensor, cases: Sequence[tuple[Case, Mapping[int, Box]]], dtype: torch.dtype = torch.float32
) -> Generator[list[Point], list[Reply], list[dict[int, dict[int, float]]]]:
    """Coroutine: the logits of each case (by class id) without each of its neighbours (number -> box).

    A neighbour becomes `fill`, a picture like `x`, as far as it lies outside the box of the case; one that does not is
    passed over.
    """
    path, points = Segment(x, fill), []
    asked: list[tuple[int, int]] = []
    for index, (case, neighbours) in enumerate(cases):
        own = within(case.box, x)
        for number, box in neighbours.items():
            hidden = within(box, x) & ~own
            if bool(hidden.any()):
                asked.append((index, number))
                points.append(Point(path, 1.0, case.targets, False, dtype, hidden=hidden, field=FIELD))
    replies = (yield points) if points else []
    outcomes: list[dict[int, dict[int, float]]] = [{} for _ in cases]
    for (index, number), reply in zip(asked, replies, strict=True):
        ids = (target.class_id for target in cases[index][0].targets)
        outcomes[index][number] = dict(zip(ids, reply.values, strict=True))
    return outcomes
