"""Which other box a report rests on: each neighbour is taken out of the picture in turn, one forward each.

In a full bag objects lie on one another, and a detector may take a thing for a knife since scissors lie beside it.
What is replaced is a neighbour as far as it lies outside the box itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from detxai.evidence.measures import log_sigmoid, sigmoid
from detxai.evidence.model import Neighbour
from detxai.values import Box, Detection, iou, shared_area

#: A neighbour overlaps the box when that has grown by this share of its sides, each way.
REACH = 0.5
#: From this IoU on two boxes are of one object.
SAME = 0.5
#: So many are tried, those that cover most of the grown box first.
MOST = 4
#: A report rests on a neighbour where less than this share of its score stays without it.
HALF = 0.5


def near(index: int, boxes: Sequence[Box], among: Iterable[int]) -> list[int]:
    """The numbers `among` all of the neighbours of box `index` of `boxes` (xyxy, one frame), the closest first."""
    x0, y0, x1, y1 = boxes[index]
    grown = (x0 - REACH * (x1 - x0), y0 - REACH * (y1 - y0), x1 + REACH * (x1 - x0), y1 + REACH * (y1 - y0))
    shared = {
        k: shared_area(grown, boxes[k])
        for k in among
        if k != index and shared_area(grown, boxes[k]) > 0 and iou(boxes[index], boxes[k]) < SAME
    }
    return sorted(shared, key=lambda k: (-shared[k], k))[:MOST]


def of_neighbours(logit: float, without: Mapping[int, float], detections: Sequence[Detection]) -> tuple[Neighbour, ...]:
    """What is left of a class with `logit` `without` each neighbour (logits by number), the least first."""
    rows = (
        Neighbour(
            detection=k,
            class_id=detections[k].class_id,
            class_name=detections[k].class_name,
            logit=left,
            score=sigmoid(left),
            kept=math.exp(log_sigmoid(left) - log_sigmoid(logit)),
        )
        for k, left in without.items()
    )
    return tuple(sorted(rows, key=lambda row: (row.kept, row.detection)))


def rests_on(neighbours: Sequence[Neighbour]) -> str | None:
    """In words, the neighbour without which less than half of the score stays; None where there is none such."""
    if not neighbours or neighbours[0].kept >= HALF:
        return None
    least = neighbours[0]
    left = f"without that box ({least.detection}) {least.kept:.0%} of its score stays"
    return f"it rests on the {least.class_name} beside it: {left}"
