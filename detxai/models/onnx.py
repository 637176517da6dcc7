"""ONNX files, run by onnxruntime from the bytes that were hashed: nothing else is read, and nothing is guessed."""

from __future__ import annotations

import ast
from typing import Any

import numpy as np
import torch
from torch import Tensor

from detxai.errors import ModelError

DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(double)": np.float64}
_INSTALL = "pip install onnx onnxruntime"
#: Channels of a picture, as many as pages are read of one.
MOST_CHANNELS = 512


class Onnx:
    """A session over one file. `metadata`: what its exporter wrote, as plain values; `channels` of its pictures;
    `shape`: (height, width) of its input where that is fixed. Raises ModelError for what cannot be run."""

    def __init__(self, name: str, data: bytes) -> None:
        self.name = name
        try:
            import onnxruntime
        except ImportError as error:
            raise ModelError(f"{name} needs a package that is not installed: {error.name}.", _INSTALL) from error
        state: Any = onnxruntime.capi.onnxruntime_pybind11_state
        raised: list[Any] = [v for v in vars(state).values() if isinstance(v, type) and issubclass(v, Exception)]
        self._errors: tuple[type[Exception], ...] = (*raised, RuntimeError, ValueError, TypeError)
        _alone(name, data)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        try:
            self.session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
            self.metadata = _plain(self.session.get_modelmeta().custom_metadata_map)
            (taken,) = self.session.get_inputs()
        except self._errors as error:
            raise ModelError(f"{name} cannot be run: {first_line(error)}") from error
        if taken.type not in DTYPES or len(taken.shape) != 4:
            raise ModelError(f"{name} takes {taken.type} {taken.shape}, not a batch of pictures in floating point.")
        self.dtype, (batch, channels, *sides) = DTYPES[taken.type], taken.shape
        self.channels = channels if isinstance(channels, int) else self.metadata.get("channels", 3)
        if type(self.channels) is not int or not 0 < self.channels <= MOST_CHANNELS:
            raise ModelError(
                f"{name} takes pictures of {self.channels!s:.20} channels; detxai has {MOST_CHANNELS} at most.",
                "Export it again, for pictures of fewer.",
            )
        self.input, self.batch = taken.name, batch if isinstance(batch, int) else 1
        self.shape = tuple(sides) if all(isinstance(side, int) for side in sides) else None

    def __call__(self, x: Tensor) -> list[Tensor]:
        """The outputs for one picture x (1, channels, height, width), float32 in [0, 1], each with its batch axis."""
        pictures = x.expand(self.batch, -1, -1, -1).numpy().astype(self.dtype)
        try:
            outputs = self.session.run(None, {self.input: np.ascontiguousarray(pictures)})
        except self._errors as error:
            raise ModelError(f"{self.name} cannot be run: {first_line(error)}") from error
        return [torch.as_tensor(np.asarray(one)).float() for one in outputs]


def first_line(error: BaseException) -> str:
    """What an error says, in one short line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def _alone(name: str, data: bytes) -> None:
    """Refuse a file whose weights lie in others: they would be read unseen, from wherever it says."""
    try:
        import onnx
        from google.protobuf.message import DecodeError
        from onnx.external_data_helper import _get_all_tensors, uses_external_data
    except ImportError as error:
        raise ModelError(f"{name} needs a package that is not installed: {error.name}.", _INSTALL) from error
    try:
        elsewhere = any(uses_external_data(tensor) for tensor in _get_all_tensors(onnx.load_model_from_string(data)))
    except (DecodeError, ValueError, TypeError, RecursionError) as error:
        raise ModelError(f"{name} is damaged or no ONNX file: {first_line(error)}") from error
    if elsewhere:
        raise ModelError(
            f"{name} keeps weights in other files; they were not read.",
            f"Make it one file, where you trust it: "
            f"python -c \"import onnx; onnx.save(onnx.load('{name}'), 'whole.onnx')\"",
        )


def _plain(metadata: dict[str, str]) -> dict[str, Any]:
    """The values that are Python literals as such, as ultralytics and YOLOv5 write them; others stay text."""
    plain: dict[str, Any] = {}
    for key, text in metadata.items():
        try:
            plain[key] = ast.literal_eval(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
            plain[key] = text
    return plain
