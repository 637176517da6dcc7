"""The only loader of checkpoints: weights are programs until proven data.

Bytes are read once, hashed, and loaded from those same bytes, in this order: a pinned sha256 must match;
`.safetensors` (made by `detxai convert`) and Darknet files hold no code; a `.pt` goes through torch's restricted
unpickler with the literal allow-list below; only `trust_pickle` unpickles fully, for one run.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import pathlib
import pickle
import re
import zipfile
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

from detxai.errors import ModelError
from detxai.models import _ultralytics, darknet  # noqa: F401  (before any ultralytics.*)
from detxai.values import Checkpoint

#: The detector that ships with the package, trained on generated X-rays (see the README's model card).
BUNDLED = Path(__file__).parent / "bundled" / "bags-yolov8n-320.safetensors"
BUNDLED_SHA256 = "f1777a060082a689980b615ae8607cf3056552e28e249b0dd014002a0b08e9a8"

#: Exported formats that run as black boxes. ONNX is data; the others hold code.
EXPORTS = (".onnx", ".torchscript", ".engine")
#: An OpenVINO export is a folder of this ending: a graph and its weights, no code.
OPENVINO = "_openvino_model"
OLDEST_SAFE_TORCH = (2, 10)
FORMAT = "detxai.model/1"
#: Bounds of an architecture: beyond the largest that is published, and small enough to build.
MOST_LAYERS, MOST_REPEATS, WIDEST = 500, 100, 1 << 16

_MODULES = {
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
_TASKS = (
    "DetectionModel OBBModel SegmentationModel PoseModel ClassificationModel RTDETRDetectionModel WorldModel "
    "YOLOEModel YOLOESegModel"
)
_TORCH = {
    "activation": "GELU Hardswish LeakyReLU Mish MultiheadAttention ReLU ReLU6 SiLU Sigmoid",
    "batchnorm": "BatchNorm2d",
    "container": "ModuleList Sequential",
    "conv": "Conv2d ConvTranspose2d",
    "dropout": "Dropout",
    "linear": "Identity Linear NonDynamicallyQuantizableLinear",
    "loss": "BCEWithLogitsLoss",
    "normalization": "GroupNorm LayerNorm",
    "padding": "ZeroPad2d",
    "pooling": "AdaptiveAvgPool2d AvgPool2d MaxPool2d",
    "sparse": "Embedding",
    "upsampling": "Upsample",
}
_LOSSES = {
    "loss": "BboxLoss DFLoss E2EDetectLoss E2ELoss v8DetectionLoss v8OBBLoss v8PoseLoss v8SegmentationLoss",
    "tal": "RotatedTaskAlignedAssigner TaskAlignedAssigner",
}
#: Names of older ultralytics releases, and where those classes live today.
_RENAMED = {
    "ultralytics.nn.modules.block.Silence": "torch.nn.modules.linear.Identity",
    "ultralytics.nn.tasks.YOLOv10DetectionModel": "ultralytics.nn.tasks.DetectionModel",
    "ultralytics.utils.loss.v10DetectLoss": "ultralytics.utils.loss.E2EDetectLoss",
    "ultralytics.yolo.utils.IterableSimpleNamespace": "ultralytics.utils.IterableSimpleNamespace",
}
#: Packages of the original YOLOv5/YOLOv3 repositories: their classes become inert shells, never code.
_LEGACY_NAME = re.compile(r"models\.(yolo|common|experimental)\.\w+")


class Shell(nn.Module):
    """Holds the state of a legacy module without its code."""


def load(
    model: str | None = None,
    *,
    sha256: str | None = None,
    trust_pickle: bool = False,
    names: Path | None = None,
) -> Checkpoint:
    """Load the checkpoint at path `model` (None: the bundled detector), or a known Ultralytics model by its name.

    `names`: a file with one class name a line, for Darknet. The sha256 of a Darknet model is that of the bytes of its
    cfg followed by those of its weights. Raises ModelError when the model is missing, does not match `sha256`, is
    damaged, or would run code.
    """
    path = _located(model) if model else BUNDLED
    parts = [path, path.with_suffix(".weights")] if path.suffix == ".cfg" else [path]
    if openvino := path.is_dir() and path.name.endswith(OPENVINO):
        parts = sorted(file for file in path.iterdir() if file.is_file())
    data = [_read(part) for part in parts]
    digest = hashlib.sha256(b"".join(data)).hexdigest()
    pinned = sha256 or (BUNDLED_SHA256 if model is None else None)
    if pinned and digest != pinned.lower():
        raise ModelError(
            f"The sha256 of {path.name} is {digest}, not the pinned {pinned}.",
            "Nothing was loaded; check where the file came from.",
        )
    if path.suffix == ".safetensors":
        return _from_safetensors(path.name, digest, data[0])
    if path.suffix == ".pt":
        return _from_pickle(path.name, digest, data[0], trust_pickle)
    if path.suffix == ".cfg":
        return _from_darknet(path, digest, data[0], data[1], names)
    if path.suffix in EXPORTS or openvino:
        files = {f"model{OPENVINO}/{part.name}" if openvino else f"model{path.suffix}": content
                 for part, content in zip(parts, data, strict=True)}  # fmt: skip
        return _from_export(path, digest, files, trust_pickle, names)
    raise ModelError(
        f"{path.name}: '{path.suffix}' is not a model format that detxai reads.",
        "Give an ultralytics or legacy YOLOv5/v3 .pt, a Darknet .cfg, or a .safetensors made by detxai.",
    )


def _from_export(path: Path, digest: str, files: dict[str, bytes], trust: bool, names: Path | None) -> Checkpoint:
    """An exported model, to be run as a black box; those that carry code need the user's trust."""
    code = path.suffix in (".torchscript", ".engine")
    if code and not trust:
        raise ModelError(
            f"{path.name} was not loaded: a {path.suffix} file is a program.",
            "If you trust whoever made it, run again with --trust-pickle.",
        )
    return Checkpoint(
        path.name, digest, "export", None, path.suffix[1:] or "openvino", _listed(names) if names else {},
        trusted=code, extra={"files": files},
    )  # fmt: skip


