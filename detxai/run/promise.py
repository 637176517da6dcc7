"""The promise of a list: the scores of right boxes on labelled images, one forward an image and no map."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch

from detxai.attribution.baselines import picture
from detxai.evidence.promise import FLOOR, Promise, threshold
from detxai.models.predictions import predictions_on
from detxai.run.calibration_lookup import box_settings
from detxai.run.plan import Plan
from detxai.run.prepare import prepared_image
from detxai.run.results import PreparedImage
from detxai.run.select import Selector
from detxai.values import Detection, ImageRef


@dataclass
class ItemScores:
    """Of labelled pictures: `items`, the score of the right box on each item of those that have one (0: none);
    `boxes`, the scores of all boxes, picture by picture."""

    items: list[list[float]] = field(default_factory=list)
    boxes: list[list[float]] = field(default_factory=list)

    def add(self, detections: Iterable[Detection]) -> None:
        """Count a labelled picture by what the selector makes of it: its boxes, and a miss for every other item."""
        scores = list(detections)
        on_items = [d for d in scores if d.match and d.match.status in ("true", "missed")]
        self.boxes.append([d.score for d in scores if d.kind != "missed"])
        if on_items:
            self.items.append([0.0 if d.kind == "missed" else d.score for d in on_items])

    def promise(self, recall: float, settings: dict[str, str]) -> Promise:
        """The promise of `recall` from these pictures. Raises UsageError where they do not carry it."""
        least = threshold(self.items, recall)
        scores = [score for own in self.items for score in own]
        return Promise(
            recall=recall,
            threshold=least,
            pictures=len(self.items),
            items=len(scores),
            listed=sum(score > least for score in scores),
            boxes=sum(score > least for own in self.boxes for score in own) / len(self.boxes),
            settings=settings,
        )


def item_scores(plan: Plan, refs: Iterable[ImageRef]) -> ItemScores:
    """The scores on the labelled images among `refs`, down to FLOOR; what cannot be read or has no labels is left out.

    The run is `plan`'s, so that the boxes are those that `explain` would list.
    """
    settings = plan.config.detection.model_copy(update={"conf": FLOOR, "candidates": None})
    select, scores = Selector(settings, plan.info.names, plan.classes), ItemScores()
    for ref in refs:
        item = prepared_image(plan, ref, None)
        if isinstance(item, PreparedImage) and item.labels is not None:
            scores.add(_boxes(plan, item, select))
    return scores


@torch.no_grad()
def _boxes(plan: Plan, item: PreparedImage, select: Selector) -> tuple[Detection, ...]:
    candidates = predictions_on(plan.detector, picture(item.canvas, plan.device))
    return select(candidates, item.letterbox, item.labels)


def promised(plan: Plan, refs: Iterable[ImageRef], recall: float) -> Promise:
    """The promise that a list of `plan`'s boxes holds `recall` of the items. Raises UsageError as `threshold` does."""
    settings = box_settings(plan.config, plan.classes or (), plan.fit)
    return item_scores(plan, refs).promise(recall, settings)
