"""The only loader of checkpoints: weights are data, and nothing of a file ever lives.

Bytes are read once, hashed, and loaded from those same bytes: a pinned sha256 must match; a `.pt` is read as inert
values (`pickles`, `tensors`), of which a network of our own is built (`layers`, `networks`); `.safetensors` (made by
`detxai convert`) and Darknet files hold no code. Only `trust_pickle` unpickles in full, for one run.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import re
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

from detxai.errors import ModelError, sound_if_it_had_room
from detxai.models import converted, darknet, networks, tensors, trusted, upstream  # noqa: F401  (before any ultralytics.*)
from detxai.models.converted import build, save
from detxai.models.layers import Unbuildable
from detxai.models.onnx import first_line
from detxai.models.pickles import Refused
from detxai.models.tensor_file import metadata, packed
from detxai.models.trusted import DAMAGED
from detxai.values import Checkpoint, as_imgsz

__all__ = ["BUNDLED", "BUNDLED_SHA256", "build", "load", "metadata", "packed", "save"]

#: The detector that ships with the package, trained on generated X-rays (see the README's model card).
BUNDLED = Path(__file__).parent / "bundled" / "bags-yolov8n-320.safetensors"
BUNDLED_SHA256 = "f1777a060082a689980b615ae8607cf3056552e28e249b0dd014002a0b08e9a8"

#: Files of torch.save.
PICKLED = (".pt", ".pth")
#: Exported formats that run as black boxes. ONNX is data; the others hold code.
EXPORTS = (".onnx", ".torchscript", ".engine")
#: An OpenVINO export is a folder of this ending: a graph and its weights, no code.
OPENVINO = "_openvino_model"
#: The largest file that is read: beyond any detector that is published.
MOST_BYTES = 1 << 32


@sound_if_it_had_room()
def load(
    model: str | None = None,
    *,
    sha256: str | None = None,
    trust_pickle: bool = False,
    module_path: Path | None = None,
    names: Path | None = None,
) -> Checkpoint:
    """Load the checkpoint at path `model` (None: the bundled detector), or a known Ultralytics model by its name.

    `names`: a file with one class name a line, for Darknet. `module_path`: a folder of the user's own layers, which a
    trusted pickle may import. The sha256 of a Darknet model is that of the bytes of its
    cfg followed by those of its weights. Raises ModelError when the model is missing, does not match `sha256`, is
    damaged, or would run code; DeviceError when the system has no memory for it.
    """
    path = _located(model) if model else BUNDLED
    suffix = path.suffix.lower()
    parts = [path, _weights_of(path)] if suffix == ".cfg" else [path]
    if openvino := os.path.isdir(path) and path.name.endswith(OPENVINO):
        parts = sorted(file for file in path.iterdir() if file.is_file())
    # What is read in pages is given back to the system part by part; a pickle that may be run is needed whole.
    pages = suffix == ".safetensors" or (suffix in PICKLED and not trust_pickle)
    data: list[Any] = [_read(part, _pages if pages else Path.read_bytes) for part in parts]
    hashed = hashlib.sha256()
    for content in data:
        hashed.update(content)
    digest = hashed.hexdigest()
    pinned = sha256 or (BUNDLED_SHA256 if model is None else None)
    if pinned and digest != pinned.lower():
        raise ModelError(
            f"The sha256 of {path.name} is {digest}, not the pinned {pinned}.",
            "Nothing was loaded; check where the file came from.",
        )
    if suffix == ".safetensors":
        return _from_safetensors(path.name, digest, data[0])
    if suffix in PICKLED:
        return _from_pickle(path.name, digest, data[0], trust=trust_pickle, module_path=module_path)
    if suffix == ".cfg":
        return _from_darknet(path, digest, data[0], data[1], names)
    if suffix in EXPORTS or openvino:
        files = {f"model{OPENVINO}/{part.name}" if openvino else f"model{suffix}": content
                 for part, content in zip(parts, data, strict=True)}  # fmt: skip
        return _from_export(path, digest, files, trust=trust_pickle, names=names)
    raise ModelError(
        f"{path.name}: '{path.suffix}' is not a model format that detxai reads.",
        "Give an ultralytics or legacy YOLOv5/v3 .pt, a Darknet .cfg, or a .safetensors made by detxai.",
    )


def _from_export(path: Path, digest: str, files: dict[str, bytes], *, trust: bool, names: Path | None) -> Checkpoint:
    """An exported model, to be run as a black box; those that carry code need the user's trust."""
    suffix = path.suffix.lower()
    code = suffix in (".torchscript", ".engine")
    if code and not trust:
        raise ModelError(
            f"{path.name} was not loaded: a {suffix} file is a program.",
            "If you trust whoever made it, run again with --trust-pickle.",
        )
    return Checkpoint(
        path.name, digest, "export", None, suffix[1:] or "openvino", _listed(names) if names else {},
        trusted=code, extra={"files": files},
    )  # fmt: skip


