"""The only place where the stages meet: decode ahead, explain on the device, write behind.

Threads decode and write; the calling thread owns the device. One image's failure is one failed record.
"""

from __future__ import annotations

import contextlib
import os
import time
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import astuple, dataclass
from functools import partial
from itertools import count, islice
from pathlib import Path
from typing import Any

import torch

from detxai.attribution.baselines import picture
from detxai.attribution.clock import DeviceClock
from detxai.attribution.engine import Engine
from detxai.attribution.memory import out_of_memory
from detxai.attribution.methods import METHODS
from detxai.attribution.points import Segment, TargetMap
from detxai.attribution.programs import Programs
from detxai.config import settings
from detxai.config.settings import RunConfig
from detxai.errors import DetxaiError, DeviceError, ImageError, UsageError, memory_refused
from detxai.evidence.model import EvidenceLevel
from detxai.inputs import given
from detxai.inputs.budget import Budget
from detxai.models.detector import Candidates, Detector
from detxai.models.predictions import predictions_on
from detxai.output import recording, store
from detxai.parchgrad.session import Masks
from detxai.run.assess import TrialPlan
from detxai.run.engine import Beside
from detxai.run.engine import engine as engine_of
from detxai.run.leaving import Leaving
from detxai.run.plan import make_plan
from detxai.run.prepare import Pictures, prepared_image
from detxai.run.publish import LeftUnfinished, Publisher
from detxai.run.results import MapGroup, PreparedImage, PublishedGroup, Result
from detxai.run.resume import Work
from detxai.run.select import Selector
from detxai.run.targets import Variant, groups, wanted_targets
from detxai.values import Checkpoint, Detection, ImageRef, Letterbox, Target, written
from detxai.vocabulary import EDGES

#: Bytes that decoding ahead may hold, by the headers of the files; a picture that takes more is decoded alone.
AHEAD_BYTES = 2**30
#: Bytes that maps in source pixels and their pictures may hold while they are made, and how many a pixel takes of that:
#: 36 were measured with one map, the four edges of a box share a picture.
BEHIND_BYTES, PAINT_BYTES = 2**30, 64
#: What only a mistake of ours raises, on the device and behind it; a RuntimeError may be the device.
BUGS = (ValueError, LookupError, ArithmeticError, AssertionError, TypeError, AttributeError)


@dataclass
class Timings:
    """Seconds that the `device` worked, see `DeviceClock`, and that its thread waited for decoded images, and writers.

    `points` that were computed, of them `padded` in vain; `packs_halved`: how often memory ran out.
    """

    device: float = 0.0
    waiting_for_input: float = 0.0
    waiting_for_output: float = 0.0
    points: int = 0
    padded: int = 0
    packs_halved: int = 0

    def __add__(self, other: Timings) -> Timings:
        return Timings(*map(sum, zip(astuple(self), astuple(other), strict=True)))


@dataclass(frozen=True, eq=False)
class MappedImage:
    """An image behind the device: what is kept of its detections is being made, group by group."""

    prepared: PreparedImage
    detections: tuple[Detection, ...]
    groups: tuple[Future[PublishedGroup], ...]


#: Turns the maps of a group of some work into what is kept of them, behind the device.
Publish = Callable[[Work, int, MapGroup], Future[PublishedGroup]]


