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
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import torch

from detxai.attribution import baselines
from detxai.attribution.engine import Engine, out_of_memory
from detxai.attribution.methods import METHODS
from detxai.attribution.points import Segment, TargetMap
from detxai.config import settings
from detxai.config.fingerprint import fingerprint
from detxai.config.settings import RunConfig
from detxai.errors import DeviceError, ImageError, UsageError
from detxai.inputs import decode, given
from detxai.inputs.budget import Budget
from detxai.inputs.labels import Drawn
from detxai.inputs.letterbox import boxes_to_letterbox, fitted
from detxai.models.detector import Detector
from detxai.output import records, store
from detxai.parchgrad.session import Masks
from detxai.run import assess
from detxai.run.engine import engine as engine_of
from detxai.run.plan import Plan
from detxai.run.publish import Explained, Part, Prepared, Result, Variant, part, publish
from detxai.run.select import selected
from detxai.values import Checkpoint, Detection, ImageRef, Letterbox, Pixels, Target
from detxai.vocabulary import EXPECTED_BASELINES

#: What trials show beside the baseline, and what instead where that is the baseline.
FILLS = ("blur", "gray")
#: Bytes that decoding ahead may hold, by the headers of the files; a picture that takes more is decoded alone.
AHEAD_BYTES = 2**30


@dataclass
class Timings:
    """Seconds of the calling thread: `device` computing, `waiting` for decoded images or for the writers."""

    device: float = 0.0
    waiting: float = 0.0
    points: int = 0
    padded: int = 0
    packs_halved: int = 0


@dataclass(frozen=True, eq=False)
class Outcome:
    """An image behind the device: what is kept of its detections is being made."""

    prepared: Prepared
    detections: tuple[Detection, ...]
    parts: tuple[Future[Part], ...]


