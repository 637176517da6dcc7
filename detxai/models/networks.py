"""What a torch checkpoint holds, as a network of our own: of ultralytics, or of one of the original repositories."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from detxai.models.darknet import Network, Scale
from detxai.models.layers import Builder, Unbuildable
from detxai.models.pickles import Node

TASKS = (
    "DetectionModel OBBModel SegmentationModel PoseModel ClassificationModel RTDETRDetectionModel WorldModel "
    "YOLOEModel YOLOESegModel"
)
#: Names of other releases, and where those classes live today.
_RENAMED = {"YOLOv10DetectionModel": "DetectionModel"}
_ROOT = re.compile(r"(?:yolov\d\.)?models\.(?:yolo|yolov5|yolov3)\.(?:Model|\w+Model)")
#: Wrappers with the network inside them, and its name there.
_WRAPPERS = {"DataParallel": "module", "DistributedDataParallel": "module", "AutoShape": "model", "autoShape": "model"}
#: Heads of YOLOv9's own repository: which of their scales and branches report. The others are for training.
_MAIN = {
    "Detect": (0, "cv2", "cv3"), "DDetect": (0, "cv2", "cv3"), "DualDetect": (1, "cv4", "cv5"),
    "DualDDetect": (1, "cv4", "cv5"), "TripleDetect": (2, "cv6", "cv7"), "TripleDDetect": (2, "cv6", "cv7"),
}  # fmt: skip
MOST_NAMES, LONGEST_NAME = 1 << 16, 1000
SMALLEST_SIZE, LARGEST_SIZE, COARSEST = 32, 4096, 512
#: Bounds of a stored yaml.
MOST_ITEMS, DEEPEST = 20_000, 8


class Classifier(Exception):
    """The network says what a whole picture is, not where."""


@dataclass(frozen=True, eq=False)
class Stored:
    """A network that was stored: `kind` as in `Checkpoint`, the network, its class names, its training size."""

    kind: str
    module: nn.Module
    names: dict[int, str]
    family: str
    imgsz: int | None


def root(content: Any) -> Any:
    """The model in what a checkpoint holds, without wrappers. Raises ValueError or Unbuildable for all else."""
    node = content
    if type(content) is dict:
        node = content.get("ema") or content.get("model")
        if node is None and any(type(value) is Tensor for value in content.values()):
            node = content
    while type(node) is Node and (inside := _WRAPPERS.get(node.name.rpartition(".")[2])):
        node = (node.state or {}).get("_modules", {}).get(inside)
    if type(node) is dict and any(type(value) is Tensor for value in node.values()):
        raise ValueError("it is a state dict: tensors without the network that they belong to")
    if type(node) is not Node:
        raise ValueError(f"it holds no model (found {type(node).__name__})")
    if type(node.state) is not dict:
        raise Unbuildable(f"the model is a {node.name:.100}, which detxai does not know")
    return node


def network(content: Any, size: int) -> Stored:
    """The network of a checkpoint of `size` bytes.

    Raises Unbuildable where it cannot be rebuilt exactly, ValueError and its like where there is none.
    """
    node = root(content)
    task = node.name.rpartition(".")[2]
    builder = Builder(4 * size)  # halves are twice as large in float32, and a layer may have two places
    yaml = plain(node.state.get("yaml") or {})
    if not isinstance(yaml, dict):
        raise ValueError("its yaml is not a mapping")
    names = class_names(node.state.get("names"))
    imgsz = image_size(content, node)
    if node.name.startswith("ultralytics.nn.tasks."):
        task = _RENAMED.get(task, task)
        if task not in TASKS.split():
            raise Unbuildable(f"the model is a {node.name:.100}, which detxai does not know")
        module = _ultralytics_network(node, task, yaml, builder)
        return Stored("ultralytics", module, _fitting(names, module.model[-1]), family(yaml), imgsz)  # type: ignore[index]
    if not _ROOT.fullmatch(node.name):
        raise Unbuildable(f"the model is a {node.name:.100}, which detxai does not know")
    *layers, head = _sequence(node)
    kind = head.name.rpartition(".")[2] if type(head) is Node else ""
    if kind in _MAIN and "cv2" in (head.state or {}).get("_modules", {}):
        module = _yolov9(layers, head, kind, yaml, builder)
        return Stored("ultralytics", module, _fitting(names, module.model[-1]), family(yaml, "yolov9"), imgsz)  # type: ignore[index]
    legacy = _anchor_based(layers, head, node.state, names, builder)
    names = names or {i: str(i) for i in range(legacy.scales[0].classes)}
    return Stored("legacy", legacy, names, family(yaml), None)


def _ultralytics_network(node: Node, task: str, yaml: dict[str, Any], builder: Builder) -> nn.Module:
    from ultralytics.nn import tasks

    layers = builder.layer(node.state["_modules"]["model"], "model")
    if type(layers) is not nn.Sequential or not layers:
        raise Unbuildable("its layers are not in a row")
    check_wiring(layers)
    model = _empty(getattr(tasks, task), layers, yaml)
    for name in ("txt_feats", "pe"):  # the words of an open vocabulary
        value = node.state.get(name)
        if type(value) is Tensor:
            model.__dict__[name] = builder.tensor(value, name)
    return model


def _empty(cls: Any, layers: nn.Sequential, yaml: dict[str, Any]) -> nn.Module:
    """A model of ultralytics around `layers`."""
    model: Any = cls.__new__(cls)
    nn.Module.__init__(model)
    model.model, model.yaml, model.inplace = layers, yaml, False
    head: Any = layers[-1]
    if isinstance(getattr(head, "stride", None), Tensor):
        model.stride = head.stride
        whole_strides(head.stride.tolist())
    read = [f for layer in layers for f in (layer.f if isinstance(layer.f, list) else [layer.f])]
    model.save = sorted({f for f in read if isinstance(f, int) and f >= 0})
    return model.eval()  # type: ignore[no-any-return]


def check_wiring(layers: nn.Sequential) -> None:
    """See that each layer knows its place and reads layers before it. Raises Unbuildable."""
    for index, layer in enumerate(layers):
        sources: Any = getattr(layer, "f", None)
        read = sources if type(sources) in (list, tuple) else [sources]
        if layer.__dict__.get("i") != index or not read or any(type(f) is not int for f in read):
            raise Unbuildable(f"layer {index} is not wired")
        if any(not -1 <= (f + index if f < -1 else f) < max(index, 0) for f in read):
            raise Unbuildable(f"layer {index} reads what does not come before it")


def _sequence(node: Node) -> list[Any]:
    layers = node.state.get("_modules", {}).get("model")
    if type(layers) is not Node or layers.name != "torch.nn.modules.container.Sequential":
        raise Unbuildable("its layers are not in a row")
    return list(layers.state["_modules"].values())


# -- heads of the original repositories ---------------------------------------------------------------


def _trunk(layers: list[Any], builder: Builder) -> nn.Sequential:
    trunk = nn.Sequential(*(builder.layer(layer, f"layer {i}") for i, layer in enumerate(layers)))
    check_wiring(trunk)
    return trunk


def _anchor_based(
    layers: list[Any], head: Any, model: dict[str, Any], names: dict[int, str], builder: Builder
) -> Network:
    """The network under a head with anchors (Detect, IDetect, and the detections of Segment): one `Scale` a level."""
    kind = head.name.rpartition(".")[2] if type(head) is Node else type(head).__name__
    state = head.state if type(head) is Node and type(head.state) is dict else {}
    parts, buffers = state.get("_modules", {}), state.get("_buffers", {})
    if kind == "Classify":
        raise Classifier
    if kind not in ("Detect", "IDetect", "IAuxDetect", "Segment", "ISegment") or not {"m"} <= parts.keys():
        raise Unbuildable(f"it ends in a {kind} head of its own repository")
    count, feeds = state["nc"], state["f"]
    if type(count) is not int or not 0 < count <= MOST_NAMES or (names and len(names) < count):
        raise ValueError(f"it has {len(names)} class names for {count} classes")
    trunk = _trunk(layers, builder)
    anchors = builder.tensor(buffers["anchors"], "anchors")
    stride: Any = model.get("stride") if state.get("stride") is None else state["stride"]
    strides = whole_strides(stride.tolist() if type(stride) is Tensor else stride)
    scales = []
    for level, node in enumerate(parts["m"].state["_modules"].values()):
        conv: Any = builder.layer(node, f"head.m.{level}")
        conv = _with_implicit(conv, parts, level, builder)
        pixels = anchors[level] * strides[level]
        if "anchor_grid" in buffers:  # what these releases multiply with
            pixels = builder.tensor(buffers["anchor_grid"], "anchor_grid")[level].reshape(-1, 2)
        outputs = conv.out_channels // len(pixels)
        if conv.kernel_size != (1, 1) or outputs * len(pixels) != conv.out_channels or outputs < 5 + count:
            raise Unbuildable(f"head.m.{level} has {conv.out_channels} outputs for {len(pixels)} × {5 + count}")
        if not 0 <= feeds[level] < len(trunk):
            raise Unbuildable(f"the head reads layer {feeds[level]}")
        scales.append(
            Scale(feeds[level], _first(conv, len(pixels), 5 + count), pixels, strides[level], count, 2.0, True)
        )
    return Network(list(trunk), scales, (640, 640))


def whole_strides(values: Any) -> list[int]:
    """Pixels of a cell, a level. Raises ValueError for what is none."""
    strides = [int(value) for value in values]
    if not all(1 <= stride <= COARSEST for stride in strides):
        raise ValueError(f"its cells are {strides} pixels wide")
    return strides


def _with_implicit(conv: nn.Conv2d, parts: dict[str, Any], level: int, builder: Builder) -> nn.Conv2d:
    """`conv` with what YOLOv7 adds before it and multiplies behind it, folded in."""
    if "ia" not in parts or "im" not in parts:
        return conv
    added, factor = (
        builder.tensor(parts[name].state["_modules"][str(level)].state["_parameters"]["implicit"], name).flatten()
        for name in ("ia", "im")
    )
    bias = conv.bias if conv.bias is not None else torch.zeros(conv.out_channels)
    conv.bias = nn.Parameter((bias + conv.weight.flatten(1) @ added) * factor, requires_grad=False)
    conv.weight = nn.Parameter(conv.weight * factor.view(-1, 1, 1, 1), requires_grad=False)
    return conv


def _first(conv: nn.Conv2d, anchors: int, kept: int) -> nn.Conv2d:
    """`conv` with the first `kept` outputs of each anchor: a segment head has masks behind its detections."""
    if conv.out_channels == anchors * kept:
        return conv
    first = nn.Conv2d(conv.in_channels, anchors * kept, 1)
    for name in ("weight", "bias"):
        whole: Any = getattr(conv, name)
        own = whole.detach().unflatten(0, (anchors, -1))[:, :kept].flatten(0, 1).clone()
        setattr(first, name, nn.Parameter(own, requires_grad=False))
    return first


def _yolov9(layers: list[Any], head: Node, kind: str, yaml: dict[str, Any], builder: Builder) -> nn.Module:
    """A model of ultralytics whose head has the branches that YOLOv9's own repository reports with."""
    from ultralytics.nn import tasks
    from ultralytics.nn.modules.head import Detect

    group, boxes, classes = _MAIN[kind]
    parts, state = head.state["_modules"], head.state
    own: Any = Detect.__new__(Detect)
    nn.Module.__init__(own)
    own.cv2, own.cv3 = (builder.layer(parts[name], f"head.{name}") for name in (boxes, classes))
    own.dfl = builder.layer(parts["dfl"], "head.dfl")
    own.nc, own.reg_max, own.nl, own.i = state["nc"], state["reg_max"], len(own.cv2), len(layers)
    if any(type(n) is not int for n in (own.nc, own.reg_max)) or len(own.cv2) != len(own.cv3):
        raise Unbuildable("its head is not put together as expected")
    own.no, own.stride = own.nc + 4 * own.reg_max, builder.tensor(state["stride"], "head.stride")
    own.f = list(state["f"])[group * own.nl : (group + 1) * own.nl]
    trunk = nn.Sequential(*_trunk(layers, builder), own.eval())
    check_wiring(trunk)
    return _empty(tasks.DetectionModel, trunk, yaml)


