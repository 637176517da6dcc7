"""What every detector offers, and the parts that most of them are made of."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from detxai.data import EDGES as EDGES
from detxai.data import Target


class Pin(NamedTuple):
    """The scalar `target` at row `row` of a batch of path points."""

    row: int
    target: Target


@dataclass(frozen=True)
class ModelInfo:
    """What a record says of its model. `head` names the branch that made the detections.

    `differentiable`: gradients can be had; black boxes only detect. `antialias`: its reference letterbox averages when
    it shrinks (legacy repositories), unlike ultralytics' own. `stretch`: it takes the whole square (RT-DETR).
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
    antialias: bool = False
    differentiable: bool = True
    stretch: bool = False


@dataclass(frozen=True, eq=False)
class Candidates:
    """All predictions on one letterboxed image, before any threshold.

    boxes: (A, 4) float32 xyxy letterbox pixels (hulls of rotated ones); scores, logits: (A, classes) float32,
    logit = log-odds of the score; levels: (A,) int64; rotated: (A, 5) cx cy w h radians, letterbox pixels;
    contexts: what a target needs beside its anchor index to stay pinned (RT-DETR's query selection).
    """

    boxes: Tensor
    scores: Tensor
    logits: Tensor
    levels: Tensor
    rotated: Tensor | None = None
    context: Any = None
    end_to_end: bool = False


class Detector(Protocol):
    """A network whose predictions can be pinned and differentiated. `trunk`: the layers below its head, if any."""

    info: ModelInfo
    module: nn.Module
    trunk: Trunk

    def predict(self, x: Tensor) -> list[Candidates]:
        """All predictions on x (batch, 3, size, size), float RGB in [0, 1]."""
        ...

    def scores(self, x: Tensor, classes: Sequence[int]) -> tuple[Tensor, Tensor]:
        """(batch, A, 4) boxes and (batch, A, len(classes)) scores of `predict`, for these classes only."""
        ...

    def values(self, x: Tensor, pins: Sequence[tuple[int, Target]]) -> Tensor:
        """(len(pins),) float32: the pinned scalars, differentiable in x, computed with the least work."""
        ...

    def full_values(self, x: Tensor, pins: Sequence[tuple[int, Target]]) -> Tensor:
        """The same scalars through the whole network and head: the reference for `values`."""
        ...

    def layer_of(self, target: Target) -> int:
        """The layer below the head whose output it reads for `target`."""
        ...


def scores_of(found: Sequence[Candidates], classes: Sequence[int]) -> tuple[Tensor, Tensor]:
    """`Detector.scores` from whole predictions, where leaving classes out saves nothing."""
    return torch.stack([c.boxes for c in found]), torch.stack([c.scores[:, list(classes)] for c in found])


def _channels_last(gradient: Tensor) -> Tensor:
    return gradient.contiguous(memory_format=torch.channels_last) if gradient.dim() == 4 else gradient


