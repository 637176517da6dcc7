"""Packs path points of many images into batches of one fixed shape and runs them.

A row's result does not depend on its neighbours: every pack has the same number of rows, padded at the end of a run
only, so that shuffled, resumed and sharded runs give the same bytes.
"""

from __future__ import annotations

import contextlib
import math
from collections import deque
from collections.abc import Callable, Generator, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from detxai.attribution.clock import DeviceClock
from detxai.attribution.memory import Held, Room
from detxai.attribution.points import Point, Reply
from detxai.attribution.programs import Programs
from detxai.values import InputShape, Target

T = TypeVar("T")
#: Rows in a pack by device, for inputs up to 640 pixels; a run out of memory goes on with half.
ROWS = {"cpu": 8, "mps": 8, "cuda": 32}

#: Rows of a program by device. On a CPU the targets of an image share a forward pass instead, which costs most there;
#: a GPU waits for Python, and does many rows in the time of few.
PROGRAM_ROWS = {"cuda": 128}
#: Rounds of packs queued before the host looks at the first, by device: one is worked at while the host thinks.
AHEAD = {"cuda": 2}


def rows_for(device: torch.device, shape: InputShape, table: Mapping[str, int] = ROWS) -> int:
    """Rows in a pack of pictures of `shape`, by their area: a table, never the free memory, so that bytes repeat."""
    rows, size = table.get(device.type, 8), math.isqrt(math.prod(shape))
    while size > 640 and rows > 1:
        size, rows = size * 5 // 7, rows // 2
    return rows


