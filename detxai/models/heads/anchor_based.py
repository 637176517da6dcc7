"""Heads with anchor boxes and an objectness: legacy YOLOv5 and YOLOv3 checkpoints, and Darknet.

The score these models report is objectness × class. Its log-odds is the `class` target: explained through both,
and still meaningful for one-class models whose class logit is constant.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from detxai.errors import ModelError
from detxai.models.detector import Address, Candidates, DetectorInfo, Pin, levels_of, scaled
from detxai.models.trunk import Trunk, freeze, fuse
from detxai.models.windows import Windows
from detxai.values import Checkpoint, InputShape, Target
from detxai.vocabulary import EDGES


@dataclass(frozen=True, eq=False)
class AnchorHead:
    """The output of one scale: `conv` (a 1×1 convolution to anchors × (5 + classes)) over the layer `feed`.

    `anchors`: (n, 2) letterbox pixels. Centres are `scale_xy` σ − (scale_xy − 1) / 2 cells from the cell's corner;
    sizes (2σ)² anchors, or e^t anchors where `exponential` (Darknet).
    """

    feed: int
    conv: nn.Conv2d
    anchors: Tensor
    stride: int
    scale_xy: float = 2.0
    exponential: bool = False

    def raw(self, feature: Tensor, classes: Sequence[int] | None = None) -> Tensor:
        """(B, anchors, height, width, 5 + classes) of `feature`; of some `classes` alone, or of all."""
        n, weight, bias = len(self.anchors), self.conv.weight, self.conv.bias
        assert bias is not None
        if classes is not None:
            kept = [*range(5), *(5 + c for c in classes)]
            weight, bias = (part.unflatten(0, (n, -1))[:, kept].flatten(0, 1) for part in (weight, bias))
        output = nn.functional.conv2d(feature, weight, bias).float()
        return output.view(len(output), n, -1, *output.shape[2:]).permute(0, 1, 3, 4, 2)

    def boxes(self, raw: Tensor, cells: Tensor, anchors: Tensor) -> Tensor:
        """(…, 4) xyxy letterbox pixels from raw (…, 4), cells (…, 2) as (row, column), anchors (…, 2)."""
        corner = cells.flip(-1).to(raw.dtype)
        centre = (raw[..., :2].sigmoid() * self.scale_xy - (self.scale_xy - 1) / 2 + corner) * self.stride
        size = (raw[..., 2:4].exp() if self.exponential else (raw[..., 2:4].sigmoid() * 2) ** 2) * anchors
        return torch.cat([centre - size / 2, centre + size / 2], -1)


def score_logit(objectness: Tensor, classes: Tensor) -> Tensor:
    """Log-odds of σ(objectness) σ(classes), without overflow: −log(e⁻ᵒ + e⁻ᶜ + e⁻ᵒ⁻ᶜ)."""
    o, c = torch.broadcast_tensors(objectness, classes)
    return -torch.logsumexp(torch.stack([-o, -c, -o - c]), 0)


class AnchorBased:
    """Predictions in the order level, anchor, row, column."""

    branch = "anchors"

    def __init__(self, checkpoint: Checkpoint, branch: str | None = None) -> None:
        if branch not in (None, self.branch):
            raise ModelError(f"An anchor-based model has no {branch} branch.", "Leave --head out.")
        network = _with_heads(checkpoint)
        self.module = freeze(fuse(network))
        self.trunk = Trunk(self.module.layers)  # type: ignore[arg-type]
        self.heads: list[AnchorHead] = list(self.module.heads)  # type: ignore[arg-type]
        self.info = DetectorInfo.of(
            checkpoint,
            self.branch,
            ("class", "objectness", *EDGES),
            sparse=True,
            fit="darknet" if checkpoint.kind == "darknet" else "letterbox",
            stride=max(head.stride for head in self.heads),
            channels=self.trunk.channels,
        )

    def _maps(self, x: Tensor, levels: Sequence[int]) -> dict[int, Tensor]:
        outputs = self.trunk(x, {self.heads[i].feed for i in levels})
        return {i: outputs[self.heads[i].feed] for i in levels}

    def _dense(self, x: Tensor, classes: Sequence[int] | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """(B, A, 4) boxes, (B, A, 1) objectness and (B, A, classes) class logits; A over level, anchor, row, column."""
        boxes, rest = [], []
        for level, feature in self._maps(x, range(len(self.heads))).items():
            head = self.heads[level]
            height, width = feature.shape[-2:]
            raw = head.raw(feature, classes)
            grid = torch.cartesian_prod(torch.arange(height), torch.arange(width)).view(height, width, 2).to(x.device)
            boxes.append(head.boxes(raw[..., :4], grid, head.anchors[:, None, None].to(x.device)).flatten(1, 3))
            rest.append(raw[..., 4:].flatten(1, 3))
        scores = torch.cat(rest, 1)
        return torch.cat(boxes, 1), scores[..., :1], scores[..., 1:]

    def _maps_of(self, shape: InputShape) -> list[tuple[int, int]]:
        """(height, width) of the map of each head."""
        return [(shape[0] // head.stride, shape[1] // head.stride) for head in self.heads]

    def predict(self, x: Tensor) -> list[Candidates]:
        boxes, objectness, classes = self._dense(x)
        levels = torch.cat(
            [
                levels_of([cells], len(head.anchors)) + i
                for i, (head, cells) in enumerate(
                    zip(self.heads, self._maps_of((x.shape[-2], x.shape[-1])), strict=True)
                )
            ]
        )
        logits = score_logit(objectness, classes)
        scores = objectness.sigmoid() * classes.sigmoid()
        return [Candidates(boxes[i], scores[i], logits[i], levels) for i in range(len(x))]

    def scores(self, x: Tensor, classes: Sequence[int]) -> tuple[Tensor, Tensor]:
        boxes, objectness, logits = self._dense(x, classes)
        return boxes, objectness.sigmoid() * logits.sigmoid()

    def values(self, x: Tensor, pins: Sequence[tuple[int, Target]]) -> Tensor:
        return self._values(x, (x.shape[-2], x.shape[-1]), pins)

    def entered(self, z: Tensor, pins: Sequence[tuple[int, Target]]) -> Tensor:
        return self._values(z, self.trunk.shape_before(z), pins, entered=True)

    def _values(
        self, x: Tensor, shape: InputShape, pins: Sequence[tuple[int, Target]], *, entered: bool = False
    ) -> Tensor:
        wanted = [Pin(*pin) for pin in pins]
        levels = sorted({p.target.level for p in wanted})
        windows = {i: self._windows(i, shape, x) for i in levels}
        outputs = self.trunk(x, frozenset().union(*(w.wanted for w in windows.values())), entered)
        result: list[Tensor | None] = [None] * len(wanted)
        start = [0]
        for head, (height, width) in zip(self.heads, self._maps_of(shape), strict=True):
            start.append(start[-1] + len(head.anchors) * height * width)
        for level in levels:
            head, (height, width) = self.heads[level], self._maps_of(shape)[level]
            group = [i for i, p in enumerate(wanted) if p.target.level == level]
            places = [divmod(wanted[i].target.anchor - start[level], height * width) for i in group]
            cells = [divmod(rest, width) for _, rest in places]
            raw = windows[level](outputs, [wanted[i].row for i in group], cells).float()
            raw = raw.unflatten(1, (len(head.anchors), -1))[range(len(group)), [a for a, _ in places]]
            anchors = head.anchors.to(x.device)[[a for a, _ in places]]
            boxes = head.boxes(raw[:, :4], torch.tensor(cells, device=x.device), anchors)
            for j, i in enumerate(group):
                result[i] = _scalar(wanted[i], boxes[j], raw[j, 4], raw[j, 5:])
        return scaled(torch.stack(result), wanted)  # type: ignore[arg-type]

    def address(self, target: Target, shape: InputShape) -> Address:
        maps = self._maps_of(shape)
        start = sum(len(h.anchors) * a * b for h, (a, b) in zip(self.heads, maps[: target.level], strict=False))
        height, width = maps[target.level]
        anchor, rest = divmod(target.anchor - start, height * width)
        part = "box" if target.kind in EDGES else target.kind
        channel = EDGES.index(target.kind) if part == "box" else target.class_id
        return (target.level, part), (*divmod(rest, width), anchor, channel, target.other or 0)

    def pinned(self, x: Tensor, kind: tuple[int, str], index: Tensor, *, entered: bool = False) -> Tensor:
        (level, part), (cells, anchor, channel, other) = kind, index.split((2, 1, 1, 1), 1)
        head, shape = self.heads[level], self.trunk.shape_before(x) if entered else (x.shape[-2], x.shape[-1])
        windows = self._windows(level, shape, x)
        every = windows.at(self.trunk(x, windows.wanted, entered), cells).float().unflatten(1, (len(head.anchors), -1))
        raw: Tensor = every.gather(1, anchor[:, :, None].expand(-1, 1, every.shape[2]))[:, 0]
        if part == "objectness":
            return raw[:, 4]
        if part == "box":
            anchors = head.anchors.to(x.device)[anchor[:, 0]]
            return head.boxes(raw[:, :4], cells, anchors).gather(1, channel)[:, 0]
        values = score_logit(raw[:, 4], raw[:, 5:].gather(1, channel)[:, 0])
        return values - score_logit(raw[:, 4], raw[:, 5:].gather(1, other)[:, 0]) if part == "contrast" else values

    def in_precision(self, dtype: torch.dtype, shape: InputShape) -> AnchorBased:
        twin = copy.deepcopy(self)
        like = torch.zeros(1, device=next(self.module.parameters()).device)
        for level in range(len(self.heads)):  # how far layers reach is seen in float32
            twin._windows(level, shape, like)
        twin.trunk.to(dtype)
        return twin

    def _windows(self, level: int, shape: InputShape, like: Tensor) -> Windows:
        windows = self.trunk.around(self.heads[level].feed, self.heads[level].conv, shape, like)
        assert windows is not None, "a convolution reads a bounded part of its map"
        return windows

    def layer_of(self, target: Target) -> int:
        return self.heads[target.level].feed

    def full_values(self, x: Tensor, pins: Sequence[tuple[int, Target]]) -> Tensor:
        wanted = [Pin(*pin) for pin in pins]
        boxes, objectness, classes = self._dense(x)
        at = [(p.row, p.target.anchor) for p in wanted]
        picked = [_scalar(p, boxes[i], objectness[i][0], classes[i]) for p, i in zip(wanted, at, strict=True)]
        return scaled(torch.stack(picked), wanted)


def _scalar(pin: Pin, box: Tensor, objectness: Tensor, classes: Tensor) -> Tensor:
    kind = pin.target.kind
    if kind == "class":
        return score_logit(objectness, classes[pin.target.class_id])
    return objectness if kind == "objectness" else box[EDGES.index(kind)]


def _with_heads(checkpoint: Checkpoint) -> nn.Module:
    """The network of a Darknet or legacy checkpoint, with its heads."""
    network: Any = checkpoint.module
    network.heads = [
        AnchorHead(s.feed, s.conv, s.anchors, s.stride, s.scale_xy, exponential=not s.new_coords)
        for s in network.scales
    ]
    return network  # type: ignore[no-any-return]
