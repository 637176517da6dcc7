"""Detectors: one file a family of heads, one entry in `HEADS`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from detxai import _ultralytics  # noqa: F401  (before any ultralytics.*)
from detxai.data import Checkpoint, Target
from detxai.detectors.anchor_based import AnchorBased
from detxai.detectors.anchor_free import AnchorFree
from detxai.detectors.base import EDGES, Candidates, Detector, ModelInfo, Pin, convolutions
from detxai.detectors.black_box import BlackBox
from detxai.detectors.open_vocabulary import OpenVocabulary
from detxai.detectors.rtdetr import RTDETR
from detxai.errors import ModelError

__all__ = [
    "EDGES",
    "HEADS",
    "Candidates",
    "Detector",
    "ModelInfo",
    "Pin",
    "build",
    "closeness",
    "contrasting",
    "convolutions",
    "reported",
    "self_test",
    "similarity",
]

#: Class of the last layer -> detector.
HEADS: dict[str, Callable[..., Detector]] = {
    "Detect": AnchorFree,
    "Segment": AnchorFree,
    "Segment26": AnchorFree,
    "Pose": AnchorFree,
    "Pose26": AnchorFree,
    "OBB": AnchorFree,
    "OBB26": AnchorFree,
    "v10Detect": AnchorFree,
    "WorldDetect": OpenVocabulary,
    "YOLOEDetect": OpenVocabulary,
    "YOLOESegment": OpenVocabulary,
    "YOLOESegment26": OpenVocabulary,
    "RTDETRDecoder": RTDETR,
    "legacy": AnchorBased,
    "darknet": AnchorBased,
    "export": BlackBox,
}

#: Two ways to the same logit, in float32, differ by less than this.
SAME = 1e-3
#: An end-to-end head keeps as many before classes are filtered, whatever fewer the user asks for.
HEAD_MAX_DET = 300


def build(checkpoint: Checkpoint, branch: str | None = None) -> Detector:
    """The detector for `checkpoint`. Raises ModelError for a head that cannot be explained."""
    if checkpoint.kind == "ultralytics":
        layers = getattr(checkpoint.module, "model", None)
        head = type(layers[-1]).__name__ if layers is not None else type(checkpoint.module).__name__
    else:
        head = checkpoint.kind
    if head not in HEADS:
        raise ModelError(
            f"{checkpoint.name} ends in a {head} head, which is not a detector that detxai explains.",
            f"Supported: {', '.join(HEADS)}.",
        )
    try:
        return HEADS[head](checkpoint, branch)
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ModelError(f"{checkpoint.name}: its {head} head is not built as expected: {error!s:.200}") from error


def contrasting(values: Callable[[Tensor, Sequence[tuple[int, Target]]], Tensor]) -> Callable[..., Tensor]:
    """`values` of a detector, for targets of the kind `contrast` too: the difference of two class logits."""

    def both(x: Tensor, pins: Sequence[tuple[int, Target]]) -> Tensor:
        differences = [i for i, (_, target) in enumerate(pins) if target.kind == "contrast"]
        if not differences:
            return values(x, pins)
        first = [(row, replace(t, kind="class") if t.kind == "contrast" else t) for row, t in pins]
        others = [(row, replace(t, kind="class", class_id=t.other or 0)) for row, t in (pins[i] for i in differences)]
        found = values(x, [*first, *others])
        at = torch.tensor(differences, device=found.device)
        return found[: len(pins)].index_add(0, at, found[len(pins) :], alpha=-1)

    return both


def self_test(detector: Detector, x: Tensor) -> float:
    """Largest |gradient| of the strongest class logit on x (1, 3, size, size).

    Raises ModelError when it is zero or not finite: then no gradient method can work (a detached or quantised head);
    or when the sparse value is not that of the whole network: it has layers of another kind than is known here.
    """
    found = detector.predict(x)[0]
    anchor, class_id = divmod(int(found.logits.argmax()), found.logits.shape[1])
    target = Target(anchor, int(found.levels[anchor]), "class", class_id, context=found.context)
    x = x.detach().clone().requires_grad_(True)
    value = detector.values(x, [Pin(0, target)])[0]
    whole = float(found.logits[anchor, class_id])
    if abs(value.item() - whole) > SAME * max(abs(whole), 1.0):
        raise ModelError(f"{detector.info.name}: {value.item():.6g} where the whole network says {whole:.6g}.")
    (gradient,) = torch.autograd.grad(value, x)
    largest = float(gradient.abs().max())
    if not 0 < largest < float("inf"):
        raise ModelError(
            f"{detector.info.name}: the gradient at the input is {largest}; the model cannot be explained by gradients."
        )
    return largest


def reported(
    found: Candidates, *, conf: float, iou: float, max_det: int, classes: list[int] | None = None
) -> list[tuple[int, int]]:
    """(anchor, class_id) of the predictions that the model reports, best first, as ultralytics' `predict` would."""
    if found.end_to_end:
        return _top(found, conf, max_det, classes)
    from ultralytics.utils.nms import non_max_suppression

    rotated = found.rotated is not None
    corners = found.boxes
    boxes = (
        found.rotated[:, :4]
        if found.rotated is not None
        else torch.cat([(corners[:, :2] + corners[:, 2:]) / 2, corners[:, 2:] - corners[:, :2]], -1)
    )
    columns: list[Any] = [boxes, found.scores] + ([found.rotated[:, 4:]] if found.rotated is not None else [])
    rows, kept = non_max_suppression(
        torch.cat(columns, -1).T[None],
        conf, iou, classes=classes, max_det=max_det, nc=found.scores.shape[1], rotated=rotated, return_idxs=True,
        max_time_img=60.0,
    )  # fmt: skip
    return [(int(a), int(c)) for a, c in zip(kept[0], rows[0][:, 5], strict=True)]


def similarity(found: list[Candidates], pins: Sequence[tuple[int, Target]]) -> Tensor:
    """(len(pins),): the best IoU × score of the target's class among the predictions of the pin's row.

    Boxes are compared in letterbox pixels, before NMS (Petsiuk et al. 2021).
    """
    return torch.stack([_closest(found[row].boxes, found[row].scores[:, t.class_id], t) for row, t in pins])


def closeness(detector: Detector, x: Tensor, pins: Sequence[tuple[int, Target]]) -> Tensor:
    """`similarity` to what `detector` predicts on x (batch, 3, size, size), without the scores of other classes."""
    classes = sorted({target.class_id for _, target in pins})
    boxes, scores = detector.scores(x, classes)
    return torch.stack([_closest(boxes[row], scores[row, :, classes.index(t.class_id)], t) for row, t in pins])


def _closest(boxes: Tensor, scores: Tensor, target: Target) -> Tensor:
    near = boxes.new_tensor(target.box)
    overlap = (torch.minimum(boxes[:, 2:], near[2:]) - torch.maximum(boxes[:, :2], near[:2])).clamp(min=0).prod(1)
    area = (boxes[:, 2:] - boxes[:, :2]).prod(1) + (near[2:] - near[:2]).prod()
    return (overlap / (area - overlap).clamp(min=1e-9) * scores).max()


def _top(found: Candidates, conf: float, max_det: int, classes: list[int] | None) -> list[tuple[int, int]]:
    k = min(max(max_det, HEAD_MAX_DET), len(found.scores))
    anchors = found.scores.amax(1).topk(k).indices
    scores, flat = found.scores[anchors].flatten().topk(k)
    pairs = [divmod(int(i), found.scores.shape[1]) for i in flat[scores > conf]]
    return [(int(anchors[a]), c) for a, c in pairs if classes is None or c in classes][:max_det]
