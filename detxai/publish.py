"""From an explained image to what is kept of it: maps in source pixels, its record, its pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from detxai import detectors, images, judge, overlays, records, store
from detxai.attribution.methods import PERTURBATION
from detxai.attribution.path import TargetMap
from detxai.attribution.trials import Trial
from detxai.data import Attribution, Detection, Image, ImageRef, Letterbox, Target
from detxai.evidence.measures import ground_mask
from detxai.evidence.model import Evidence
from detxai.plan import DTYPES, EXPECTED_BASELINES, Plan

#: Methods that compare with nothing, or with more than one baseline.
BASELINE_OF = {
    "grad": "none",
    "smoothgrad": "none",
    "inputxgrad": "black",
    "expected": "+".join(EXPECTED_BASELINES),
}


@dataclass(frozen=True, eq=False)
class Explanation:
    """One target of one detection: `attribution.map` is (height, width) in source pixels."""

    detection: int
    class_name: str
    as_class: bool
    attribution: Attribution
    evidence: Evidence | None = None


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
class Prepared:
    ref: ImageRef
    image: Image
    letterbox: Letterbox
    x: torch.Tensor
    baselines: tuple[torch.Tensor, ...]
    baseline: str
    fingerprint: str
    fills: dict[str, torch.Tensor] = field(default_factory=dict)
    ground: tuple[int, int, int] | None = None


@dataclass(frozen=True, eq=False)
class Explained:
    prepared: Prepared
    detections: tuple[Detection, ...]
    wanted: tuple[tuple[int, Target, bool], ...]
    maps: dict[str, list[TargetMap]]
    tried: dict[judge.Key, list[Trial]] = field(default_factory=dict)


def publish(plan: Plan, e: Explained, *, files: bool = True) -> tuple[Result, dict[str, bytes]]:
    """The result of one image and its `files` by name. Raises ValueError where a map is not finite."""
    p, output = e.prepared, plan.config.output
    explanations = tuple(
        _explanation(plan, p, method, i, as_class, found)
        for method, column in e.maps.items()
        for (i, _, as_class), found in zip(e.wanted, column, strict=True)
    )
    explanations = _with_evidence(plan, e, explanations)
    pictures: dict[str, bytes] = {}
    rows: list[list[records.AttributionRecord]] = [[] for _ in e.detections]
    boxed = "box" in plan.config.attribution.target
    for item in explanations:
        a, d = item.attribution, e.detections[item.detection]
        as_class = a.target.class_id if item.as_class else None
        edge = a.target.kind in detectors.EDGES
        shown = "box" if edge and boxed and a.target.kind not in plan.config.attribution.target else a.target.kind
        stem = store.picture_stem(p.ref.path, item.detection, a.method, target=shown, as_class=as_class)
        overlay = f"{stem}.png" if files and output.overlays else None
        if overlay and overlay not in pictures:
            group = [
                o
                for o in explanations
                if o.detection == item.detection
                and o.attribution.method == a.method
                and o.attribution.target.kind in detectors.EDGES
            ]
            pictures[overlay] = _overlay(plan, p.image, d, group if shown == "box" else [item])
        map_name = None
        if files and output.maps != "none":
            own = store.picture_stem(p.ref.path, item.detection, a.method, target=a.target.kind, as_class=as_class)
            suffix, content = store.encode_map(a.map, output.maps)
            map_name = own + suffix
            pictures[map_name] = content
        rows[item.detection].append(
            records.attribution_record(
                a,
                d.box,
                item.class_name,
                as_class=item.as_class,
                overlay=overlay,
                map_name=map_name,
                evidence=item.evidence if item.as_class else None,
            )
        )
    verdicts = {o.detection: o.evidence for o in explanations if o.evidence and not o.as_class}
    info = plan.info
    record = records.Record(
        status="ok",
        fingerprint=p.fingerprint,
        image=records.image_info(p.image),
        model=records.ModelInfo(
            name=info.name, sha256=info.sha256, family=info.family, head=info.head, imgsz=plan.size
        ),
        detections=tuple(records.detection_record(d, i, rows[i], verdicts.get(i)) for i, d in enumerate(e.detections)),
    )
    return Result(p.ref, record, p.image, explanations), pictures


def _with_evidence(plan: Plan, e: Explained, explanations: tuple[Explanation, ...]) -> tuple[Explanation, ...]:
    """`explanations`, in the order of methods and of what is wanted, those that are judged with their evidence."""
    if plan.config.attribution.evidence == "none":
        return explanations
    ground = ground_mask(e.prepared.image.pixels, e.prepared.ground)
    keys: list[judge.Key] = [(method, j) for method in e.maps for j in range(len(e.wanted))]
    known = dict(zip(keys, explanations, strict=True))
    for key in judge.judged(e.wanted, list(e.maps)):
        item = known[key]
        found = judge.evidence(e.detections[item.detection], item.attribution, ground, e.tried.get(key, ()))
        known[key] = replace(item, evidence=found)
    return tuple(known.values())


def _explanation(plan: Plan, p: Prepared, method: str, index: int, as_class: bool, found: TargetMap) -> Explanation:
    square = found.map.cpu().numpy()
    source = images.map_to_source(square, p.letterbox)
    total = float(square.sum())
    notes = found.notes
    if found.dtype != plan.dtype:
        notes += ("half precision did not converge: done again in fp32",)
    attribution = Attribution(
        method=method,
        target=found.target,
        baseline=BASELINE_OF.get(method, p.baseline),
        precision=next(name for name, dtype in DTYPES.items() if dtype == found.dtype),
        path="black box" if method in PERTURBATION else "sparse" if plan.info.sparse else "full",
        map=source,
        total=total,
        padding_sum=total - float(source.sum(dtype=np.float64)),
        padding_mass=_padding_mass(square, p.letterbox),
        value_at_input=found.value_at_input,
        value_at_baseline=found.value_at_baseline,
        evaluations=found.evaluations,
        completeness_error=found.completeness_error,
        error_bound=found.error_bound,
        converged=found.converged,
        notes=notes,
    )
    return Explanation(index, plan.info.names[found.target.class_id], as_class, attribution)


def _padding_mass(square: Any, box: Letterbox) -> float:
    magnitude = np.abs(square)
    inner = magnitude[box.top : box.top + box.inner_height, box.left : box.left + box.inner_width]
    return max(float(magnitude.sum()) - float(inner.sum()), 0.0)


def _overlay(plan: Plan, image: Image, d: Detection, group: Sequence[Explanation]) -> bytes:
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
        "strip": plan.config.output.strip,
    }
    if len(group) > 1:
        drawn = overlays.draw_edges(
            image.pixels, {g.attribution.target.kind: g.attribution.map for g in group}, **common
        )
    else:
        unit = (
            "similarity" if first.method in PERTURBATION else "px" if first.target.kind in detectors.EDGES else "logits"
        )
        drawn = overlays.draw(image.pixels, first.map, unit=unit, **common)
    return overlays.encode(drawn)