def _located(model: str) -> Path:
    """The file `model`; a bare name that is no file but a known Ultralytics model is downloaded once, by their code."""
    path = Path(model).expanduser()
    if path.exists() or path.name != model or path.suffix not in ("", ".pt"):
        return path
    from ultralytics.utils import downloads

    name = f"{path.stem}.pt" if path.suffix else f"{model}.pt"
    if name not in downloads.GITHUB_ASSETS_NAMES:
        return path
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "detxai"
    try:
        cache.mkdir(parents=True, exist_ok=True)
        found = Path(downloads.attempt_download_asset(cache / name, retry=1))
    except (OSError, MemoryError) as error:  # ultralytics' and requests' network errors are OSErrors
        raise ModelError(
            f"There is no file {model} here, and the Ultralytics model {name} could not be downloaded: "
            f"{_first_line(error)}",
            f"Without a network, fetch it elsewhere and give its path with --model /path/to/{name}",
        ) from error
    return found


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        if path.suffix == ".weights":
            raise ModelError(f"A Darknet model needs its weights beside the cfg: no {path}.") from None
        raise ModelError(f"No model at {path}.", "Check --model; leave it out for the bundled detector.") from None
    except OSError as error:
        raise ModelError(f"Cannot read the model {path}: {error.strerror}.") from None


# -- Darknet: text and numbers, no code -----------------------------------------------------------


def _from_darknet(path: Path, digest: str, cfg: bytes, weights: bytes, names: Path | None) -> Checkpoint:
    try:
        network = darknet.load(cfg, weights)
    except (ValueError, RuntimeError) as error:
        raise ModelError(
            f"{path.name} is not a Darknet detector that detxai can build: {_first_line(error)}"
        ) from error
    known = _class_names(path, network.scales[0].classes, names)
    family = re.search(r"yolo-?v?\d+|yolo-fastest", path.stem.lower())
    found = family.group().replace("yolo-v", "yolov") if family else "darknet"
    return Checkpoint(path.name, digest, "darknet", network, found, known, network.size)


def _class_names(path: Path, count: int, names: Path | None) -> dict[int, str]:
    """Names from the file `names`, else from the one `.names` file beside the cfg, else the class ids."""
    if names is None:
        beside = sorted(path.parent.glob("*.names"))
        same = [file for file in beside if file.stem == path.stem]
        if not (beside := same or beside) or len(beside) > 1:
            return {i: str(i) for i in range(count)}
        names = beside[0]
    found = _listed(names)
    if len(found) != count:
        raise ModelError(
            f"{names} has {len(found)} class names, {path.name} has {count} classes.",
            "Give the right file with --names FILE.",
        )
    return found


