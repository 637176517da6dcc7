"""What is judged: the detections of one image, what is known to be true of them, and what each map of them is worth."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from detxai.evaluation import metrics, priors
from detxai.evaluation.masks import Parts
from detxai.evaluation.options import Options
from detxai.evaluation.perturbation import ranking
from detxai.inputs import labels
from detxai.inputs.letterbox import map_to_source
from detxai.run.results import Result
from detxai.values import Attribution, Box, Image, ImageRef, Label, Letterbox, Map, Pixels, Target

#: Longer side of the maps that are compared with each other, and of the pictures on the contact sheet.
THUMB, PANEL = 400, 400
#: A picture on the contact sheet shows this many sides of the box, and at least this share of the image's longer side.
AROUND, LEAST = 2.2, 0.35


@dataclass(frozen=True, eq=False)
class Subject:
    """One detection. `label`: the labelled box it was matched with; `parts`: that item's part mask, source pixels;
    `window`: left, top, right, bottom of what the contact sheet shows of the image, source pixels."""

    number: int
    class_id: int
    class_name: str
    score: float
    box: Box
    target: Target
    label: Label | None = None
    parts: NDArray[np.uint8] | None = None
    window: tuple[int, int, int, int] = (0, 0, 1, 1)


@dataclass(frozen=True, eq=False)
class Reading:
    """What one map of one detection says of itself, before the network is asked again.

    `rank` as `perturbation.ranking` gives it; `thumb`: the map on at most THUMB pixels; `panel`: what of it lies in
    `Subject.window`, PANEL pixels long; `parts`: name -> (share of the positive part, share of the area), in the box.
    """

    numbers: dict[str, float | None]
    parts: dict[str, tuple[float, float]] | None
    rank: NDArray[np.int32]
    thumb: Map
    panel: Map


@dataclass(eq=False)
class Opened:
    """An image under judgement: its pixels, its detections, and the readings of every method so far, one a detection.

    `runners_up`: the second best class of each detection, None where the model has one class; `seed`: even, `seed + 1`
    drew the `ties`; `seconds`: of each method, a detection.
    """

    image: Image
    canvas: Pixels
    box: Letterbox
    subjects: list[Subject]
    runners_up: list[int | None]
    seed: int
    ties: Map
    readings: dict[str, list[Reading]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def ref(self) -> ImageRef:
        return self.image.ref

    def read(
        self, subject: Subject, values: Map, parts: Parts | None, options: Options, **numbers: float | None
    ) -> Reading:
        """The reading of a signed map (height, width) of `subject`; `numbers` are added to its own."""
        box, shares_of_parts = subject.box, None
        own: dict[str, float | None] = {
            "pointing": metrics.pointing(values, box),
            "energy": metrics.energy(values, box),
            "gini": metrics.gini(values),
        }
        if subject.label is not None:
            own["pointing_label"] = metrics.pointing(values, subject.label.box)
            own["energy_label"] = metrics.energy(values, subject.label.box)
        if subject.parts is not None and parts is not None:
            shares = metrics.part_shares(values, subject.parts, box)
            if shares is not None:
                shares_of_parts = {parts.name(subject.class_name, k): pair for k, pair in shares.items()}
                whole = [sum(column) for column in zip(*shares.values(), strict=True)]
                own["parts"] = whole[0] / whole[1] if shares else None
        left, top, right, bottom = subject.window
        gain = self.box.inner_width / self.box.width
        sigma = options.smooth * gain * ((box[2] - box[0]) * (box[3] - box[1])) ** 0.5
        rank = ranking(values if options.order == "signed" else abs(values), self.box, self.ties, sigma)
        panel = resized(values[top:bottom, left:right], PANEL)
        return Reading(own | numbers, shares_of_parts, rank, resized(values, min(THUMB, max(values.shape))), panel)


def opened(result: Result, letterboxed: Callable[[Pixels], tuple[Pixels, Letterbox]], seed: int) -> Opened:
    """The image of a `result` that did not fail, its detections without any labels yet."""
    image, record = result.image, result.record
    assert image is not None and record.detections is not None
    canvas, box = letterboxed(image.seen)
    targets = {e.detection: e.attribution.target for e in result.explanations}
    subjects = [
        Subject(
            d.id,
            d.class_id,
            d.class_name,
            d.score,
            d.box,
            replace(targets[i], context=None),
            window=_window(d.box, image.width, image.height),
        )
        for i, d in enumerate(record.detections)
    ]
    others = [next((c.class_id for c in d.top_classes if c.class_id != d.class_id), None) for d in record.detections]
    # By content, not by order: resumed and repeated runs draw the same.
    own = 2 * (int(image.sha256[:8], 16) + seed)
    return Opened(image, canvas, box, subjects, others, own, priors.random_map(image.height, image.width, own + 1))


def labelled(subjects: Sequence[Subject], drawn: labels.Drawn, image: Image, parts: Parts | None) -> list[Subject]:
    """`subjects`, each that is a true detection with its label and part mask. Raises ImageError for a wrong file."""
    known = drawn.at(image.width, image.height)
    boxes, classes, scores = ([getattr(s, key) for s in subjects] for key in ("box", "class_id", "score"))
    matches = labels.match(boxes, classes, scores, known)
    labelled_subjects = []
    for subject, match in zip(subjects, matches, strict=True):
        if match.status == "true" and match.label is not None:
            mask = parts.read(image.ref, match.label, image.height, image.width) if parts else None
            subject = replace(subject, label=known[match.label], parts=mask)
        labelled_subjects.append(subject)
    return labelled_subjects


def _window(box: Box, width: int, height: int) -> tuple[int, int, int, int]:
    """A square around `box`, cut at the image's borders."""
    side = max(AROUND * max(box[2] - box[0], box[3] - box[1]), LEAST * max(width, height))
    x, y = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
    left, top = max(0, int(x - side / 2)), max(0, int(y - side / 2))
    return left, top, max(left + 1, min(width, int(x + side / 2))), max(top + 1, min(height, int(y + side / 2)))


def resized(values: Map, long: int) -> Map:
    """`values` (height, width) with a longer side of `long` pixels, their sum kept."""
    height, width = values.shape
    gain = long / max(height, width)
    size = max(1, round(height * gain)), max(1, round(width * gain))
    return map_to_source(values, Letterbox((0, 0), size[1], size[0], 1.0, 0, 0, width, height))


def costs(attribution: Attribution) -> dict[str, float | None]:
    """What a map cost and how complete it is."""
    return {
        "completeness_error": attribution.completeness_error,
        "evaluations": float(attribution.evaluations),
    }
