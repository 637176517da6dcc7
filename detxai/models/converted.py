"""Models as `.safetensors`, made by `detxai convert`: tensors, and an architecture in the header; no code."""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from detxai.errors import ModelError
from detxai.models import tensor_file, upstream  # noqa: F401  (before any ultralytics.*)
from detxai.models.bounds import Bounds
from detxai.models.layers import MOST_LAYERS, TORCH, ULTRALYTICS, WIDEST
from detxai.models.networks import class_names, image_size
from detxai.models.trunk import return_pages
from detxai.values import Checkpoint

FORMAT = "detxai.model/1"
#: Bounds of an architecture: beyond the largest that is published, and small enough to build.
MOST_ROWS, MOST_REPEATS = 500, 100
#: Numbers that a network may hold beside those of its file: what fine-tuning made narrower than its yaml says.
SPARE_NUMBERS = 1 << 20
#: Text that the arguments of a layer may be; ultralytics would evaluate any other.
_WORDS = ("nc", "None", "True", "False", "nearest", "bilinear", "anchors", "kpt_shape")
#: Side in pixels of the picture that both forms of a model are compared on, and how far they may differ.
PICTURE, SAME = 256, 1e-4
_ACTIVATIONS = {"SiLU": nn.SiLU, "ReLU": nn.ReLU, "LeakyReLU": nn.LeakyReLU, "GELU": nn.GELU, "Mish": nn.Mish,
                "Hardswish": nn.Hardswish}  # fmt: skip
_RANDOM = (torch.ops.aten.normal_, torch.ops.aten.uniform_)


def read(name: str, digest: str, data: bytes | mmap.mmap) -> Checkpoint:
    """The model in the bytes `data` of a `.safetensors`; of a `mmap` each part is given back once it is read.

    Raises ModelError, or ValueError and its like for damage.
    """
    about, entries = tensor_file.metadata(data), tensor_file.entries(data)
    if about.get("format") != FORMAT:
        raise ModelError(
            f"{name} holds tensors but no architecture ({FORMAT} is missing in its header).",
            "Make it with: detxai convert MODEL.pt OUT.safetensors",
        )
    names = class_names({int(k): v for k, v in json.loads(about["names"]).items()})
    imgsz = image_size({"train_args": {"imgsz": int(about["imgsz"])}})
    with torch.no_grad(), _Unset():  # type: ignore[no-untyped-call]
        module = build(json.loads(about["architecture"]), names, sum(entry.count for entry in entries.values()))
        _fit(module, {key: entry.shape for key, entry in entries.items()})
    return_pages()
    own = module.state_dict()
    lacking = [key for key in own if key not in entries and not key.endswith("num_batches_tracked")]
    unlike = [key for key, entry in entries.items() if key not in own or own[key].shape != entry.shape]
    if lacking or unlike:
        raise ModelError(f"{name}: tensors and architecture disagree, e.g. at {(lacking + unlike)[0]}.")
    for key, entry in entries.items():
        own[key].copy_(entry.read(data))
    return Checkpoint(name, digest, "ultralytics", module, about["family"], names, imgsz)


