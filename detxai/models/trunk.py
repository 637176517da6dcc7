"""The layers below a head: run as far as wanted, opened for those who look inside, frozen and fused."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
from collections.abc import Iterable, Iterator, Mapping
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn

from detxai.models.windows import KNOWN, MapShape, Reach, Windows, around, reach
from detxai.values import InputShape

#: Bytes that are worth giving back to the system.
LARGE = 1 << 22
#: Shares of red, green and blue in gray (ITU-R BT.601), as OpenCV has them.
LUMA = (0.299, 0.587, 0.114)


def _channels_last(gradient: Tensor) -> Tensor:
    return gradient.contiguous(memory_format=torch.channels_last) if gradient.dim() == 4 else gradient


class Trunk:
    """The layers below the head, run only as far as the wanted ones need.

    Layers carry ultralytics' wiring: `i` their index, `f` where their input comes from.
    """

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        self.layers: list[Any] = list(layers)
        self.channels = channels_of(self.layers[0]) or 3
        self.sources: list[tuple[int, ...]] = []
        self.ancestors: list[frozenset[int]] = []
        self._tap: tuple[int, list[Tensor]] | None = None
        self._whole = False
        self._maps: dict[InputShape, dict[int, MapShape]] = {}
        self._reaches: dict[int, Reach | None] = {}
        self._head_reaches: dict[nn.Module, Reach | None] = {}
        self._windows: dict[tuple[Any, ...], Windows | None] = {}
        for index, layer in enumerate(self.layers):
            wired = [layer.f] if isinstance(layer.f, int) else layer.f
            self.sources.append(tuple(j for j in (index + f if f < 0 else f for f in wired) if j >= 0))
            self.ancestors.append(frozenset((index,)).union(*(self.ancestors[j] for j in self.sources[index])))

    def to(self, dtype: torch.dtype) -> None:
        """Give all layers weights of `dtype`."""
        for layer in self.layers:
            layer.to(dtype)

    @contextlib.contextmanager
    def tap(self, layer: int) -> Iterator[list[Tensor]]:
        """While open, the output of `layer` is cut off from what made it; the list holds it, to be differentiated in.

        It stays empty where the layer does not run, or gives no tensor (batch, channels, height, width).
        """
        self._tap = (layer, [])
        try:
            with self.whole():
                yield self._tap[1]
        finally:
            self._tap = None

    @contextlib.contextmanager
    def whole(self) -> Iterator[None]:
        """While open, every layer runs on its whole map: for those who look at layers from outside."""
        before, self._whole = self._whole, True
        try:
            yield
        finally:
            self._whole = before

    def give_up_windows(self) -> None:
        """Run every layer on its whole map from now on."""
        self._whole = True

    def around(self, feed: int, head: nn.Module, shape: InputShape, like: Tensor) -> Windows | None:
        """`head` over the layer `feed`, with the layers below that can, on windows around cells; see `windows`.

        None where the head reads without bound. `shape`: rows and columns of the pictures; `like` a batch of them or
        behind the stem.
        """
        key = (feed, id(head), shape, like.device, self._whole)
        if key not in self._windows:
            self._windows[key] = around(self, feed, head, self._maps_of(shape, like), like.new_empty(()))
        return self._windows[key]

    @torch.no_grad()
    def _maps_of(self, shape: InputShape, like: Tensor) -> dict[int, MapShape]:
        """(channels, height, width) of the maps of all layers."""
        if shape not in self._maps:
            tap, self._tap = self._tap, None
            outputs = self(like.new_zeros(1, self.channels, *shape), range(len(self.layers)))
            self._tap = tap
            maps = {i: y for i, y in outputs.items() if isinstance(y, Tensor) and y.dim() == 4}
            self._maps[shape] = {i: (y.shape[1], y.shape[2], y.shape[3]) for i, y in maps.items()}
        return self._maps[shape]

    def reach_of(self, i: int, maps: Mapping[int, MapShape], like: Tensor) -> Reach | None:
        """How far layer `i` reaches; None where that has no bound, or where it runs on its whole map anyway."""
        if self._whole or not self.sources[i] or not {i, *self.sources[i]} <= maps.keys():
            return None
        _, height, width = maps[i]
        inputs = [(maps[j][0], Fraction(maps[j][1], height)) for j in self.sources[i]]
        if any(scale != Fraction(maps[j][2], width) for j, (_, scale) in zip(self.sources[i], inputs, strict=True)):
            return None
        if i not in self._reaches:
            layer = self.layers[i]
            self._reaches[i] = reach(layer, inputs, like, many=not isinstance(layer.f, int))
        return self._reaches[i]

    def reach_of_head(self, head: nn.Module, channels: int, like: Tensor) -> Reach | None:
        """How far `head` reaches into a map of so many `channels`; None where that has no bound."""
        if head not in self._head_reaches:
            self._head_reaches[head] = reach(head, [(channels, Fraction(1))], like)
        return self._head_reaches[head]

    def early(self, x: Tensor) -> dict[int, int]:
        """For every layer with a feature map, the last one of its size before maps grow finer again: the backbone's."""
        outputs = self(x, range(len(self.layers)))
        sizes = {i: y.shape[-1] for i, y in sorted(outputs.items()) if isinstance(y, Tensor) and y.dim() == 4}
        neck = next((j for i, j in itertools.pairwise(sizes) if sizes[j] > sizes[i]), len(self.layers))
        last = {size: i for i, size in sizes.items() if i < neck}
        return {i: last.get(size, i) for i, size in sizes.items()}

    @property
    def stem(self) -> nn.Conv2d | None:
        """The convolution that the network begins with, where nothing but an activation comes before the next layer."""
        first = self.layers[0]
        conv = getattr(first, "conv", None)
        parts = {name for name, _ in first.named_children()}
        return conv if isinstance(conv, nn.Conv2d) and parts <= {"conv", "act"} and hasattr(first, "act") else None

    def shape_before(self, z: Tensor) -> InputShape:
        """Rows and columns of the pictures of which `stem` has made z."""
        assert self.stem is not None
        return int(z.shape[-2]) * int(self.stem.stride[0]), int(z.shape[-1]) * int(self.stem.stride[1])

    def __call__(self, x: Tensor, wanted: Iterable[int], entered: bool = False) -> dict[int, Tensor]:
        """Outputs of the layers `wanted` for x (batch, 3, rows, columns), or for what `stem` has made of it."""
        wanted = frozenset(wanted)
        needed = frozenset().union(*(self.ancestors[i] for i in wanted))
        last_use = {j: i for i in sorted(needed) for j in self.sources[i]}
        outputs: dict[int, Tensor] = {-1: x}
        for i in sorted(needed):
            layer = self.layers[i] if i or not entered else self.layers[0].act
            if i == 0:
                outputs[i] = layer(x)
            elif isinstance(layer.f, int):
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
                # A window's gradient comes in another memory layout, for which convolutions round differently: without
                # this a target's last bits would depend on the scales of those it shares a pack with.
                outputs[i].register_hook(_channels_last)
        return {i: outputs[i] for i in wanted}