class Explainer:
    """Explains images with one model and one configuration: `Explainer("best.pt", method="ig", conf=0.3)`.

    `model`: a checkpoint or name as for `--model`, or a whole RunConfig. `options`: those of `detxai explain`, with
    underscores, checked as there. `checkpoint` or `detector` may be given for a model that is already in memory.
    Raises UsageError and ModelError as `Plan` does.
    """

    def __init__(
        self,
        model: RunConfig | str | Path | None = None,
        *,
        checkpoint: Checkpoint | None = None,
        detector: Detector | None = None,
        **options: Any,
    ) -> None:
        with torch.inference_mode(False):  # which turns gradients on too
            self.plan = Plan(_configured(model, options), checkpoint, detector)
        self.timings = Timings()
        self._engine_at_work: Engine | None = None
        self._waiting: dict[int, Future[Result]] = {}
        self._detecting = 0.0
        self.workers = max(1, min(4, os.cpu_count() or 1))

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
        Once `over()` holds no further image is begun; those on the device are finished.
        Raises DeviceError when the device is lost, OutputError when the tree cannot be written.
        """
        results = self._explained(given.refs(images, self.plan.config.images.frames), tree, over)
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
        engine = self._engine_at_work = engine_of(self.plan)
        self._detecting = 0.0
        waiting = self._waiting = {}
        turn = 0
        with ThreadPoolExecutor(self.workers) as readers, ThreadPoolExecutor(self.workers) as writers:
            budget = Budget(AHEAD_BYTES)
            prepared = enumerate(self._ahead(readers, refs, tree, 2 * in_flight, over, budget))
            kept = partial(part, self.plan, files=tree is not None)
            jobs = ((index, self._job(item, partial(writers.submit, kept))) for index, item in prepared)
            try:
                for index, outcome in engine.run(jobs, in_flight):
                    waiting[index] = writers.submit(self._finish, outcome, tree)
                    self._account(engine)
                    # A slow image holds back those behind it, but not more of them than this.
                    while turn in waiting and (waiting[turn].done() or len(waiting) > 4 * in_flight):
                        yield self._waited(waiting[turn].result)
                        del waiting[turn]
                        turn += 1
                for index in sorted(waiting):
                    yield self._waited(waiting[index].result)
                    del waiting[index]
            except torch.AcceleratorError as error:
                if out_of_memory(error):
                    raise
                raise DeviceError(f"{self.plan.device} was lost: {str(error).splitlines()[0]}.") from error
            finally:
                budget.close()
                readers.shutdown(wait=False, cancel_futures=True)
                self._account(engine)
                if engine.programs is not None:
                    engine.programs.forget(engine.programs.rows)

    @property
    def points(self) -> int:
        """Points on paths, and masks, that the network has seen so far in this run; moves during an image too."""
        return 0 if self._engine_at_work is None else self._engine_at_work.points

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
    ) -> Iterator[Prepared | Result]:
        """Prepared images in order, `depth` of them being read and decoded ahead of the device within `budget`."""
        source = enumerate(refs)
        queue: deque[tuple[int, Future[Prepared | Result]]] = deque()
        for number, ref in islice(source, depth):
            queue.append((number, pool.submit(self._within, budget, number, ref, tree)))
        while queue and not over():
            first, future = queue.popleft()
            ready = self._waited(future.result)
            budget.give_back(first)
            for number, ref in islice(source, 1):
                queue.append((number, pool.submit(self._within, budget, number, ref, tree)))
            yield ready

    def _within(self, budget: Budget, number: int, ref: ImageRef, tree: store.Store | None) -> Prepared | Result:
        """`_prepare`, decoding when `budget` has room for the picture and all before it have theirs."""
        held = 0
        try:
            ready = self._prepare(ref, tree, partial(budget.take, number))
            held = ready.image.pixels.nbytes if isinstance(ready, Prepared) else 0
            return ready
        finally:
            budget.skip(number)
            budget.shrink(number, held)

    def _waited(self, get: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = get()
        self.timings.waiting += time.perf_counter() - start
        return result

    def _account(self, engine: Engine) -> None:
        t = self.timings
        t.device, t.points, t.padded, t.packs_halved = (
            self._detecting + engine.seconds,
            engine.points,
            engine.padded,
            engine.halved,
        )

    def forecast(self, ref: ImageRef, tree: store.Store) -> tuple[str, str]:
        """What would be done with an image, and why: ("explain" | "skip" | "fail on", reason)."""
        ready = self._prepare(ref, tree)
        if isinstance(ready, Prepared):
            return "explain", ""
        return ("skip", "done already") if ready.record.error is None else ("fail on", ready.record.error.message)

    # -- before the device ----------------------------------------------------------------------

    def _prepare(
        self, ref: ImageRef, tree: store.Store | None, admit: Callable[[int], None] = lambda size: None
    ) -> Prepared | Result:
        image = None
        try:
            labels, given = self._drawn(ref)
            digests = [None if d is None else d.digest for d in (labels, given)]
            if tree is not None and not self.plan.config.run.force and (done := self._done(ref, tree, digests)):
                return Result(ref, done, skipped=True)
            wanted = self.plan.config.images
            image = decode.load(ref, wanted.window, wanted.max_pixels, admit)
            square, box = self.plan.letterboxed(image.pixels)
            compared = self._baselines(square, box)
            name, b = next(iter(compared.items()))
            x = torch.from_numpy(square).permute(2, 0, 1).float() / 255
            fills, soft, ground = self._fills(square, box, name, b)
            mark = self._fingerprint(image.sha256, digests)
            drawn, boxes = (None if d is None else d.at(image.width, image.height) for d in (labels, given))
            return Prepared(
                ref, image, box, x, compared, mark, fills=fills, softened=soft, ground=ground, labels=drawn, given=boxes
            )
        except ImageError as error:
            return Result(ref, records.failed_record(ref, error, None if image is None else records.image_info(image)))

    def _baselines(self, square: Pixels, box: Letterbox) -> dict[str, torch.Tensor]:
        """The pictures that show nothing by name, the one asked for first; more than one for `expected` only."""
        wanted, given = self.plan.config.attribution, self.plan.baseline_images
        found = {n: baselines.baseline(n, square, box, fitted(p, box))[0] for n, p in given.items()}
        if not given:
            b, name = baselines.baseline(wanted.baseline, square, box)
            found[name] = b
        if "expected" in wanted.method and not Path(wanted.baseline).is_dir():
            for name in EXPECTED_BASELINES:
                if name not in {known.removeprefix("auto:") for known in found}:
                    found[name], _ = baselines.baseline(name, square, box)
        return found

    def _fills(
        self, square: Pixels, box: Letterbox, name: str, b: torch.Tensor
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor, tuple[int, int, int] | None]:
        """What takes the place of parts of the picture in trials, the picture softened, its empty ground's colour."""
        if self.plan.config.attribution.evidence == "none":
            return {}, b, None
        other = next(fill for fill in FILLS if fill != name)
        inner = square[box.top : box.top + box.inner_height, box.left : box.left + box.inner_width]
        fills = {name: b, other: baselines.baseline(other, square, box)[0]}
        return fills, baselines.softened(square, box), baselines.ground_of(name, inner)

    def _drawn(self, ref: ImageRef) -> tuple[Drawn | None, Drawn | None]:
        """The image's labels, if it has any, and the boxes given for it. Raises ImageError for malformed ones."""
        labels, given = self.plan.labels, self.plan.given
        return None if labels is None else labels.read(ref), None if given is None else given.read(ref) or Drawn()

    def _done(self, ref: ImageRef, tree: store.Store, drawn: Sequence[str | None]) -> records.Record | None:
        """The record of an earlier run if it still holds: the same bytes, model and settings."""
        known = tree.existing(ref.path)
        if known is None or known.status != "ok":
            return None
        digest = decode.digest(ref, self.plan.config.images.max_pixels)
        if digest is None:
            return None
        return tree.done(ref.path, self._fingerprint(digest, drawn))

    def _fingerprint(self, image_sha256: str, drawn: Sequence[str | None]) -> str:
        used = [made.sha256 for made in (self.plan.keeping, self.plan.calibrated) if made is not None]
        plan = self.plan
        schema = records.RECORD_SCHEMA
        return fingerprint(plan.config, image_sha256, plan.info.sha256, schema, drawn, used, plan.counted_fit)

    # -- on the device --------------------------------------------------------------------------

    def _job(
        self, item: Prepared | Result, keep: Callable[[Explained], Future[Part]]
    ) -> Generator[Any, Any, Outcome | Result]:
        """Coroutine of one image: detect, then ask every method for the maps of a few detections at a time.

        `keep` turns maps into what is kept of them, behind the device; two groups of maps are in memory at most.
        """
        if isinstance(item, Result):
            return item
        try:
            x = item.x.to(self.plan.device)
            paths = [Segment(x, b.to(self.plan.device)) for b in item.baselines.values()]
            keeping, shown = self.plan.keeping, self.plan.config.attribution
            nobody: contextlib.AbstractContextManager[dict[int, torch.Tensor]] = contextlib.nullcontext({})
            with keeping.watching(shown.gradient) if keeping else nobody as seen:
                detections, context = self._detect(x, item)
            wanted = tuple(self._wanted(detections, item.letterbox, context))
            masks = self._masks(tuple(target for _, target, _ in wanted), seen, item.letterbox)
            seen.clear()
            fills = {name: fill.to(self.plan.device) for name, fill in item.fills.items()}
            soft = item.softened.to(self.plan.device)
            parts: list[Future[Part]] = []
            for group in _groups(wanted, self.plan.targets_at_once):
                maps = yield from self._maps(paths, [target for _, target, _ in group], masks)
                tried = yield from assess.tried(self.plan, x, fills, soft, detections, group, maps)
                again = yield from assess.again(self.plan, x, fills, group, maps)
                if parts:
                    self._waited(parts[-1].result)
                parts.append(keep(Explained(item, detections, group, maps, tried, again)))
            return Outcome(item, detections, tuple(parts))
        except ImageError as error:
            return _failed(item, error)
        except MemoryError:
            return _failed(item, self._too_much())
        except (ValueError, IndexError, KeyError, ArithmeticError, AssertionError) as error:
            return _bug(item.ref, error)

    def _too_much(self) -> ImageError:
        """Why an image of which not even one detection fits into memory has failed."""
        what = f"one detection at {self.plan.size} pixels does not fit into the memory of {self.plan.device}"
        return ImageError("memory", f"{what}: use a smaller --imgsz")

    def _maps(
        self, paths: Sequence[Segment], wanted: Sequence[Target], masks: dict[str, Masks]
    ) -> Generator[Any, Any, dict[Variant, list[TargetMap]]]:
        """Coroutine: the maps of the targets `wanted` by every method with every gradient."""
        keeping, shown = self.plan.keeping, self.plan.config.attribution
        maps: dict[Variant, list[TargetMap]] = {(m, g): [] for m in shown.method for g in shown.gradient}
        for start in range(0, len(wanted), self.plan.targets_at_once):
            targets = wanted[start : start + self.plan.targets_at_once]
            for (method, gradient), found in maps.items():
                if keeping and gradient != "plain":
                    found += yield from keeping.ask(
                        method, gradient, paths, targets, self.plan.settings, masks[gradient]
                    )
                else:
                    found += yield from METHODS[method](paths, targets, self.plan.settings)
        return maps

    def _masks(self, targets: Sequence[Target], seen: dict[int, torch.Tensor], box: Letterbox) -> dict[str, Masks]:
        """What each of ParchGrad's gradients keeps for `targets`."""
        keeping, gradients = self.plan.keeping, self.plan.config.attribution.gradient
        if keeping is None:
            return {}
        picture = (box.left, box.top, box.left + box.inner_width, box.top + box.inner_height)
        return {g: keeping.masks(g, targets, seen, picture) for g in gradients if g != "plain"}

    @torch.no_grad()
    def _detect(self, x: torch.Tensor, item: Prepared) -> tuple[tuple[Detection, ...], Any]:
        start = time.perf_counter()
        try:
            found = self.plan.detector.predict(x[None].contiguous(memory_format=torch.channels_last))[0]
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            raise MemoryError from error
        detections = selected(self.plan, found, item.letterbox, item.labels, item.given)
        self._detecting += time.perf_counter() - start
        return detections, found.context

    def _wanted(
        self, detections: Sequence[Detection], box: Letterbox, context: Any
    ) -> Iterator[tuple[int, Target, bool]]:
        """(detection, target, asked as another class) of everything that is to be explained."""
        scale = {"left": box.width / box.inner_width, "top": box.height / box.inner_height}
        scale |= {"right": scale["left"], "bottom": scale["top"]}
        shift = {"left": box.left, "right": box.left, "top": box.top, "bottom": box.top}
        for i, d in enumerate(detections):
            own: Any = tuple(boxes_to_letterbox([d.box], box)[0].tolist())
            pinned = Target(d.anchor, d.level, "class", d.class_id, context=context, box=own)
            for kind in self.plan.targets:
                if kind == "contrast":
                    continue
                factor = scale.get(kind, 1.0)
                offset = -shift.get(kind, 0) * factor
                yield i, Target(d.anchor, d.level, kind, d.class_id, factor, offset, context, own), False
            for other in self.plan.as_class:
                if other != d.class_id and "class" in self.plan.targets:
                    yield i, replace(pinned, class_id=other), True
            if self.plan.contrasts:
                others = [c.class_id for c in d.classes if c.class_id != d.class_id][:1] + self.plan.as_class
                for other in dict.fromkeys(others):
                    if other != d.class_id:
                        yield i, replace(pinned, kind="contrast", other=other), False

    # -- behind the device ----------------------------------------------------------------------

    def _finish(self, outcome: Outcome | Result, tree: store.Store | None) -> Result:
        """The record and pictures of one image, written if there is a tree."""
        result: Result | Outcome = outcome
        pictures: dict[str, bytes] = {}
        if isinstance(outcome, Outcome):
            try:
                parts = [one.result() for one in outcome.parts]
                result, pictures = publish(self.plan, outcome.prepared, outcome.detections, parts)
            except ImageError as error:
                result = _failed(outcome.prepared, error)
            except (ValueError, IndexError, KeyError, ArithmeticError) as error:
                result = _bug(outcome.prepared.ref, error)
        assert isinstance(result, Result)
        if tree is None or result.skipped:
            return result
        try:
            tree.write_image(result.ref.path, pictures, result.record)
        except ImageError as error:
            result = Result(result.ref, records.failed_record(result.ref, error))
            tree.write_image(result.ref.path, {}, result.record)
        return result


