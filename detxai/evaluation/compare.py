"""From a few images to the figures of every method on every detection: one JSON-ready dictionary an image."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from detxai.attribution.devices import rows_for
from detxai.attribution.memory import out_of_memory
from detxai.config.settings import RunConfig
from detxai.errors import DeviceError, ImageError, ModelError, UsageError
from detxai.evaluation import disturbed, priors
from detxai.evaluation.masks import Parts
from detxai.evaluation.metrics import area_under
from detxai.evaluation.options import Options
from detxai.evaluation.perturbation import FILLS, MODES, PixelOrder, Scene, curves, shares
from detxai.evaluation.subjects import THUMB, Opened, Reading, costs, labelled, opened, resized
from detxai.evaluation.variants import Variant, bare, variants
from detxai.inputs import labels
from detxai.inputs.letterbox import map_to_source
from detxai.models.detector import Differentiable, differentiable
from detxai.models.heads.anchor_free import AnchorFree
from detxai.models.heads.whole_image import layercam
from detxai.models.predictions import closeness
from detxai.run.pipeline import Explainer
from detxai.run.results import Result
from detxai.schema import significant
from detxai.statistics import rank_correlation
from detxai.values import ImageRef, Map, Target

#: Baselines by the name they have in every table; `grad` is a method of detxai.
RANDOM, BOX, GRAD, ULTRALYTICS = "random", "box", "grad", "ultralytics"
#: Most gradient evaluations for a map of a network that was tampered with: only its likeness counts.
ROUGH = 32


@dataclass(frozen=True, eq=False)
class EvaluatedImage:
    """What came of one image: its figures, or the `error` it failed with; `bug`: a traceback, where detxai failed."""

    ref: ImageRef
    figures: dict[str, Any] | None = None
    image: Opened | None = None
    error: str | None = None
    bug: str | None = None


class Judge:
    """Judges images with one model and one configuration. Raises UsageError and ModelError as `Explainer` does."""

    def __init__(self, config: RunConfig, options: Options) -> None:
        self.options = options
        self.config = bare(config)
        self.variants = variants(config)
        self.asked = len(self.variants)
        self.first = self._explainer(self.variants[0])
        self.plan = self.first.plan
        if (options.sanity or options.stability) and self.plan.network is None:
            raise UsageError(
                f"--sanity and --stability change the network, and {self.plan.info.name} is a black box.",
                "Leave them out.",
            )
        if options.baselines and self.plan.network is not None and Variant(GRAD, "plain") not in self.variants:
            self.variants.append(Variant(GRAD, "plain"))
        self.explainers = [self.first, *(self._explainer(v, self.plan.detector) for v in self.variants[1:])]
        folder = config.detection.labels
        self.labels = labels.Folder(folder, self.plan.info.names) if folder else None
        self.parts = Parts(options.masks) if options.masks else None

    def _explainer(self, variant: Variant, detector: Any = None, **changes: Any) -> Explainer:
        a = self.config.attribution.model_copy(
            update={"method": (variant.method,), "gradient": (variant.gradient,)} | changes
        )
        return Explainer(self.config.model_copy(update={"attribution": a}), detector=detector)

    @property
    def names(self) -> dict[str, bool]:
        """Every label of the tables, and whether it is a baseline."""
        is_baseline = {v.label: i >= self.asked for i, v in enumerate(self.variants)}
        if self.options.baselines:
            is_baseline |= {RANDOM: True, BOX: True}
            if isinstance(self.plan.detector, AnchorFree):
                is_baseline[ULTRALYTICS] = True
        return is_baseline

    @property
    def at_once(self) -> int:
        """Images whose maps fill the device's packs together; a CPU gains nothing by it, and one is done sooner."""
        alone = self.plan.device.type == "cpu" and self.config.run.batch == "auto"
        return 1 if alone else self.plan.in_flight

    # -- one group of images --------------------------------------------------------------------

    def judge(
        self, refs: Sequence[ImageRef], *, stability: bool = False, sanity: bool = False
    ) -> Iterator[EvaluatedImage]:
        """The figures of a few images, in their order; `stability`, `sanity`: those tests on each of them.

        Raises DeviceError where one image does not fit into memory.
        """
        open_: dict[str, Opened] = {}
        failed: dict[str, EvaluatedImage] = {}
        for variant, explainer in zip(self.variants, self.explainers, strict=True):
            maps = 0
            for result in explainer.explain([ref for ref in refs if ref.path not in failed]):
                error = self._entered(result, variant, open_)
                if error is not None:
                    failed[result.ref.path] = error
                maps += len(result.explanations)
            for image in open_.values():
                image.seconds[variant.label] = explainer.timings.device / max(maps, 1)
        for ref in refs:
            if ref.path in failed:
                yield failed[ref.path]
                continue
            image = open_.pop(ref.path)
            yield EvaluatedImage(ref, self._figures(image, stability=stability, sanity=sanity), image)

    def _entered(self, result: Result, variant: Variant, open_: dict[str, Opened]) -> EvaluatedImage | None:
        """Add the readings of one result; its failure, if any."""
        if result.record.error is not None:
            error = result.record.error
            return EvaluatedImage(result.ref, error=f"{error.message} ({error.code})", bug=result.bug)
        try:
            image = open_.get(result.ref.path) or self._opened(result)
        except ImageError as problem:
            return EvaluatedImage(result.ref, error=f"{problem.message} ({problem.code})")
        open_[result.ref.path] = image
        image.readings[variant.label] = [
            image.read(image.subjects[e.detection], e.attribution.map, self.parts, self.options, **costs(e.attribution))
            for e in result.explanations
        ]
        return None

    def _opened(self, result: Result) -> Opened:
        image = opened(result, self.plan.letterboxed, self.options.seed)
        drawn = self.labels.read(result.ref) if self.labels else None
        if drawn is not None:
            image.subjects = labelled(image.subjects, drawn, image.image, self.parts)
        return image

    # -- one image ------------------------------------------------------------------------------

    def _figures(self, image: Opened, *, stability: bool, sanity: bool) -> dict[str, Any]:
        if self.options.baselines and image.subjects:
            self._add_priors(image)
        try:
            curves_of = self._curves(image)
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            message = f"The pictures of {image.ref.path} do not fit into the memory of {self.plan.device}."
            raise DeviceError(message, "Use a smaller --imgsz.") from error
        extra: dict[str, Any] = {}
        if stability and image.subjects:
            other = disturbed.noisy(differentiable(self.plan.detector), image.box.shape, self.options.seed)
            extra["stability"] = self._likeness(image, other)
        if sanity and image.subjects:
            extra["cascade"] = [
                {"share": share, "correlation": self._likeness(image, other, max_evaluations=ROUGH)}
                for share, other in disturbed.cascade(differentiable(self.plan.detector), self.options.seed)
            ]
            extra["other_class"] = self._other_class(image)
        detections = [
            {
                "id": s.number, "class_id": s.class_id, "class_name": s.class_name, "score": significant(s.score),
                "box": [significant(v) for v in s.box],
                "label": None if s.label is None else [significant(v) for v in s.label.box],
                "methods": {
                    name: _entry(readings[k], image.seconds[name], curves_of[name][k])
                    for name, readings in image.readings.items()
                },
            }
            for k, s in enumerate(image.subjects)
        ]  # fmt: skip
        return {"detections": detections, **extra}

    def _add_priors(self, image: Opened) -> None:
        height, width = image.image.height, image.image.width
        noise = priors.random_map(height, width, image.seed)
        parts, options = self.parts, replace(self.options, order="signed")  # they are orders, and no more
        boxes = [priors.box_map(height, width, s.box) for s in image.subjects]
        pairs = list(zip(image.subjects, boxes, strict=True))
        image.readings[RANDOM] = [image.read(s, noise, parts, options) for s in image.subjects]
        image.readings[BOX] = [image.read(s, values, parts, options) for s, values in pairs]
        image.seconds |= {RANDOM: 0.0, BOX: 0.0}
        if isinstance(self.plan.detector, AnchorFree):
            started = time.perf_counter()
            x = torch.from_numpy(image.canvas).permute(2, 0, 1)[None].float().to(self.plan.device) / 255
            cam, passes = layercam(self.plan.detector, x, self.plan.config.detection.conf)
            values = map_to_source(cam.cpu().numpy(), image.box)
            cost = {"evaluations": passes / len(image.subjects)}
            image.readings[ULTRALYTICS] = [image.read(s, values, parts, options, **cost) for s in image.subjects]
            image.seconds[ULTRALYTICS] = (time.perf_counter() - started) / len(image.subjects)

    def _curves(self, image: Opened) -> dict[str, list[dict[tuple[str, str], Any]]]:
        """label -> for each detection (fill, mode) -> scores (steps + 1,)."""
        if not image.subjects:
            return {name: [] for name in image.readings}
        scene = Scene.of(image.canvas, image.box, self.plan.device)
        keys = [(name, k) for name, readings in image.readings.items() for k in range(len(readings))]
        cases = [PixelOrder(image.readings[name][k].rank, (image.subjects[k].target,)) for name, k in keys]
        rows = rows_for(self.plan.device, self.plan.shape)
        measured = curves(self._score, scene, cases, self.options.steps, rows)
        tables: dict[str, list[dict[tuple[str, str], Any]]] = {}
        for (name, _), table in zip(keys, measured, strict=True):
            tables.setdefault(name, []).append({key: values[:, 0] for key, values in table.items()})
        return tables

    def _score(self, x: Tensor, pins: Sequence[tuple[int, Target]]) -> Tensor:
        with self._arithmetic():
            return closeness(self.plan.detector, x, pins)

    def _arithmetic(self) -> contextlib.AbstractContextManager[Any]:
        if self.options.score_precision == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.plan.device.type, torch.bfloat16)

    # -- networks that were tampered with ---------------------------------------------------------

    def _likeness(self, image: Opened, other: Differentiable, **changes: Any) -> dict[str, list[float | None]]:
        """label -> for each detection the rank correlation of its map with that of another network."""
        correlations: dict[str, list[float | None]] = {}
        for variant in self.variants:
            try:
                explainer = self._explainer(variant, other, **changes)
            except ModelError:  # no gradient is left: there is no map to compare
                correlations[variant.label] = [None] * len(image.subjects)
                continue
            # Only now: a network is tested at load by its own predictions.
            pinned: Differentiable = disturbed.Reporting(other, self.plan.detector)
            explainer.plan = replace(explainer.plan, detector=pinned)
            correlations[variant.label] = self._correlations(image, variant, explainer)
        return correlations

    def _correlations(self, image: Opened, variant: Variant, explainer: Explainer) -> list[float | None]:
        (result,) = explainer.explain([image.ref])
        maps: dict[int, Map] = {e.detection: _thumb(e.attribution.map) for e in result.explanations}
        before = image.readings[variant.label]
        return [_rounded(rank_correlation(before[k].thumb, maps[k])) if k in maps else None for k in range(len(before))]

    def _other_class(self, image: Opened) -> dict[str, list[float | None]]:
        """label -> for each detection the rank correlation of its map with that of its runner-up class."""
        others = {k: other for k, other in enumerate(image.runners_up) if other is not None}
        correlations: dict[str, list[float | None]] = {v.label: [None] * len(image.subjects) for v in self.variants}
        for variant in self.variants if others else ():
            asked = tuple(sorted(set(others.values())))
            explainer = self._explainer(variant, self.plan.detector, as_class=asked, max_evaluations=ROUGH)
            (result,) = explainer.explain([image.ref])
            for e in result.explanations:
                if e.as_class and others.get(e.detection) == e.attribution.target.class_id:
                    own = image.readings[variant.label][e.detection].thumb
                    correlations[variant.label][e.detection] = _rounded(
                        rank_correlation(own, _thumb(e.attribution.map))
                    )
        return correlations


