"""Layers made by us of what a checkpoint says of them: a literal list of classes, plain settings, tensors.

A layer of the result is an instance of a class on the list, with the numbers that its own code reads and the tensors
and layers inside that its own code reads: the very network that was stored. What the installed class has no use for
would mean that another version of it was stored; such a layer is refused by its name.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import import_module
from types import CodeType
from typing import Any

from torch import Tensor, nn

from detxai.models import foreign, upstream  # noqa: F401  (before any ultralytics.*)
from detxai.models.pickles import Node

#: Bounds of a network, beyond the largest that is published. Layers that run several times count several times.
MOST_LAYERS, DEEPEST = 20_000, 24
#: The largest number and the longest list that a setting may be.
WIDEST, LONGEST = 1 << 16, 64

ULTRALYTICS = {
    "activation": "AGLU",
    "block": "A2C2f AAttn ABlock AConv ADown Attention BNContrastiveHead Bottleneck BottleneckCSP C1 C2 C2PSA C2f "
    "C2fAttn C2fCIB C2fPSA C3 C3Ghost C3TR C3f C3k C3k2 C3x CBFuse CBLinear CIB ContrastiveHead DFL ELAN1 "
    "GhostBottleneck HGBlock HGStem ImagePoolingAttn MaxSigmoidAttnBlock PSA PSABlock Proto Proto26 RealNVP "
    "RepBottleneck RepC3 RepCSP RepNCSPELAN4 RepVGGDW ResNetBlock ResNetLayer Residual SAVPE SCDown SPP SPPELAN "
    "SPPF SwiGLUFFN",
    "conv": "CBAM ChannelAttention Concat Conv Conv2 ConvTranspose DWConv DWConvTranspose2d Focus GhostConv Index "
    "LightConv RepConv SpatialAttention",
    "head": "Classify Detect LRPCHead OBB OBB26 Pose Pose26 RTDETRDecoder Segment Segment26 WorldDetect YOLOEDetect "
    "YOLOESegment YOLOESegment26 v10Detect",
    "transformer": "AIFI DeformableTransformerDecoder DeformableTransformerDecoderLayer LayerNorm2d MLP MLPBlock "
    "MSDeformAttn TransformerBlock TransformerEncoderLayer TransformerLayer",
}
TORCH = {
    "activation": "ELU GELU Hardsigmoid Hardswish LeakyReLU Mish MultiheadAttention ReLU ReLU6 SiLU Sigmoid Tanh",
    "batchnorm": "BatchNorm2d",
    "container": "ModuleList Sequential",
    "conv": "Conv2d ConvTranspose2d",
    "dropout": "Dropout",
    "linear": "Identity Linear NonDynamicallyQuantizableLinear",
    "normalization": "GroupNorm LayerNorm",
    "padding": "ZeroPad2d",
    "pooling": "AdaptiveAvgPool2d AdaptiveMaxPool2d AvgPool2d MaxPool2d",
    "sparse": "Embedding",
    "upsampling": "Upsample",
}
#: The text that a setting may be; any other text is refused.
WORDS = ("bicubic", "bilinear", "circular", "nearest", "nearest-exact", "none", "reflect", "replicate", "same", "tanh",
         "valid", "zeros")  # fmt: skip
#: What tells a layer its place in the network; ultralytics sets it from outside.
WIRING = ("f", "i")
#: What a layer remembers of its last picture, of the export that it was written for, and notes about it.
STALE = ("anchors", "dynamic", "export", "feats", "format", "name", "np", "shape", "strides", "type",
         "valid_mask")  # fmt: skip
TENSORS = ("stride",)
#: Where older releases of torch and ultralytics stored less: what their own code puts in on loading.
DEFAULTS: dict[str, dict[str, Callable[[Any], Any]]] = {
    "AAttn": {"all_head_dim": lambda layer: layer.head_dim * layer.num_heads},
    "BatchNorm2d": {"track_running_stats": lambda _: True},
    "Conv2d": {"padding_mode": lambda _: "zeros"},
    "ConvTranspose2d": {"padding_mode": lambda _: "zeros"},
    "Hardswish": {"inplace": lambda _: False},
    "MultiheadAttention": {"_qkv_same_embed_dim": lambda _: True, "batch_first": lambda _: False},
    "Upsample": {"recompute_scale_factor": lambda _: True},
}
_OWN = frozenset(nn.Module().__dict__)


class Unbuildable(Exception):
    """What is stored cannot be built exactly; the message names the layer."""


@cache
def layer_class(name: str) -> type[nn.Module] | None:
    """The class that the full name `name` stands for; None where it is not on the list."""
    module, _, item = name.rpartition(".")
    package, _, room = module.rpartition(".")
    if package == "torch.nn.modules" and item in TORCH.get(room, "").split():
        return getattr(import_module(module), item)  # type: ignore[no-any-return]
    if module.startswith("ultralytics.nn.modules"):
        rooms = [room for room, items in ULTRALYTICS.items() if item in items.split()]
        if rooms:
            return getattr(import_module(f"ultralytics.nn.modules.{rooms[0]}"), item, None)
        return nn.Identity if item == "Silence" else None
    return foreign.layer_class(name)


class Builder:
    """Builds the layers of one checkpoint, whose tensors may have `size` bytes in all."""

    def __init__(self, size: int) -> None:
        self.left = size
        self.known: dict[int, nn.Module] = {}
        self.tensors: dict[int, Tensor] = {}
        self.runs: dict[int, int] = {}
        self.open: list[Any] = []

    def layer(self, node: Any, where: str) -> nn.Module:
        """The layer that `node` describes; nodes that are one object become one layer. Raises Unbuildable."""
        if id(node) in self.known:
            return self.known[id(node)]
        if type(node) is not Node or type(node.state) is not dict:
            raise Unbuildable(f"{where} is no layer")
        cls = layer_class(node.name)
        if cls is None:
            raise Unbuildable(f"{where} is a {node.name:.100}, which detxai does not know")
        if len(self.open) >= DEEPEST or any(node is outer for outer in self.open):
            raise Unbuildable(f"{where} lies too deep, or inside itself")
        self.open.append(node)
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        self._settings(node, layer, where)
        self._parts(node.state, layer, where)
        _finish(layer, where)
        self.open.pop()
        self.known[id(node)] = layer
        return layer.eval()

    def _settings(self, node: Node, layer: nn.Module, where: str) -> None:
        kind: Any = type(layer)
        wanted = read_by(kind)
        for name, value in node.state.items():
            if type(name) is not str or name.startswith("__"):
                raise Unbuildable(f"{where} carries {name!r:.50}")
            if name in _OWN or name in STALE or name not in (*WIRING, *wanted):
                if "hooks" in name and value:
                    raise Unbuildable(f"{where} carries {name}: it computes more than its class does")
                continue
            own = getattr(kind, name, None)
            if name == "forward" and hasattr(kind, "forward_fuse") and _fused(value, node):
                layer.forward = layer.forward_fuse  # type: ignore[assignment]
            elif callable(own):
                raise Unbuildable(f"{where} replaces the method {name} of its class")
            elif not isinstance(own, property):
                layer.__dict__[name] = self._plain(value, name, where)
        for name, made in DEFAULTS.get(kind.__name__, {}).items():
            if name not in layer.__dict__:
                layer.__dict__[name] = made(layer)

    def _plain(self, value: Any, name: str, where: str, depth: int = 0) -> Any:
        kind = type(value)
        if kind in (bool, type(None)) or (kind is str and value in WORDS):
            return value
        if kind in (int, float) and abs(value) <= WIDEST:
            return value
        if kind in (list, tuple) and len(value) <= LONGEST and depth < 3:
            return kind(self._plain(item, name, where, depth + 1) for item in value)
        if kind is Tensor and name in TENSORS and value.numel() <= LONGEST:
            return value.float().clone()
        raise Unbuildable(f"{where} has a setting that is out of the ordinary: {name}")

    def _parts(self, state: dict[str, Any], layer: nn.Module, where: str) -> None:
        kind: Any = type(layer)
        runs = 1
        parts = {key: state.get(key) or {} for key in ("_parameters", "_buffers", "_modules")}
        for key, part in parts.items():
            for name, value in part.items():
                label = f"{where}.{name}"
                if type(name) is not str or not (name in read_by(kind) or _holds(kind, key)):
                    raise Unbuildable(f"{label} has no place in the {kind.__name__} of the installed release")
                if key == "_modules":
                    layer.add_module(name, None if value is None else self.layer(value, label))
                    runs += self.runs.get(id(value), 0)
                elif key == "_buffers":
                    layer.register_buffer(name, None if value is None else self.tensor(value, label))
                else:
                    own = None if value is None else self.tensor(value, label)
                    layer.register_parameter(name, None if own is None else nn.Parameter(own, requires_grad=False))
        if runs > MOST_LAYERS:
            raise Unbuildable(f"{where} has more layers than any detector that is known")
        self.runs[id(self.open[-1])] = runs

    def tensor(self, value: Any, where: str) -> Tensor:
        """The stored tensor in float32, or in its own whole numbers."""
        if type(value) is not Tensor:
            raise Unbuildable(f"{where} is no tensor")
        if id(value) not in self.tensors:
            self.left -= value.nbytes
            if self.left < 0:
                raise Unbuildable(f"with {where} it declares more data than it holds")
            self.tensors[id(value)] = value.float() if value.is_floating_point() else value
        return self.tensors[id(value)]


def _fused(value: Any, node: Node) -> bool:
    """Whether a stored `forward` is the class's own for a BatchNorm that was folded in."""
    return (
        type(value) is Node and value.name == "builtins.getattr" and len(value.args) == 2
        and value.args[0] is node and value.args[1] in ("forward_fuse", "fuseforward")
    )  # fmt: skip


