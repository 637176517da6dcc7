"""The only place where the stages meet: decode ahead, explain on the device, write behind.

Threads decode and write; the calling thread owns the device. One image's failure is one failed record.
"""

from __future__ import annotations

import hashlib
import os
import time
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from detxai import detectors, images, overlays, records, store, weights
from detxai.attribution import baselines
from detxai.attribution.engine import Engine, out_of_memory, rows_for
from detxai.attribution.methods import METHODS, PERTURBATION, Settings
from detxai.attribution.path import Path as IntegrationPath
from detxai.attribution.path import TargetMap
from detxai.config import BASELINES, RunConfig, fingerprint
from detxai.data import (
    Attribution,
    Checkpoint,
    ClassScore,
    Detection,
    Image,
    ImageRef,
    Letterbox,
    Pixels,
    Target,
)
from detxai.errors import DeviceError, ImageError, ModelError, UsageError

#: Bytes for the gradients that wait for their weights, over all images in flight at about 24 nodes a target.
GRADIENT_BYTES, NODES = 2**31, 24
#: Targets of one image that share forward passes, at most; more are done in turn, so that memory stays bounded.
TARGETS_AT_ONCE = 16
#: Images in flight on the device under `batch: auto`: enough to fill its packs.
IN_FLIGHT = {"cpu": 4, "mps": 4, "cuda": 8}
#: The arithmetic below the head under `precision: auto`, where half precision is faster and its error is known:
#: float16 changes maps by 1–3 % in L2 (bfloat16: 5–12 %, too much), but is slower than float32 on CPUs.
AUTO_DTYPE = {"cuda": torch.float16}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
HALF_TOLERANCE = 0.05
#: What `expected` averages over beside the baseline asked for.
EXPECTED_BASELINES = ("black", "white", "gray", "blur")
#: Methods that compare with nothing, or with more than one baseline.
BASELINE_OF = {"grad": "none", "smoothgrad": "none", "inputxgrad": "black", "expected": "+".join(EXPECTED_BASELINES)}
#: Seed of every random choice of a method.
SEED = 0


@dataclass(frozen=True, eq=False)
class Explanation:
    """One target of one detection: `attribution.map` is (height, width) in source pixels."""

    detection: int
    class_name: str
    as_class: bool
    attribution: Attribution


@dataclass(frozen=True, eq=False)
class Result:
    """What came of one image. `record` is what the output tree holds; `image` and `maps` are None/empty if skipped
    or failed. `skipped`: an earlier run had done it."""

    ref: ImageRef
    record: records.Record
    image: Image | None = None
    explanations: tuple[Explanation, ...] = ()
    skipped: bool = False
    bug: str | None = None


@dataclass(frozen=True, eq=False)
class _Prepared:
    ref: ImageRef
    image: Image
    letterbox: Letterbox
    x: torch.Tensor
    baselines: tuple[torch.Tensor, ...]
    baseline: str
    fingerprint: str


@dataclass(frozen=True, eq=False)
class _Explained:
    prepared: _Prepared
    detections: tuple[Detection, ...]
    wanted: tuple[tuple[int, Target, bool], ...]
    maps: dict[str, list[TargetMap]]


@dataclass
class Timings:
    """Seconds of the calling thread: `device` computing, `waiting` for decoded images or for the writers."""

    device: float = 0.0
    waiting: float = 0.0
    points: int = 0
    padded: int = 0
    packs_halved: int = 0


def device_of(name: str) -> torch.device:
    """The torch device for `--device`; raises UsageError for one that is not there."""
    if name == "auto":
        mps = torch.backends.mps.is_available()
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if mps else "cpu")
    device = torch.device(name)
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise UsageError(f"--device {name}: this machine has {count} CUDA devices.", "Use --device cpu.")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UsageError("--device mps: not available on this machine.", "Use --device cpu.")
    return device