class Trunk:
    """The layers below the head, run only as far as the wanted ones need.

    Layers carry ultralytics' wiring: `i` their index, `f` where their input comes from.
    """

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        self.layers: list[Any] = list(layers)
        self.ancestors: list[frozenset[int]] = []
        self._tap: tuple[int, list[Tensor]] | None = None
        for index, layer in enumerate(self.layers):
            above: frozenset[int] = frozenset((index,))
            for source in self._sources(index, layer):
                above |= self.ancestors[source]
            self.ancestors.append(above)

    @staticmethod
    def _sources(index: int, layer: Any) -> list[int]:
        wired = [layer.f] if isinstance(layer.f, int) else layer.f
        return [j for j in (index + f if f < 0 else f for f in wired) if j >= 0]

    @contextlib.contextmanager
    def tap(self, layer: int) -> Iterator[list[Tensor]]:
        """While open, the output of `layer` is cut off from what made it; the list holds it, to be differentiated in.

        It stays empty where the layer does not run, or gives no tensor (batch, channels, height, width).
        """
        self._tap = (layer, [])
        try:
            yield self._tap[1]
        finally:
            self._tap = None

    def early(self, x: Tensor) -> dict[int, int]:
        """For every layer with a feature map, the last one of its size before maps grow finer again: the backbone's."""
        outputs = self(x, range(len(self.layers)))
        sizes = {i: y.shape[-1] for i, y in sorted(outputs.items()) if isinstance(y, Tensor) and y.dim() == 4}
        neck = next((j for i, j in itertools.pairwise(sizes) if sizes[j] > sizes[i]), len(self.layers))
        last = {size: i for i, size in sizes.items() if i < neck}
        return {i: last.get(size, i) for i, size in sizes.items()}

    def __call__(self, x: Tensor, wanted: Iterable[int]) -> dict[int, Tensor]:
        """Outputs of the layers `wanted` for x (batch, 3, size, size)."""
        wanted = frozenset(wanted)
        needed = frozenset().union(*(self.ancestors[i] for i in wanted))
        last_use = {j: i for i in sorted(needed) for j in self._sources(i, self.layers[i])}
        outputs: dict[int, Tensor] = {-1: x}
        for i in sorted(needed):
            layer = self.layers[i]
            if isinstance(layer.f, int):
                outputs[i] = layer(outputs[i + layer.f if layer.f < 0 else layer.f])
            else:
                outputs[i] = layer([outputs[i + f if f < 0 else f] for f in layer.f])
            if self._tap is not None and self._tap[0] == i and isinstance(outputs[i], Tensor) and outputs[i].dim() == 4:
                outputs[i] = outputs[i].detach().requires_grad_(True)
                self._tap[1].append(outputs[i])
            for done in [j for j in outputs if j not in wanted and last_use.get(j, -1) == i]:
                del outputs[done]
        for i in wanted:
            if isinstance(outputs[i], Tensor) and outputs[i].requires_grad:
                # A patch's gradient comes in another memory layout, for which convolutions round differently: without
                # this a target's last bits would depend on the scales of those it shares a pack with.
                outputs[i].register_hook(_channels_last)
        return {i: outputs[i] for i in wanted}


def convolutions(detector: Detector) -> dict[str, nn.Conv2d]:
    """The convolutions below the head by name, `<layer>.<part>`; none where a detector has no layers (black boxes)."""
    return {
        f"{i}.{name}": part
        for i, layer in enumerate(detector.trunk.layers)
        for name, part in layer.named_modules()
        if isinstance(part, nn.Conv2d)
    }


def levels_of(shapes: Sequence[tuple[int, int]], anchors_per_cell: int = 1) -> Tensor:
    """(A,) int64: the level of each prediction in the flat list made of feature maps of (height, width)."""
    return torch.cat([torch.full((anchors_per_cell * h * w,), i) for i, (h, w) in enumerate(shapes)])