def convolutions(trunk: Trunk) -> dict[str, nn.Conv2d]:
    """The convolutions below the head by name, `<layer>.<part>`."""
    return {
        f"{i}.{name}": part
        for i, layer in enumerate(trunk.layers)
        for name, part in layer.named_modules()
        if isinstance(part, nn.Conv2d)
    }


def channels_of(layer: nn.Module) -> int | None:
    """How many channels the pictures have that a first `layer` reads; None where that is nobody's to know."""
    conv = _first_convolution(layer)
    return conv.in_channels // _parts(layer) if conv is not None else None


def read_colour(layer: nn.Module) -> None:
    """Make a first `layer` that reads gray pictures read RGB ones, in place.

    A gray picture gives what it gave; a coloured one what its gray version gives (OpenCV's weights, as ultralytics
    makes it).
    """
    conv = _first_convolution(layer)
    assert conv is not None, "a layer that is known to read gray"
    weight = conv.weight.detach()[:, :, None] * torch.tensor(LUMA).view(3, 1, 1)
    conv.weight, conv.in_channels = nn.Parameter(weight.flatten(1, 2), requires_grad=False), 3 * _parts(layer)


def _first_convolution(layer: nn.Module) -> nn.Conv2d | None:
    if not type(layer).__module__.startswith(KNOWN):
        return None
    return next((part for part in layer.modules() if isinstance(part, nn.Conv2d) and part.groups == 1), None)


def _parts(layer: nn.Module) -> int:
    """A Focus gives its convolution every second row and column of the picture, four times."""
    return 4 if type(layer).__name__ == "Focus" else 1


def freeze(module: nn.Module) -> nn.Module:
    """`module` in evaluation mode, float32, channels last, without weight gradients or in-place activations."""
    module = module.eval().float()
    part: Any
    for part in module.modules():
        if hasattr(part, "inplace"):
            part.inplace = False
    freed = 0
    for parameter in module.parameters():
        parameter.requires_grad_(False)
        if parameter.dim() == 4:
            parameter.data = parameter.data.to(memory_format=torch.channels_last)
            freed = return_pages(freed + parameter.nbytes)
    return module.to(memory_format=torch.channels_last)


def return_pages(freed: int = LARGE) -> int:
    """Give `freed` bytes back to the system, if they are many, and say how many are left to be.

    glibc keeps holes that the next tensor does not fit.
    """
    if freed < LARGE:
        return freed
    with contextlib.suppress(OSError, AttributeError, TypeError):  # other C libraries
        ctypes.CDLL(None).malloc_trim(0)
    return 0


def fuse(module: nn.Module) -> nn.Module:
    """Fold BatchNorm into the convolutions, in place; unlike ultralytics' own, it keeps every branch of the head."""
    from ultralytics.nn.modules import Conv, Conv2, ConvTranspose, RepConv
    from ultralytics.nn.modules.block import RepVGGDW
    from ultralytics.utils.torch_utils import fuse_conv_and_bn, fuse_deconv_and_bn

    part: Any
    freed = 0
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
            freed = return_pages(freed + part.conv.weight.nbytes)
            del part.bn
            part.forward = part.forward_fuse
        elif isinstance(part, ConvTranspose) and hasattr(part, "bn"):
            part.conv_transpose = fuse_deconv_and_bn(part.conv_transpose, part.bn)
            del part.bn
            part.forward = part.forward_fuse
    return module
