"""What every detector offers, and the parts that most of them are made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, Self, runtime_checkable

import torch
from torch import Tensor, nn

from detxai.errors import ImageError, ModelError
from detxai.models.trunk import Trunk
from detxai.values import Checkpoint, InputShape, Target
from detxai.vocabulary import EDGES

#: (level, part) of a head, and the numbers that say which of its scalars is meant.
Address = tuple[tuple[int, str], tuple[int, ...]]


class Pin(NamedTuple):
    """The scalar `target` at row `row` of a batch of path points."""

    row: int
    target: Target


@dataclass(frozen=True)
class DetectorInfo:
    """What a record says of its model. `head` names the branch that made the detections.

    `fit`: how its own code makes its input of a picture (see `detxai.inputs.letterbox.FITS`). `stride`: of its
    coarsest map, in pixels; rows and columns are multiples. `rotated`: its boxes are. `shape`: (rows, columns) that it
    was made for, where they are no square of `imgsz`; `fixed`: it reads no other. `channels` of the pictures it reads.
    """

    name: str
    sha256: str
    family: str
    head: str
    imgsz: int
    names: dict[int, str]
    targets: tuple[str, ...]
    sparse: bool
    trusted: bool = False
    fit: str = "letterbox"
    stride: int = 32
    rotated: bool = False
    shape: InputShape | None = None
    fixed: bool = False
    channels: int = 3

    @property
    def own_shape(self) -> InputShape:
        """The (rows, columns) that it was made for."""
        return self.shape or (self.imgsz, self.imgsz)

    @classmethod
    def of(cls, checkpoint: Checkpoint, head: str, targets: tuple[str, ...], **more: Any) -> Self:
        """The info of a network built from `checkpoint`; `more`: the fields that its kind of head decides."""
        size = checkpoint.imgsz or 640
        return cls(
            checkpoint.name,
            checkpoint.sha256,
            checkpoint.family,
            head,
            size if isinstance(size, int) else max(size),
            checkpoint.names,
            targets,
            trusted=checkpoint.trusted,
            shape=None if isinstance(size, int) else size,
            **more,
        )


@dataclass(frozen=True, eq=False)
class Candidates:
    """All predictions on one letterboxed image, before any threshold.

    boxes: (A, 4) float32 xyxy letterbox pixels (hulls of rotated ones); scores, logits: (A, classes) float32,
    logit = log-odds of the score; levels: (A,) int64, on the host; rotated: (A, 5) cx cy w h radians, letterbox pixels;
    context: what a target needs beside its anchor index to stay pinned (RT-DETR's query selection). On the host it
    raises ImageError where a number is not finite, or a score is not in [0, 1]: a broken model must not look like one
    that found nothing. On a device nothing has looked at them, or waited for them: see `brought`.
    """

    boxes: Tensor
    scores: Tensor
    logits: Tensor
    levels: Tensor
    rotated: Tensor | None = None
    context: Tensor | None = None
    end_to_end: bool = False

    def __post_init__(self) -> None:
        if self.boxes.device.type != "cpu":
            return
        own = {"boxes": self.boxes, "scores": self.scores, "logits": self.logits, "rotated boxes": self.rotated}
        numbers = {name: values for name, values in own.items() if values is not None}
        sound = [values.isfinite().all() for values in numbers.values()]
        sound.append(((self.scores >= 0) & (self.scores <= 1)).all())
        *finite, possible = torch.stack(sound).tolist()
        for fine, (name, values) in zip(finite, numbers.items(), strict=True):
            if not fine:
                wrong = int((~values.isfinite()).flatten(1).any(1).sum())
                raise ImageError("not_finite", f"{wrong} of the model's {len(values)} {name} are not finite numbers")
        if not possible:
            span = f"{float(self.scores.min()):g} to {float(self.scores.max()):g}"
            raise ImageError("impossible", f"the model's scores are not in [0, 1]: they go from {span}")

    def brought(self) -> Candidates:
        """These in the memory of the host, all numbers at once. Raises ImageError, see above."""
        if self.boxes.device.type == "cpu":
            return self
        parts = [self.boxes, self.scores, self.logits, *([] if self.rotated is None else [self.rotated])]
        boxes, scores, logits, *rotated = torch.cat(parts, 1).cpu().split([part.shape[1] for part in parts], 1)
        context = None if self.context is None else self.context.cpu()
        return Candidates(boxes, scores, logits, self.levels, next(iter(rotated), None), context, self.end_to_end)


class Detector(Protocol):
    """Whatever makes predictions on pictures; a black box does no more."""

    info: DetectorInfo

    def predict(self, x: Tensor) -> list[Candidates]:
        """All predictions on x (batch, 3, rows, columns), float RGB in [0, 1]."""
        ...

    def scores(self, x: Tensor, classes: Sequence[int]) -> tuple[Tensor, Tensor]:
        """(batch, A, 4) boxes and (batch, A, len(classes)) scores of `predict`, for these classes only."""
        ...


@runtime_checkable
class Differentiable(Detector, Protocol):
    """A network whose predictions can be pinned and differentiated; `trunk`: its layers below the head."""

    module: nn.Module
    trunk: Trunk

    def values(self, x: Tensor, pins: Sequence[tuple[int, Target]]) -> Tensor:
        """(len(pins),) float32: the pinned scalars, differentiable in x, computed with the least work."""
        ...

    def entered(self, z: Tensor, pins: Sequence[tuple[int, Target]]) -> Tensor:
        """`values` of the pictures of which the network's first convolution (`Trunk.stem`) has made z."""
        ...

    def address(self, target: Target, shape: InputShape) -> Address:
        """What `pinned` computes `target` with, on pictures of `shape` (rows, columns)."""
        ...

    def pinned(self, x: Tensor, kind: tuple[int, str], index: Tensor, *, entered: bool = False) -> Tensor:
        """(rows,) float32: of row i of x the scalar whose address is (kind, index[i]), not yet in a target's unit.

        A program of fixed shapes: nothing in it depends on what is in `index`, or waits for the device.
        """
        ...

    def in_precision(self, dtype: torch.dtype, shape: InputShape) -> Differentiable:
        """A copy whose layers below the head have weights of `dtype`, for pictures of `shape`; the head is as it is."""
        ...

    def full_values(self, x: Tensor, pins: Sequence[tuple[int, Target]]) -> Tensor:
        """The same scalars through the whole network and head: the reference for `values`."""
        ...

    def layer_of(self, target: Target) -> int:
        """The layer below the head whose output it reads for `target`."""
        ...


def differentiable(detector: Detector) -> Differentiable:
    """`detector`, which has gradients. Raises ModelError for a black box."""
    if not isinstance(detector, Differentiable):
        raise ModelError(f"{detector.info.name} is a black box ({detector.info.family}): it has no gradients.")
    return detector


def scores_of(candidates: Sequence[Candidates], classes: Sequence[int]) -> tuple[Tensor, Tensor]:
    """`Detector.scores` from whole predictions, where leaving classes out saves nothing."""
    return torch.stack([c.boxes for c in candidates]), torch.stack([c.scores[:, list(classes)] for c in candidates])


def levels_of(shapes: Sequence[tuple[int, int]], anchors_per_cell: int = 1) -> Tensor:
    """(A,) int64: the level of each prediction in the flat list made of feature maps of (height, width)."""
    return torch.cat([torch.full((anchors_per_cell * h * w,), i) for i, (h, w) in enumerate(shapes)])


def at_pins(logits: Tensor, edges: Tensor, pins: Sequence[Pin]) -> Tensor:
    """(n,): of every pin the class logit in `logits` (n, anchors, classes), or the edge in `edges` (n, anchors, 4)."""
    scalars = [
        logits[p.row, p.target.anchor, p.target.class_id]
        if p.target.kind == "class"
        else edges[p.row, p.target.anchor, EDGES.index(p.target.kind)]
        for p in pins
    ]
    return scaled(torch.stack(scalars), pins)


def scaled(values: Tensor, pins: Sequence[Pin]) -> Tensor:
    """`values` (n,) in the units of their targets (edges: source pixels)."""
    scale = values.new_tensor([p.target.scale for p in pins])
    return values * scale + values.new_tensor([p.target.offset for p in pins])
