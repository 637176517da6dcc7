"""The driver's side of a run with many workers: what each was given, and what came back."""

from __future__ import annotations

import contextlib
import pickle
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import count, islice
from typing import Any, Protocol

from detxai.errors import DetxaiError
from detxai.output import records
from detxai.output.store import Store
from detxai.run.board import Given, Greeting
from detxai.run.pipeline import Timings
from detxai.run.results import Result
from detxai.run.worker import Row
from detxai.values import ImageRef

#: Images in a group, for each that a worker has on its device at a time: at least, and while many are left. Between
#: two groups a worker has neither pictures to decode nor maps to paint beside its device.
GROUP = (2, 16)
#: Seconds between looks at what is new.
LOOK_EVERY = 0.1
#: Seconds that rows have to end once all is done.
PATIENCE = 3.0
#: Seconds of a worker's rows that come back together: each return costs a pool more than a row does.
TOGETHER = 0.5


class Pool(Protocol):
    """Workers that take groups from a `Board` and send back a row an image. One may come twice, none is lost."""

    workers: int

    def rows(self) -> Iterator[Row]:
        """Rows as they come, until the board was closed and all is done."""

    def tell(self, what: str, *arguments: Any) -> None:
        """Call a method of the board, and do not wait for it."""

    def ask(self, what: str, *arguments: Any) -> Any:
        """What a method of the board answers."""

    def leave(self) -> None:
        """End the workers, as often as it is called."""


def in_groups(refs: Iterable[ImageRef], workers: int, in_flight: int) -> Iterator[list[ImageRef]]:
    """`refs` in groups: small at first, so that all workers begin soon, and at last, so that all end at a time."""
    least, most = (many * in_flight for many in GROUP)
    source, ahead, size = iter(refs), deque[ImageRef](), least
    while True:
        ahead.extend(islice(source, 2 * workers * size - len(ahead)))
        if not ahead:
            return
        share = max(least, min(size, len(ahead) // (2 * workers)))
        yield [ahead.popleft() for _ in range(min(share, len(ahead)))]
        size = min(most, 2 * size)


class PooledExplainer:
    """What `Explainer` is to a run, with a pool of workers; raises what it does."""

    def __init__(self, pool: Pool) -> None:
        self._pool, self.cut_short = pool, False
        self._ledger: dict[int, Given] = {}
        self._results: dict[int, Result] = {}
        self._groups: dict[int, set[int]] = {}
        self._times: dict[int, Timings] = {}
        self._finished, self._together, self._looked = 0, 1, (time.monotonic(), 0)
        self._images, self._count = count(), count()
        self._arrived: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        try:
            self._reader.start()
            while (word := pool.ask("said")) is None:
                list(self._news())
            if not isinstance(word, Greeting):
                raise word
            self.plan = word
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the workers; a pool that ends while its rows are read may take this process with it."""
        if self._reader.is_alive():
            self._reader.join(PATIENCE)
        self._pool.leave()

    def explain(self, refs: Iterable[ImageRef], tree: Store, over: Callable[[], bool]) -> Iterator[Result]:
        """Results of `refs` as they come, written to `tree`, whose lock is held here; see `Explainer.explain`."""
        self._tree = tree
        groups = in_groups(refs, self._pool.workers, self.plan.in_flight)
        more, stopped = True, False
        while more or self._ledger:
            if not stopped and over():
                self._pool.tell("stop")
                self.cut_short, more, stopped = more, False, True
            while more and len(self._groups) <= 2 * self._pool.workers:
                group = next(groups, None)
                more = group is not None
                if group is not None:
                    self._give(group)
            if not more:
                self._pool.tell("close")
            for number in self._news():
                if number in self._results:
                    yield self._results[number]
                else:
                    self.cut_short |= number in self._ledger
                self._done(number)

    def unfinished(self) -> list[Any]:
        """None that is known of here: what workers leave lies in the tree, and the next run goes on from there."""
        return []

    @property
    def timings(self) -> Timings:
        """Of all workers together."""
        return sum(self._times.values(), Timings())

    @property
    def points(self) -> int:
        """Points on paths, and masks, that the workers have told of."""
        return self.timings.points

    def untold(self) -> Iterator[Result]:
        """After `explain` was closed early: what was written by then and not yielded (the last one yielded, too)."""
        self.close()
        with contextlib.suppress(DetxaiError, RuntimeError):
            list(self._news())
        for number, given in sorted(self._ledger.items()):
            written = self._tree.stamp(given.ref.path) != given.stamp
            record = self._tree.existing(given.ref.path) if written and number not in self._results else None
            if record is not None:
                self._results[number] = Result(given.ref, record)
            if number in self._results:
                yield self._results[number]
        self._tree.tidy()

    # -- to the workers and back -----------------------------------------------------------------

    def _give(self, refs: list[ImageRef]) -> None:
        group, tree, together = next(self._count), self._tree, self._pace()
        images = [
            (
                next(self._images),
                Given(r, group, tree.known(r.path), tree.seen.entry(r.path), tree.stamp(r.path), together),
            )
            for r in refs
        ]
        self._ledger.update(images)
        self._groups[group] = {number for number, _ in images}
        self._pool.tell("put", pickle.dumps(images))

    def _pace(self) -> int:
        """Images of which a worker was done with as many in TOGETHER seconds, of late."""
        now, (then, finished) = time.monotonic(), self._looked
        if now - then >= 2 * TOGETHER:
            each = (self._finished - finished) / (now - then) / self._pool.workers
            self._together, self._looked = max(1, int(each * TOGETHER)), (now, self._finished)
        return self._together

    def _done(self, number: int) -> None:
        given = self._ledger.pop(number, None)
        self._results.pop(number, None)
        if given is not None:
            self._finished += 1
            left = self._groups[given.group]
            left.remove(number)
            if not left:
                del self._groups[given.group]
                self._pool.tell("drop", given.group)

    def _read(self) -> None:
        """In a thread of its own: what comes back, and what ended it."""
        try:
            for row in self._pool.rows():
                self._arrived.put(row)
            self._arrived.put(RuntimeError("the stream of records ended early"))
        except Exception as error:  # noqa: BLE001  (raised again by `_take`)
            self._arrived.put(error)

    def _news(self) -> Iterator[int]:
        """Numbers of images that came back; waits a moment for the first."""
        with contextlib.suppress(queue.Empty):
            yield self._take(self._arrived.get(timeout=LOOK_EVERY))
            while self._ledger:  # the stream ends when all is done
                yield self._take(self._arrived.get_nowait())

    def _take(self, arrived: Any) -> int:
        if isinstance(arrived, Exception):
            raise arrived
        number, told, worker, self._times[worker] = arrived
        given = self._ledger.get(number)
        if given is not None and told is not None:
            record, skipped, bug = told
            # A worker that died had written it; the next one found it done, but not by an earlier run.
            skipped = skipped and self._tree.stamp(given.ref.path) == given.stamp
            self._results[number] = Result(given.ref, records.load(record), skipped=skipped, bug=bug)
        return int(number)
