"""A worker's side of a run with many: groups of images in, rows of what came of them out."""

from __future__ import annotations

import contextlib
import os
import queue
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from detxai.config.settings import RunConfig
from detxai.errors import DetxaiError, DeviceError, ImageError
from detxai.output import recording, records
from detxai.output.store import Store
from detxai.run.board import Given, Greeting
from detxai.run.console import keep_freed_memory
from detxai.run.pipeline import Explainer, Timings
from detxai.run.results import Result
from detxai.values import ImageRef

#: Number of the image; its record, whether it was done before, and a traceback; the worker, and all it has done.
Row = tuple[int, tuple[bytes, bool, str | None] | None, int, Timings]


class Worker:
    """Explains groups of images and writes into the tree, whose lock the driver holds; `ask` calls the `Board`.

    `memory_share`: see `Explainer`.
    """

    def __init__(
        self, settings: dict[str, Any], folder: str, ask: Callable[..., Any], memory_share: float = 1.0
    ) -> None:
        keep_freed_memory()
        with contextlib.suppress(OSError):
            os.chdir(folder)  # where relative paths start
        self._ask, config = ask, RunConfig.model_validate(settings)
        try:
            self._explainer = Explainer(config, memory_share=memory_share)
        except DetxaiError as error:
            self._ask("say", error)
            raise
        self._tree, self._tries = Store(config.output.dir), config.ray.tries
        self._stopped, self._looked, self._before = False, 0.0, Timings()
        p = self._explainer.plan
        self._ask("say", Greeting(p.info, p.shape, p.side, p.rect, p.fit, str(p.device), p.warnings, p.in_flight))

    def rows(self, number: int, images: list[tuple[int, Given]]) -> Iterator[Row]:
        """Of the group `number`, a row an image in their order: what came of it, None where it was not done.

        Made in a thread of its own, since the device does not wait until a row was taken.
        """
        made: queue.SimpleQueue[Row | None] = queue.SimpleQueue()

        def work() -> None:
            try:
                for row in self._rows(number, images):
                    made.put(row)
            finally:
                made.put(None)

        with ThreadPoolExecutor(1) as at_work:
            ended = at_work.submit(work)
            yield from iter(made.get, None)
            ended.result()

    def _rows(self, number: int, images: list[tuple[int, Given]]) -> Iterator[Row]:
        for _, given in images:
            self._tree.learn(given.ref.path, given.known)
            self._tree.seen.learn(given.ref.path, given.seen)
        again = self._ask("begin", number) > 1
        refs = [given.ref for _, given in images]
        results = self._singly(refs) if again else self._explained(refs)
        late: dict[str, Result] = {}
        try:
            for index, given in images:
                r = next(results, None) or late.pop(given.ref.path, None)
                if r is None:  # stopped: some that come behind it may be done all the same
                    late |= {one.ref.path: one for one in self._explainer.untold()}
                    r = late.pop(given.ref.path, None)
                yield index, _told(r) if r else None, *self._work()
        except DeviceError:
            os._exit(1)  # another one, perhaps on another node, may do better
        except DetxaiError as error:
            self._ask("say", error)
            raise
        finally:
            for _, given in images:
                self._tree.forget(given.ref.path)

    def _work(self) -> tuple[int, Timings]:
        """Who this is, and all that it has done, of which an explainer counts its last group alone."""
        return os.getpid(), self._before + self._explainer.timings

    def _explained(self, refs: list[ImageRef]) -> Iterator[Result]:
        self._before, self._explainer.timings = self._work()[1], Timings()
        yield from self._explainer.explain(refs, self._tree, self._over)

    def _singly(self, refs: list[ImageRef]) -> Iterator[Result]:
        """The images of a group that an actor died over, one by one, so that the one that kills it is known."""
        for ref in refs:
            self._tree.look(ref.path)
            if self._ask("begin", ref.path) <= self._tries:
                results = list(self._explained([ref]))
                self._ask("survive", ref.path)
                yield from results
                continue
            what = f"its worker died {self._tries} times over this image alone (--ray-tries)"
            failed = recording.failed_record(ref, ImageError("worker_died", what))
            self._tree.write_image(ref.path, {}, failed)
            yield Result(ref, failed)

    def _over(self) -> bool:
        """Whether no further image is to be begun, as asked now and then."""
        if time.monotonic() - self._looked > 1:
            self._stopped, self._looked = self._ask("stopped"), time.monotonic()
        return self._stopped


def _told(result: Result) -> tuple[bytes, bool, str | None]:
    return records.dump(result.record), result.skipped, result.bug