def _listed(names: Path) -> dict[int, str]:
    lines = [line.strip() for line in _read(names).decode("utf-8-sig", "replace").splitlines() if line.strip()]
    return dict(enumerate(lines))


# -- safetensors: tensors and an architecture, no code ------------------------------------------


def _from_safetensors(name: str, digest: str, data: bytes) -> Checkpoint:
    from safetensors import SafetensorError, deserialize
    from safetensors.torch import load as load_tensors

    try:
        deserialize(data)
        about = metadata(data)
        if about.get("format") != FORMAT:
            raise ModelError(
                f"{name} holds tensors but no architecture ({FORMAT} is missing in its header).",
                "Make it with: detxai convert MODEL.pt OUT.safetensors",
            )
        architecture = json.loads(about["architecture"])
        names = {int(k): str(v) for k, v in json.loads(about["names"]).items()}
        tensors = {key: value.float() for key, value in load_tensors(data).items()}
        module = build(architecture, names)
        _fit(module, tensors)
        missing, unexpected = module.load_state_dict(tensors, strict=False)
    except (SafetensorError, *_DAMAGED) as error:
        raise ModelError(f"{name} is not a readable detxai model: {_first_line(error)}") from error
    lacking = [key for key in missing if not key.endswith("num_batches_tracked")]
    if lacking or unexpected:
        raise ModelError(f"{name}: tensors and architecture disagree, e.g. at {(lacking + unexpected)[0]}.")
    return Checkpoint(name, digest, "ultralytics", module, about["family"], names, int(about["imgsz"]))


def build(architecture: dict[str, Any], names: dict[int, str]) -> nn.Module:
    """The ultralytics network of a model-yaml dict, checked against the allow-list, with random weights.

    Raises ModelError for what `_check_architecture` refuses.
    """
    from ultralytics.nn.tasks import DetectionModel

    _check_architecture(architecture)
    architecture = architecture | {"nc": len(names)}
    module: nn.Module = DetectionModel(architecture, ch=architecture.get("channels", 3), verbose=False)
    module.names = names  # type: ignore[assignment]
    return module


def _check_architecture(architecture: dict[str, Any]) -> None:
    """Refuse a model-yaml that names what is not on the list (it would be evaluated), or that cannot be real."""
    rows = [*architecture["backbone"], *architecture["head"]]
    known = {item for group in _MODULES.values() for item in group.split()}
    known |= {f"nn.{item}" for group in _TORCH.values() for item in group.split()}
    if unknown := {str(row[2]) for row in rows} - known:
        raise ModelError(f"The architecture names unknown layers: {', '.join(sorted(unknown))[:200]}.")
    activation = architecture.get("activation")
    if activation and not re.fullmatch(
        r"(torch\.)?nn\.(SiLU|ReLU|LeakyReLU|GELU|Mish|Hardswish)\([\d.,= \w]*\)", str(activation)
    ):
        raise ModelError(f"The architecture names an unknown activation: {str(activation)[:200]!r}.")
    sizes = [architecture.get(key, 1) for key in ("depth_multiple", "width_multiple", "scales")]
    too_many = len(rows) > MOST_LAYERS or any(not 0 < row[1] <= MOST_REPEATS for row in rows)
    if too_many or max(_numbers([sizes, [row[3] for row in rows]]), default=0) > WIDEST:
        raise ModelError("The architecture is larger than any detector that is known.")


def _numbers(value: Any) -> list[float]:
    """All numbers in nested lists and dicts, without their signs."""
    if isinstance(value, (int, float)):
        return [abs(value)]
    nested = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return [number for item in nested for number in _numbers(item)]


