"""Darknet `.cfg` and `.weights` (Redmon; Bochkovskiy's fork) as a torch network: text and numbers, no code.

Sections become layers with ultralytics' wiring (`i` the index, `f` where the input comes from), so that routes keep
their numbers. A convolution before a [yolo] section is the output of one scale and is described by a `Scale`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from detxai.values import InputShape

MAX_CFG_BYTES = 1 << 20
MAX_LAYERS = 1000
MAX_SIZE = 4096
#: As in OpenCV's reader, √(variance + ε). Darknet itself has used √variance + 1e-6, its best known fork
#: √(variance + 1e-5).
EPSILON = 1e-6

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "leaky": lambda: nn.LeakyReLU(0.1),
    "linear": nn.Identity,
    "logistic": nn.Sigmoid,
    "mish": nn.Mish,
    "relu": nn.ReLU,
    "swish": nn.SiLU,
}


@dataclass(frozen=True, eq=False)
class Scale:
    """One [yolo] section: `conv` (1×1, anchors × (5 + classes) outputs) over layer `feed`; `anchors` (n, 2) pixels.

    Centres are σ · scale_xy − (scale_xy − 1) / 2 cells; sizes exp(t) · anchor, or (2σ)² · anchor with `new_coords`.
    """

    feed: int
    conv: nn.Conv2d
    anchors: Tensor
    stride: int
    classes: int
    scale_xy: float
    new_coords: bool


class Network(nn.Module):
    """`layers` in the order of the sections, `scales` of the [yolo] sections; `shape` (rows, columns) of the input."""

    def __init__(self, layers: list[Any], scales: list[Scale], shape: InputShape) -> None:
        super().__init__()
        self.layers, self.scales, self.shape = nn.ModuleList(layers), scales, shape


class Convolution(nn.Module):
    """A convolution with its activation; batch normalisation is folded in when the weights are read."""

    def __init__(self, conv: nn.Conv2d, act: nn.Module, *, normalised: bool) -> None:
        super().__init__()
        self.conv, self.act, self.normalised = conv, act, normalised

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.conv(x))  # type: ignore[no-any-return]


class MaxPool(nn.Module):
    """Darknet's pooling: `padding` pixels in all, the smaller half before."""

    def __init__(self, size: int, stride: int, padding: int) -> None:
        super().__init__()
        self.size, self.stride, self.before, self.after = size, stride, padding // 2, padding - padding // 2

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.pad(x, (self.before, self.after) * 2, value=-torch.inf)
        return nn.functional.max_pool2d(x, self.size, self.stride)


class Route(nn.Module):
    """The concatenation of layers, or one group of channels of each."""

    def __init__(self, groups: int, group: int) -> None:
        super().__init__()
        self.groups, self.group = groups, group

    def forward(self, xs: list[Tensor]) -> Tensor:
        return torch.cat([x.chunk(self.groups, 1)[self.group] for x in xs], 1)


class Shortcut(nn.Module):
    """The sum of layers."""

    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.act = act

    def forward(self, xs: list[Tensor]) -> Tensor:
        return self.act(sum(xs[1:], xs[0]))  # type: ignore[no-any-return]


class Section:
    """One section of a cfg; what it lacks or holds wrongly is a ValueError that names its line."""

    def __init__(self, kind: str, line: int) -> None:
        self.kind, self.line, self.options = kind, line, dict[str, str]()

    def error(self, problem: str) -> ValueError:
        return ValueError(f"[{self.kind}] at line {self.line}: {problem}")

    def numbers(self, key: str, default: str | None = None) -> list[float]:
        text = self.options.get(key, default)
        if text is None:
            raise self.error(f"'{key}' is missing")
        try:
            values = [float(part) for part in text.split(",") if part.strip()]
        except ValueError:
            raise self.error(f"{key}={text} is not a number") from None
        if not all(abs(value) < 1e9 for value in values):
            raise self.error(f"{key}={text} is out of range")
        return values

    def number(self, key: str, default: int | None = None, *, low: int = 0, high: int = 1 << 16) -> int:
        value = self.numbers(key, None if default is None else str(default))
        if len(value) != 1 or value[0] != int(value[0]) or not low <= value[0] <= high:
            raise self.error(f"{key}={self.options.get(key)} is not a whole number from {low} to {high}")
        return int(value[0])

    def activation(self, default: str) -> nn.Module:
        name = self.options.get("activation", default)
        if name not in ACTIVATIONS:
            raise self.error(f"activation={name} is not one of {', '.join(ACTIVATIONS)}")
        return ACTIVATIONS[name]()

    def refuse(self, **allowed: str) -> None:
        """Refuse options that change the meaning of the section in ways that are not built."""
        for key, value in allowed.items():
            if self.options.get(key, value) != value:
                raise self.error(f"{key}={self.options[key]} is not supported")


