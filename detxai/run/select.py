"""Which predictions on an image are explained: what the model reports, candidates, given boxes, misses."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from detxai.errors import ImageError
from detxai.inputs import labels
from detxai.inputs.letterbox import boxes_to_source
from detxai.models.detector import Candidates
from detxai.models.predictions import reported
from detxai.run.plan import Plan
from detxai.values import Box, ClassScore, Detection, Label, Letterbox, Match, Nearest


def selected(
    plan: Plan,
    found: Candidates,
    letterbox: Letterbox,
    drawn: Sequence[Label] | None = None,
    given: Sequence[Label] | None = None,
) -> tuple[Detection, ...]:
    """Everything that is explained: detections, candidates, then misses, each by falling score.

    `found`: all predictions on the image; `drawn`: its labels, None where it has none; `given`: the boxes of another
    system, None to take the model's own. The boxes of both are in source pixels.
    """
    at = _Image(plan, found, letterbox)
    chosen = at.reported() if given is None else at.given(given)
    if drawn is not None:
        chosen = _marked(chosen, drawn)
        chosen += at.missed(chosen, drawn)
    return tuple(chosen)


class _Image:
    """The predictions on one image, with their boxes in source pixels."""

    def __init__(self, plan: Plan, found: Candidates, letterbox: Letterbox) -> None:
        self.plan, self.found, self.letterbox = plan, found, letterbox
        self.boxes = boxes_to_source(found.boxes.cpu().numpy().reshape(-1, 4), letterbox)

    def reported(self) -> list[Detection]:
        """What passes the threshold and, if asked for, candidates: where an image has no box at all, its strongest."""
        d, found = self.plan.config.detection, self.found
        least = d.conf if d.candidates is None else d.candidates
        kept = reported(found, conf=least, iou=d.iou, max_det=d.max_det, classes=self.plan.classes)
        if not kept and d.candidates is not None:
            kept = reported(found, conf=0.0, iou=d.iou, max_det=1, classes=self.plan.classes)
        return [self._prediction(a, c, "detection" if found.scores[a, c] > d.conf else "candidate") for a, c in kept]

    def given(self, boxes: Sequence[Label]) -> list[Detection]:
        """Boxes of another system, each pinned to the prediction of its class with the best IoU."""
        pinned = []
        for box in boxes:
            assert box.class_id is not None, "a reader of predictions refuses other classes"
            if self.plan.classes is None or box.class_id in self.plan.classes:
                found = self._at(box.box, box.class_id, "detection")
                pinned.append(found if box.score is None else replace(found, score=box.score))
        return sorted(pinned, key=lambda d: -d.score)

    def missed(self, marked: Sequence[Detection], drawn: Sequence[Label]) -> list[Detection]:
        """The labels that no detection is on, of classes that were asked for, at the predictions nearest to them."""
        hit = _taken(d for d in marked if d.kind == "detection")
        wanted = self.plan.info.names if self.plan.classes is None else self.plan.classes
        misses = []
        for k, label in enumerate(drawn):
            if k not in hit and label.class_id is not None and label.class_id in wanted:
                miss = self._at(label.box, label.class_id, "missed")
                assert miss.nearest is not None
                misses.append(replace(miss, match=Match("missed", k, miss.nearest.iou)))
        return sorted(misses, key=lambda d: -d.score)

    def _at(self, box: Box, class_id: int, kind: str) -> Detection:
        """`box`, explained at the prediction of the class that is nearest to it."""
        anchor, iou = labels.nearest(self.boxes, self.found.scores[:, class_id].cpu(), box)
        own = self._prediction(anchor, class_id, kind)
        return replace(own, box=box, obb=None, nearest=Nearest(own.box, iou, own.score))

    def _prediction(self, anchor: int, class_id: int, kind: str) -> Detection:
        found, names = self.found, self.plan.info.names
        scores, logits = found.scores[anchor].cpu(), found.logits[anchor].cpu()
        order = scores.argsort(descending=True, stable=True).tolist()
        obb = None
        if found.rotated is not None:
            cx, cy, w, h, angle = (float(v) for v in found.rotated[anchor].cpu())
            gain, left, top = self.letterbox.gain, self.letterbox.left, self.letterbox.top
            obb = ((cx - left) / gain, (cy - top) / gain, w / gain, h / gain, angle)
        x0, y0, x1, y1 = self.boxes[anchor].tolist()
        if x0 > x1 or y0 > y1:
            raise ImageError("impossible", f"the model reports a box from ({x0:g}, {y0:g}) to ({x1:g}, {y1:g})")
        return Detection(
            anchor,
            int(found.levels[anchor]),
            class_id,
            names[class_id],
            float(scores[class_id]),
            float(logits[class_id]),
            (x0, y0, x1, y1),
            tuple(ClassScore(i, names[i], float(scores[i]), float(logits[i])) for i in order),
            kind,
            obb,
        )


def _marked(found: Sequence[Detection], drawn: Sequence[Label]) -> list[Detection]:
    """`found` with how each meets the labels; candidates may only take what detections leave."""
    marked: list[Detection] = []
    for kind in ("detection", "candidate"):
        taken = _taken(marked)
        group = [d for d in found if d.kind == kind]
        parts = [d.box for d in group], [d.class_id for d in group], [d.score for d in group]
        matches = labels.match(*parts, drawn, taken)
        marked += [replace(d, match=m) for d, m in zip(group, matches, strict=True)]
    return marked


def _taken(marked: Iterable[Detection]) -> set[int]:
    """The labels that these are on."""
    matches = [d.match for d in marked]
    return {m.label for m in matches if m is not None and m.label is not None and m.status == "true"}
