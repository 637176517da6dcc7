"""Packs path points of many images into batches of one fixed shape and runs them.

A row's result does not depend on its neighbours: every pack has the same number of rows, padded at the end of a run
only, so that shuffled, resumed and sharded runs give the same bytes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Hashable, Iterable, Iterator, Sequence
from dataclasses import InitVar, dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from detxai.attribution.clock import DeviceClock
from detxai.attribution.devices import AHEAD
from detxai.attribution.memory import Held, Room, out_of_memory
from detxai.attribution.points import Asked, Point, Reply, Row, Sum
from detxai.attribution.programs import Programs
from detxai.attribution.shared import Field, ModifiedGradient, Over, Shared, Tap
from detxai.attribution.sums import Sums

T = TypeVar("T")


@dataclass(eq=False)
class _Job:
    """A coroutine in flight: what it is told next, how much of that is missing, and whether its points fit at all."""

    tag: Any
    ask: Generator[Asked, list[Reply], Any]
    replies: list[Reply] | None = None
    missing: int = 0
    fits: bool = True


@dataclass(frozen=True, eq=False)
class _Entry:
    """What waits for a pack: a row of what a job asks for as number `i`, and by what it is run."""

    job: _Job
    i: int
    row: Row
    by: Shared | Programs | Sums

    @property
    def kind(self) -> Hashable:
        """What all of a pack have in common."""
        return self.by.kind(self.row)

    @property
    def rows(self) -> int:
        """Rows of its pack."""
        return self.by.rows_of(self.row)


@dataclass(frozen=True, eq=False)
class _Flight:
    """What is on its way: packs and what is held of each, target by target; (values, slopes), (2, n) float64; `points`:
    how many were computed, none in sums."""

    packs: list[tuple[list[_Entry], list[list[Held | None]]]]
    table: Tensor
    points: int
    ready: Any


@dataclass
class Engine:
    """Runs coroutines that ask for path points. `rows`: points a pack, fixed for a run (see `rows_for`).

    `f` gives the pinned values, `entered` those behind the network's first convolution; `similarity` how alike a
    target is to what is detected (black-box methods); `parchgrad` takes over the backward pass of points that name
    channels; `tap` opens the network at a layer. `room`: for the gradients that they hold. `programs`: runs what it
    takes, target by target; other points go through `f` with all their targets at once. `sums`: adds up gradients.
    `over`: whether to leave what is not finished; asked between packs and between the targets of one. `clock`: how long
    the device has worked.
    `points` computed, of them `padded` in vain, `halved`: how often memory ran out.
    """

    f: Field
    device: torch.device
    rows: InitVar[int] = 8
    similarity: Field | None = None
    entered: Field | None = None
    parchgrad: ModifiedGradient | None = None
    tap: Tap | None = None
    room: Room = field(default_factory=Room)
    programs: Programs | None = None
    sums: Sums = field(default_factory=Sums)
    over: Callable[[], bool] = lambda: False
    clock: DeviceClock = field(init=False)
    shared: Shared = field(init=False)
    points: int = 0
    padded: int = 0
    halved: int = 0
    _waiting: dict[Hashable, deque[_Entry]] = field(default_factory=dict)
    _flying: deque[_Flight] = field(default_factory=deque)

    def __post_init__(self, rows: int) -> None:
        self.clock = DeviceClock(self.device)
        fields = {"value": self.f, "trial": self.f, "entered": self.entered, "similarity": self.similarity or self.f}
        self.shared = Shared(fields, self.device, rows, self.parchgrad, self.tap)

    def run(
        self, jobs: Iterable[tuple[Any, Generator[Asked, list[Reply], T]]], in_flight: int
    ) -> Iterator[tuple[Any, T]]:
        """(tag, result) of every job as it finishes, until `over()`; at most `in_flight` are begun at a time.

        A job of which not even one point fits into memory is thrown a MemoryError.
        """
        source, begun = iter(jobs), 0
        self.shared.over = self.over
        while not self.over():
            if begun < in_flight and not self._full() and (entry := next(source, None)) is not None:
                begun, told = begun + 1, [_Job(*entry)]
            elif begun:
                try:
                    told = self._step()
                except Over:
                    return
            else:
                return
            for job in told:
                for result in self._advance(job):
                    begun -= 1
                    yield result

    def _full(self) -> list[Hashable]:
        """The kinds of which a whole pack waits, or whose pack may be half empty: what ends a job is cheap."""
        return [
            k for k, entries in self._waiting.items() if len(entries) >= entries[0].rows or entries[0].by is self.sums
        ]

    def _advance(self, job: _Job) -> list[tuple[Any, Any]]:
        """Tell the job its replies and queue what it asks next; its (tag, result) when it is done."""
        replies: Any = job.replies
        job.replies = None
        try:
            asked = job.ask.send(replies) if job.fits else job.ask.throw(MemoryError())
        except StopIteration as stop:
            return [(job.tag, stop.value)]
        finally:
            del replies  # a gradient that nobody holds leaves its room
        job.replies, job.missing = [Reply.to(one) for one in asked], 0
        for i, one in enumerate(asked):
            by, rows = self._split(one)
            for row in rows:
                entry = _Entry(job, i, row, by)
                self._waiting.setdefault(entry.kind, deque()).append(entry)
                job.missing += 1
        return []

    def _split(self, asked: Point | Sum) -> tuple[Shared | Programs | Sums, list[Row]]:
        """What runs it, and the rows that it makes of it."""
        if isinstance(asked, Sum):
            return self.sums, self.sums.split(asked)
        by = self.programs if self.programs is not None and self.programs.takes(asked) else self.shared
        return by, by.split(asked)

    def _step(self) -> list[_Job]:
        """Run packs of the waiting points, ahead of the one look at what earlier ones found; the jobs to be told."""
        ahead, kinds = AHEAD.get(self.device.type, 1), self._full()
        if not (kinds or self._flying):
            fill = {kind: len(entries) / entries[0].rows for kind, entries in self._waiting.items()}
            kinds = sorted(fill, key=lambda kind: -fill[kind])[:ahead]
        done = self._launch(kinds)
        # Behind sums alone a device would soon have nothing to do.
        if self._flying and (len(self._flying) >= ahead + (self._flying[-1].points == 0) or not kinds):
            done += self._landed(self._flying.popleft())
        return done

    def _pack(self, kind: Hashable) -> list[_Entry]:
        """The next pack of a kind, taken out of what waits."""
        entries = self._waiting[kind]
        # Rows with as many targets as their neighbours waste no backward passes.
        ordered = sorted(entries, key=lambda entry: -len(entry.row.ks))
        pack, rest = ordered[: entries[0].rows], set(ordered[entries[0].rows :])
        left = deque(entry for entry in entries if entry in rest)
        if left:
            self._waiting[kind] = left
        else:
            del self._waiting[kind]
        return pack

    def _launch(self, kinds: Sequence[Hashable]) -> list[_Job]:
        """Set a pack of each of `kinds` going, to be looked at later, all at once; the jobs that do not fit."""
        before = self.points
        flown: list[tuple[list[_Entry], list[list[Held | None]]]] = []
        tables: list[Tensor] = []
        failed: list[_Job] = []
        for pack in (self._pack(kind) for kind in kinds if kind in self._waiting):
            by, rows = pack[0].by, pack[0].rows
            try:
                by.prepare(pack[0].row)
                with self.clock.working():
                    ran = by.run([entry.row for entry in pack], self.room)
            except RuntimeError as error:  # OutOfMemoryError on a GPU, a plain one on the CPU
                if not out_of_memory(error):
                    raise
                failed += self._halved(pack)
                continue
            if by is not self.sums:
                self.points, self.padded = self.points + rows, self.padded + rows - len(pack)
            tables.append(torch.stack([ran.values.double(), ran.slopes]).flatten(1))
            flown.append((pack, ran.held))
        if tables:
            table, ready = torch.cat(tables, 1), None
            if self.device.type == "cuda":
                table, ready = table.to("cpu", non_blocking=True), torch.cuda.Event()
                ready.record()
            self._flying.append(_Flight(flown, table, self.points - before, ready))
        return failed

    def _halved(self, pack: Sequence[_Entry]) -> list[_Job]:
        """Let `pack` wait again, for packs of half the rows; the job of a row that does not fit alone."""
        first = pack[0]
        if first.by.rows > 1:
            first.by.halve()
            self.halved += 1
            self._waiting.setdefault(first.kind, deque()).extendleft(reversed(pack))
            return []
        first.job.fits = False
        left = {kind: deque(e for e in entries if e.job is not first.job) for kind, entries in self._waiting.items()}
        self._waiting = {kind: entries for kind, entries in left.items() if entries}
        return [first.job]

    def _landed(self, flight: _Flight) -> list[_Job]:
        """The round's one look at what the device has found; the jobs that miss nothing any more."""
        if flight.ready is not None:
            flight.ready.synchronize()
        self.clock.read()
        numbers = iter(zip(*flight.table.cpu().tolist(), strict=True))
        done = []
        for pack, held in flight.packs:
            for n, column in enumerate(held):
                for entry, kept in zip(pack, column, strict=True):
                    value, slope = next(numbers)
                    if n < len(entry.row.ks) and entry.job.fits:
                        assert entry.job.replies is not None
                        entry.job.replies[entry.i].tell(entry.row.ks[n], value, slope, kept)
            for entry in pack:
                entry.job.missing -= 1
                if not entry.job.missing and entry.job.fits:
                    done.append(entry.job)
        return done


def solve(f: Field, ask: Generator[Asked, list[Reply], T], tap: Tap | None = None, entered: Field | None = None) -> T:
    """Run one coroutine alone, on the CPU: for scripts, notebooks and tests."""
    engine = Engine(f, torch.device("cpu"), tap=tap, entered=entered)
    return next(iter(engine.run([(None, ask)], 1)))[1]