class _Unset(TorchDispatchMode):
    """Within it, no weight is drawn at random and none is read: what comes over them is not there yet, and ultralytics
    runs a new network for the sizes of its maps alone."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # as in `Bounds`

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in _RANDOM:
            return args[0]
        if func.overloadpacket is torch.ops.aten.convolution:
            outline = func(*(part.to("meta") if isinstance(part, torch.Tensor) else part for part in args))
            return args[0].new_zeros(outline.shape)
        return func(*args, **(kwargs or {}))


def build(architecture: dict[str, Any], names: dict[int, str], numbers: int | None = None) -> nn.Module:
    """The ultralytics network of a model-yaml dict, checked against the allow-list, with random weights.

    `numbers`: how many its tensors hold in all, where that is known. Raises ModelError for what
    `_check_architecture` refuses, and for more numbers or layers than there can be.
    """
    from ultralytics.nn.tasks import DetectionModel

    architecture = _checked(architecture)
    activation = architecture.pop("activation", None)
    with _bounded(numbers), _default_activation(activation):
        module: nn.Module = DetectionModel(
            architecture | {"nc": len(names)}, ch=architecture.get("channels", 3), verbose=False
        )
    if activation:
        module.yaml["activation"] = activation  # type: ignore[operator,index]
    module.names = names  # type: ignore[assignment]
    return module


@contextlib.contextmanager
def _default_activation(text: Any) -> Iterator[None]:
    """Within it, ultralytics' convolutions are followed by the activation `text`, which is not evaluated."""
    from ultralytics.nn.modules import Conv

    before = Conv.default_act
    if text:
        match = re.fullmatch(r"(?:torch\.)?nn\.(\w+)\((?:(?:negative_slope=)?([\d.]+)|inplace=\w+)?\)", str(text))
        if not match or match[1] not in _ACTIVATIONS or (match[2] and match[1] != "LeakyReLU"):
            raise ModelError(f"The architecture names an unknown activation: {str(text)[:200]!r}.")
        Conv.default_act = _ACTIVATIONS[match[1]](*([float(match[2])] if match[2] else []))
    try:
        yield
    finally:
        Conv.default_act = before


@contextlib.contextmanager
def _bounded(numbers: int | None) -> Iterator[None]:
    """Within it, no network grows beyond `numbers` numbers in its tensors, nor beyond the bounds of layers and work.

    A tensor is counted before anything is written into it: until then it takes no memory.
    """
    from torch.nn.modules import module as hooks

    layers, left = MOST_LAYERS, None if numbers is None else 2 * numbers + SPARE_NUMBERS
    measured = False

    def count_layer(*_: Any) -> None:
        nonlocal layers
        layers -= 1
        if layers < 0:
            raise ModelError("The architecture is larger than any detector that is known.")

    def count_numbers(_: Any, name: str, tensor: Any) -> None:
        nonlocal left
        if left is not None and tensor is not None:
            left -= tensor.numel()
            if left < 0:
                raise ModelError("The architecture is larger than the tensors that came with it.")

    def measure(*_: Any) -> None:
        nonlocal measured
        if not measured:
            measured = True
            stack.enter_context(Bounds("The architecture", 0))

    handles = [
        hooks.register_module_module_registration_hook(count_layer),
        hooks.register_module_parameter_registration_hook(count_numbers),
        hooks.register_module_forward_pre_hook(measure),
    ]
    try:
        with contextlib.ExitStack() as stack:
            yield
    finally:
        for handle in handles:
            handle.remove()


def _checked(architecture: Any) -> dict[str, Any]:
    """A copy of `architecture`, without what names things that are not on the list, or that cannot be real."""
    architecture = json.loads(json.dumps(architecture))
    if not isinstance(architecture, dict):
        raise ModelError("The architecture is no mapping.")
    rows = [*architecture["backbone"], *architecture["head"]]
    known = {item for group in ULTRALYTICS.values() for item in group.split()}
    known |= {f"nn.{item}" for group in TORCH.values() for item in group.split()}
    if unknown := {str(row[2]) for row in rows} - known:
        raise ModelError(f"The architecture names unknown layers: {', '.join(sorted(unknown))[:200]}.")
    if odd := {text for row in rows for text in _texts(row[3])} - {*_WORDS}:
        raise ModelError(f"The architecture has arguments that are no numbers: {', '.join(sorted(odd))[:200]}.")
    sizes = [architecture.get(key, 1) for key in ("depth_multiple", "width_multiple", "scales", "channels", "reg_max")]
    too_many = len(rows) > MOST_ROWS or any(not 0 < row[1] <= MOST_REPEATS for row in rows)
    if too_many or max(_numbers([sizes, [row[3] for row in rows]]), default=0) > WIDEST:
        raise ModelError("The architecture is larger than any detector that is known.")
    return architecture