def out_of_memory(error: RuntimeError) -> bool:
    """Whether torch says that a device or the machine has no memory left."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


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


class _Over(Exception):
    """The time of the run is up within a pack."""


@dataclass(eq=False)
class _Job:
    """A coroutine in flight: what it is told next, how much of that is missing, and whether its points fit at all."""

    tag: Any
    ask: Generator[list[Point], list[Reply], Any]
    replies: list[Reply] | None = None
    missing: int = 0
    fits: bool = True


@dataclass(frozen=True, eq=False)
class _Entry:
    """What waits for a pack: point `i` of a job, with all its targets or, as a row of a program, with target `k`."""

    job: _Job
    i: int
    point: Point
    kind: Hashable
    k: int | None = None


@dataclass(frozen=True, eq=False)
class _Flight:
    """Packs on their way, and what they found: (values, slopes) of all their rows in order, (2, rows) float64."""

    packs: list[tuple[list[_Entry], list[Held | None]]]
    table: Tensor
    ready: Any


#: While open, the network is cut above a layer; the list then holds the layer's output, to be differentiated in.
Tap = Callable[[int], contextlib.AbstractContextManager[list[Tensor]]]


@dataclass
class Engine:
    """Runs coroutines that ask for path points. `rows`: points a pack, fixed for a run (see `rows_for`).

    `f` gives the pinned values, `entered` those behind the network's first convolution; `similarity` how alike a
    target is to what is detected (black-box methods);
    `parchgrad` takes over the backward pass of points that name channels; `tap` opens the network at a layer.
    `room`: for the gradients that they hold. `programs`: runs what it takes, target by target; other points go through
    `f` with all their targets at once. `over`: whether to leave what is not finished; asked between packs and between
    the targets of one.
    `clock`: how long the device has worked. `points` computed, of them `padded` in vain, `halved`: how often memory
    ran out.
    """

    f: Field
    device: torch.device
    rows: int = 8
    similarity: Field | None = None
    entered: Field | None = None
    parchgrad: ModifiedGradient | None = None
    tap: Tap | None = None
    room: Room = field(default_factory=Room)
    programs: Programs | None = None
    over: Callable[[], bool] = lambda: False
    clock: DeviceClock = field(init=False)
    points: int = 0
    padded: int = 0
    halved: int = 0
    _waiting: dict[Hashable, deque[_Entry]] = field(default_factory=dict)
    _flying: deque[_Flight] = field(default_factory=deque)

    def __post_init__(self) -> None:
        self.clock = DeviceClock(self.device)

    def run(
        self, jobs: Iterable[tuple[Any, Generator[list[Point], list[Reply], T]]], in_flight: int
    ) -> Iterator[tuple[Any, T]]:
        """(tag, result) of every job as it finishes, until `over()`; at most `in_flight` are begun at a time.

        A job of which not even one point fits into memory is thrown a MemoryError.
        """
        source, exhausted, begun = iter(jobs), False, 0
        while not self.over():
            while not exhausted and begun < in_flight and not self._full():
                if exhausted := (entry := next(source, None)) is None:
                    break
                begun += 1
                for result in self._advance(_Job(*entry)):
                    begun -= 1
                    yield result
            if exhausted and not begun:
                return
            try:
                done = self._step()
            except _Over:
                return
            for job in done:
                for result in self._advance(job):
                    begun -= 1
                    yield result

    def _full(self) -> bool:
        return any(len(entries) >= self._rows(entries[0]) for entries in self._waiting.values())

    def _rows(self, entry: _Entry) -> int:
        """Rows of a pack of this kind. Values at baselines and layers come one an image: small packs waste none."""
        if entry.k is not None and self.programs is not None:
            return self.programs.rows
        point = entry.point
        alone = point.layer is not None or (not point.gradient and point.field in ("value", "entered"))
        return max(1, self.rows // 4) if alone else self.rows

    def _advance(self, job: _Job) -> list[tuple[Any, Any]]:
        """Tell the job its replies and queue what it asks next; its (tag, result) when it is done."""
        replies: Any = job.replies
        job.replies = None
        try:
            points = job.ask.send(replies) if job.fits else job.ask.throw(MemoryError())
        except StopIteration as stop:
            return [(job.tag, stop.value)]
        finally:
            del replies  # a gradient that nobody holds leaves its room
        job.replies, job.missing = [Reply([]) for _ in points], 0
        for i, point in enumerate(points):
            for entry in self._entries(job, i, point):
                self._waiting.setdefault(entry.kind, deque()).append(entry)
                job.missing += 1
        return []

    def _entries(self, job: _Job, i: int, point: Point) -> list[_Entry]:
        """What of a point goes into one pack: rows of a program, or all its targets."""
        if self.programs is None or not self.programs.takes(point):
            kind = (point.gradient, point.dtype, point.field, point.layer, point.channels is None, point.path.shape)
            return [_Entry(job, i, point, kind)]
        shapes = [self.programs.shape((point, k)) for k in range(len(point.targets))]
        makes = (point.combine is None, point.picture is None)
        return [_Entry(job, i, point, (shape, *makes), k) for k, shape in enumerate(shapes)]

    def _step(self) -> list[_Job]:
        """Run packs of the waiting points; the jobs that have all their replies now.

        Programs are launched ahead of the one look at what earlier ones found.
        """
        full = [kind for kind, entries in self._waiting.items() if len(entries) >= self._rows(entries[0])]
        if not full and self._waiting and not self._flying:
            fill = {kind: len(entries) / self._rows(entries[0]) for kind, entries in self._waiting.items()}
            full = sorted(fill, key=lambda kind: -fill[kind])[: AHEAD.get(self.device.type, 1)]
        packs = [self._pack(kind) for kind in full]
        done: list[_Job] = []
        for pack in packs:
            if pack[0].k is None and (fits := [entry for entry in pack if entry.job.fits]):
                done += self._tried(partial(self._shared, fits), fits)
        programs = [fits for pack in packs if pack[0].k is not None and (fits := [e for e in pack if e.job.fits])]
        if programs:
            done += self._tried(partial(self._launch, programs), [entry for pack in programs for entry in pack])
        if self._flying and (len(self._flying) >= AHEAD.get(self.device.type, 1) or not packs):
            done += self._landed(self._flying.popleft())
        return done

    def _pack(self, kind: Hashable) -> list[_Entry]:
        """The next pack of a kind, taken out of what waits."""
        entries = self._waiting[kind]
        rows = self._rows(entries[0])
        # Rows with as many targets as their neighbours waste no backward passes.
        ordered = (
            sorted(entries, key=lambda entry: -len(entry.point.targets)) if entries[0].k is None else list(entries)
        )
        pack, rest = ordered[:rows], set(ordered[rows:])
        left = deque(entry for entry in entries if entry in rest)
        if left:
            self._waiting[kind] = left
        else:
            del self._waiting[kind]
        return pack

    def _tried(self, work: Callable[[], list[_Job]], entries: Sequence[_Entry]) -> list[_Job]:
        """What `work` on `entries` makes; where memory runs out they wait again, for packs of half the rows."""
        try:
            return work()
        except RuntimeError as error:  # OutOfMemoryError on a GPU, a plain one on the CPU
            if not out_of_memory(error):
                raise
        rows = self.rows if self.programs is None or entries[0].k is None else self.programs.rows
        if rows == 1:
            return [self._failed(entries[0].job)]
        if entries[0].k is None:
            self.rows //= 2
        elif self.programs is not None:
            self.programs.forget(rows // 2)
        self.halved += 1
        for entry in reversed(entries):
            self._waiting.setdefault(entry.kind, deque()).appendleft(entry)
        return []

    def _failed(self, job: _Job) -> _Job:
        job.fits = False
        kept = {kind: deque(e for e in entries if e.job is not job) for kind, entries in self._waiting.items()}
        self._waiting = {kind: entries for kind, entries in kept.items() if entries}
        return job

    def _shared(self, pack: list[_Entry]) -> list[_Job]:
        """Run one pack of points with all their targets."""
        with self.clock.working():
            replies = self._evaluate([entry.point for entry in pack], self._rows(pack[0]))
        self.clock.read()
        for entry, reply in zip(pack, replies, strict=True):
            assert entry.job.replies is not None
            entry.job.replies[entry.i] = reply
        return _told(pack)

    def _launch(self, packs: list[list[_Entry]]) -> list[_Job]:
        """Set programs going on `packs`; what they find is looked at later, all at once."""
        assert self.programs is not None
        tables, flown = [], []
        for pack in packs:
            self.programs.make(self.programs.shape((pack[0].point, pack[0].k or 0)))
            with self.clock.working():
                values, slopes, held = self._flown(pack)
            tables.append(torch.stack([values.double(), slopes])[:, : len(pack)])
            flown.append((pack, held))
        table, ready = torch.cat(tables, 1), None
        if self.device.type == "cuda":
            table, ready = table.to("cpu", non_blocking=True), torch.cuda.Event()
            ready.record()
        self._flying.append(_Flight(flown, table, ready))
        return []

    def _flown(self, pack: list[_Entry]) -> tuple[Tensor, Tensor, list[Held | None]]:
        """(rows,) values and slopes of one pack of a program, and what is held of its gradients."""
        assert self.programs is not None
        shape, first = self.programs.shape((pack[0].point, pack[0].k or 0)), pack[0].point
        self.points, self.padded = self.points + self._rows(pack[0]), self.padded + self._rows(pack[0]) - len(pack)
        values, gradients, slots = self.programs.launch(shape, [(entry.point, entry.k or 0) for entry in pack])
        slopes = torch.zeros_like(values, dtype=torch.float64)
        if gradients is None:
            return values, slopes, [None] * len(pack)
        gradients = gradients.float()
        if first.combine is None:
            differences = self.programs.differences(shape, slots)
            kept: Any = first.path.products(gradients, differences)
            slopes = first.path.slopes(kept, differences)
        else:
            kept = [entry.point.kept(row) for entry, row in zip(pack, gradients, strict=False)]
        held = [self.room.hold(one, needed=e.point.needed) for one, e in zip(kept, pack, strict=False)]
        return values, slopes, held

    def _landed(self, flight: _Flight) -> list[_Job]:
        """The round's one look at what the device has found."""
        if flight.ready is not None:
            flight.ready.synchronize()
        self.clock.read()
        values, slopes = flight.table.cpu().tolist()
        done, at = [], 0
        for pack, held in flight.packs:
            for entry, kept in zip(pack, held, strict=True):
                _fill(entry, values[at], slopes[at], kept)
                at += 1
            done += _told(pack)
        return done

    def _evaluate(self, points: list[Point], rows: int) -> list[Reply]:
        """Replies to `points` of one kind, filled up to `rows`: one forward, a backward a target of the busiest row."""
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
                if k and self.over():
                    raise _Over
                if layer is not None:
                    maps = _layer_maps(points, k, values[k], tapped, k + 1 < depth)
                    held.append([self.room.hold(point_maps, needed=True) for point_maps in maps])
                    continue
                if parchgrad is not None:
                    parchgrad.keep([p.channels[min(k, len(p.targets) - 1)] for p in filled if p.channels])
                (g,) = torch.autograd.grad(values[k].sum(), x, retain_graph=k + 1 < depth)
                maps = [p.kept(g[row].float()) for row, p in enumerate(points)]
                held.append(
                    [
                        self.room.hold(point_maps, needed=p.needed) if k < len(p.targets) else None
                        for point_maps, p in zip(maps, points, strict=True)
                    ]
                )
                slopes += [p.slope(point_maps) for point_maps, p in zip(maps, points, strict=True)]
        numbers = torch.cat([values.detach().double(), *([torch.stack(slopes).view(depth, -1)] if slopes else [])], 1)
        table = numbers.cpu().tolist()
        return [
            Reply(
                [table[k][row] for k in range(len(p.targets))],
                [table[k][rows + row] for k in range(len(p.targets))] if slopes else [],
                [held[k][row] for k in range(len(p.targets))] if gradient else [],
            )
            for row, p in enumerate(points)
        ]

    def _field(self, name: str) -> Field:
        fields = {"value": self.f, "trial": self.f, "entered": self.entered, "similarity": self.similarity or self.f}
        wanted = fields[name]
        assert wanted is not None, f"an engine without {name}"
        return wanted

    def _tapped(self, layer: int | None) -> contextlib.AbstractContextManager[list[Tensor]]:
        if layer is None:
            return contextlib.nullcontext([])
        assert self.tap is not None
        return self.tap(layer)

    def _arithmetic(self, dtype: torch.dtype) -> contextlib.AbstractContextManager[Any]:
        if dtype is torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype)


def _fill(entry: _Entry, value: float, slope: float, kept: Held | None) -> None:
    """Tell the reply to the entry's point what was found at its target."""
    if not entry.job.fits:
        return
    assert entry.job.replies is not None and entry.k is not None
    reply, count = entry.job.replies[entry.i], len(entry.point.targets)
    if not reply.values:
        reply.values.extend([0.0] * count)
        if entry.point.gradient:
            reply.slopes.extend([0.0] * count)
            reply.held.extend([None] * count)
    reply.values[entry.k] = value
    if entry.point.gradient:
        reply.slopes[entry.k], reply.held[entry.k] = slope, kept


def _told(pack: Sequence[_Entry]) -> list[_Job]:
    """The jobs of `pack` that miss nothing any more."""
    done = []
    for entry in pack:
        entry.job.missing -= 1
        if not entry.job.missing and entry.job.fits:
            done.append(entry.job)
    return done


def _layer_maps(points: Sequence[Point], k: int, values: Tensor, tapped: Sequence[Tensor], more: bool) -> list[Tensor]:
    """(rows, columns): maps of target `k` of every point at the tapped layer; zero where it does not matter."""
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
