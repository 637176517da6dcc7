"""What a model reports of all its predictions, and how alike they are to one."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from detxai.models import upstream  # noqa: F401  (before any ultralytics.*)
from detxai.models.detector import Candidates, Detector
from detxai.values import Target

#: An end-to-end head keeps as many before classes are filtered, whatever fewer the user asks for.
HEAD_MAX_DET = 300


def predictions_on(detector: Detector, x: Tensor) -> Candidates:
    """All predictions on one picture x (c, rows, columns), float in [0, 1], on the host.

    Raises ImageError where one is not finite, or a score is not in [0, 1].
    """
    (made,) = detector.predict(x[None].contiguous(memory_format=torch.channels_last))
    return made.brought()


def reported(
    candidates: Candidates, *, conf: float, iou: float, max_det: int, classes: Collection[int] | None = None
) -> list[tuple[int, int]]:
    """(anchor, class_id) of the predictions that the model reports, best first, as ultralytics' `predict` would."""
    if candidates.end_to_end:
        return _top(candidates, conf, max_det, classes)
    from ultralytics.utils.nms import non_max_suppression

    rotated = candidates.rotated is not None
    corners = candidates.boxes
    boxes = (
        candidates.rotated[:, :4]
        if candidates.rotated is not None
        else torch.cat([(corners[:, :2] + corners[:, 2:]) / 2, corners[:, 2:] - corners[:, :2]], -1)
    )
    columns: list[Any] = [boxes, candidates.scores] + (
        [candidates.rotated[:, 4:]] if candidates.rotated is not None else []
    )
    rows, kept = non_max_suppression(
        torch.cat(columns, -1).T[None],
        conf, iou, classes=classes, max_det=max_det, nc=candidates.scores.shape[1], rotated=rotated, return_idxs=True,
        max_time_img=60.0,
    )  # fmt: skip
    return [(int(a), int(c)) for a, c in zip(kept[0].tolist(), rows[0][:, 5].tolist(), strict=True)]


def similarity(candidates: list[Candidates], pins: Sequence[tuple[int, Target]]) -> Tensor:
    """(len(pins),): the best IoU × score of the target's class among the predictions of the pin's row.

    Boxes are compared in letterbox pixels, before NMS (Petsiuk et al. 2021).
    """
    return torch.stack([_closest(candidates[row].boxes, candidates[row].scores[:, t.class_id], t) for row, t in pins])


def closeness(detector: Detector, x: Tensor, pins: Sequence[tuple[int, Target]]) -> Tensor:
    """`similarity` to what `detector` predicts on x (batch, 3, rows, columns), without the scores of other classes."""
    classes = sorted({target.class_id for _, target in pins})
    boxes, scores = detector.scores(x, classes)
    return torch.stack([_closest(boxes[row], scores[row, :, classes.index(t.class_id)], t) for row, t in pins])


def _closest(boxes: Tensor, scores: Tensor, target: Target) -> Tensor:
    near = boxes.new_tensor(target.box)
    overlap = (torch.minimum(boxes[:, 2:], near[2:]) - torch.maximum(boxes[:, :2], near[:2])).clamp(min=0).prod(1)
    area = (boxes[:, 2:] - boxes[:, :2]).prod(1) + (near[2:] - near[:2]).prod()
    return (overlap / (area - overlap).clamp(min=1e-9) * scores).max()


def _top(candidates: Candidates, conf: float, max_det: int, classes: Collection[int] | None) -> list[tuple[int, int]]:
    k = min(max(max_det, HEAD_MAX_DET), len(candidates.scores))
    anchors = candidates.scores.amax(1).topk(k).indices
    scores, flat = candidates.scores[anchors].flatten().topk(k)
    pairs, best = [divmod(i, candidates.scores.shape[1]) for i in flat[scores > conf].tolist()], anchors.tolist()
    return [(best[a], c) for a, c in pairs if classes is None or c in classes][:max_det]
