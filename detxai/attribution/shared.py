"""Packs of points that share a forward pass among all their targets: what no program takes, and all on a CPU."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from detxai.attribution.memory import Held, Room
from detxai.attribution.points import Point, Ran, Row
from detxai.values import Target

#: While open, the network is cut above a layer; the list then holds the layer's output, to be differentiated in.
Tap = Callable[[int], contextlib.AbstractContextManager[list[Tensor]]]


class Field(Protocol):
    """F: the pinned scalars of a batch, differentiable in it."""

    def __call__(self, x: Tensor, pins: Sequence[tuple[int, Target]], /) -> Tensor:
        """(len(pins),) values for x (rows, 3, height, width); a pin is (row, target)."""
        ...


class ModifiedGradient(Protocol):
    """Takes over the backward pass of a batch, keeping some channels of each row: ParchGrad."""

    def watching(self) -> contextlib.AbstractContextManager[None]:
        """While open, forward passes are watched, and their backward passes modified."""
        ...

    def keep(self, channels: Sequence[Tensor], /) -> None:
        """Which channels each row of the batch keeps, (total channels,) bool."""
        ...


class Over(Exception):
    """The time of the run is up within a pack."""


@dataclass
class Shared:
    """Runs points with all their targets: one forward pass, then a backward pass a target of the busiest row.

    `fields`: the functions that points name; `over`: whether to leave, asked between the targets of a pack.
    """

    fields: dict[str, Field | None]
    device: torch.device
    rows: int
    parchgrad: ModifiedGradient | None
    tap: Tap | None
    over: Callable[[], bool] = lambda: False

    def split(self, point: Point) -> list[Row]:
        """One row."""
        return [Row(point, tuple(range(len(point.targets))))]

    def kind(self, row: Row) -> Hashable:
        """What all points of a pack have in common."""
        point = row.asked
        return point.gradient, point.dtype, point.field, point.layer, point.channels is None, point.path.shape

    def rows_of(self, row: Row) -> int:
        """Rows of a pack. Values at baselines and layers come one an image: small packs waste none."""
        point = row.asked
        alone = point.layer is not None or (not point.gradient and point.field in ("value", "entered"))
        return max(1, self.rows // 4) if alone else self.rows

    def prepare(self, row: Row) -> None:
        """Nothing to prepare."""

    def halve(self) -> None:
        """Go on with half the rows."""
        self.rows //= 2

    def run(self, pack: Sequence[Row], room: Room) -> Ran:
        """Values, slopes and gradients of a `pack`, filled up to its rows. Raises Over."""
        points, rows = [row.asked for row in pack], self.rows_of(pack[0])
        first, filled = points[0], points + points[:1] * (rows - len(points))
        parchgrad = self.parchgrad if first.channels is not None else None
        assert (parchgrad is None) == (first.channels is None), "channels need a ParchGrad"
        x = torch.stack([p.place() for p in filled]).contiguous(memory_format=torch.channels_last)
        x.requires_grad_(first.gradient and first.layer is None)
        depth = max(len(p.targets) for p in points)
        # Pass by pass, one target of every row: rows without one repeat a target and drop the result.
        columns = [[min(k, len(p.targets) - 1) for p in filled] for k in range(depth)]
        pins = [(row, p.targets[column[row]]) for column in columns for row, p in enumerate(filled)]
        watching = contextlib.nullcontext() if parchgrad is None else parchgrad.watching()
        with torch.set_grad_enabled(first.gradient), self._arithmetic(first), watching, self._tapped(first) as tapped:
            values = self._field(first.field)(x, pins).float().view(depth, rows)
        slopes = torch.zeros(depth, len(points), dtype=torch.float64, device=values.device)
        held: list[list[Held | None]] = [[None] * len(points) for _ in columns]
        for k, column in enumerate(columns if first.gradient else ()):
            if k and self.over():
                raise Over
            if first.layer is not None:
                kept = _layer_maps(points, k, values[k], tapped, k + 1 < depth)
            else:
                if parchgrad is not None:
                    parchgrad.keep([p.channels[at] for p, at in zip(filled, column, strict=True) if p.channels])
                (g,) = torch.autograd.grad(values[k].sum(), x, retain_graph=k + 1 < depth)
                kept = [p.kept(g[row].float()) for row, p in enumerate(points)]
                slopes[k] = torch.stack([p.slope(one) for p, one in zip(points, kept, strict=True)])
            held[k] = [
                room.hold(one[None], [p.needed])[0] if k < len(p.targets) else None
                for p, one in zip(points, kept, strict=True)
            ]
        return Ran(values.detach()[:, : len(points)], slopes, held)

    def _field(self, name: str) -> Field:
        wanted = self.fields[name]
        assert wanted is not None, f"an engine without {name}"
        return wanted

    def _tapped(self, point: Point) -> contextlib.AbstractContextManager[list[Tensor]]:
        if point.layer is None:
            return contextlib.nullcontext([])
        assert self.tap is not None
        return self.tap(point.layer)

    def _arithmetic(self, point: Point) -> contextlib.AbstractContextManager[Any]:
        if point.dtype is torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, point.dtype)


def _layer_maps(points: Sequence[Point], k: int, values: Tensor, tapped: Sequence[Tensor], more: bool) -> list[Tensor]:
    """(rows, columns): maps of target `k` of every point at the tapped layer; zero where it does not matter."""
    if not tapped or not values.requires_grad:
        return [values.new_zeros(p.path.x.shape[1:]) for p in points]
    output = tapped[0]
    (g,) = torch.autograd.grad(values.sum(), output, retain_graph=more, materialize_grads=True)
    rows = zip(points, g.float(), output.detach().float(), strict=False)  # what fills the pack up is left out
    return [p.kept(own, a, p.targets[min(k, len(p.targets) - 1)]) for p, own, a in rows]
