"""The one way round: a pickle that is run in full, on the user's word, and told before it runs."""

from __future__ import annotations

import io
import logging
import pickle
import struct
import sys
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from detxai.errors import ModelError
from detxai.models import networks, tensors
from detxai.models.onnx import first_line
from detxai.models.pickles import Refused
from detxai.text import printable
from detxai.values import Checkpoint

#: Names of a pickle that are told one by one.
MOST_TOLD = 40
#: What is expected in a checkpoint.
USUAL = ("torch", "ultralytics")
#: What damaged files raise on their way through zipfile, struct, torch and ultralytics.
DAMAGED = (
    ArithmeticError, AssertionError, AttributeError, EOFError, ImportError, LookupError, OSError, RuntimeError,
    SyntaxError, TypeError, ValueError, struct.error, zipfile.BadZipFile,
)  # fmt: skip


def load(name: str, digest: str, data: bytes, module_path: Path | None) -> Checkpoint:
    """The model of the pickle in `data`, which runs; its own layers are imported from `module_path`.

    Raises ModelError.
    """
    if module_path is not None and not module_path.is_dir():
        raise ModelError(f"--module-path {module_path} is no folder.")
    logging.getLogger("detxai").warning("%s", announcement(name, digest, data))
    if module_path is not None:
        sys.path.insert(0, str(module_path.resolve()))
    try:
        content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=False)
    except ModuleNotFoundError as error:
        raise ModelError(
            f"{name} needs the Python module '{error.name}', which is not installed.",
            "Give the folder that holds it with --module-path DIR.",
        ) from error
    except (*DAMAGED, pickle.UnpicklingError) as error:
        raise ModelError(f"{name} is damaged or not a checkpoint: {first_line(error)}") from error
    module: Any = (content.get("ema") or content.get("model")) if isinstance(content, dict) else content
    if not isinstance(module, nn.Module):
        raise ModelError(f"{name} holds no model (found {type(module).__name__}).")
    if any(hasattr(part, "anchor_grid") for part in module.modules()):
        raise ModelError(
            f"{name} ends in an anchor-based head of its own code, which detxai does not read from a live object.",
            "Export it to ONNX where it was made, and explain it with --method drise.",
        )
    try:
        module = module.float().eval()
        yaml = module.yaml if isinstance(getattr(module, "yaml", None), dict) else {}
        names = networks.class_names(getattr(module, "names", None))
        imgsz = networks.image_size(content)
        return Checkpoint(name, digest, "ultralytics", module, networks.family(yaml), names, imgsz, trusted=True)
    except DAMAGED as error:
        raise ModelError(f"{name} holds a model that is not put together as expected: {first_line(error)}") from error


def announcement(name: str, digest: str, data: bytes) -> str:
    """What is about to run: the file, its sha256, and what its pickle names that checkpoints usually do not."""
    try:
        unusual = sorted(one for one in tensors.names(data) if one.partition(".")[0] not in USUAL)
        told = ", ".join(printable(one)[:200] for one in unusual[:MOST_TOLD]) or "nothing"
        more = f" and {len(unusual) - MOST_TOLD} more" if len(unusual) > MOST_TOLD else ""
    except (*DAMAGED, Refused) as error:
        told, more = f"what could not be read beforehand ({printable(first_line(error))})", ""
    return (
        f"--trust-pickle runs the code that {printable(name)} (sha256 {digest}) asks for. "
        f"From outside of {' and '.join(USUAL)} it names {told}{more}."
    )