def _thumb(values: Map) -> Map:
    return resized(values, min(THUMB, max(values.shape)))


def _rounded(value: float | None) -> float | None:
    return None if value is None else significant(value)


def _entry(reading: Reading, seconds: float, tables: dict[tuple[str, str], Any]) -> dict[str, Any]:
    """The figures of one method on one detection. Margin: insertion minus deletion, higher is better."""
    steps = len(next(iter(tables.values()))) - 1
    area = {key: area_under(shares(steps), values) for key, values in tables.items()}
    numbers = {f"{mode}_{fill}": area[fill, mode] for fill in FILLS for mode in MODES}
    numbers |= {f"margin_{fill}": area[fill, "insertion"] - area[fill, "deletion"] for fill in FILLS}
    numbers["margin"] = float(np.mean([numbers[f"margin_{fill}"] for fill in FILLS]))
    entry: dict[str, Any] = {
        name: None if value is None else significant(value)
        for name, value in {**numbers, **reading.numbers, "seconds": seconds}.items()
    }
    if reading.parts is not None:
        entry["part_shares"] = {name: [significant(v) for v in pair] for name, pair in reading.parts.items()}
    entry["curves"] = {
        fill: {mode: [significant(float(v)) for v in tables[fill, mode]] for mode in MODES} for fill in FILLS
    }
    return entry