def _located(model: str) -> Path:
    """The file `model`; a bare name that is no file but a known Ultralytics model is downloaded once, by their code."""
    path = Path(model).expanduser()
    if os.path.exists(path) or path.name != model or path.suffix not in ("", ".pt"):
        return path
    from ultralytics.utils import downloads

    name = f"{path.stem}.pt" if path.suffix else f"{model}.pt"
    if name not in downloads.GITHUB_ASSETS_NAMES:
        return path
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "detxai"
    try:
        cache.mkdir(parents=True, exist_ok=True)
        file = Path(downloads.attempt_download_asset(cache / name, retry=1))
    except (OSError, MemoryError) as error:  # ultralytics' and requests' network errors are OSErrors
        raise ModelError(
            f"There is no file {model} here, and the Ultralytics model {name} could not be downloaded: "
            f"{first_line(error)}",
            f"Without a network, fetch it elsewhere and give its path with --model /path/to/{name}",
        ) from error
    return file


def _weights_of(cfg: Path) -> Path:
    """The weights beside a Darknet cfg, whatever the case of their suffix."""
    beside = cfg.with_suffix(".weights")
    if os.path.exists(beside) or not os.path.isdir(cfg.parent):
        return beside
    return next((file for file in cfg.parent.glob(f"{cfg.stem}.*") if file.suffix.lower() == ".weights"), beside)


def _read(path: Path, read: Callable[[Path], Any] = Path.read_bytes) -> Any:
    """What `read` makes of a regular file; devices, pipes and folders are refused before they are opened."""
    try:
        kind = path.stat()
        if not stat.S_ISREG(kind.st_mode):
            raise ModelError(f"{path} is not a file.", "Check --model.")
        if kind.st_size > MOST_BYTES:
            raise ModelError(f"{path} has {kind.st_size} bytes: no detector is that large.")
        return read(path)
    except FileNotFoundError:
        if path.suffix == ".weights":
            raise ModelError(f"A Darknet model needs its weights beside the cfg: no {path}.") from None
        raise ModelError(f"No model at {path}.", "Check the spelling of --model.") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"Cannot read the model {str(path)[:500]!r}: {first_line(error)}.") from None


def _pages(path: Path) -> bytes | mmap.mmap:
    """The bytes of a file in memory that can be given back page by page."""
    with path.open("rb") as file:
        if not (size := os.fstat(file.fileno()).st_size):
            return b""
        private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
        memory = mmap.mmap(-1, size, **private)
        if file.readinto(memory) != size:
            raise OSError("it changes while it is read")
        return memory


# -- Darknet: text and numbers, no code -----------------------------------------------------------


def _from_darknet(path: Path, digest: str, cfg: bytes, weights: bytes, names: Path | None) -> Checkpoint:
    try:
        network = darknet.load(cfg, weights)
    except (ValueError, RuntimeError) as error:
        raise ModelError(f"{path.name} is not a Darknet detector that detxai can build: {first_line(error)}") from error
    known = _class_names(path, network.scales[0].classes, names)
    family = re.search(r"yolo-?v?\d+|yolo-fastest", path.stem.lower())
    name = family.group().replace("yolo-v", "yolov") if family else "darknet"
    return Checkpoint(path.name, digest, "darknet", network, name, known, as_imgsz(network.shape))


def _class_names(path: Path, count: int, names: Path | None) -> dict[int, str]:
    """Names from the file `names`, else from the one `.names` file beside the cfg, else the class ids."""
    if names is None:
        beside = sorted(path.parent.glob("*.names"))
        same = [file for file in beside if file.stem == path.stem]
        if not (beside := same or beside) or len(beside) > 1:
            return {i: str(i) for i in range(count)}
        names = beside[0]
    listed = _listed(names)
    if len(listed) != count:
        raise ModelError(
            f"{names} has {len(listed)} class names, {path.name} has {count} classes.",
            "Give the right file with --names FILE.",
        )
    return listed


def _listed(names: Path) -> dict[int, str]:
    lines = [line.strip() for line in _read(names).decode("utf-8-sig", "replace").splitlines() if line.strip()]
    return dict(enumerate(lines))


# -- safetensors, torch.save ------------------------------------------------------------------------------


def _from_safetensors(name: str, digest: str, data: bytes | mmap.mmap) -> Checkpoint:
    try:
        return converted.read(name, digest, data)
    except DAMAGED as error:
        raise ModelError(f"{name} is not a readable detxai model: {first_line(error)}") from error


def _from_pickle(name: str, digest: str, data: bytes, *, trust: bool, module_path: Path | None) -> Checkpoint:
    try:
        stored = networks.network(tensors.read(data), len(data))
    except (Refused, Unbuildable) as reason:
        if not trust:
            raise ModelError(
                f"{name} was not loaded: {reason}.",
                "If you trust whoever made it, run again with --trust-pickle (and --module-path DIR, where its layers "
                "are code of your own); or export it to ONNX where it was made.",
            ) from reason
        return trusted.load(name, digest, data, module_path)
    except networks.Classifier as reason:
        raise ModelError(
            f"{name} is a classifier: it says what a whole picture is, and reports no boxes to explain.",
            "Give a detector: --model best.pt.",
        ) from reason
    except DAMAGED as error:
        raise ModelError(f"{name} was not loaded: {first_line(error)}.", _advice(error)) from error
    return Checkpoint(name, digest, stored.kind, stored.module, stored.family, stored.names, stored.imgsz)


def _advice(error: Exception) -> str:
    if "state dict" in str(error):
        return "Save the whole model (torch.save(model, FILE)), or export it to ONNX where it was made."
    return "Check where the file came from, and that it was copied whole."