# -- plain values ---------------------------------------------------------------------------------------


def plain(value: Any) -> Any:
    """A copy of `value` of dicts with text keys, lists, text and numbers. Raises ValueError for all else."""
    left = MOST_ITEMS

    def copied(value: Any, depth: int) -> Any:
        nonlocal left
        left -= 1
        kind = type(value)
        if left < 0 or depth > DEEPEST:
            raise ValueError("its yaml is larger than any that is known")
        if kind in (bool, int, float, type(None)) or (kind is str and len(value) <= LONGEST_NAME):
            return value
        if kind is dict and all(type(key) in (str, int) for key in value):
            return {key: copied(item, depth + 1) for key, item in value.items()}
        if kind in (list, tuple):
            return [copied(item, depth + 1) for item in value]
        if kind is Node:  # a path, a namespace: nothing that a network is made of
            return None
        raise ValueError(f"its yaml holds a {kind.__name__}")

    return copied(value, 0)


def class_names(value: Any) -> dict[int, str]:
    """Names by class id. Raises ValueError where they are no list or mapping of text, or too many."""
    if value is None:
        return {}
    pairs = value.items() if type(value) is dict else enumerate(value) if type(value) in (list, tuple) else None
    if pairs is None or len(value) > MOST_NAMES:
        raise ValueError("its class names are no list, or longer than any that is known")
    names_by_id: dict[int, str] = {}
    for key, name in pairs:
        if type(name) not in (str, int, float) or len(str(name)) > LONGEST_NAME:
            raise ValueError(f"its class {key!s:.50} has no name that is text")
        names_by_id[int(key)] = str(name)
    return names_by_id