def _fit(module: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    """Give convolutions and norms the widths of their tensors: fine-tuning keeps a head wider than its yaml says."""
    part: Any
    for name, part in list(module.named_modules()):
        shape: Any = tensors[f"{name}.weight"].shape if f"{name}.weight" in tensors else None
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
    """Write `checkpoint` as `.safetensors` with its architecture in the header: a model without a pickle."""
    if checkpoint.kind != "ultralytics":
        raise ModelError(
            f"{checkpoint.name}: {checkpoint.kind} models are not converted; detxai reads them as they are."
        )
    module: Any = checkpoint.module
    dtype = torch.float16 if half else torch.float32
    tensors = {
        key: value.detach().to(dtype).contiguous().clone()
        for key, value in module.state_dict().items()
        if not key.endswith("num_batches_tracked")
    }
    about = {
        "format": FORMAT,
        "family": checkpoint.family,
        "architecture": json.dumps(module.yaml),
        "names": json.dumps(checkpoint.names),
        "imgsz": str(checkpoint.imgsz or 640),
        "name": checkpoint.name,
    }
    path.write_bytes(packed(tensors, about))


def packed(tensors: dict[str, torch.Tensor], about: dict[str, str]) -> bytes:
    """The bytes of a safetensors file with `about` as its metadata: the same content gives the same bytes."""
    from safetensors.torch import save as serialized

    data: bytes = serialized(tensors, metadata=about)
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    # safetensors orders its metadata by chance.
    text = json.dumps(header | {"__metadata__": about}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


def metadata(data: bytes) -> dict[str, str]:
    """The metadata of a safetensors file. Raises ValueError where there is no header."""
    header: dict[str, dict[str, str]] = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return header.get("__metadata__", {})


# -- pickles ------------------------------------------------------------------------------------


def _from_pickle(name: str, digest: str, data: bytes, trust: bool) -> Checkpoint:
    try:
        _check_archive(name, data)
        content, trusted = _unpickle(name, data, trust), False
    except _Refused as refused:
        if not trust:
            raise ModelError(
                f"{name} was not loaded: {refused}.",
                "If you trust whoever made it, run again with --trust-pickle.",
            ) from refused
        content, trusted = _unpickle_fully(name, data), True
    module = (content.get("ema") or content.get("model")) if isinstance(content, dict) else content
    if not isinstance(module, nn.Module):
        raise ModelError(f"{name} holds no model (found {type(module).__name__}).")
    try:
        _check_tensors(name, module, len(data))
        module = module.float().eval()
        names = _names(module)
        if isinstance(module, Shell):
            _check_architecture(module.yaml)  # type: ignore[arg-type]
            return Checkpoint(name, digest, "legacy", module, _family(module), names, None, trusted)
        arguments = content.get("train_args") if isinstance(content, dict) else None
        imgsz = dict(arguments or {}).get("imgsz")
        imgsz = max(imgsz) if isinstance(imgsz, (list, tuple)) else imgsz
        imgsz = int(imgsz) if imgsz else None
        return Checkpoint(name, digest, "ultralytics", module, _family(module), names, imgsz, trusted)
    except _DAMAGED as error:
        raise ModelError(f"{name} holds a model that is not put together as expected: {_first_line(error)}") from error


def _check_tensors(name: str, module: nn.Module, size: int) -> None:
    """Refuse tensors that say they are larger than their storage (strides of zero): copies of them fill the memory."""
    total = 0
    for tensor in {id(t): t for t in [*module.parameters(), *module.buffers()]}.values():
        own = tensor.numel() * tensor.element_size()
        total += own
        if own > tensor.untyped_storage().nbytes():
            raise ModelError(f"{name} declares more data than it holds; it was refused.")
    if total > 2 * size:
        raise ModelError(f"{name} declares more data than it holds; it was refused.")


class _Refused(Exception):
    """The restricted loader would have to run code that is not on the list."""


def _check_archive(name: str, data: bytes) -> None:
    """Refuse what is not a plain torch zip: torch stores its tensors uncompressed, so sizes cannot explode."""
    try:
        entries = zipfile.ZipFile(io.BytesIO(data)).infolist()
    except (zipfile.BadZipFile, ValueError, OSError, EOFError, NotImplementedError) as error:
        raise ModelError(f"{name} is not a torch checkpoint: {_first_line(error)}") from None
    if any(e.compress_type != zipfile.ZIP_STORED for e in entries) or sum(e.file_size for e in entries) > len(data):
        raise ModelError(f"{name} declares more data than it holds; it was refused.")
    if any(e.filename.endswith("constants.pkl") for e in entries):
        raise ModelError(f"{name} is a TorchScript archive.", "Give the .pt checkpoint it was exported from.")


def _unpickle(name: str, data: bytes, trust: bool) -> Any:
    version = tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2])
    if version < OLDEST_SAFE_TORCH:
        raise _Refused(f"torch {torch.__version__} has no safe enough loader (2.10 has)")
    try:
        wanted = torch.serialization.get_unsafe_globals_in_checkpoint(io.BytesIO(data))
        allowed: list[Any] = [(_resolve(item), item) for item in wanted]
        with torch.serialization.safe_globals(allowed):
            return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise _Refused(_first_line(error)) from error
    except _DAMAGED as error:
        raise ModelError(f"{name} is damaged or not a checkpoint: {_first_line(error)}") from error


