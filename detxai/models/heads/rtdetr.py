"""RT-DETR: the queries that the encoder selects on the image are kept along the whole path.

RT-DETR picks its queries by a top-k over all cells, so that query i of a path point is another cell than query i of the
image. `Candidates.context` holds the cells picked on the image; targets carry them, and every path point uses them.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from detxai.errors import ModelError
from detxai.models.detector import Address, Candidates, DetectorInfo, Pin, at_pins, scores_of
from detxai.models.trunk import Trunk, freeze, fuse
from detxai.values import Checkpoint, InputShape, Target
from detxai.vocabulary import EDGES

#: Side in pixels of the boxes that belong to the finest scale: 0.05 of 640, where the encoder's anchors begin.
SIDE = 32


class RTDETR:
    """The decoder's predictions: one a query, in the order of the selection; the whole network runs: no sparse path."""

    branch = "decoder"

    def __init__(self, checkpoint: Checkpoint, branch: str | None = None) -> None:
        if branch not in (None, self.branch):
            raise ModelError(f"RT-DETR has no {branch} branch.", "Leave --head out.")
        self.module = freeze(fuse(checkpoint.module))
        *layers, head = self.module.model  # type: ignore[misc]
        self.head: Any = head
        self.trunk = Trunk(layers)
        self.feeds: list[int] = list(head.f)
        self.info = DetectorInfo.of(
            checkpoint,
            self.branch,
            ("class", *EDGES),
            sparse=False,
            fit="stretch",
            channels=self.trunk.channels,
        )

    def predict(self, x: Tensor) -> list[Candidates]:
        boxes, logits, cells = self._decoded(x, None)
        levels = torch.zeros(logits.shape[1], dtype=torch.int64)
        return [
            Candidates(boxes[i], logits[i].sigmoid(), logits[i], levels, context=cells[i], end_to_end=True)
            for i in range(len(x))
        ]

    def scores(self, x: Tensor, classes: Sequence[int]) -> tuple[Tensor, Tensor]:
        return scores_of(self.predict(x), classes)

    def values(self, x: Tensor, pins: Sequence[tuple[int, Target]]) -> Tensor:
        return self.full_values(x, pins)

    def entered(self, z: Tensor, pins: Sequence[tuple[int, Target]]) -> Tensor:
        raise NotImplementedError("RT-DETR is not sparse, and entered at the picture.")

    def layer_of(self, target: Target) -> int:
        """The decoder reads all scales: that on which the model expects boxes of this size, four strides a side."""
        if target.box is None:
            raise ValueError("The layer of a target of RT-DETR is chosen by its box.")
        left, top, right, bottom = target.box
        level = round(math.log2(max((right - left) * (bottom - top), 1.0)) / 2 - math.log2(SIDE))
        return self.feeds[min(max(level, 0), len(self.feeds) - 1)]

    def full_values(self, x: Tensor, pins: Sequence[tuple[int, Target]]) -> Tensor:
        wanted = [Pin(*pin) for pin in pins]
        cells: list[Tensor | None] = [None] * len(x)
        for row, target in wanted:
            known = cells[row]
            if target.context is None or (known is not None and not torch.equal(known, target.context)):
                raise ValueError("A target of RT-DETR carries the selection of its image, one a row.")
            cells[row] = target.context
        spare = next(c for c in cells if c is not None)
        kept = torch.stack([spare if c is None else c for c in cells]).to(x.device)
        boxes, logits, _ = self._decoded(x, kept)
        return at_pins(logits, boxes, wanted)

    def address(self, target: Target, shape: InputShape) -> Address:
        part = "box" if target.kind in EDGES else target.kind
        channel = EDGES.index(target.kind) if part == "box" else target.class_id
        return (0, part), (target.anchor, channel, target.other or 0, *target.context.tolist())

    def pinned(self, x: Tensor, kind: tuple[int, str], index: Tensor, *, entered: bool = False) -> Tensor:
        boxes, logits, _ = self._decoded(x, index[:, 3:])
        pinned = (boxes if kind[1] == "box" else logits)[torch.arange(len(x), device=x.device), index[:, 0]]
        values = pinned.gather(1, index[:, 1:2])[:, 0]
        return values - pinned.gather(1, index[:, 2:3])[:, 0] if kind[1] == "contrast" else values

    def in_precision(self, dtype: torch.dtype, shape: InputShape) -> RTDETR:
        twin = copy.deepcopy(self)
        twin.trunk.to(dtype)
        return twin

    def _decoded(self, x: Tensor, cells: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """(B, Q, 4) boxes in letterbox pixels, (B, Q, classes) logits and the (B, Q) cells of the queries.

        `cells`: the selection to use; None selects on x, as the model does.
        """
        head, outputs = self.head, self.trunk(x, set(self.feeds))
        features, shapes = head._get_encoder_input([outputs[i].float() for i in self.feeds])
        anchors, valid = head._generate_anchors(shapes, features)
        encoded = head.enc_output(valid * features)
        if cells is None:
            best = head.enc_score_head(encoded).amax(-1)
            cells = best.topk(min(head.num_queries, best.shape[1]), dim=1).indices
        rows = torch.arange(len(x), device=x.device)[:, None]
        content = encoded[rows, cells]
        reference = head.enc_bbox_head(content) + anchors[0, cells]
        if head.learnt_init_query:
            content = head.tgt_embed.weight[: cells.shape[1]].expand(len(x), -1, -1)
        boxes, logits = head.decoder(
            content, reference, features, shapes, head.dec_bbox_head, head.dec_score_head, head.query_pos_head
        )
        (x0, y0, width, height), (down, across) = boxes[0].float().unbind(-1), x.shape[-2:]
        x0, width, y0, height = x0 * across, width * across, y0 * down, height * down
        corners = torch.stack([x0 - width / 2, y0 - height / 2, x0 + width / 2, y0 + height / 2], -1)
        return corners, logits[0].float(), cells
