"""From an explained image to what is kept of it: maps in source pixels, its record, its pictures."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import groupby
from typing import Any

import numpy as np
import PIL.Image
import torch
from numpy.typing import NDArray

from detxai.attribution.ablation import Trial
from detxai.attribution.points import TargetMap
from detxai.errors import ImageError
from detxai.evidence.measures import ground_mask, near_edge
from detxai.evidence.model import Evidence
from detxai.inputs.letterbox import map_to_source
from detxai.output import overlays, records, store
from detxai.run import assess
from detxai.run.plan import DTYPES, Plan
from detxai.values import Attribution, Detection, Image, ImageRef, Label, Letterbox, Map
from detxai.vocabulary import BLACK_BOX_METHODS, EDGES, LAYER_METHODS, METHODS, unit

#: (method, gradient): what a map is made with.
Variant = tuple[str, str]
#: More baselines than these are counted, not named, in a caption.
MOST_NAMED = 5


@dataclass(frozen=True, eq=False)
class Explanation:
    """One target of one detection, with its picture for notebooks."""

    detection: int
    class_name: str
    as_class: bool
    attribution: Attribution
    evidence: Evidence | None = None
    draw: Callable[[], bytes] | None = field(default=None, repr=False)

    @property
    def map(self) -> Map:
        """(height, width) float32, signed, in source pixels and the target's unit."""
        return self.attribution.map

    def overlay(self) -> PIL.Image.Image | None:
        """The map on its picture, as the command writes it."""
        return _opened(self._repr_png_())

    def _repr_png_(self) -> bytes | None:
        return None if self.draw is None else self.draw()


@dataclass(frozen=True, eq=False)
class Result:
    """What came of one image. `record` is what the output tree holds; `image` is None if skipped or failed.
    `explanations`: with their maps, where there is no tree to write. `skipped`: an earlier run had done it."""

    ref: ImageRef
    record: records.Record
    image: Image | None = None
    explanations: tuple[Explanation, ...] = ()
    skipped: bool = False
    bug: str | None = None

    @property
    def map(self) -> Map | None:
        """The map of the first explanation; None where nothing was found."""
        return self.explanations[0].map if self.explanations else None

    def overlay(self) -> PIL.Image.Image | None:
        """The picture of the first explanation, else the plain image; None for a failed image."""
        return _opened(self._repr_png_())

    def _repr_png_(self) -> bytes | None:
        if self.explanations or self.image is None:
            return self.explanations[0]._repr_png_() if self.explanations else None
        return overlays.encode(PIL.Image.fromarray(self.image.pixels))


def _opened(png: bytes | None) -> PIL.Image.Image | None:
    return None if png is None else PIL.Image.open(io.BytesIO(png))


@dataclass(frozen=True, eq=False)
class Prepared:
    ref: ImageRef
    image: Image
    letterbox: Letterbox
    x: torch.Tensor
    baselines: dict[str, torch.Tensor]
    fingerprint: str
    fills: dict[str, torch.Tensor]
    softened: torch.Tensor
    labels: tuple[Label, ...] | None = None
    given: tuple[Label, ...] | None = None
    ground: tuple[int, int, int] | None = None


@dataclass(frozen=True, eq=False)
class Explained:
    """Some detections of an image with their maps: `wanted` are their targets, `detections` all of the image."""

    prepared: Prepared
    detections: tuple[Detection, ...]
    wanted: tuple[assess.Wanted, ...]
    maps: dict[Variant, list[TargetMap]]
    tried: dict[assess.Key, list[Trial]] = field(default_factory=dict)
    again: dict[assess.Key, tuple[str, TargetMap]] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Part:
    """What is kept of some detections: by detection its records, and the files by name. `explanations`: see Result."""

    rows: dict[int, list[records.AttributionRecord]] = field(default_factory=dict)
    verdicts: dict[int, Evidence] = field(default_factory=dict)
    pictures: dict[str, bytes] = field(default_factory=dict)
    explanations: list[Explanation] = field(default_factory=list)


def part(plan: Plan, e: Explained, *, files: bool = True) -> Part:
    """What is kept of some detections, made one after the other: maps in source pixels are large.

    Raises ImageError where a map is not finite.
    """
    p, judging = e.prepared, plan.config.attribution.evidence != "none"
    ground = ground_mask(p.image.pixels, p.ground) if judging else None
    found = Part()
    for i, numbers in groupby(range(len(e.wanted)), lambda j: e.wanted[j][0]):
        own = tuple(numbers)
        known: dict[assess.Key, Explanation] = {
            (variant, j): _explanation(plan, p, variant, i, e.wanted[j][2], column[j])
            for variant, column in e.maps.items()
            for j in own
        }
        known |= _evidence(plan, e, known, ground)
        _keep(plan, e, i, list(known.values()), found, files)
    return found


