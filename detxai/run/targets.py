"""Which scalars of an image's detections are explained, and in which groups."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

from detxai.evidence.model import Rival
from detxai.inputs.letterbox import boxes_to_letterbox
from detxai.values import Box, Detection, Letterbox, Target

#: What a map is made with: (method, gradient).
Variant = tuple[str, str]


@dataclass(frozen=True, eq=False)
class WantedTarget:
    """A `target` of the image's detection of that number; `as_class`: asked for, not the predicted class."""

    detection: int
    target: Target
    as_class: bool = False


#: A map of a group: which variant, and the number of its target in the group.
MapKey = tuple[Variant, int]


def wanted_targets(
    detections: Sequence[Detection],
    box: Letterbox,
    context: Any,
    kinds: Sequence[str],
    as_class: Sequence[int],
    *,
    contrasts: bool,
) -> Iterator[WantedTarget]:
    """Everything that is to be explained of `detections`, one after the other; `context` as `Candidates` has it."""
    places = boxes_to_letterbox([d.box for d in detections], box) if detections else ()
    for i, (d, place) in enumerate(zip(detections, places, strict=True)):
        own: Box = tuple(place.tolist())
        pinned = Target(d.anchor, d.level, "class", d.class_id, context=context, box=own)
        for kind in kinds:
            if kind != "contrast":
                scale, offset = _to_source(kind, box)
                yield WantedTarget(i, replace(pinned, kind=kind, scale=scale, offset=offset))
        others = [other for other in as_class if other != d.class_id]
        for other in others if "class" in kinds else ():
            yield WantedTarget(i, replace(pinned, class_id=other), as_class=True)
        if contrasts:
            best = runner_up(d)
            for other in dict.fromkeys([*([] if best is None else [best]), *others]):
                yield WantedTarget(i, replace(pinned, kind="contrast", other=other))


def _to_source(kind: str, box: Letterbox) -> tuple[float, float]:
    """(scale, offset) of a target of that kind; edges come in letterbox pixels and are told in source pixels."""
    if kind in ("left", "right"):
        scale = box.width / box.inner_width
        return scale, -box.left * scale
    if kind in ("top", "bottom"):
        scale = box.height / box.inner_height
        return scale, -box.top * scale
    return 1.0, 0.0


def groups(wanted: Sequence[WantedTarget], most: int) -> Iterator[tuple[WantedTarget, ...]]:
    """`wanted` in groups of whole detections with at most `most` targets; more only where one detection has them."""
    group: tuple[WantedTarget, ...] = ()
    for _, of_one in groupby(wanted, lambda item: item.detection):
        own = tuple(of_one)
        if group and len(group) + len(own) > most:
            yield group
            group = ()
        group += own
    if group:
        yield group


def runner_up(d: Detection) -> int | None:
    """The best class at `d` beside its own; None where the model has one."""
    return next((c.class_id for c in d.classes if c.class_id != d.class_id), None)


def rival(d: Detection, class_id: int | None) -> Rival | None:
    """The class `class_id` at `d`, as records name it."""
    names = {c.class_id: c.class_name for c in d.classes}
    return None if class_id is None else Rival(class_id=class_id, class_name=names[class_id])
