"""Exported models (ONNX, TorchScript, TensorRT, OpenVINO): they detect, and cannot be differentiated.

What the numbers of an output mean is read from its shape and from what the exporter wrote beside it. Layouts:

- `channels` (1, 4 + classes + more, boxes): centre, size, scores; ultralytics without NMS. OBB: the last is the angle.
- `objectness` (1, boxes, 5 + classes + more): the score is objectness × class; YOLOv5's and YOLOv7's exporters.
- `rows` (1, boxes, 6 + more): corners, score, class; NMS or an end-to-end head. OBB: centre, size, score, class, angle.
- `batched` (boxes, 7): number of the picture, corners, class, score; YOLOv7 with NMS.
- `queries` (1, boxes, 6) or (1, boxes, 4 + classes): RT-DETR, boxes as shares of a stretched picture.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from detxai.errors import ImageError, ModelError
from detxai.models.detector import Candidates, DetectorInfo, scores_of
from detxai.models.onnx import Onnx, first_line
from detxai.models.trunk import LUMA
from detxai.values import Checkpoint, written

TASKS = ("detect", "segment", "pose", "obb")
STRIDES = (8, 16, 32, 64)
_UNREADABLE = (RuntimeError, ValueError, KeyError, TypeError, OSError, AttributeError, IndexError)


class BlackBox:
    """Runs an export from the bytes that were hashed: ONNX by onnxruntime, the others through ultralytics."""

    def __init__(self, checkpoint: Checkpoint, branch: str | None = None) -> None:
        if branch is not None:
            raise ModelError(f"{checkpoint.name} is an export: it has the head it was made with.", "Leave --head out.")
        files: dict[str, bytes] = checkpoint.extra["files"]
        (content, *_), onnx = files.values(), checkpoint.family == "onnx"
        self.run: Any = Onnx(checkpoint.name, content) if onnx else _Backend(checkpoint.name, files)
        about = self.run.metadata
        self.task = str(about.get("task", "detect"))
        if self.task not in TASKS:
            raise ModelError(f"{checkpoint.name} is a {self.task} model, not a detector.")
        written = _names(about.get("names"))
        names = checkpoint.names or written
        if not names:
            raise ModelError(f"{checkpoint.name} does not say its classes.", "Give their names with --names FILE.")
        if written and len(names) != len(written):
            raise ModelError(
                f"--names has {len(names)} names, {checkpoint.name} has {len(written)} classes.", "Give the right file."
            )
        height, width = self.run.shape or _pair(about.get("imgsz", 640))
        said = f"{about.get('head', '')} {about.get('description', '')}".lower().replace("-", "")
        self.transformer = "rtdetr" in said
        self.nms = bool(about.get("end2end")) or bool(_dict(about.get("args")).get("nms"))
        self.info = DetectorInfo(
            checkpoint.name,
            checkpoint.sha256,
            checkpoint.family,
            "export",
            max(height, width),
            names,
            ("class",),
            sparse=False,
            trusted=checkpoint.trusted,
            fit="stretch" if self.transformer else "letterbox",
            stride=1 if self.run.shape else 32,
            rotated=self.task == "obb",
            shape=None if height == width else (height, width),
            fixed=self.run.shape is not None,
            channels=3 if self.run.channels == 1 else self.run.channels,
        )

    def predict(self, x: Tensor) -> list[Candidates]:
        """All predictions on x (batch, channels, rows, columns), one by one: exports may have a fixed batch."""
        if self.run.shape and tuple(x.shape[-2:]) != self.run.shape:
            raise ModelError(
                f"{self.info.name} was exported for {written(self.run.shape)} pixels.", "Leave --imgsz out."
            )
        return [self._candidates(row[None].contiguous()) for row in x.cpu()]

    def scores(self, x: Tensor, classes: Sequence[int]) -> tuple[Tensor, Tensor]:
        return scores_of(self.predict(x), classes)

    def _candidates(self, x: Tensor) -> Candidates:
        if self.run.channels == 1:
            x = (x * x.new_tensor(LUMA).view(3, 1, 1)).sum(1, keepdim=True)
        outputs = [output for output in self.run(x) if output.ndim >= 2]
        first, height, width = outputs[0], x.shape[-2], x.shape[-1]
        layout, classes = self._layout(outputs, height, width), len(self.info.names)
        rows = first if layout == "batched" else first[0].T if layout == "channels" else first[0]
        whole = layout in ("rows", "batched", "queries")  # nothing is left for NMS to do
        angles = rows[:, -1:] if self.task == "obb" else None
        boxes, rest = rows[:, :4], rows[:, 4:]
        if layout == "batched":
            boxes, rest = rows[:, 1:5], rows[:, [6, 5]]
        if layout == "objectness":
            scores = rest[:, :1] * rest[:, 1 : 1 + classes]
        elif whole and not (layout == "queries" and rows.shape[1] != 6):
            scores = self._one_class(rest[:, 0], rest[:, 1])
        else:
            scores = rest[:, :classes]
        if layout == "queries":
            boxes = boxes * boxes.new_tensor([width, height] * 2)
        if layout in ("channels", "objectness", "queries") and angles is None:
            boxes = torch.cat([boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2], 1)
        rotated = None if angles is None else torch.cat([boxes, angles], 1)
        boxes = boxes if rotated is None else _hull(rotated)
        levels = torch.zeros(len(boxes), dtype=torch.int64)
        return Candidates(boxes, scores, torch.logit(scores, eps=1e-7), levels, rotated, end_to_end=whole)

    def _layout(self, outputs: Sequence[Tensor], height: int, width: int) -> str:
        """Raises ModelError where the shapes fit no layout, or the names do not fit the numbers of a box."""
        first, classes = outputs[0], len(self.info.names)
        if first.ndim == 2 and first.shape[1] == 7:
            return "batched"
        if first.ndim == 3:
            rows, columns = first.shape[1:]
            more = self._more(outputs)
            if self.transformer and columns in (6, 4 + classes):
                return "queries"
            grid = [sum((height // s) * (width // s) for s in STRIDES[:n]) for n in (2, 3, 4)]
            fitting = {
                "objectness": columns == 5 + classes + more and not self.nms and rows in [3 * cells for cells in grid],
                "rows": columns == 6 + more and (self.nms or rows not in grid),
                "channels": rows == 4 + classes + more and columns in grid,
            }
            for layout, fits in fitting.items():
                if fits:
                    return layout
        shapes = ", ".join(str(tuple(output.shape)) for output in outputs)
        raise ModelError(
            f"{self.info.name} has {classes} class names and gives {shapes}: no layout that is known.",
            "Check --names and --imgsz, or export it with ultralytics.",
        )

    def _more(self, outputs: Sequence[Tensor]) -> int:
        """Numbers of a box beside its place and scores: mask coefficients, keypoints, an angle."""
        if self.task == "pose":
            return math.prod(_pair(self.run.metadata.get("kpt_shape", (17, 3))))
        masks = [output.shape[1] for output in outputs[1:] if output.ndim == 4]
        return 1 if self.task == "obb" else masks[0] if masks else 0

    def _one_class(self, score: Tensor, class_id: Tensor) -> Tensor:
        """(n, classes): the score at its class, zero elsewhere."""
        scores, ids = score.new_zeros(len(score), len(self.info.names)), class_id.round().long()
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < scores.shape[1]:
            message = f"the model reports class {int(ids.max())}, and has {scores.shape[1]} names"
            raise ImageError("impossible", message)
        return scores.scatter(1, ids[:, None], score[:, None])


def _hull(rotated: Tensor) -> Tensor:
    """(n, 4) upright xyxy boxes around (n, 5) rotated ones: cx, cy, w, h, radians."""
    centre, (w, h, angle) = rotated[:, :2], rotated[:, 2:].T
    cos, sin = angle.cos().abs(), angle.sin().abs()
    half = torch.stack([w * cos + h * sin, w * sin + h * cos], 1) / 2
    return torch.cat([centre - half, centre + half], 1)


def _names(value: Any) -> dict[int, str]:
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else ()
    return {int(i): str(name) for i, name in pairs}


def _pair(value: Any) -> tuple[int, int]:
    height, width = value if isinstance(value, (list, tuple)) and len(value) == 2 else (value, value)
    return int(height), int(width)


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


class _Backend:
    """An export that ultralytics' own backends run."""

    def __init__(self, name: str, files: dict[str, bytes]) -> None:
        from ultralytics.nn.autobackend import AutoBackend

        with tempfile.TemporaryDirectory(prefix="detxai-") as folder:
            for part, content in files.items():
                file = Path(folder, part)
                file.parent.mkdir(exist_ok=True)
                file.write_bytes(content)
            whole = file if file.parent == Path(folder) else file.parent
            try:
                self.backend: Any = AutoBackend(str(whole), device=torch.device("cpu"), fp16=False, verbose=False)
            except ImportError as error:
                raise ModelError(
                    f"{name} needs a package that is not installed: {error.name or error}.",
                    "For OpenVINO: pip install openvino.",
                ) from error
            except _UNREADABLE as error:
                raise ModelError(f"{name} cannot be run: {first_line(error)}") from error
        backend = self.backend
        self.metadata: dict[str, Any] = dict(backend.metadata or {})
        self.metadata.setdefault("names", backend.names)
        self.metadata.setdefault("task", backend.task or "detect")
        self.channels = int(self.metadata.get("channels", 3))
        fixed = self.metadata.get("imgsz") and not self.metadata.get("dynamic")
        self.shape = _pair(self.metadata["imgsz"]) if fixed else None

    def __call__(self, x: Tensor) -> list[Tensor]:
        with torch.inference_mode():
            outputs = self.backend(x)
        parts = outputs if isinstance(outputs, (list, tuple)) else [outputs]
        return [torch.as_tensor(part).clone().float() for part in parts]
