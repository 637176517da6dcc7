"""Which predictions on an image are explained: what the model reports, candidates, given boxes, misses."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from detxai.config.settings import DetectionConfig
from detxai.errors import ImageError
from detxai.inputs import labels
from detxai.inputs.letterbox import boxes_to_source
from detxai.models.detector import Candidates
from detxai.models.predictions import reported
from detxai.values import Box, ClassScore, Detection, Label, Letterbox, Match, Nearest


@dataclass(frozen=True)
class Selector:
    """Chooses what is explained: under which `settings`, of which class `names`, only of `classes` (None: of all)."""

    settings: DetectionConfig
    names: Mapping[int, str]
    classes: Collection[int] | None

    def __call__(
        self,
        candidates: Candidates,
        letterbox: Letterbox,
        drawn: Sequence[Label] | None = None,
        given: Sequence[Label] | None = None,
    ) -> tuple[Detection, ...]:
        """Everything that is explained: detections, candidates, then misses, each by falling score.

        `candidates`: all predictions on the image; `drawn`: its labels, None where it has none; `given`: the boxes of
        another system, None to take the model's own. The boxes of both are in source pixels.
        """
        on_image = _Predictions(candidates, letterbox, self.names)
        chosen = self._reported(on_image) if given is None else self._given(on_image, given)
        if drawn is not None:
            chosen = _marked(chosen, drawn)
            chosen += self._missed(on_image, chosen, drawn)
        return tuple(chosen)

    def _reported(self, on_image: _Predictions) -> list[Detection]:
        """What passes the threshold and, if asked for, candidates: where an image has no box at all, its strongest."""
        s, candidates = self.settings, on_image.candidates
        least = s.conf if s.candidates is None else s.candidates
        kept = reported(candidates, conf=least, iou=s.iou, max_det=s.max_det, classes=self.classes)
        if not kept and s.candidates is not None:
            kept = reported(candidates, conf=0.0, iou=s.iou, max_det=1, classes=self.classes)
        scores = on_image.scores
        return [on_image.detection(a, c, "detection" if scores[a, c] > s.conf else "candidate") for a, c in kept]

    def _given(self, on_image: _Predictions, boxes: Sequence[Label]) -> list[Detection]:
        """Boxes of another system, each pinned to the prediction of its class with the best IoU."""
        pinned = []
        for box in boxes:
            assert box.class_id is not None, "a reader of predictions refuses other classes"
            if self.classes is None or box.class_id in self.classes:
                own = on_image.at(box.box, box.class_id, "detection")
                pinned.append(own if box.score is None else replace(own, score=box.score))
        return sorted(pinned, key=lambda d: -d.score)

    def _missed(self, on_image: _Predictions, marked: Sequence[Detection], drawn: Sequence[Label]) -> list[Detection]:
        """The labels that no detection is on, of classes that were asked for, at the predictions nearest to them."""
        hit = _taken(d for d in marked if d.kind == "detection")
        wanted = self.names if self.classes is None else self.classes
        misses = []
        for k, label in enumerate(drawn):
            if k not in hit and label.class_id is not None and label.class_id in wanted:
                miss = on_image.at(label.box, label.class_id, "missed")
                assert miss.nearest is not None
                misses.append(replace(miss, match=Match("missed", k, miss.nearest.iou)))
        return sorted(misses, key=lambda d: -d.score)


class _Predictions:
    """The predictions on one image, brought to the host, with their boxes in source pixels."""

    def __init__(self, candidates: Candidates, letterbox: Letterbox, names: Mapping[int, str]) -> None:
        self.candidates, self.letterbox, self.names = candidates, letterbox, names
        self.boxes = boxes_to_source(candidates.boxes.numpy().reshape(-1, 4), letterbox)
        self.scores, self.logits, self.levels = candidates.scores, candidates.logits, candidates.levels

    def at(self, box: Box, class_id: int, kind: str) -> Detection:
        """`box`, explained at the prediction of the class that is nearest to it."""
        anchor, iou = labels.nearest(self.boxes, self.scores[:, class_id], box)
        own = self.detection(anchor, class_id, kind)
        return replace(own, box=box, obb=None, nearest=Nearest(own.box, iou, own.score))

    def detection(self, anchor: int, class_id: int, kind: str) -> Detection:
        """The prediction of that number as one of its classes."""
        names, scores, logits = self.names, self.scores[anchor], self.logits[anchor]
        order = scores.argsort(descending=True, stable=True).tolist()
        x0, y0, x1, y1 = self.boxes[anchor].tolist()
        if x0 > x1 or y0 > y1:
            raise ImageError("impossible", f"the model reports a box from ({x0:g}, {y0:g}) to ({x1:g}, {y1:g})")
        return Detection(
            anchor,
            int(self.levels[anchor]),
            class_id,
            names[class_id],
            float(scores[class_id]),
            float(logits[class_id]),
            (x0, y0, x1, y1),
            tuple(ClassScore(i, names[i], float(scores[i]), float(logits[i])) for i in order),
            kind,
            self._rotated(anchor),
        )

    def _rotated(self, anchor: int) -> tuple[float, float, float, float, float] | None:
        """cx, cy, w, h in source pixels and radians; None where boxes are upright."""
        if self.candidates.rotated is None:
            return None
        cx, cy, w, h, angle = (float(v) for v in self.candidates.rotated[anchor])
        gain, left, top = self.letterbox.gain, self.letterbox.left, self.letterbox.top
        return (cx - left) / gain, (cy - top) / gain, w / gain, h / gain, angle


def _marked(chosen: Sequence[Detection], drawn: Sequence[Label]) -> list[Detection]:
    """`chosen` with how each meets the labels; candidates may only take what detections leave."""
    marked: list[Detection] = []
    for kind in ("detection", "candidate"):
        taken = _taken(marked)
        group = [d for d in chosen if d.kind == kind]
        parts = [d.box for d in group], [d.class_id for d in group], [d.score for d in group]
        matches = labels.match(*parts, drawn, taken)
        marked += [replace(d, match=m) for d, m in zip(group, matches, strict=True)]
    return marked


def _taken(marked: Iterable[Detection]) -> set[int]:
    """The labels that these are on."""
    matches = [d.match for d in marked]
    return {m.label for m in matches if m is not None and m.label is not None and m.status == "true"}
