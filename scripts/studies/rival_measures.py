"""What the trade measures of a report to doubt it: forwards, suppressed boxes, gradients, features.

Frames are the letterboxed square's pixels. A report is a box that a detector gave on a picture, and its class.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import study_tools as tools
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, one_hot
from torchvision.ops import complete_box_iou_loss

from detxai.models.detector import Candidates
from detxai.models.heads.anchor_based import AnchorBased
from detxai.models.heads.anchor_free import AnchorFree

#: A box of an altered picture is the same one from this IoU on; NMS drops what overlaps as much.
SAME_BOX = 0.5
#: Suppressed boxes count from this score on.
FAINT = 0.01
#: Boxes that a gradient's loss is summed over: of the report's class, from this IoU and score on.
BESIDE, FAINTEST = 0.45, 1e-4
#: Right reports at a level without which nothing is said of distances there.
FEWEST = 8
SMALLER, SHIFT, BLUR = 0.83, 0.03, 1.0
Numbers = NDArray[np.float64]
Measured = dict[str, float]


def overlaps(boxes: Tensor, box: Tensor) -> Tensor:
    """(n,) IoU of `boxes` (n, 4) with `box` (4,), xyxy."""
    common = (torch.minimum(boxes[:, 2:], box[2:]) - torch.maximum(boxes[:, :2], box[:2])).clamp(min=0).prod(1)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(1) + (box[2:] - box[:2]).prod()
    return common / (areas - common).clamp(min=1e-9)


class Altered:
    """A square picture (3, s, s) seen otherwise: `x` for the network, and its boxes moved back to the square."""

    def __init__(
        self, name: str, x: Tensor, gain: float = 1.0, offset: Sequence[float] = (0, 0), flip: str = ""
    ) -> None:
        self.name, self.x, self.gain, self.flip = name, x, gain, flip
        self.offset = torch.tensor([*offset, *offset], dtype=torch.float32)

    def back(self, boxes: Tensor) -> Tensor:
        """Boxes (n, 4) of the altered picture in the frame of the square."""
        size = self.x.shape[-1]
        if self.flip:
            first = 0 if self.flip == "x" else 1
            boxes = boxes.clone()
            boxes[:, [first, first + 2]] = size - boxes[:, [first + 2, first]]
        return (boxes - self.offset) / self.gain


def alterations(square: NDArray[np.uint8]) -> list[Altered]:
    """The square (s, s, 3), mirrored two ways, smaller, shifted and blurred."""
    size = square.shape[0]
    ground = tuple(float(v) for v in np.median(square.reshape(-1, 3)[:: max(size // 64, 1)], 0))

    def moved(gain: float, by: float) -> NDArray[np.uint8]:
        place = np.array([[gain, 0, by], [0, gain, by]], np.float64)
        return np.asarray(cv2.warpAffine(square, place, (size, size), borderValue=ground), np.uint8)

    border, shift = (1 - SMALLER) * size / 2, SHIFT * size
    return [
        Altered("mirrored", tensor(square[:, ::-1]), flip="x"),
        Altered("upside down", tensor(square[::-1]), flip="y"),
        Altered("smaller", tensor(moved(SMALLER, border)), SMALLER, (border, border)),
        Altered("shifted", tensor(moved(1.0, shift)), 1.0, (shift, shift)),
        Altered("blurred", tensor(np.asarray(cv2.GaussianBlur(square, (0, 0), BLUR), np.uint8))),
    ]


def tensor(square: NDArray[np.uint8]) -> Tensor:
    """(3, s, s) float32 in [0, 1] of (s, s, 3) uint8."""
    return torch.from_numpy(np.ascontiguousarray(square)).permute(2, 0, 1).float() / 255


def suppressed(candidates: Any, box: Tensor, class_id: int) -> Measured:
    """How many boxes of the class NMS drops in favour of this one, and how they scatter."""
    scores = candidates.scores[:, class_id]
    iou = overlaps(candidates.boxes, box)
    near = (iou >= SAME_BOX) & (scores >= FAINT)
    own, weights = candidates.boxes[near], scores[near]
    if not len(own):
        return {"count": 0.0}
    side = (box[2:] - box[:2]).prod().sqrt()
    return {
        "count": float(len(own)), "mean score": float(weights.mean()), "sum": float(weights.sum()),
        "scatter": float((own - box).abs().mean() / side), "mean IoU": float(iou[near].mean()),
        "rivals": float(candidates.scores[near].sum(1).sub(weights).max()),
    }  # fmt: skip


def stays(candidates: Any, altered: Altered, box: Tensor, class_id: int) -> Measured:
    """Score and IoU of the best box of the class where this one was."""
    scores = candidates.scores[:, class_id]
    iou = overlaps(altered.back(candidates.boxes), box)
    best = int((scores * iou).argmax())
    return {
        f"{altered.name}: score": float(scores[best] * (iou[best] >= SAME_BOX)),
        f"{altered.name}: IoU": float(iou[best]),
    }


# -- gradients and features ---------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Ends:
    """The ends of a head: of each level the layer before the last, and the last."""

    classes: Sequence[Sequence[nn.Module]]
    boxes: Sequence[Sequence[nn.Module]]

    @property
    def groups(self) -> dict[str, list[nn.Parameter]]:
        """The weights of each depth, all levels and both branches together."""
        all_ends = [*self.classes, *self.boxes]
        named = {
            "last": [w for end in all_ends for w in end[-1].parameters()],
            "before": [w for end in all_ends for layer in end[:-1] for w in layer.parameters()],
        }
        return {name: list(dict.fromkeys(weights)) for name, weights in named.items() if weights}

    @contextlib.contextmanager
    def differentiated(self) -> Iterator[None]:
        """While open, what is predicted can be differentiated in these weights; nothing below them is."""
        weights = [w for group in self.groups.values() for w in group]
        for w in weights:
            w.requires_grad_(True)
        try:
            yield
        finally:
            for w in weights:
                w.requires_grad_(False)


def ends(detector: Any) -> Ends:
    """Where a head ends. Raises TypeError for a head that is none of ours with convolutions at its end."""
    if isinstance(detector, AnchorFree):
        return Ends(*([list(branch)[-2:] for branch in b] for b in (detector.class_heads, detector.box_heads)))
    if isinstance(detector, AnchorBased):
        convolutions = [[head.conv] for head in detector.heads]
        return Ends(convolutions, convolutions)
    raise TypeError(f"{detector.info.name} ({detector.info.family}) has no head whose last layers are known here")


def gradient_norms(candidates: Candidates, box: Tensor, class_id: int, weights_of: Ends) -> Measured:
    """Norms of the gradient of the report's own loss in the head's last weights (arXiv 2107.04517).

    The report stands in for the truth: cross-entropy of its class, and complete IoU with its box, over the
    `candidates` that NMS would drop for it. They must have been made with gradients for the weights of `weights_of`.
    """
    scores, boxes = candidates.scores[:, class_id], candidates.boxes
    near = (overlaps(boxes.detach(), box) >= BESIDE) & (scores >= FAINTEST)
    logits, truth = candidates.logits[near], torch.tensor(class_id).expand(int(near.sum()))
    losses = {
        "class": binary_cross_entropy_with_logits(
            logits, one_hot(truth, logits.shape[1]).to(logits.dtype), reduction="sum"
        ),
        "box": complete_box_iou_loss(boxes[near], box.expand(len(truth), 4), reduction="sum"),
    }
    figures: Measured = {}
    for loss, value in losses.items():
        for depth, weights in weights_of.groups.items():
            parts = torch.autograd.grad(value, weights, retain_graph=True, allow_unused=True)
            flat = torch.cat([part.flatten() for part in parts if part is not None])
            name = f"{loss}, {depth} layer"
            figures |= {f"{name}: L1": float(flat.abs().sum()), f"{name}: L2": float(flat.norm())}
            figures |= {f"{name}: largest": float(flat.abs().max()), f"{name}: spread": float(flat.std())}
    return figures


@dataclass(frozen=True, eq=False)
class Feature:
    """What a report was read from: what enters the last layer of its class, at its cell. `values`: (channels,)."""

    level: int
    values: Numbers


def feature_at(maps: Sequence[Tensor], candidates: Candidates, at: int) -> Feature:
    """The feature of prediction `at`; `maps`: (channels, height, width) by level."""
    level = int(candidates.levels[at])
    chosen = maps[level]
    cell = (at - int((candidates.levels < level).sum())) % chosen[0].numel()  # anchors of a level one after the other
    return Feature(level, chosen.flatten(1)[:, cell].double().numpy())


def class_maps(detector: Any, x: Tensor) -> list[Tensor]:
    """By level what enters the last layer of the class branch on x (1, 3, s, s): (channels, height, width)."""
    if isinstance(detector, AnchorFree):
        return [
            branch[:-1](feature)[0] for branch, feature in zip(detector.class_heads, detector.features(x), strict=True)
        ]
    outputs = detector.trunk(x, {head.feed for head in detector.heads})
    return [outputs[head.feed][0] for head in detector.heads]


class Distance:
    """How far each feature lies from those of right reports of its class at its level, on other photos.

    Cosine and Mahalanobis distance (one covariance for all classes of a level, shrunk by Ledoit and Wolf; Lee et al.
    2018, arXiv 1807.03888), and each less that of the nearest other class; NaN where none is known.
    """

    def __init__(
        self, features: Sequence[Feature], classes: Sequence[int], right: Sequence[bool], photos: Sequence[str]
    ) -> None:
        self.features, self.photos = features, np.array(photos)
        self.levels, self.classes = np.array([f.level for f in features]), np.array(classes)
        self.right = np.array(right, bool)

    def __call__(self, train: NDArray[Any]) -> Numbers:
        """(n, 4) for all rows, learned from the rows `train`; no photo of these from its own, but by folds."""
        result = self._from(train, np.arange(len(self.right)))
        for teachers, learners in tools.folds(self.photos[train].tolist()):
            result[train[learners]] = self._from(train[teachers], train[learners])
        return result

    def _from(self, teachers: NDArray[Any], rows: NDArray[Any]) -> Numbers:
        result = np.full((len(rows), 4), np.nan)
        for level in np.unique(self.levels[rows]):
            known = teachers[self.right[teachers] & (self.levels[teachers] == level)]
            own = np.flatnonzero(self.levels[rows] == level)
            if len(known) >= FEWEST:
                result[own] = self._at_level(known, rows[own])
        return result

    def _at_level(self, known: NDArray[Any], rows: NDArray[Any]) -> Numbers:
        from sklearn.covariance import LedoitWolf

        seen, asked = (np.array([self.features[i].values for i in part]) for part in (known, rows))
        kinds = np.unique(self.classes[known])
        means = np.array([seen[self.classes[known] == c].mean(0) for c in kinds])
        spread = LedoitWolf(assume_centered=True).fit(seen - means[np.searchsorted(kinds, self.classes[known])])
        away = asked[:, None] - means  # (rows, classes, channels)
        far = np.sqrt(np.einsum("rck,kl,rcl->rc", away, spread.precision_, away))
        length = np.linalg.norm(asked, axis=1)[:, None] * np.linalg.norm(means, axis=1)
        cosine = 1 - asked @ means.T / np.maximum(length, 1e-12)
        own = self.classes[rows][:, None] == kinds
        columns = []
        for distance in (cosine, far):
            mine = np.where(own.any(1), np.where(own, distance, 0).sum(1), np.nan)
            other = np.where(own, np.inf, distance).min(1)
            columns += [mine, np.where(np.isfinite(other), mine - other, np.nan)]
        return np.column_stack(columns)