class Explainer:
    """Explains images with one model and one configuration; a `with` block ends its threads.

    `checkpoint` or `detector` may be given for a model that is already in memory (tests, notebooks).
    """

    def __init__(
        self,
        config: RunConfig | None = None,
        *,
        checkpoint: Checkpoint | None = None,
        detector: detectors.Detector | None = None,
    ) -> None:
        self.config = config or RunConfig()
        self.device = device_of(self.config.run.device)
        self.detector = detector or self._detector(checkpoint)
        if self.detector.info.differentiable:
            self.detector.module.to(self.device)
        self.info = self.detector.info
        self.size = self.config.detection.imgsz or self.info.imgsz
        self.classes = self._class_ids(self.config.detection.classes, "--classes")
        self.as_class = self._class_ids(self.config.attribution.as_class, "--as-class") or []
        self.targets = self._target_kinds()
        self._check_methods()
        self.baseline_image = self._baseline_image()
        self.dtype = self._dtype()
        batch = self.config.run.batch
        self.in_flight = IN_FLIGHT[self.device.type] if batch == "auto" else int(batch)
        share = GRADIENT_BYTES // (self.in_flight * NODES * 4 * self.size**2)
        self.targets_at_once = max(1, min(TARGETS_AT_ONCE, share))
        self.timings = Timings()
        self.workers = max(1, min(4, os.cpu_count() or 1))

    def _dtype(self) -> torch.dtype:
        wanted = self.config.run.precision
        if self.device.type == "cuda":  # TF32 would call itself float32
            torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
        if wanted != "auto":
            return DTYPES[wanted]
        exact = self.config.attribution.tolerance < HALF_TOLERANCE
        return torch.float32 if exact else AUTO_DTYPE.get(self.device.type, torch.float32)

    def _detector(self, checkpoint: Checkpoint | None) -> detectors.Detector:
        model = self.config.model
        loaded = checkpoint or weights.load(model.path, sha256=model.sha256, trust_pickle=model.trust_pickle)
        return detectors.build(loaded, None if model.head == "auto" else model.head)

    def _class_ids(self, wanted: Sequence[int | str] | None, option: str) -> list[int] | None:
        if not wanted:
            return None
        by_name = {name: i for i, name in self.info.names.items()}
        found = [by_name.get(w, w if isinstance(w, int) else -1) for w in wanted]
        for name, class_id in zip(wanted, found, strict=True):
            if class_id not in self.info.names:
                raise UsageError(
                    f"{option}: the model has no class {name!r}.", f"It has: {', '.join(self.info.names.values())}."
                )
        return found

    def _target_kinds(self) -> tuple[str, ...]:
        wanted = self.config.attribution.target
        expanded = [k for name in wanted for k in (detectors.EDGES if name == "box" else (name,))]
        for kind in expanded:
            if kind not in self.info.targets:
                raise UsageError(
                    f"--target {kind}: a {self.info.family} model with its {self.info.head} head has none.",
                    f"It has: {', '.join(self.info.targets)}.",
                )
        return tuple(dict.fromkeys(expanded))

    def _check_methods(self) -> None:
        """Raise UsageError for methods that make no sense here, ModelError where gradients do not work."""
        for name in self.config.attribution.method:
            if name in PERTURBATION and self.targets != ("class",):
                raise UsageError(f"--method {name} sees detections only: it explains --target class, nothing else.")
            if name not in PERTURBATION and not self.info.differentiable:
                raise UsageError(
                    f"--method {name} needs gradients, and {self.info.name} is a black box ({self.info.family}).",
                    f"These methods work for it: --method {', '.join(PERTURBATION)}.",
                )
        if any(name not in PERTURBATION for name in self.config.attribution.method):
            gray = torch.full((1, 3, self.size, self.size), 0.5, device=self.device)
            detectors.self_test(self.detector, gray)

    def _baseline_image(self) -> Pixels | None:
        name = self.config.attribution.baseline
        if name in BASELINES:
            return None
        try:
            return images.load(ImageRef(Path(name).name, Path(name))).pixels
        except ImageError as error:
            raise UsageError(f"--baseline {name}: {error.message}") from error

    # -- the flow -------------------------------------------------------------------------------

    def explain(
        self,
        refs: Iterable[ImageRef],
        tree: store.Store | None = None,
        over: Callable[[], bool] = lambda: False,
    ) -> Iterator[Result]:
        """Results in the order of `refs`, each written to `tree` (if any) before it is yielded.

        Once `over()` holds no further image is begun; those on the device are finished.
        Raises DeviceError when one image does not fit, OutputError when the tree cannot be written.
        """
        in_flight = self.in_flight
        engine = Engine(self._value, self.device, rows_for(self.device, self.size), self._similarity)
        waiting: dict[int, Future[Result]] = {}
        turn = 0
        with ThreadPoolExecutor(self.workers) as readers, ThreadPoolExecutor(self.workers) as writers:
            prepared = enumerate(self._ahead(readers, refs, tree, 2 * in_flight, over))
            jobs = ((index, self._job(item)) for index, item in prepared)
            try:
                for index, outcome in engine.run(jobs, in_flight):
                    waiting[index] = writers.submit(self._finish, outcome, tree)
                    self._account(engine)
                    # A slow image holds back those behind it, but not more of them than this.
                    while turn in waiting and (waiting[turn].done() or len(waiting) > 4 * in_flight):
                        yield self._waited(waiting.pop(turn).result)
                        turn += 1
                for index in sorted(waiting):
                    yield self._waited(waiting[index].result)
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
                raise DeviceError(
                    f"One image at {self.size} pixels does not fit into the memory of {self.device}.",
                    "Use a smaller --imgsz.",
                ) from error
            finally:
                readers.shutdown(wait=False, cancel_futures=True)
                self._account(engine)

    def _ahead(
        self,
        pool: ThreadPoolExecutor,
        refs: Iterable[ImageRef],
        tree: store.Store | None,
        depth: int,
        over: Callable[[], bool],
    ) -> Iterator[_Prepared | Result]:
        """Prepared images in order, `depth` of them being read and decoded ahead of the device."""
        source = iter(refs)
        queue: deque[Future[_Prepared | Result]] = deque()
        for ref in islice(source, depth):
            queue.append(pool.submit(self._prepare, ref, tree))
        while queue and not over():
            ready = self._waited(queue.popleft().result)
            for ref in islice(source, 1):
                queue.append(pool.submit(self._prepare, ref, tree))
            yield ready

    def _waited(self, get: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = get()
        self.timings.waiting += time.perf_counter() - start
        return result

    def _account(self, engine: Engine) -> None:
        t = self.timings
        t.device, t.points, t.padded, t.packs_halved = engine.seconds, engine.points, engine.padded, engine.halved

    # -- before the device ----------------------------------------------------------------------

    def _prepare(self, ref: ImageRef, tree: store.Store | None) -> _Prepared | Result:
        try:
            if tree is not None and not self.config.run.force and (done := self._done(ref, tree)):
                return Result(ref, done, skipped=True)
            settings = self.config.images
            image = images.load(ref, settings.window, settings.max_pixels)
            square, box = images.letterbox(image.pixels, self.size, self.info.antialias)
            file = None if self.baseline_image is None else images.fitted(self.baseline_image, box)
            name = self.config.attribution.baseline
            b, name = baselines.baseline(name if file is None else Path(name).name, square, box, file)
            more = EXPECTED_BASELINES if "expected" in self.config.attribution.method else ()
            others = [baselines.baseline(other, square, box)[0] for other in more if other != name]
            x = torch.from_numpy(square).permute(2, 0, 1).float() / 255
            return _Prepared(ref, image, box, x, (b, *others), name, self._fingerprint(image.sha256))
        except ImageError as error:
            return Result(ref, records.failed_record(ref, error))

    def _done(self, ref: ImageRef, tree: store.Store) -> records.Record | None:
        """The record of an earlier run if it still holds: the same bytes, model and settings."""
        known = tree.existing(ref.path)
        if known is None or known.status != "ok":
            return None
        try:
            digest = hashlib.sha256(ref.file.read_bytes()).hexdigest()
        except OSError:
            return None
        return tree.done(ref.path, self._fingerprint(digest))

    def _fingerprint(self, image_sha256: str) -> str:
        return fingerprint(self.config, image_sha256, self.info.sha256, records.RECORD_SCHEMA)

    # -- on the device --------------------------------------------------------------------------

    def _value(self, x: torch.Tensor, pins: Sequence[tuple[int, Target]]) -> torch.Tensor:
        return self.detector.values(x, [detectors.Pin(*pin) for pin in pins])

    def _similarity(self, x: torch.Tensor, pins: Sequence[tuple[int, Target]]) -> torch.Tensor:
        return detectors.similarity(self.detector.predict(x), [detectors.Pin(*pin) for pin in pins])

    def _job(self, item: _Prepared | Result) -> Generator[Any, Any, _Explained | Result]:
        """Coroutine of one image: detect, then ask every method for the maps of all targets."""
        if isinstance(item, Result):
            return item
        try:
            x = item.x.to(self.device)
            paths = [IntegrationPath(x, b.to(self.device)) for b in item.baselines]
            detections, context = self._detect(x, item.letterbox)
            wanted = tuple(self._wanted(detections, item.letterbox, context))
            a = self.config.attribution
            settings = Settings(a.tolerance, a.max_evaluations, self.dtype, SEED)
            maps: dict[str, list[TargetMap]] = {name: [] for name in a.method}
            for start in range(0, len(wanted), self.targets_at_once):
                targets = [target for _, target, _ in wanted[start : start + self.targets_at_once]]
                for name, found in maps.items():
                    found += yield from METHODS[name](paths, targets, settings)
            return _Explained(item, detections, wanted, maps)
        except (ValueError, IndexError, KeyError, ArithmeticError, AssertionError) as error:
            return _bug(item.ref, error)

    @torch.no_grad()
    def _detect(self, x: torch.Tensor, box: Letterbox) -> tuple[tuple[Detection, ...], Any]:
        start = time.perf_counter()
        found = self.detector.predict(x[None].contiguous(memory_format=torch.channels_last))[0]
        d = self.config.detection
        kept = detectors.reported(found, conf=d.conf, iou=d.iou, max_det=d.max_det, classes=self.classes)
        boxes = images.boxes_to_source(found.boxes[[a for a, _ in kept]].cpu().numpy().reshape(-1, 4), box)
        detections = tuple(
            self._detection(found, anchor, class_id, tuple(map(float, xyxy)), box)
            for (anchor, class_id), xyxy in zip(kept, boxes, strict=True)
        )
        self.timings.device += time.perf_counter() - start
        return detections, found.context

    def _detection(
        self, found: detectors.Candidates, anchor: int, class_id: int, xyxy: Any, box: Letterbox
    ) -> Detection:
        scores, logits = found.scores[anchor].cpu(), found.logits[anchor].cpu()
        order = torch.argsort(scores, descending=True, stable=True).tolist()
        names = self.info.names
        classes = tuple(ClassScore(i, names[i], float(scores[i]), float(logits[i])) for i in order)
        obb = None
        if found.rotated is not None:
            cx, cy, w, h, angle = (float(v) for v in found.rotated[anchor].cpu())
            gain = box.gain
            obb = ((cx - box.left) / gain, (cy - box.top) / gain, w / gain, h / gain, angle)
        return Detection(
            anchor, int(found.levels[anchor]), class_id, names[class_id], float(scores[class_id]),
            float(logits[class_id]), xyxy, classes, obb=obb,
        )  # fmt: skip

    def _wanted(
        self, detections: Sequence[Detection], box: Letterbox, context: Any
    ) -> Iterator[tuple[int, Target, bool]]:
        """(detection, target, asked as another class) of everything that is to be explained."""
        scale = {"left": box.width / box.inner_width, "top": box.height / box.inner_height}
        scale |= {"right": scale["left"], "bottom": scale["top"]}
        shift = {"left": box.left, "right": box.left, "top": box.top, "bottom": box.top}
        for i, d in enumerate(detections):
            own: Any = tuple(images.boxes_to_letterbox([d.box], box)[0].tolist())
            for kind in self.targets:
                factor = scale.get(kind, 1.0)
                offset = -shift.get(kind, 0) * factor
                yield i, Target(d.anchor, d.level, kind, d.class_id, factor, offset, context, own), False
            for other in self.as_class:
                if other != d.class_id and "class" in self.targets:
                    yield i, Target(d.anchor, d.level, "class", other, context=context, box=own), True

    # -- behind the device ----------------------------------------------------------------------

    def _finish(self, outcome: _Explained | Result, tree: store.Store | None) -> Result:
        """The record and pictures of one image, written if there is a tree."""
        result, pictures = outcome, {}
        if isinstance(outcome, _Explained):
            try:
                result, pictures = self._result(outcome)
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

    def _result(self, e: _Explained) -> tuple[Result, dict[str, bytes]]:
        p, output = e.prepared, self.config.output
        explanations = tuple(
            self._explanation(p, method, i, as_class, found)
            for method, column in e.maps.items()
            for (i, _, as_class), found in zip(e.wanted, column, strict=True)
        )
        pictures: dict[str, bytes] = {}
        rows: list[list[records.AttributionRecord]] = [[] for _ in e.detections]
        boxed = "box" in self.config.attribution.target
        for item in explanations:
            a, d = item.attribution, e.detections[item.detection]
            as_class = a.target.class_id if item.as_class else None
            edge = a.target.kind in detectors.EDGES
            shown = "box" if edge and boxed and a.target.kind not in self.config.attribution.target else a.target.kind
            stem = store.picture_stem(p.ref.path, item.detection, a.method, target=shown, as_class=as_class)
            overlay = f"{stem}.png" if output.overlays else None
            if overlay and overlay not in pictures:
                group = [
                    o
                    for o in explanations
                    if o.detection == item.detection
                    and o.attribution.method == a.method
                    and o.attribution.target.kind in detectors.EDGES
                ]
                pictures[overlay] = self._overlay(p.image, d, group if shown == "box" else [item])
            map_name = None
            if output.maps != "none":
                own = store.picture_stem(p.ref.path, item.detection, a.method, target=a.target.kind, as_class=as_class)
                suffix, content = store.encode_map(a.map, output.maps)
                map_name = own + suffix
                pictures[map_name] = content
            rows[item.detection].append(
                records.attribution_record(
                    a, d.box, item.class_name, as_class=item.as_class, overlay=overlay, map_name=map_name
                )
            )
        info = self.info
        record = records.Record(
            status="ok",
            fingerprint=p.fingerprint,
            image=records.image_info(p.image),
            model=records.ModelInfo(
                name=info.name, sha256=info.sha256, family=info.family, head=info.head, imgsz=self.size
            ),
            detections=tuple(
                records.detection_record(d, i, rows[i]) for i, d in enumerate(e.detections)
            ),
        )
        return Result(p.ref, record, p.image, explanations), pictures

    def _explanation(self, p: _Prepared, method: str, index: int, as_class: bool, found: TargetMap) -> Explanation:
        square = found.map.cpu().numpy()
        source = images.map_to_source(square, p.letterbox)
        total = float(square.sum())
        notes = found.notes
        if found.dtype != self.dtype:
            notes += ("half precision did not converge: done again in fp32",)
        attribution = Attribution(
            method=method,
            target=found.target,
            baseline=BASELINE_OF.get(method, p.baseline),
            precision=next(name for name, dtype in DTYPES.items() if dtype == found.dtype),
            path="black box" if method in PERTURBATION else "sparse" if self.info.sparse else "full",
            map=source,
            total=total,
            padding_sum=total - float(source.sum(dtype=np.float64)),
            value_at_input=found.value_at_input,
            value_at_baseline=found.value_at_baseline,
            evaluations=found.evaluations,
            completeness_error=found.completeness_error,
            error_bound=found.error_bound,
            converged=found.converged,
            notes=notes,
        )
        return Explanation(index, self.info.names[found.target.class_id], as_class, attribution)

    def _overlay(self, image: Image, d: Detection, group: Sequence[Explanation]) -> bytes:
        first = group[0].attribution
        bounds = [g.attribution.error_bound for g in group if g.attribution.error_bound is not None]
        converged = all(g.attribution.converged is not False for g in group)
        what = f"{first.method} · {first.baseline.removeprefix('auto:')}"
        if group[0].as_class:
            what = f"as {group[0].class_name} · {what}"
        elif first.target.kind != "class" and len(group) == 1:
            what = f"{first.target.kind} · {what}"
        common: dict[str, Any] = {
            "box": d.box,
            "label": d.class_name,
            "score": d.score,
            "caption": f"{what} · error ≤ {100 * max(bounds):.1f} %" if bounds else what,
            "warning": None if converged else "not converged: read with care",
            "strip": self.config.output.strip,
        }
        if len(group) > 1:
            drawn = overlays.draw_edges(image.pixels, {g.attribution.target.kind: g.attribution.map for g in group}, **common)
        else:
            unit = "similarity" if first.method in PERTURBATION else "px" if first.target.kind in detectors.EDGES else "logits"
            drawn = overlays.draw(image.pixels, first.map, unit=unit, **common)
        return overlays.encode(drawn)


def _bug(ref: ImageRef, error: Exception) -> Result:
    """A failure of detxai itself: one failed record, exit code 1 at the end, the traceback for `-vv`."""
    failed = records.failed_record(ref, ImageError("internal", f"{type(error).__name__}: {error}"))
    return Result(ref, failed, bug="".join(traceback.format_exception(error)))