def _keep(plan: Plan, e: Explained, i: int, explanations: list[Explanation], found: Part, files: bool) -> None:
    """Add the records, files and (without `files`) maps of detection `i` to `found`."""
    p, output, d, pictures = e.prepared, plan.config.output, e.detections[i], found.pictures
    rows = found.rows[i] = []
    boxed = "box" in plan.config.attribution.target
    for item in explanations:
        a = item.attribution
        as_class = a.target.class_id if item.as_class else None
        if a.target.other is not None and a.target.other != assess.runner_up(d):
            as_class = a.target.other
        edge = a.target.kind in EDGES
        shown = "box" if edge and boxed and a.target.kind not in plan.config.attribution.target else a.target.kind
        stem = store.picture_stem(p.ref.path, i, a.method, a.gradient, shown, as_class)
        overlay = f"{stem}.png" if files and output.overlays else None
        if overlay and overlay not in pictures:
            group = [
                o
                for o in explanations
                if (o.attribution.method, o.attribution.gradient) == (a.method, a.gradient)
                and o.attribution.target.kind in EDGES
            ]
            pictures[overlay] = _overlay(plan, p.image, d, group if shown == "box" else [item])
        map_name = None
        if files and output.maps != "none":
            own = store.picture_stem(p.ref.path, i, a.method, a.gradient, a.target.kind, as_class)
            suffix, content = store.encode_map(a.map, output.maps)
            map_name = own + suffix
            pictures[map_name] = content
        rows.append(
            records.attribution_record(
                a,
                d.box,
                item.class_name,
                as_class=item.as_class,
                overlay=overlay,
                map_name=map_name,
                evidence=item.evidence if item.as_class else None,
                against=assess.rival(d, a.target.other),
            )
        )
        if item.evidence and not item.as_class:
            found.verdicts[i] = item.evidence
    if not files:
        drawn = (partial(_overlay, plan, p.image, d, [item]) for item in explanations)
        found.explanations.extend(replace(item, draw=draw) for item, draw in zip(explanations, drawn, strict=True))


def publish(
    plan: Plan, p: Prepared, detections: Sequence[Detection], parts: Sequence[Part]
) -> tuple[Result, dict[str, bytes]]:
    """The result of one image, and its files by name."""
    rows = {i: found for one in parts for i, found in one.rows.items()}
    verdicts = {i: found for one in parts for i, found in one.verdicts.items()}
    info = plan.info
    record = records.Record(
        status="ok",
        fingerprint=p.fingerprint,
        image=records.image_info(p.image),
        model=records.ModelInfo(
            name=info.name,
            sha256=info.sha256,
            family=info.family,
            head=info.head,
            imgsz=plan.size,
            letterbox=None if plan.fit == "letterbox" else plan.fit,
        ),
        labels=records.label_records(p.labels, detections),
        detections=tuple(
            records.detection_record(d, i, rows.get(i, ()), verdicts.get(i)) for i, d in enumerate(detections)
        ),
    )
    explanations = tuple(item for one in parts for item in one.explanations)
    return Result(p.ref, record, p.image, explanations), {k: v for one in parts for k, v in one.pictures.items()}


def _evidence(
    plan: Plan, e: Explained, known: Mapping[assess.Key, Explanation], ground: NDArray[np.bool_] | None
) -> dict[assess.Key, Explanation]:
    """Those of `known`, the explanations of one detection, that are judged, with their evidence."""
    judged = {}
    wanted = assess.judged(e.wanted, list(e.maps)) if plan.config.attribution.evidence != "none" else []
    for key in (key for key in wanted if key in known):
        item = known[key]
        d = e.detections[item.detection]
        found = assess.evidence(d, item.attribution, ground, e.tried.get(key, ()), plan.calibrated)
        if plan.config.attribution.evidence == "full":
            mates = [other.attribution for (variant, _), other in known.items() if variant == key[0]]
            name, second = e.again.get(key, ("", None))
            other = None if second is None else map_to_source(second.map.cpu(), e.prepared.letterbox)
            found = assess.full(found, d, item.attribution, mates, name, other)
        judged[key] = replace(item, evidence=found)
    return judged


