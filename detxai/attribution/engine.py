"""Packs path points of many images into batches of one fixed shape and runs them.

A row's result does not depend on its neighbours: every pack has the same number of rows, padded at the end of a run
only, so that shuffled, resumed and sharded runs give the same bytes.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from detxai.attribution.memory import Held, Room
from detxai.attribution.points import Point, Reply
from detxai.values import Target

T = TypeVar("T")
#: Rows in a pack by device, for inputs up to 640 pixels; a run out of memory goes on with half.
ROWS = {"cpu": 8, "mps": 8, "cuda": 32}


def rows_for(device: torch.device, size: int) -> int:
    """Rows in a pack of `size` pixel squares: a fixed table, never the free memory, so that bytes repeat."""
    rows = ROWS.get(device.type, 8)
    while size > 640 and rows > 1:
        size, rows = size * 5 // 7, rows // 2
    return rows


def out_of_memory(error: RuntimeError) -> bool:
    """Whether torch says that a device or the machine has no memory left."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


class Field(Protocol):
    """F: the pinned scalars of a batch, differentiable in it."""

    def __call__(self, x: Tensor, pins: Sequence[tuple[int, Target]], /) -> Tensor:
        """(len(pins),) values for x (rows, 3, size, size); a pin is (row, target)."""
        ...


class ModifiedGradient(Protocol):
    """Takes over the backward pass of a batch, keeping some channels of each row: ParchGrad."""

    def watching(self) -> contextlib.AbstractContextManager[None]:
        """While open, forward passes are watched, and their backward passes modified."""
        ...

    def keep(self, channels: Sequence[Tensor], /) -> None:
        """Which channels each row of the batch keeps, (total channels,) bool."""
        ...


@dataclass(eq=False)
class _Job:
    """A coroutine in flight: what it asked for, the replies so far, and whether a point of its own fits into memory."""

    tag: Any
    ask: Generator[list[Point], list[Reply], Any]
    replies: list[Any] | None = None
    fits: bool = True


_Entry = tuple[_Job, int, Point]
#: While open, the network is cut above a layer; the list then holds the layer's output, to be differentiated in.
Tap = Callable[[int], contextlib.AbstractContextManager[list[Tensor]]]