def sections(text: str) -> list[Section]:
    """The sections of a cfg. Raises ValueError with the line that cannot be read."""
    blocks: list[Section] = []
    for number, raw in enumerate(text.splitlines(), 1):
        line = re.split(r"[#;]", raw, maxsplit=1)[0].strip()
        if not line:
            continue
        if match := re.fullmatch(r"\[\s*([\w-]+)\s*\]", line):
            blocks.append(Section(match[1].lower(), number))
        elif "=" in line and blocks:
            key, _, value = line.partition("=")
            blocks[-1].options[key.strip()] = value.strip()
        else:
            raise ValueError(f"line {number} is neither a [section] nor key=value: {line[:60]!r}")
    if not blocks or blocks[0].kind not in ("net", "network"):
        raise ValueError("it does not begin with a [net] section")
    if len(blocks) > MAX_LAYERS:
        raise ValueError(f"it has {len(blocks)} sections, more than {MAX_LAYERS}")
    return blocks


class _Builder:
    """Builds layers one section after the other, on the meta device: nothing is allocated before sizes are checked."""

    def __init__(self, net: Section) -> None:
        self.layers: list[Any] = []
        self.channels: list[int] = []
        self.strides: list[int] = []
        self.scales: list[Scale] = []
        self.inputs = net.number("channels", 3, low=1, high=3)
        if self.inputs != 3:
            raise net.error("channels must be 3")

    def add(self, section: Section, layer: Any, channels: int, stride: int, sources: int | list[int] = -1) -> None:
        layer.i, layer.f = len(self.layers), sources
        read = [sources] if isinstance(sources, int) else sources
        for source in (len(self.layers) + s if s < 0 else s for s in read):
            if source >= 0 and isinstance(self.layers[source], Yolo):
                raise section.error("reads the output of a [yolo] section")
        self.layers.append(layer)
        self.channels.append(channels)
        self.strides.append(stride)

    @property
    def here(self) -> tuple[int, int]:
        """(channels, stride) of the last layer."""
        return (self.channels[-1], self.strides[-1]) if self.layers else (self.inputs, 1)

    def sources(self, section: Section, key: str) -> list[int]:
        numbers = []
        for value in section.numbers(key):
            index = int(value) + (len(self.layers) if value < 0 else 0)
            if not 0 <= index < len(self.layers):
                raise section.error(f"{key}={section.options[key]} points outside the network")
            numbers.append(index)
        if not numbers:
            raise section.error(f"{key} is empty")
        return numbers

    def convolutional(self, section: Section) -> None:
        section.refuse(
            binary="0",
            xnor="0",
            antialiasing="0",
            flipped="0",
            assisted_excitation="0",
            share_index="-1000000000",
        )
        (channels, stride), filters = self.here, section.number("filters", 1, low=1)
        size, step = section.number("size", 1, low=1, high=31), section.number("stride", 1, low=1, high=8)
        groups, dilation = section.number("groups", 1, low=1), section.number("dilation", 1, low=1, high=32)
        if channels % groups or filters % groups:
            raise section.error(f"{groups} groups do not divide {channels} into {filters} channels")
        padding = size // 2 * dilation if section.number("pad", 0) else section.number("padding", 0, high=64)
        conv = nn.Conv2d(channels, filters, size, step, padding, dilation, groups, device="meta")
        normalised = section.number("batch_normalize", 0, high=1) == 1
        self.add(
            section, Convolution(conv, section.activation("logistic"), normalised=normalised), filters, stride * step
        )

    def maxpool(self, section: Section) -> None:
        section.refuse(antialiasing="0", maxpool_depth="0")
        (channels, stride), step = self.here, section.number("stride", 1, low=1, high=8)
        size = section.number("size", step, low=1, high=63)
        self.add(
            section,
            MaxPool(size, step, section.number("padding", size - 1, high=64)),
            channels,
            stride * step,
        )

    def upsample(self, section: Section) -> None:
        section.refuse(scale="1")
        (channels, stride), factor = self.here, section.number("stride", 2, low=1, high=8)
        if stride % factor:
            raise section.error("makes the picture larger than the input")
        self.add(section, nn.Upsample(scale_factor=factor, mode="nearest"), channels, stride // factor)

    def route(self, section: Section) -> None:
        read = self.sources(section, "layers")
        groups = section.number("groups", 1, low=1)
        if any(self.channels[s] % groups for s in read) or len({self.strides[s] for s in read}) > 1:
            raise section.error("joins layers of different sizes, or groups that do not divide them")
        layer = Route(groups, section.number("group_id", 0, high=groups - 1))
        self.add(section, layer, sum(self.channels[s] // groups for s in read), self.strides[read[0]], read)

    def shortcut(self, section: Section) -> None:
        section.refuse(weights_type="none")
        read = [len(self.layers) - 1, *self.sources(section, "from")]
        if len({(self.channels[s], self.strides[s]) for s in read}) > 1:
            raise section.error("adds layers of different sizes")
        self.add(section, Shortcut(section.activation("linear")), *self.here, read)

    def dropout(self, section: Section) -> None:
        self.add(section, nn.Identity(), *self.here)

    def yolo(self, section: Section) -> None:
        head: Any = self.layers[-1] if self.layers else None
        classes, total = section.number("classes", 20, low=1), section.number("num", 1, low=1)
        sizes = section.numbers("anchors")
        if len(sizes) != 2 * total or not all(0 < s < MAX_SIZE for s in sizes):
            raise section.error(f"'anchors' are not {total} pairs of pixels")
        mask = [int(m) for m in section.numbers("mask", ",".join(map(str, range(total))))]
        if not mask or not all(0 <= m < total for m in mask):
            raise section.error("'mask' points outside the anchors")
        new = section.number("new_coords", 0, high=1) == 1
        wanted: type[nn.Module] = nn.Sigmoid if new else nn.Identity
        outputs = len(mask) * (5 + classes)
        plain = isinstance(head, Convolution) and head.conv.kernel_size == (1, 1) and not head.normalised
        if not plain or not isinstance(head.act, wanted) or head.conv.out_channels != outputs or len(self.layers) < 2:
            raise section.error(f"must follow a plain 1×1 convolution with {outputs} filters")
        (scale_xy,) = section.numbers("scale_x_y", "1")[:1] or [1.0]
        anchors = torch.tensor(sizes).view(-1, 2)[mask]
        stride = self.strides[-1]
        self.scales.append(Scale(len(self.layers) - 2, head.conv, anchors, stride, classes, scale_xy, new))
        self.add(section, Yolo(), *self.here)


class Yolo(nn.Identity):
    """The place of a [yolo] section: it has a number, but nothing reads it."""


def load(cfg: bytes, weights: bytes) -> Network:
    """The network of a cfg filled with its weights. Raises ValueError for whatever is malformed or does not match."""
    if len(cfg) > MAX_CFG_BYTES:
        raise ValueError(f"the cfg has {len(cfg)} bytes, more than {MAX_CFG_BYTES}")
    net, *rest = sections(cfg.decode("utf-8", "replace"))
    width, height = (net.number(key, 416, low=32, high=MAX_SIZE) for key in ("width", "height"))
    build = _Builder(net)
    for section in rest:
        step = getattr(build, section.kind, None) if section.kind in KINDS else None
        if step is None:
            raise section.error(f"this section is not supported (only {', '.join(KINDS)})")
        step(section)
    if not build.scales:
        raise ValueError("it has no [yolo] section, so it is not a detector")
    if len({scale.classes for scale in build.scales}) > 1:
        raise ValueError("its [yolo] sections have different numbers of classes")
    _fill(build.layers, weights)
    return Network(build.layers, build.scales, (height, width))


KINDS = ("convolutional", "maxpool", "upsample", "route", "shortcut", "dropout", "yolo")


def _fill(layers: list[Any], weights: bytes) -> None:
    """Read the weights in file order: of each convolution bias [scale, mean, variance], then the kernel."""
    if len(weights) < 16:
        raise ValueError("the weights file has no header")
    major, minor = np.frombuffer(weights, "<i4", 2)
    header = 20 if 0 <= major < 1000 and 0 <= minor < 1000 and major * 10 + minor >= 2 else 16
    convs = [layer for layer in layers if isinstance(layer, Convolution)]
    needed = 4 * sum(c.conv.weight.numel() + c.conv.out_channels * (4 if c.normalised else 1) for c in convs)
    if len(weights) != header + needed:
        raise ValueError(
            f"the weights file has {len(weights)} bytes, the cfg needs {header + needed}: they do not belong together, "
            "or the file is cut off"
        )
    values = np.frombuffer(weights, "<f4", offset=header)
    if not np.isfinite(values).all():
        raise ValueError("the weights file holds numbers that are not finite")
    at = 0

    def take(count: int) -> Tensor:
        nonlocal at
        at += count
        return torch.from_numpy(values[at - count : at].astype(np.float32))

    for layer in convs:
        conv, n = layer.conv, layer.conv.out_channels
        bias, factor = take(n), None
        if layer.normalised:
            scale, mean, variance = take(n), take(n), take(n)
            factor = scale / (variance.clamp(min=0) + EPSILON).sqrt()
            bias = bias - mean * factor
        kernel = take(conv.weight.numel()).view(conv.weight.shape)
        if factor is not None:
            kernel = kernel * factor.view(-1, 1, 1, 1)
        conv.weight, conv.bias = nn.Parameter(kernel), nn.Parameter(bias)
