"""From the maps of some detections to what is kept of them: maps in source pixels, records, pictures."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from detxai.attribution.points import TargetMap
from detxai.config.settings import OutputConfig
from detxai.errors import ImageError
from detxai.evidence.calibration import EvidenceCalibration
from detxai.evidence.maps import map_sums
from detxai.evidence.measures import ground_mask
from detxai.evidence.model import Evidence, EvidenceLevel
from detxai.evidence.neighbours import of_neighbours
from detxai.evidence.promise import Promise
from detxai.inputs.letterbox import map_to_source
from detxai.models.detector import DetectorInfo
from detxai.output import overlays, overview, recording, records, store
from detxai.run import assess, captions
from detxai.run.plan import DTYPES
from detxai.run.results import Explanation, MapGroup, PreparedImage, PublishedGroup, Result, model_record
from detxai.run.targets import MapKey, Variant, WantedTarget, rival, runner_up
from detxai.values import Attribution, Detection, InputShape, Letterbox
from detxai.vocabulary import BLACK_BOX_METHODS, EDGES, METHODS, unit


class LeftUnfinished(Exception):
    """The run was left before all of a group was made."""


@dataclass(frozen=True, eq=False)
class Publisher:
    """Makes of maps what is kept of them.

    `imgsz`: the longer side asked for; `rect`: the largest shape, where each picture has its own; `fit`: how the
    network's input was made; `dtype`: the arithmetic asked for;
    `edge_pictures`: edges that get a picture each, not one together; `files`: whether pictures and raw maps are made.
    Without, the maps themselves are kept. `left`: whether to give up, asked before every detection.
    """

    info: DetectorInfo
    imgsz: int
    rect: InputShape | None
    fit: str
    dtype: torch.dtype
    output: OutputConfig
    level: EvidenceLevel
    calibration: EvidenceCalibration | None
    promise: Promise | None
    edge_pictures: frozenset[str]
    files: bool = True
    left: Callable[[], bool] = lambda: False

    def group(self, group: MapGroup) -> PublishedGroup:
        """What is kept of a group, made one detection after the other: maps in source pixels are large.

        Raises ImageError where a map is not finite, LeftUnfinished.
        """
        p, kept = group.prepared, PublishedGroup(scales=self._scales(group))
        ground = None if self.level is EvidenceLevel.NONE else ground_mask(p.image.seen, p.ground)
        for number, indices in groupby(range(len(group.wanted)), lambda j: group.wanted[j].detection):
            if self.left():
                raise LeftUnfinished
            explained = self._explanations(group, list(indices))
            explained |= self._assessed(group, explained, ground)
            self._keep(group, number, list(explained.values()), kept)
        return kept

    def image(
        self, p: PreparedImage, detections: Sequence[Detection], kept: Sequence[PublishedGroup]
    ) -> tuple[Result, dict[str, bytes]]:
        """The result of one image, and its files by name that are not written yet."""
        rows = {i: own for group in kept for i, own in group.rows.items()}
        evidence = {i: own for group in kept for i, own in group.evidence.items()}
        shown = tuple(
            recording.detection_record(d, i, rows.get(i, ()), evidence.get(i), self._listed(d))
            for i, d in enumerate(detections)
        )
        name = f"{p.ref.path.rpartition('/')[2]}.{self.output.overlay_format}"
        drawn = self.files and shown and self.output.overlays != "none"
        record = records.Record(
            status="ok",
            fingerprint=p.fingerprint,
            image=recording.image_info(p.image),
            model=model_record(self.info, self.imgsz, p.letterbox.shape, self.fit, self.rect),
            labels=recording.label_records(p.labels, detections),
            promise=recording.promise_record(self.promise),
            overview=name if drawn else None,
            detections=shown,
        )
        files = {k: v for group in kept for k, v in group.files.items()}
        if drawn:
            stamps = {i: own for group in kept for i, own in group.stamps.items()}
            files = {name: self._overview(p, shown, stamps, kept[0].scales)} | files
        explanations = tuple(item for group in kept for item in group.explanations)
        return Result(p.ref, record, p.image, explanations), files

    def _overview(
        self,
        p: PreparedImage,
        detections: Sequence[records.DetectionRecord],
        stamps: Mapping[int, overview.Stamp],
        scales: Mapping[str, float],
    ) -> bytes:
        """The picture of all boxes of an image."""
        boxes = [
            overview.ShownBox(
                d.id,
                d.box,
                d.class_name,
                d.score,
                _verdict(d.kind, d.evidence),
                d.evidence.reasons[0] if d.evidence else "",
                stamps.get(d.id),
            )
            for d in detections
        ]
        first = [d.attributions[0] for d in detections if d.attributions]
        caption = captions.made(first[0], [a.error_bound for a in first]) if first else ""
        named = unit(first[0].method, first[0].target, first[0].gradient) if first else ""
        scale = scales.get(scale_key(first[0].method, first[0].gradient, named)) if first else None
        drawn = overview.draw(p.image.pixels, boxes, caption=caption, unit=named, font=self.output.font, scale=scale)
        return overlays.encode(drawn, self.output.overlay_format)

    def _listed(self, d: Detection) -> bool | None:
        """Whether a box is on the list that the calibration promises; None where there is none, and for a miss."""
        return None if self.promise is None or d.kind == "missed" else d.score > self.promise.threshold

    # -- maps -------------------------------------------------------------------------------------

    def _explanations(self, group: MapGroup, indices: Sequence[int]) -> dict[MapKey, Explanation]:
        """The explanations of one detection, whose targets have these indices in the group."""
        return {
            (variant, j): self._explanation(group, variant, group.wanted[j], column[j])
            for variant, column in group.maps.items()
            for j in indices
        }

    def _explanation(self, group: MapGroup, variant: Variant, wanted: WantedTarget, made: TargetMap) -> Explanation:
        made = made.brought()
        if not math.isfinite(float(made.map.sum())) or not math.isfinite(made.value_at_input):
            what = f"the map of box {wanted.detection} by {variant[0]} holds numbers that are not finite"
            raise ImageError("not_finite", what)
        attribution = self._attribution(group.prepared, variant, made)
        box = group.detections[wanted.detection].box
        name = self.info.names[made.target.class_id]
        return Explanation(wanted.detection, name, wanted.as_class, attribution, map_sums(attribution, box))

    def _attribution(self, p: PreparedImage, variant: Variant, made: TargetMap) -> Attribution:
        (method, gradient), own = variant, made.map.numpy()
        source = map_to_source(own, p.letterbox)
        total, notes = float(own.sum()), made.notes
        if made.dtype != self.dtype and gradient == "plain":
            notes += ("half precision did not converge: done again in fp32",)
        return Attribution(
            method=method,
            gradient=gradient,
            target=made.target,
            baseline=METHODS[method].baseline or "+".join(list(p.baselines)[: None if method == "expected" else 1]),
            precision=next(name for name, dtype in DTYPES.items() if dtype == made.dtype),
            path=self._path(method, made),
            map=source,
            total=total,
            padding_sum=total - float(source.sum(dtype=np.float64)),
            padding_mass=_padding_mass(own, p.letterbox),
            value_at_input=made.value_at_input,
            value_at_baseline=made.value_at_baseline,
            evaluations=made.evaluations,
            completeness_error=made.completeness_error,
            error_bound=made.error_bound,
            map_error=made.map_error,
            converged=made.converged,
            notes=notes,
        )

    def _path(self, method: str, made: TargetMap) -> str:
        if method in BLACK_BOX_METHODS:
            return "black box"
        if made.layer is not None:
            return f"layer {made.layer}"
        return "sparse" if self.info.sparse else "full"

    def _scales(self, group: MapGroup) -> dict[str, float]:
        """With `--scale common`, from how much a pixel colour is full, by what was made, over the boxes of `group`.

        The image's first group decides for all: its scales, where `group` has them.
        """
        if self.output.scale == "own" or group.scales is not None:
            return group.scales or {}
        stamps: dict[str, list[overview.Stamp]] = {}
        for (method, gradient), column in group.maps.items():
            for wanted, made in zip(group.wanted, column, strict=True):
                kind = made.target.kind
                key = scale_key(method, gradient, unit(method, kind, gradient))
                source = map_to_source(made.map.cpu().numpy(), group.prepared.letterbox)
                if self._together(kind):  # how much, not which way, is drawn
                    source = np.abs(source)
                stamps.setdefault(key, []).append(overview.stamp(source, group.detections[wanted.detection].box))
        height, width = group.prepared.image.pixels.shape[:2]
        return {key: overview.common_scale(own, (width, height)) for key, own in stamps.items()}

    # -- evidence ---------------------------------------------------------------------------------

    def _assessed(
        self, group: MapGroup, explained: Mapping[MapKey, Explanation], ground: NDArray[np.bool_] | None
    ) -> dict[MapKey, Explanation]:
        """Those of `explained`, the explanations of one detection, that get evidence, with it."""
        if self.level is EvidenceLevel.NONE:
            return {}
        assessed = {}
        for key in assess.assessed_maps(group.wanted, list(group.maps)):
            if key in explained:
                item = explained[key]
                contrasts = [
                    other
                    for (variant, _), other in explained.items()
                    if variant == key[0] and other.attribution.target.other is not None
                ]
                assessed[key] = replace(item, evidence=self._evidence(group, key, item, ground, contrasts))
        return assessed

    def _evidence(
        self,
        group: MapGroup,
        key: MapKey,
        item: Explanation,
        ground: NDArray[np.bool_] | None,
        contrasts: Sequence[Explanation],
    ) -> Evidence:
        full, second = self.level is EvidenceLevel.FULL, None
        if full and key in group.second_maps:
            name, other = group.second_maps[key]
            second = name, map_to_source(other.map.cpu().numpy(), group.prepared.letterbox)
        d, outcomes = group.detections[item.detection], group.trials.get(key, ())
        target, left = item.attribution.target, group.neighbours.get(item.detection, {})
        without = {k: logits[target.class_id] for k, logits in left.items()}
        beside = of_neighbours(item.attribution.value_at_input, without, group.detections)
        contrasts = contrasts if full else ()
        return assess.evidence(d, item, ground, outcomes, self.calibration, contrasts, second, beside)

    # -- records and files ------------------------------------------------------------------------

    def _keep(self, group: MapGroup, number: int, explained: Sequence[Explanation], kept: PublishedGroup) -> None:
        """Add the records, evidence and files (else maps) of a detection."""
        d, image = group.detections[number], group.prepared.image
        kept.rows[number] = []
        own = next((item.evidence for item in explained if item.evidence and not item.as_class), None)
        pictured = self._pictured(_verdict(d.kind, own))
        if self.files and self.output.overlays != "none":
            kept.stamps[number] = overview.stamp(explained[0].map, d.box)
        for item in explained:
            a, asked = item.attribution, _asked_class(d, item)
            names = self._file_names(group.prepared.ref.path, number, item, asked, pictured=pictured)
            if names.overlay is not None and names.overlay not in kept.files:
                shown = self._shown_with(item, explained)
                kept.files[names.overlay] = self._overlay(
                    image.pixels, d, kept.scales, shown, self.output.overlay_format
                )
            if names.map is not None:
                kept.files[names.map] = store.encode_map(a.map, self.output.maps)
            row = recording.attribution_record(
                a,
                item.sums,
                item.class_name,
                as_class=item.as_class,
                overlay=names.overlay,
                map_name=names.map,
                evidence=item.evidence if item.as_class else None,
                against=rival(d, a.target.other),
            )
            kept.rows[number].append(row)
            if item.evidence and not item.as_class:
                kept.evidence[number] = item.evidence
        if not self.files:
            draw = partial(self._overlay, image.pixels, d, kept.scales)
            kept.explanations.extend(replace(item, draw=partial(draw, [item])) for item in explained)

    def _pictured(self, verdict: str) -> bool:
        """Whether the maps of a box of this verdict (or kind) get pictures of their own."""
        return self.output.overlays == "all" or (self.output.overlays == "look" and overview.asks(verdict))

    def _file_names(self, path: str, number: int, item: Explanation, asked: int | None, *, pictured: bool) -> FileNames:
        """Names of the files of one map, None where there is none."""
        a = item.attribution
        if not self.files:
            return FileNames(None, None)
        shown = "box" if self._together(a.target.kind) else a.target.kind
        stem = store.picture_stem(path, number, a.method, a.gradient, shown, asked)
        own = store.picture_stem(path, number, a.method, a.gradient, a.target.kind, asked)
        maps = self.output.maps
        overlay = f"{stem}.{self.output.overlay_format}" if pictured else None
        return FileNames(overlay, None if maps == "none" else own + store.MAP_SUFFIX[maps])

    def _together(self, kind: str) -> bool:
        """Whether a target of this `kind` is an edge whose map shares its picture with the other edges."""
        return kind in EDGES and kind not in self.edge_pictures

    def _shown_with(self, item: Explanation, explained: Iterable[Explanation]) -> list[Explanation]:
        """The explanations that share the picture of `item`."""
        a = item.attribution
        if not self._together(a.target.kind):
            return [item]
        made = (a.method, a.gradient)
        return [
            other
            for other in explained
            if other.attribution.target.kind in EDGES and (other.attribution.method, other.attribution.gradient) == made
        ]

    def _overlay(
        self,
        pixels: NDArray[np.uint8],
        d: Detection,
        scales: Mapping[str, float],
        shown: Sequence[Explanation],
        kind: str = "png",
    ) -> bytes:
        first = shown[0].attribution
        named = unit(first.method, first.target.kind, first.gradient)
        other = None if first.target.other is None else self.info.names[first.target.other]
        common: dict[str, Any] = {
            "box": d.box,
            "label": d.class_name if d.kind == "detection" else f"{d.kind} {d.class_name}",
            "dashed": d.kind != "detection",
            "score": d.score,
            "caption": captions.caption(d, shown, other),
            "warning": captions.warning(shown),
            "strip": self.output.strip,
            "unit": named,
            "font": self.output.font,
            "scale": scales.get(scale_key(first.method, first.gradient, named)),
        }
        if len(shown) > 1:
            edges = {e.attribution.target.kind: e.attribution.map for e in shown}
            return overlays.encode(overlays.draw_edges(pixels, edges, **common), kind)
        return overlays.encode(overlays.draw(pixels, first.map, poles=captions.poles(d, other), **common), kind)


@dataclass(frozen=True)
class FileNames:
    """Names of the files of one map beside the record, None where there is none."""

    overlay: str | None
    map: str | None


def scale_key(method: str, gradient: str, named: str) -> str:
    """What shares a scale with `--scale common`: maps of one method, gradient and unit, so `named`."""
    return f"{method} {gradient} {named}"


def _verdict(kind: str, evidence: Evidence | None) -> str:
    """How a box is shown: by its verdict, `none` without one; a candidate or a miss as such."""
    return kind if kind != "detection" else evidence.verdict if evidence is not None else "none"


def _asked_class(d: Detection, item: Explanation) -> int | None:
    """The class that tells the files of a map from those of the predicted class."""
    target = item.attribution.target
    if target.other is not None and target.other != runner_up(d):
        return target.other
    return target.class_id if item.as_class else None


def _padding_mass(values: NDArray[Any], box: Letterbox) -> float:
    if (box.inner_height, box.inner_width) == values.shape:
        return 0.0
    magnitude = np.abs(values)
    inner = magnitude[box.top : box.top + box.inner_height, box.left : box.left + box.inner_width]
    return max(float(magnitude.sum()) - float(inner.sum()), 0.0)