class Branch:
    """A stack of stride-1 convolutions over one feature map, evaluated on the patch around single cells.

    A prediction's output depends on a (2 radius + 1)² patch only. The patch is cut out with zeros beyond the map,
    convolved without padding, and set to zero beyond the map after every activation, so that the result equals the
    dense one to rounding, at borders and corners too.
    """

    def __init__(self, steps: list[tuple[nn.Conv2d, nn.Module]]) -> None:
        self.steps = steps
        self.radius = sum(conv.kernel_size[0] // 2 for conv, _ in steps)

    @classmethod
    def of(cls, module: nn.Module) -> Branch | None:
        """The branch in `module`, or None where it holds more than plain convolutions and activations."""
        steps = _steps(module)
        return cls(steps) if steps is not None and all(_plain(conv) for conv, _ in steps) else None

    def __call__(self, feature: Tensor, rows: list[int], cells: list[tuple[int, int]]) -> Tensor:
        """(n, channels) outputs at `cells` (row, column) of `feature` (batch, c, height, width), of batch items `rows`.

        Cells are taken in groups of the batch size, the last one filled up: fixed shapes give every cell the same
        bits whatever it shares a batch with. Without gradients a cell that is asked for again costs nothing.
        """
        if not torch.is_grad_enabled():
            places = list(dict.fromkeys(zip(rows, cells, strict=True)))
            if len(places) < len(rows):
                known = {place: i for i, place in enumerate(places)}
                found = self(feature, [row for row, _ in places], [cell for _, cell in places])
                return found[[known[place] for place in zip(rows, cells, strict=True)]]
        feature = feature.float()
        group, spare = len(feature), -len(rows) % len(feature)
        rows, cells = [*rows, *rows[:1] * spare], [*cells, *cells[:1] * spare]
        with torch.autocast(feature.device.type, enabled=False):  # the head is cheap, and logits are its differences
            parts = [
                self._group(feature, rows[i : i + group], cells[i : i + group]) for i in range(0, len(rows), group)
            ]
        return torch.cat(parts)[: len(rows) - spare]

    def _group(self, feature: Tensor, rows: Sequence[int], cells: Sequence[tuple[int, int]]) -> Tensor:
        height, width = feature.shape[-2:]
        device = feature.device
        span = torch.arange(-self.radius, self.radius + 1, device=device)
        at = torch.tensor(cells, device=device).reshape(-1, 2)
        ys, xs = at[:, :1] + span, at[:, 1:] + span
        inside_y, inside_x = (ys >= 0) & (ys < height), (xs >= 0) & (xs < width)
        ys, xs = ys.clamp(0, height - 1), xs.clamp(0, width - 1)
        batch = torch.tensor(rows, device=device)
        patch = feature[batch[:, None, None], :, ys[:, :, None], xs[:, None, :]].permute(0, 3, 1, 2)
        inside = (inside_y[:, None, :, None] & inside_x[:, None, None, :]).to(feature.dtype)
        patch = patch * inside
        for conv, act in self.steps:
            patch = nn.functional.conv2d(patch, conv.weight, conv.bias, groups=conv.groups)
            patch = act(patch)
            if cut := conv.kernel_size[0] // 2:
                inside = inside[..., cut:-cut, cut:-cut]
            patch = patch * inside
        return patch.flatten(1)


def _steps(module: Any) -> list[tuple[nn.Conv2d, nn.Module]] | None:
    if isinstance(module, nn.Conv2d):
        return [(module, nn.Identity())]
    if isinstance(module, nn.Sequential):
        parts = [_steps(child) for child in module]
        return None if any(p is None for p in parts) else [step for p in parts for step in p or ()]
    conv: Any = getattr(module, "conv", None)
    act: Any = getattr(module, "act", None)
    fused = isinstance(conv, nn.Conv2d) and isinstance(act, nn.Module) and not hasattr(module, "bn")
    only_these = {name for name, _ in module.named_children()} <= {"conv", "act"}
    return [(conv, act)] if fused and only_these else None


def _plain(conv: nn.Conv2d) -> bool:
    k = conv.kernel_size[0]
    same = conv.padding in ((k // 2, k // 2), "same")
    return conv.kernel_size == (k, k) and k % 2 == 1 and conv.stride == (1, 1) and conv.dilation == (1, 1) and same


def freeze(module: nn.Module) -> nn.Module:
    """`module` in evaluation mode, float32, channels last, without weight gradients or in-place activations."""
    module = module.eval().float()
    part: Any
    for part in module.modules():
        if hasattr(part, "inplace"):
            part.inplace = False
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    return module.to(memory_format=torch.channels_last)


def fuse(module: nn.Module) -> nn.Module:
    """Fold BatchNorm into the convolutions, in place; unlike ultralytics' own, it keeps every branch of the head."""
    from ultralytics.nn.modules import Conv, Conv2, ConvTranspose, RepConv
    from ultralytics.nn.modules.block import RepVGGDW
    from ultralytics.utils.torch_utils import fuse_conv_and_bn, fuse_deconv_and_bn

    part: Any
    for part in module.modules():  # lazily: what a fusion removes must not be visited again
        if isinstance(part, RepConv) and hasattr(part, "conv1"):
            part.fuse_convs()
            part.forward = part.forward_fuse
        elif isinstance(part, RepVGGDW) and hasattr(part, "conv1"):
            part.fuse()
            part.forward = part.forward_fuse
        elif isinstance(part, Conv) and hasattr(part, "bn"):
            if isinstance(part, Conv2):
                part.fuse_convs()
            part.conv = fuse_conv_and_bn(part.conv, part.bn)
            del part.bn
            part.forward = part.forward_fuse
        elif isinstance(part, ConvTranspose) and hasattr(part, "bn"):
            part.conv_transpose = fuse_deconv_and_bn(part.conv_transpose, part.bn)
            del part.bn
            part.forward = part.forward_fuse
    return module


def scaled(values: Tensor, pins: Sequence[Pin]) -> Tensor:
    """`values` (n,) in the units of their targets (edges: source pixels)."""
    scale = values.new_tensor([p.target.scale for p in pins])
    return values * scale + values.new_tensor([p.target.offset for p in pins])