class Explainer:
    """Explains images with one model and one configuration: `Explainer("best.pt", method="ig", conf=0.3)`.

    `model`: a checkpoint or name as for `--model`, or a whole RunConfig. `options`: those of `detxai explain`, with
    underscores, checked as there. `checkpoint` or `detector` may be given for a model that is already in memory.
    `memory_share`: the part of what `memory: auto` gives that this one takes, where several share a machine or a GPU.
    Raises UsageError and ModelError as `make_plan` does.
    """

    def __init__(
        self,
        model: RunConfig | str | Path | None = None,
        *,
        checkpoint: Checkpoint | None = None,
        detector: Detector | None = None,
        memory_share: float = 1.0,
        **options: Any,
    ) -> None:
        with torch.inference_mode(False):  # which turns gradients on too
            self.plan = plan = make_plan(_configured(model, options), checkpoint, detector, memory_share)
        self.timings = Timings()
        self._engine_at_work: Engine | None = None
        self._programs: Programs | None = None
        # ParchGrad goes on with what the detector has made, and a black box has its own place.
        beside = plan.device.type == "cuda" and plan.parchgrad is None and plan.network is not None
        self._beside = Beside(plan.detector, plan.device) if beside else None
        self._waiting: dict[int, Future[Result]] = {}
        self._works: dict[int, Work] = {}
        self._all_begun = True
        self.workers = _cores()
        self._select = Selector(plan.config.detection, plan.info.names, plan.classes)
        self._trials = TrialPlan(plan.level, plan.network is None, plan.settings, plan.targets_at_once)

    # -- the flow -------------------------------------------------------------------------------

    def __call__(self, *images: Any) -> list[Result]:
        """Results of `images`, see `explain`, all at once."""
        return list(self.explain(images))

    def explain_sources(self, *places: str | Path) -> Iterator[Result]:
        """Results of the images in files, folders and globs, nothing written: `detxai explain` for notebooks.

        Raises UsageError for a place that does not exist, NoInputError where there is no image.
        """
        return self.explain(places)

    def explain(
        self,
        images: Any,
        tree: store.Store | None = None,
        over: Callable[[], bool] = lambda: False,
    ) -> Iterator[Result]:
        """Results in the order of `images`, each written to `tree` (if any) before it is yielded.

        `images`: a path (file, folder, glob), a Pillow image, an array (height, width, 3) uint8 in RGB, an ImageRef, or
        an iterable of these. Raises UsageError for anything else, NoInputError for paths without an image.
        Once `over()` holds no further image is begun; those on the device are finished if that takes seconds, else left
        (see `unfinished`). `cut_short` then says whether anything was left to do.
        Raises DeviceError when the device is lost, OutputError when the tree cannot be written.
        """
        of = self.plan.config.images
        results = self._explained(given.refs(images, of.frames, of.paired, of.viewed), tree, over)
        with contextlib.closing(results):
            while True:
                with torch.inference_mode(False):  # whatever mode the caller is in, and not beyond this step
                    result = next(results, None)
                if result is None:
                    return
                yield result

    def _explained(
        self, refs: Iterable[ImageRef], tree: store.Store | None, over: Callable[[], bool]
    ) -> Generator[Result, None, None]:
        in_flight = self.plan.in_flight
        engine = self._engine_at_work = engine_of(self.plan, self._programs)
        self._programs = engine.programs
        self._works, self._all_begun = {}, False
        waiting = self._waiting = {}
        leaving = Leaving(over)
        engine.over = leaving.leaves_device
        turn = 0
        readers = ThreadPoolExecutor(self.workers)  # a run that is stopped does not wait for what is being decoded
        with ThreadPoolExecutor(self.workers) as writers:
            budget = Budget(AHEAD_BYTES)
            prepared = enumerate(self._ahead(readers, refs, tree, 2 * in_flight, leaving.begins_no_more, budget))
            publisher = self._publisher(leaving.leaves_writers, files=tree is not None)
            painting, tickets = Budget(BEHIND_BYTES), count()
            publish: Publish = lambda *made: writers.submit(  # noqa: E731
                _published, painting, next(tickets), publisher, *made
            )
            jobs = ((index, self._job(index, item, publish, tree)) for index, item in prepared)
            try:
                for index, outcome in engine.run(jobs, in_flight):
                    waiting[index] = writers.submit(self._finish, index, outcome, publisher, tree)
                    self._account(engine)
                    # A slow image holds back those behind it, but not more of them than this.
                    while turn in waiting and (waiting[turn].done() or len(waiting) > 4 * in_flight):
                        yield self._written(waiting[turn])
                        del waiting[turn]
                        turn += 1
                for index in sorted(waiting):
                    yield self._written(waiting[index])
                    del waiting[index]
            except LeftUnfinished:
                pass  # see `untold` and `unfinished`
            except torch.AcceleratorError as error:
                if out_of_memory(error):
                    raise
                raise DeviceError(f"{self.plan.device} was lost: {str(error).splitlines()[0]}.") from error
            finally:
                leaving.now()
                budget.close()
                readers.shutdown(wait=False, cancel_futures=True)
                self._account(engine)

    @property
    def points(self) -> int:
        """Points on paths, and masks, that the network has seen so far in this run; moves during an image too."""
        return 0 if self._engine_at_work is None else self._engine_at_work.points

    @property
    def cut_short(self) -> bool:
        """Whether the last run ended before all was done."""
        return not self._all_begun or bool(self._works)

    def unfinished(self) -> list[Work]:
        """Images on the device or behind it, in order: at work now, or left by a run that ended early."""
        return [work for _, work in sorted(self._works.copy().items())]

    def close(self) -> None:
        """Free what is kept on a GPU for the next run; one after this makes it again."""
        if self._beside is not None:
            self._beside.forget()
        if self._programs is not None:
            self._programs.forget(self._programs.rows)

    def untold(self) -> Iterator[Result]:
        """After `explain` was closed early: what was written by then and not yielded (the last one yielded, too)."""
        done = [f for _, f in sorted(self._waiting.items()) if f.done() and not f.cancelled() and not f.exception()]
        self._waiting = {}
        yield from (one.result() for one in done)

    def _ahead(
        self,
        pool: ThreadPoolExecutor,
        refs: Iterable[ImageRef],
        tree: store.Store | None,
        depth: int,
        over: Callable[[], bool],
        budget: Budget,
    ) -> Iterator[PreparedImage | Result]:
        """Prepared images in order, `depth` of them being read and decoded ahead of the device within `budget`."""
        source = enumerate(refs)
        queue: deque[tuple[int, Future[PreparedImage | Result]]] = deque()
        for number, ref in islice(source, depth):
            queue.append((number, pool.submit(self._within, budget, number, ref, tree)))
        while queue and not over():
            first, future = queue.popleft()
            ready = self._read(future)
            budget.give_back(first)
            for number, ref in islice(source, 1):
                queue.append((number, pool.submit(self._within, budget, number, ref, tree)))
            yield ready
        self._all_begun = not queue

    def _within(self, budget: Budget, number: int, ref: ImageRef, tree: store.Store | None) -> PreparedImage | Result:
        """`prepared_image`, decoding when `budget` has room for the picture and all before it have theirs.

        Whatever a reader raises over one picture is that picture's failure; a tree, a device or memory is not.
        """
        held = 0
        try:
            ready = prepared_image(self.plan, ref, tree, partial(budget.take, number))
            held = ready.image.pixels.nbytes + ready.image.seen.nbytes if isinstance(ready, PreparedImage) else 0
            return ready
        except (Exception, SystemExit) as error:
            if isinstance(error, DetxaiError) or memory_refused(error):
                raise
            return _bug(ref, error)
        finally:
            budget.skip(number)
            budget.shrink(number, held)

    def _read(self, future: Future[PreparedImage | Result]) -> PreparedImage | Result:
        """What a reader has made, waited for."""
        start = time.perf_counter()
        try:
            return future.result()
        finally:
            self.timings.waiting_for_input += time.perf_counter() - start

    def _written(self, future: Future[Any]) -> Any:
        """What a writer has made, waited for."""
        start = time.perf_counter()
        try:
            return future.result()
        finally:
            self.timings.waiting_for_output += time.perf_counter() - start

    def _account(self, engine: Engine) -> None:
        engine.clock.read()
        t = self.timings
        t.device, t.points, t.padded, t.packs_halved = engine.clock.seconds, engine.points, engine.padded, engine.halved

    def forecast(self, ref: ImageRef, tree: store.Store) -> tuple[str, str]:
        """What would be done with an image, and why: ("explain" | "skip" | "fail on", reason)."""
        ready = prepared_image(self.plan, ref, tree)
        if isinstance(ready, PreparedImage):
            return "explain", ""
        return ("skip", "done already") if ready.record.error is None else ("fail on", ready.record.error.message)

    def _publisher(self, left: Callable[[], bool], *, files: bool) -> Publisher:
        plan, config = self.plan, self.plan.config
        together = EDGES if "box" in config.attribution.target else ()
        alone = frozenset(k for k in EDGES if k not in together or k in config.attribution.target)
        size = (plan.side, plan.shape if plan.rect else None, plan.fit)
        known = (plan.info, *size, plan.dtype, config.output, plan.level, plan.calibration, plan.promise)
        return Publisher(*known, alone, files=files, left=left)

    # -- on the device --------------------------------------------------------------------------

    def _job(
        self, index: int, item: PreparedImage | Result, publish: Publish, tree: store.Store | None
    ) -> Generator[Any, Any, MappedImage | Result]:
        """Coroutine of one image: detect, then ask every method for the maps of a few detections at a time.

        `publish` turns maps into what is kept of them, behind the device; two groups of maps are in memory at most.
        """
        if isinstance(item, Result):
            return item
        try:
            x = picture(item.canvas, self.plan.device)
            detections, context, outputs = self._detect(x, item)
            wanted = tuple(
                wanted_targets(
                    detections, item.letterbox, context, self.plan.targets, self.plan.as_class,
                    contrasts=self.plan.contrasts,
                )
            )  # fmt: skip
            masks = self._masks([w.target for w in wanted], outputs, item.letterbox)
            outputs.clear()
            shown = Pictures.of(item, x, self.plan.level if wanted else EvidenceLevel.NONE)
            paths = [Segment(x, b) for b in shown.baselines.values()]
            published: list[Future[PublishedGroup]] = []
            parts = list(groups(wanted, self.plan.targets_at_once))
            work = self._works[index] = self._work(item, detections, tree if len(parts) > 1 else None)
            for number, group in enumerate(parts):
                if (kept := work.kept(number, group)) is not None:
                    published.append(_known(kept))
                    continue
                maps = yield from self._maps(paths, [w.target for w in group], masks)
                trials = yield from self._trials.trials(shown, detections, group, maps)
                second = yield from self._trials.second_maps(shown, group, maps)
                left = yield from self._trials.neighbours(shown, item.letterbox, detections, group, maps)
                if published:
                    self._written(published[-1])
                scales = published[0].result().scales if published else None
                made = MapGroup(item, detections, group, maps, trials, second, left, scales)
                published.append(publish(work, number, made))
            return MappedImage(item, detections, tuple(published))
        except ImageError as error:
            return _failed(item, error)
        except MemoryError:
            return _failed(item, self._too_much())
        except BUGS as error:
            return _bug(item.ref, error)

    def _work(self, item: PreparedImage, detections: tuple[Detection, ...], tree: store.Store | None) -> Work:
        return Work(item, detections, tree, f"{self.plan.device.type} {self.plan.dtype}")

    def _too_much(self) -> ImageError:
        """Why an image of which not even one detection fits into memory has failed."""
        what = f"one detection at {written(self.plan.shape)} pixels does not fit into the memory of {self.plan.device}"
        helps = "use a smaller --imgsz, or fewer --max-evaluations, a smaller --memory, --batch 1"
        return ImageError("memory", f"{what}: {helps}")

    def _maps(
        self, paths: Sequence[Segment], wanted: Sequence[Target], masks: dict[str, Masks]
    ) -> Generator[Any, Any, dict[Variant, list[TargetMap]]]:
        """Coroutine: the maps of the targets `wanted` by every method with every gradient."""
        session, a, settings = self.plan.parchgrad, self.plan.config.attribution, self.plan.settings
        maps: dict[Variant, list[TargetMap]] = {(m, g): [] for m in a.method for g in a.gradient}
        for start in range(0, len(wanted), self.plan.targets_at_once):
            targets = wanted[start : start + self.plan.targets_at_once]
            for (method, gradient), column in maps.items():
                if session is not None and gradient != "plain":
                    column += yield from session.ask(method, gradient, paths, targets, settings, masks[gradient])
                else:
                    column += yield from METHODS[method](paths, targets, settings)
        return maps

    def _masks(self, targets: Sequence[Target], outputs: dict[int, torch.Tensor], box: Letterbox) -> dict[str, Masks]:
        """What each of ParchGrad's gradients keeps for `targets`."""
        session, gradients = self.plan.parchgrad, self.plan.config.attribution.gradient
        if session is None:
            return {}
        return {g: session.masks(g, targets, outputs, box) for g in gradients if g != "plain"}

    @torch.no_grad()
    def _detect(
        self, x: torch.Tensor, item: PreparedImage
    ) -> tuple[tuple[Detection, ...], Any, dict[int, torch.Tensor]]:
        """The detections, what pins them beside their numbers, and the outputs that ParchGrad asks for."""
        session, engine = self.plan.parchgrad, self._engine_at_work
        assert engine is not None
        nobody: contextlib.AbstractContextManager[dict[int, torch.Tensor]] = contextlib.nullcontext({})
        with session.watching(self.plan.config.attribution.gradient) if session else nobody as outputs:
            try:
                candidates = self._predicted(x, item, engine.clock)
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
                raise MemoryError from error
            detections = self._select(candidates, item.letterbox, item.labels, item.given)
        return detections, candidates.context, outputs

    def _predicted(self, x: torch.Tensor, item: PreparedImage, clock: DeviceClock) -> Candidates:
        """What the model predicts on the picture `x` of `item`, on the host."""
        if self._beside is not None:
            return self._beside.predict(item.canvas, clock)
        with clock.working():
            return predictions_on(self.plan.detector, x)

    # -- behind the device ----------------------------------------------------------------------

    def _finish(
        self, index: int, outcome: MappedImage | Result, publisher: Publisher, tree: store.Store | None
    ) -> Result:
        """The record and files of one image, written if there is a tree. Raises LeftUnfinished."""
        result = self._finished(outcome, publisher, tree)
        self._works.pop(index, None)
        return result

    def _finished(self, outcome: MappedImage | Result, publisher: Publisher, tree: store.Store | None) -> Result:
        files: dict[str, bytes] = {}
        written: frozenset[str] = frozenset()
        if isinstance(outcome, Result):
            result = outcome
        else:
            try:
                kept = [group.result() for group in outcome.groups]
                result, files = publisher.image(outcome.prepared, outcome.detections, kept)
                written = frozenset().union(*(group.written for group in kept))
            except ImageError as error:
                result = _failed(outcome.prepared, error)
            except MemoryError:
                result = _failed(outcome.prepared, self._too_much())
            except BUGS as error:
                result = _bug(outcome.prepared.ref, error)
        if tree is None or result.skipped:
            return result
        try:
            tree.write_image(result.ref.path, files, result.record, written)
        except ImageError as error:
            result = Result(result.ref, recording.failed_record(result.ref, error))
            tree.write_image(result.ref.path, {}, result.record)
        return result


