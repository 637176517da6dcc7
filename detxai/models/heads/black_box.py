"""Exported models (ONNX, TorchScript, TensorRT, OpenVINO): they detect, and cannot be differentiated."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from detxai.errors import ModelError
from detxai.models.detector import Candidates, ModelInfo, scores_of
from detxai.values import Checkpoint


class BlackBox:
    """Runs an export through ultralytics' own backends, from the bytes that were hashed."""

    def __init__(self, checkpoint: Checkpoint, branch: str | None = None) -> None:
        from ultralytics.nn.autobackend import AutoBackend

        if branch is not None:
            raise ModelError(f"{checkpoint.name} is an export: its head was chosen when it was made.")
        with tempfile.TemporaryDirectory(prefix="detxai-") as folder:
            for name, content in checkpoint.extra["files"].items():
                file = Path(folder, name)
                file.parent.mkdir(exist_ok=True)
                file.write_bytes(content)
            whole = file if file.parent == Path(folder) else file.parent
            try:
                backend = AutoBackend(str(whole), device=torch.device("cpu"), fp16=False, verbose=False)
            except ImportError as error:
                raise ModelError(
                    f"{checkpoint.name} needs a package that is not installed: {error.name or error}.",
                    "For ONNX: pip install 'detxai[onnx]'; for OpenVINO: pip install openvino.",
                ) from error
            except _UNREADABLE as error:
                raise ModelError(f"{checkpoint.name} cannot be run: {_first_line(error)}") from error
        self.backend: Any = backend
        if backend.task not in ("detect", "segment", "pose", "obb"):
            raise ModelError(f"{checkpoint.name} is a {backend.task} model, not a detector.")
        sizes = backend.metadata.get("imgsz") or [640]
        names = checkpoint.names or {int(i): str(name) for i, name in (backend.names or {}).items()}
        self.info = ModelInfo(
            checkpoint.name,
            checkpoint.sha256,
            checkpoint.family,
            "export",
            int(max(sizes)) if isinstance(sizes, (list, tuple)) else int(sizes),
            names,
            ("class",),
            sparse=False,
            trusted=checkpoint.trusted,
        )

    def predict(self, x: Tensor) -> list[Candidates]:
        """All predictions on x (batch, 3, size, size), row by row: exports may have a fixed batch of one."""
        if x.shape[-1] != self.info.imgsz and not self.backend.metadata.get("dynamic"):
            raise ModelError(f"{self.info.name} was exported for {self.info.imgsz} pixels.", "Leave --imgsz out.")
        return [self._candidates(self._output(row[None].contiguous())) for row in x]

    def _output(self, row: Tensor) -> Tensor:
        with torch.inference_mode():
            found: Any = self.backend(row.cpu())
        first = found[0] if isinstance(found, (list, tuple)) else found
        return torch.as_tensor(first).clone().float()[0]

    def _candidates(self, rows: Tensor) -> Candidates:
        classes = len(self.info.names)
        if rows.shape[-1] == 6:  # end to end: xyxy, score, class
            boxes, scores = rows[:, :4], torch.zeros(len(rows), classes)
            scores[torch.arange(len(rows)), rows[:, 5].long().clamp(0, classes - 1)] = rows[:, 4]
        else:
            centre, size = rows[:2].T, rows[2:4].T
            boxes, scores = torch.cat([centre - size / 2, centre + size / 2], 1), rows[4 : 4 + classes].T
        levels = torch.zeros(len(boxes), dtype=torch.int64)
        return Candidates(boxes, scores, torch.logit(scores, eps=1e-7), levels, end_to_end=rows.shape[-1] == 6)

    def scores(self, x: Tensor, classes: Sequence[int]) -> tuple[Tensor, Tensor]:
        return scores_of(self.predict(x), classes)


_UNREADABLE = (RuntimeError, ValueError, KeyError, TypeError, OSError, AttributeError, IndexError)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