def _fitting(names: dict[int, str], head: Any) -> dict[int, str]:
    """`names`, or the ids where there are none. Raises ValueError where there are fewer than classes."""
    count = getattr(head, "nc", len(names))
    if type(count) is not int or not 0 < count <= MOST_NAMES:
        raise ValueError("its number of classes is no number")
    if names and set(range(count)) - names.keys():
        raise ValueError(f"it has {len(names)} class names for {count} classes")
    return names or {i: str(i) for i in range(count)}


def image_size(content: Any, node: Node | None = None) -> int | None:
    """The size in pixels that the model was trained at, None where it is not stored. Raises ValueError for nonsense."""
    arguments = content.get("train_args") if type(content) is dict else None
    if type(arguments) is Node:
        arguments = arguments.state
    size = arguments.get("imgsz") if type(arguments) is dict else None
    if type(size) in (list, tuple) and size:
        size = max(size)
    if size is None:
        return None
    if type(size) is float and size == round(size):
        size = int(size)
    if type(size) is not int or not SMALLEST_SIZE <= size <= LARGEST_SIZE:
        raise ValueError(f"its training size {size!r:.50} is not from {SMALLEST_SIZE} to {LARGEST_SIZE} pixels")
    return size


def family(yaml: Any, otherwise: str | None = None) -> str:
    """`yolov8`, `yolo11`, `rtdetr`, …: from the yaml's file name, else from the blocks it is made of."""
    if named := re.search(r"yolov?\d+|rtdetr|yoloe|yolow", str(yaml.get("yaml_file", "")).lower()):
        return named.group()
    rows = [*(yaml.get("backbone") or ()), *(yaml.get("head") or ())]
    blocks = {str(row[2]) for row in rows if isinstance(row, list) and len(row) > 2}
    signs = {"RTDETRDecoder": "rtdetr", "A2C2f": "yolo12", "C3k2": "yolo11", "v10Detect": "yolov10",
             "RepNCSPELAN4": "yolov9", "C2f": "yolov8", "C3": "yolov5", "BottleneckCSP": "yolov5",
             "SPPCSPC": "yolov7"}  # fmt: skip
    return next((family for block, family in signs.items() if block in blocks), otherwise or "yolo")