def _holds(kind: type, key: str) -> bool:
    return key == "_modules" and issubclass(kind, (nn.Sequential, nn.ModuleList))


def _finish(layer: Any, where: str) -> None:
    """Complete a layer of torch, and see that its tensors have the shapes that its settings say."""
    if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
        inside, outside = layer.in_channels, layer.out_channels
        if isinstance(layer, nn.ConvTranspose2d):
            inside, outside = outside, inside
        wanted = {"weight": (outside, inside // layer.groups, *layer.kernel_size), "bias": (layer.out_channels,)}
        sides = layer.padding if isinstance(layer.padding, tuple) else (0, 0)
        layer._reversed_padding_repeated_twice = [p for p in reversed(sides) for _ in range(2)]
    elif isinstance(layer, nn.BatchNorm2d):
        wanted = dict.fromkeys(("weight", "bias", "running_mean", "running_var"), (layer.num_features,))
    elif isinstance(layer, nn.Linear):
        wanted = {"weight": (layer.out_features, layer.in_features), "bias": (layer.out_features,)}
    else:
        folded = isinstance(getattr(layer, "conv", None), nn.Conv2d) and not hasattr(layer, "bn")
        if folded and hasattr(type(layer), "forward_fuse"):
            layer.forward = layer.forward_fuse
        return
    for name, shape in wanted.items():
        part = getattr(layer, name)
        if part is not None and tuple(part.shape) != shape:
            raise Unbuildable(f"{where}.{name} has the shape {tuple(part.shape)}, its settings say {shape}")


@cache
def read_by(kind: type) -> frozenset[str]:
    """All names in the code of `kind` and of the classes that it is made of, up to torch's Module."""
    names: set[str] = set()
    codes = [
        getattr(part, "__code__", None) or getattr(getattr(part, "fget", None), "__code__", None)
        for base in kind.__mro__
        if base not in (nn.Module, object)
        for part in vars(base).values()
    ]
    while codes:
        code = codes.pop()
        if isinstance(code, CodeType):
            names.update(code.co_names, (c for c in code.co_consts if type(c) is str and c.isidentifier()))
            codes.extend(c for c in code.co_consts if isinstance(c, CodeType))
    return frozenset(names)