def _numbers(value: Any) -> list[float]:
    """All numbers in nested lists and dicts, without their signs."""
    if isinstance(value, (int, float)):
        return [abs(value)]
    nested = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return [number for item in nested for number in _numbers(item)]


def _texts(value: Any) -> list[str]:
    """All texts in nested lists and dicts."""
    if isinstance(value, str):
        return [value]
    nested = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return [text for item in nested for text in _texts(item)]


def _fit(module: nn.Module, shapes: dict[str, tuple[int, ...]]) -> None:
    """Give convolutions and norms the widths of their tensors: fine-tuning keeps a head wider than its yaml says."""
    part: Any
    for name, part in list(module.named_modules()):
        shape = shapes.get(f"{name}.weight")
        resizable = isinstance(part, (nn.Conv2d, nn.BatchNorm2d))
        if shape is None or not resizable or part.weight.shape == shape:
            continue
        parent, _, child = name.rpartition(".")
        new: nn.Module
        if len(shape) == 1:
            new = nn.BatchNorm2d(shape[0], part.eps, part.momentum)
        else:
            groups = shape[0] if part.groups == part.out_channels > 1 else part.groups
            new = nn.Conv2d(
                shape[1] * groups, shape[0], part.kernel_size, part.stride, part.padding, part.dilation, groups,
                bias=part.bias is not None,
            )  # fmt: skip
        setattr(module.get_submodule(parent), child, new.eval())


def save(checkpoint: Checkpoint, path: Path, *, half: bool = False) -> None:
    """Write `checkpoint` as `.safetensors` with its architecture in the header: a model without a pickle.

    Nothing is written unless a network built from the file says what the checkpoint's own says. Raises ModelError.
    """
    if checkpoint.kind != "ultralytics":
        raise ModelError(
            f"{checkpoint.name}: {checkpoint.kind} models are not converted; detxai reads them as they are."
        )
    module: Any = checkpoint.module
    whole, small = (
        {
            key: value.detach().to(dtype).contiguous().clone()
            for key, value in module.state_dict().items()
            if not key.endswith("num_batches_tracked")
        }
        for dtype in (torch.float32, torch.float16 if half else torch.float32)
    )
    about = {
        "format": FORMAT,
        "family": checkpoint.family,
        "architecture": json.dumps(module.yaml),
        "names": json.dumps(checkpoint.names),
        "imgsz": str(checkpoint.imgsz or 640),
        "name": checkpoint.name,
    }
    _compare(checkpoint, tensor_file.packed(whole, about))
    written = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        written.write_bytes(tensor_file.packed(small, about))
        written.replace(path)
    finally:
        written.unlink(missing_ok=True)


def _compare(checkpoint: Checkpoint, data: bytes) -> None:
    """Raises ModelError unless the converted model says on a picture what `checkpoint` says."""
    from detxai.models import detectors

    hint = "Nothing was written. detxai explains the .pt as it is; ONNX is another form without a pickle."
    built = detectors.build(checkpoint)
    picture = torch.rand(1, built.info.channels, PICTURE // 8, PICTURE // 8, generator=torch.Generator().manual_seed(0))
    picture = nn.functional.interpolate(picture, scale_factor=8, mode="bilinear")
    own = detectors.sound(built, picture)
    try:
        other = detectors.sound(detectors.build(read(checkpoint.name, "", data)), picture)
    except (ModelError, ValueError, RuntimeError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise ModelError(f"{checkpoint.name} cannot be converted: {error!s:.200}", hint) from error
    pairs = ((own.boxes, other.boxes), (own.logits, other.logits))
    if any(a.shape != b.shape or not torch.allclose(a, b, atol=SAME, rtol=SAME) for a, b in pairs):
        raise ModelError(
            f"{checkpoint.name} cannot be converted: its layers are not those that its architecture describes, and the "
            "model that would be written says something else.", hint,
        )  # fmt: skip