def _cores() -> int:
    """Cores that this process may use: so many threads read, and as many write."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _configured(model: RunConfig | str | Path | None, options: dict[str, Any]) -> RunConfig:
    """The settings that `model` and `options` ask for. Raises UsageError."""
    if isinstance(model, RunConfig):
        if options:
            raise UsageError(f"A RunConfig has all options; {', '.join(options)} came beside it.", "Put them into it.")
        return model
    words = {"model": model} | options
    return settings.load(options={k: str(v) if isinstance(v, Path) else v for k, v in words.items()})


def _published(
    painting: Budget, ticket: int, publisher: Publisher, work: Work, number: int, group: MapGroup
) -> PublishedGroup:
    """What is kept of a group, in the tree where the image has several; made when `painting` has room for it."""
    try:
        painting.take(ticket, PAINT_BYTES * group.prepared.image.pixels[..., 0].size)
        return work.keep(number, group.wanted, publisher.group(group))
    finally:
        painting.give_back(ticket)


def _known(kept: PublishedGroup) -> Future[PublishedGroup]:
    ready: Future[PublishedGroup] = Future()
    ready.set_result(kept)
    return ready


def _failed(item: PreparedImage, error: ImageError) -> Result:
    return Result(
        item.ref, recording.failed_record(item.ref, error, recording.image_info(item.image), item.fingerprint)
    )


def _bug(ref: ImageRef, error: BaseException) -> Result:
    """A failure of detxai itself: one failed record, exit code 1 at the end, the traceback for `-vv`."""
    failed = recording.failed_record(ref, ImageError("internal", f"{type(error).__name__}: {error}"))
    return Result(ref, failed, bug="".join(traceback.format_exception(error)))