_DAMAGED = (
    RuntimeError, ValueError, EOFError, OSError, KeyError, IndexError, TypeError, AttributeError, ImportError,
    UnicodeDecodeError, AssertionError, OverflowError, MemoryError,
)  # fmt: skip


def _resolve(name: str) -> Any:
    """The object that the pickle's global `name` may stand for; `_Refused` when it is not on the list."""
    if _LEGACY_NAME.fullmatch(name):
        return Shell
    if name in (
        "pathlib.PosixPath",
        "pathlib.WindowsPath",
        "pathlib._local.PosixPath",
        "pathlib._local.WindowsPath",
    ):
        return pathlib.PurePosixPath
    if name == "numpy.dtype":
        return import_module("numpy").dtype
    if name in ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar"):
        return import_module("numpy._core.multiarray").scalar
    module, _, item = _RENAMED.get(name, name).rpartition(".")
    package, _, room = module.rpartition(".")
    on_list = (
        (package == "torch.nn.modules" and item in _TORCH.get(room, "").split())
        or (package == "ultralytics.nn.modules" and item in _MODULES.get(room, "").split())
        or (module == "ultralytics.nn.modules" and any(item in group.split() for group in _MODULES.values()))
        or (module == "ultralytics.nn.tasks" and item in _TASKS.split())
        or (package == "ultralytics.utils" and item in _LOSSES.get(room, "").split())
        or f"{module}.{item}" == "ultralytics.utils.IterableSimpleNamespace"
    )
    if not on_list:
        raise _Refused(f"its pickle asks for {name}, which is not a known model class")

    found = getattr(import_module(module), item, None)
    if found is None:
        raise _Refused(f"its pickle asks for {name}, which the installed ultralytics does not have")
    return _uncallable(found) if issubclass(found, (nn.Module, *_losses())) else found


def _losses() -> tuple[type, ...]:
    return tuple(
        getattr(import_module(f"ultralytics.utils.{room}"), item)
        for room, items in _LOSSES.items()
        for item in items.split()
        if hasattr(import_module(f"ultralytics.utils.{room}"), item)
    )


@cache
def _uncallable(real: type) -> type:
    """A stand-in for class `real` that can be filled but not called.

    Objects are unpickled without their constructors. A pickle may still ask for one: `DetectionModel({...})` would
    evaluate the activation in its yaml.
    """

    def refuse(self: Any, *_: Any, **__: Any) -> None:
        raise _Refused(f"its pickle runs the constructor of {real.__name__}")

    def fill(self: Any, state: Any) -> None:
        self.__class__ = real
        if hasattr(real, "__setstate__"):
            self.__setstate__(state)
        else:
            self.__dict__.update(state)

    methods = {"__init__": refuse, "__setstate__": fill, "__module__": real.__module__}
    return type(real.__name__, (real,), methods)


def _unpickle_fully(name: str, data: bytes) -> Any:
    """Run the pickle. Only reached with `trust_pickle`."""

    try:
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=False)
    except ModuleNotFoundError as error:
        raise ModelError(f"{name} needs the Python module '{error.name}', which is not installed.") from error
    except (*_DAMAGED, pickle.UnpicklingError) as error:
        raise ModelError(f"{name} is damaged or not a checkpoint: {_first_line(error)}") from error


def _names(module: nn.Module) -> dict[int, str]:
    names = getattr(module, "names", None) or {}
    return {int(k): str(v) for k, v in (names.items() if isinstance(names, dict) else enumerate(names))}


def _family(module: Any) -> str:
    """`yolov8`, `yolo11`, `rtdetr`, …: from the yaml's file name, else from the blocks it is made of."""
    yaml = getattr(module, "yaml", None) or {}
    if found := re.search(r"yolov?\d+|rtdetr|yoloe|yolow", str(yaml.get("yaml_file", "")).lower()):
        return found.group()
    blocks = {row[2] for row in [*yaml.get("backbone", ()), *yaml.get("head", ())]}
    signs = {"RTDETRDecoder": "rtdetr", "A2C2f": "yolo12", "C3k2": "yolo11", "v10Detect": "yolov10",
             "RepNCSPELAN4": "yolov9", "C2f": "yolov8", "C3": "yolov5", "BottleneckCSP": "yolov5"}  # fmt: skip
    return next((family for block, family in signs.items() if block in blocks), "yolo")


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