def _explanation(
    plan: Plan, p: Prepared, variant: Variant, index: int, as_class: bool, found: TargetMap
) -> Explanation:
    method, gradient = variant
    square = found.map.cpu().numpy()
    if not np.isfinite(square).all() or not math.isfinite(found.value_at_input):
        raise ImageError("not_finite", f"the map of box {index} by {method} holds numbers that are not finite")
    source = map_to_source(square, p.letterbox)
    total = float(square.sum())
    notes = found.notes
    if found.dtype != plan.dtype and gradient == "plain":
        notes += ("half precision did not converge: done again in fp32",)
    attribution = Attribution(
        method=method,
        gradient=gradient,
        target=found.target,
        baseline=METHODS[method].baseline or "+".join(list(p.baselines)[: None if method == "expected" else 1]),
        precision=next(name for name, dtype in DTYPES.items() if dtype == found.dtype),
        path=_path(plan, method, found),
        map=source,
        total=total,
        padding_sum=total - float(source.sum(dtype=np.float64)),
        padding_mass=_padding_mass(square, p.letterbox),
        value_at_input=found.value_at_input,
        value_at_baseline=found.value_at_baseline,
        evaluations=found.evaluations,
        completeness_error=found.completeness_error,
        error_bound=found.error_bound,
        map_error=found.map_error,
        converged=found.converged,
        notes=notes,
    )
    return Explanation(index, plan.info.names[found.target.class_id], as_class, attribution)


def _path(plan: Plan, method: str, found: TargetMap) -> str:
    if method in BLACK_BOX_METHODS:
        return "black box"
    if found.layer is not None:
        return f"layer {found.layer}"
    return "sparse" if plan.info.sparse else "full"


def _padding_mass(square: Any, box: Letterbox) -> float:
    magnitude = np.abs(square)
    inner = magnitude[box.top : box.top + box.inner_height, box.left : box.left + box.inner_width]
    return max(float(magnitude.sum()) - float(inner.sum()), 0.0)


def _compared(a: Attribution) -> str:
    """What a caption names beside the method: the layer it looked at, or the pictures that show nothing."""
    if a.path.startswith("layer "):
        return a.path
    names = a.baseline.removeprefix("none").removeprefix("auto:").split("+")
    return "+".join(names) if len(names) <= MOST_NAMED else f"{len(names)} pictures"


def _warning(converged: bool, judged: Evidence | None) -> str | None:
    """What must not be missed: in words that ask for another look, and clear nothing."""
    if not converged:
        return "not converged: read with care"
    if judged is None or judged.verdict == "supported":
        return None
    return f"{judged.verdict}, look again: {judged.reasons[0]}"


def _overlay(plan: Plan, image: Image, d: Detection, group: Sequence[Explanation]) -> bytes:
    first = group[0].attribution
    bounds = [g.attribution.error_bound for g in group if g.attribution.error_bound is not None]
    converged = all(g.attribution.converged is not False for g in group)
    made = first.method if first.gradient == "plain" else f"{first.method} · {first.gradient}"
    telling = first.method in (*LAYER_METHODS, *BLACK_BOX_METHODS) or first.gradient != "plain"
    said = first.notes if telling and len(group) == 1 else ()
    what = " · ".join(part for part in (made, _compared(first), *said) if part)
    if group[0].as_class:
        what = f"as {group[0].class_name} · {what}"
    elif first.target.other is not None:
        what = f"{d.class_name}, not {plan.info.names[first.target.other]} · {what}"
    elif first.target.kind != "class" and len(group) == 1:
        what = f"{first.target.kind} · {what}"
    judged = group[0].evidence
    if judged is not None and judged.verdict == "supported":
        what = f"supported: {judged.reasons[0]} · {what}"
    if d.match is not None and d.kind != "missed":
        what += f" · by the labels: {d.match.status}"
    common: dict[str, Any] = {
        "box": d.box,
        "label": d.class_name if d.kind == "detection" else f"{d.kind} {d.class_name}",
        "dashed": d.kind != "detection",
        "score": d.score,
        "caption": f"{what} · error ≤ {100 * max(bounds):.1f} %" if bounds else what,
        "warning": _warning(converged, judged),
        "strip": plan.config.output.strip,
    }
    if len(group) > 1:
        edges = {g.attribution.target.kind: g.attribution.map for g in group}
        near = {edge: near_edge(values, d.box, edge) for edge, values in edges.items()}
        thirds = ", ".join(f"{edge} {share:.0%}" for edge, share in near.items() if share is not None)
        common["caption"] += f" · of what moves an edge, its own third of the box has: {thirds}"
        drawn = overlays.draw_edges(
            image.pixels, edges, unit=unit(first.method, first.target.kind, first.gradient), **common
        )
    else:
        drawn = overlays.draw(
            image.pixels, first.map, unit=unit(first.method, first.target.kind, first.gradient), **common
        )
    return overlays.encode(drawn)