@dataclass
class Engine:
    """Runs coroutines that ask for path points. `rows`: points a pack, fixed for a run (see `rows_for`).

    `room`: for the gradients that they hold.

    `f` gives the pinned values, `entered` those behind the network's first convolution; `similarity` how alike a
    target is to what is detected (black-box methods);
    `parchgrad` takes over the backward pass of points that name channels; `tap` opens the network at a layer.
    `seconds` computing, `points` computed, of them `padded` in vain, `halved`: how often memory ran out.
    """

    f: Field
    device: torch.device
    rows: int = 8
    similarity: Field | None = None
    entered: Field | None = None
    parchgrad: ModifiedGradient | None = None
    tap: Tap | None = None
    room: Room = field(default_factory=Room)
    seconds: float = 0.0
    points: int = 0
    padded: int = 0
    halved: int = 0

    def run(
        self, jobs: Iterable[tuple[Any, Generator[list[Point], list[Reply], T]]], in_flight: int
    ) -> Iterator[tuple[Any, T]]:
        """(tag, result) of every job as it finishes; at most `in_flight` are begun at a time.

        A job of which not even one point fits into memory is thrown a MemoryError.
        """
        source, exhausted, begun = iter(jobs), False, 0
        waiting: deque[_Entry] = deque()
        while True:
            while not exhausted and begun < in_flight and not self._full(waiting):
                if exhausted := (entry := next(source, None)) is None:
                    break
                begun += 1
                for result in self._advance(_Job(*entry), waiting):
                    begun -= 1
                    yield result
            if not waiting:
                if exhausted and not begun:
                    return
                continue
            for job in self._step(waiting):
                for result in self._advance(job, waiting):
                    begun -= 1
                    yield result

    def _full(self, waiting: deque[_Entry]) -> bool:
        return any(len(kind) >= self._rows(kind) for kind in self._kinds(waiting))

    @staticmethod
    def _kinds(waiting: Iterable[_Entry]) -> list[list[_Entry]]:
        """The waiting points by what a pack must have in common."""
        kinds: dict[tuple[Any, ...], list[_Entry]] = {}
        for entry in waiting:
            point = entry[2]
            kind = (point.gradient, point.dtype, point.field, point.layer, point.channels is None)
            kinds.setdefault(kind, []).append(entry)
        return list(kinds.values())

    def _rows(self, kind: list[_Entry]) -> int:
        """Rows of a pack of this kind. Values at baselines and layers come one an image: small packs waste none."""
        point = kind[0][2]
        alone = point.layer is not None or (not point.gradient and point.field in ("value", "entered"))
        return max(1, self.rows // 4) if alone else self.rows

    @staticmethod
    def _advance(job: _Job, waiting: deque[_Entry]) -> list[tuple[Any, Any]]:
        """Tell the job its replies and queue what it asks next; its (tag, result) when it is done."""
        replies: Any = job.replies
        job.replies = None
        try:
            points = job.ask.send(replies) if job.fits else job.ask.throw(MemoryError())
        except StopIteration as stop:
            return [(job.tag, stop.value)]
        finally:
            del replies  # a gradient that nobody holds leaves its room
        job.replies = [None] * len(points)
        waiting.extend((job, i, point) for i, point in enumerate(points))
        return []

    def _step(self, waiting: deque[_Entry]) -> list[_Job]:
        """Run one pack of the waiting points; the jobs that have all their replies now."""
        chosen = max(self._kinds(waiting), key=lambda kind: len(kind) / self._rows(kind))
        rows = self._rows(chosen)
        # Rows with as many targets as their neighbours waste no backward passes.
        chosen.sort(key=lambda entry: -len(entry[2].targets))
        pack = chosen[:rows]
        taken = {id(entry) for entry in pack}
        rest = [entry for entry in waiting if id(entry) not in taken]
        waiting.clear()
        waiting.extend(rest)
        try:
            replies = self._evaluate([point for _, _, point in pack], rows)
        except RuntimeError as error:  # OutOfMemoryError on a GPU, a plain one on the CPU
            if not out_of_memory(error):
                raise
            if self.rows == 1:
                (job, _, _) = pack[0]
                job.fits = False
                rest = [entry for entry in waiting if entry[0] is not job]
                waiting.clear()
                waiting.extend(rest)
                return [job]
            self.rows, self.halved = self.rows // 2, self.halved + 1
            waiting.extendleft(reversed(pack))
            return []
        finished = []
        for (job, i, _), reply in zip(pack, replies, strict=True):
            assert job.replies is not None
            job.replies[i] = reply
            if all(r is not None for r in job.replies):
                finished.append(job)
        return finished

    def _evaluate(self, points: list[Point], rows: int) -> list[Reply]:
        """Replies to `points` of one kind, filled up to `rows`: one forward, a backward a target of the busiest row."""
        start = time.perf_counter()
        gradient, layer = points[0].gradient, points[0].layer
        spare = rows - len(points)
        self.points, self.padded = self.points + rows, self.padded + spare
        filled = points + points[:1] * spare
        parchgrad = self.parchgrad if points[0].channels is not None else None
        assert (parchgrad is None) == (points[0].channels is None), "channels need a ParchGrad"
        x = torch.stack([p.place() for p in filled])
        x = x.contiguous(memory_format=torch.channels_last).requires_grad_(gradient and layer is None)
        depth = max(len(p.targets) for p in points)
        # Pass by pass, one target of every row: rows without one repeat a target and drop the result.
        pins = [(row, p.targets[min(k, len(p.targets) - 1)]) for k in range(depth) for row, p in enumerate(filled)]
        watching = contextlib.nullcontext() if parchgrad is None else parchgrad.watching()
        opened = self._tapped(layer)
        with torch.set_grad_enabled(gradient), self._arithmetic(points[0].dtype), watching, opened as tapped:
            values = self._field(points[0].field)(x, pins).float().view(depth, rows)
        held: list[list[Held | None]] = []
        slopes: list[Tensor] = []
        if gradient:
            for k in range(depth):
                if layer is not None:
                    maps = _layer_maps(points, k, values[k], tapped, k + 1 < depth)
                    held.append([self.room.hold(found, needed=True) for found in maps])
                    continue
                if parchgrad is not None:
                    parchgrad.keep([p.channels[min(k, len(p.targets) - 1)] for p in filled if p.channels])
                (g,) = torch.autograd.grad(values[k].sum(), x, retain_graph=k + 1 < depth)
                maps = [p.kept(g[row].float()) for row, p in enumerate(points)]
                held.append(
                    [
                        self.room.hold(found, needed=p.needed) if k < len(p.targets) else None
                        for found, p in zip(maps, points, strict=True)
                    ]
                )
                slopes += [p.slope(found) for found, p in zip(maps, points, strict=True)]
        table = values.detach().double().cpu().tolist()
        along = torch.stack(slopes).view(depth, -1).cpu().tolist() if slopes else []
        self.seconds += time.perf_counter() - start
        return [
            Reply(
                [table[k][row] for k in range(len(p.targets))],
                [along[k][row] for k in range(len(p.targets))] if along else [],
                [held[k][row] for k in range(len(p.targets))] if gradient else [],
            )
            for row, p in enumerate(points)
        ]

    def _field(self, name: str) -> Field:
        fields = {"value": self.f, "trial": self.f, "entered": self.entered, "similarity": self.similarity or self.f}
        found = fields[name]
        assert found is not None, f"an engine without {name}"
        return found

    def _tapped(self, layer: int | None) -> contextlib.AbstractContextManager[list[Tensor]]:
        if layer is None:
            return contextlib.nullcontext([])
        assert self.tap is not None
        return self.tap(layer)

    def _arithmetic(self, dtype: torch.dtype) -> contextlib.AbstractContextManager[Any]:
        if dtype is torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype)


def _layer_maps(points: Sequence[Point], k: int, values: Tensor, tapped: Sequence[Tensor], more: bool) -> list[Tensor]:
    """(size, size): maps of target `k` of every point at the tapped layer; zero where it does not matter."""
    if not tapped or not values.requires_grad:
        return [values.new_zeros(p.path.x.shape[1:]) for p in points]
    output = tapped[0]
    (g,) = torch.autograd.grad(values.sum(), output, retain_graph=more, materialize_grads=True)
    rows = zip(points, g.float(), output.detach().float(), strict=False)  # what fills the pack up is left out
    return [p.kept(own, a, p.targets[min(k, len(p.targets) - 1)]) for p, own, a in rows]


def solve(
    f: Field, ask: Generator[list[Point], list[Reply], T], tap: Tap | None = None, entered: Field | None = None
) -> T:
    """Run one coroutine alone, on the CPU: for scripts, notebooks and tests."""
    engine = Engine(f, torch.device("cpu"), tap=tap, entered=entered)
    return next(iter(engine.run([(None, ask)], 1)))[1]