def _configured(model: RunConfig | str | Path | None, options: dict[str, Any]) -> RunConfig:
    """The settings that `model` and `options` ask for. Raises UsageError."""
    if isinstance(model, RunConfig):
        if options:
            raise UsageError(f"A RunConfig has all options; {', '.join(options)} came beside it.", "Put them into it.")
        return model
    words = {"model": model} | options
    return settings.load(options={k: str(v) if isinstance(v, Path) else v for k, v in words.items()})


def _groups(wanted: Sequence[assess.Wanted], most: int) -> Iterator[tuple[assess.Wanted, ...]]:
    """`wanted` in groups of whole detections with at most `most` targets; more only where one detection has them."""
    group: tuple[assess.Wanted, ...] = ()
    for _, of_one in groupby(wanted, lambda w: w[0]):
        own = tuple(of_one)
        if group and len(group) + len(own) > most:
            yield group
            group = ()
        group += own
    if group:
        yield group


def _failed(item: Prepared, error: ImageError) -> Result:
    return Result(item.ref, records.failed_record(item.ref, error, records.image_info(item.image), item.fingerprint))


def _bug(ref: ImageRef, error: Exception) -> Result:
    """A failure of detxai itself: one failed record, exit code 1 at the end, the traceback for `-vv`."""
    failed = records.failed_record(ref, ImageError("internal", f"{type(error).__name__}: {error}"))
    return Result(ref, failed, bug="".join(traceback.format_exception(error)))
