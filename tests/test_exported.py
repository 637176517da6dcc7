"""ONNX files as ultralytics exports them report the boxes of their checkpoint."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SIDE, pixels, seeded_network

from detxai import Explainer

pytest.importorskip("onnxruntime")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # of torch's exporter

LAYOUTS: dict[str, dict[str, Any]] = {
    "plain": {}, "with NMS": {"nms": True, "conf": 0.001, "iou": 0.7}, "dynamic": {"dynamic": True},
    "batch of two": {"batch": 2},
}  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("exported") / "m.pt"
    torch.save({"model": seeded_network("yolov8n.yaml"), "train_args": {"imgsz": SIDE}}, file)
    return file


def boxes(model: Path, **more: Any) -> list[tuple[int, float, list[float]]]:
    """(class, score, box) of what is reported on one picture, strongest first."""
    explainer = Explainer(str(model), method="drise", max_evaluations=2, evidence="none", max_det=8, **more)
    (result,) = explainer.explain(np.ascontiguousarray(pixels("bag-02.jpg", (2 * SIDE, SIDE))))
    return [(d.class_id, d.score, list(d.box)) for d in result.record.detections]


def exported(checkpoint: Path, target: Path, **options: Any) -> Path:
    from ultralytics import YOLO

    made = YOLO(checkpoint).export(format="onnx", simplify=False, device="cpu", **{"imgsz": SIDE} | options)
    return Path(shutil.move(made, target))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_export_reports_the_boxes_of_its_checkpoint(checkpoint: Path, tmp_path: Path, layout: str) -> None:
    expected = boxes(checkpoint)
    found = boxes(exported(checkpoint, tmp_path / "m.onnx", **LAYOUTS[layout]))
    assert len(expected) >= 2
    assert [c for c, _, _ in found] == [c for c, _, _ in expected]
    for (_, score, box), (_, own, other) in zip(found, expected, strict=True):
        assert score == pytest.approx(own, abs=1e-4)
        assert box == pytest.approx(other, abs=0.02)


def test_a_rectangular_export_reports_what_its_network_says(checkpoint: Path, tmp_path: Path) -> None:
    """A picture of its own shape needs no padding: the checkpoint on that very picture says the same."""
    from ultralytics import YOLO

    found = boxes(exported(checkpoint, tmp_path / "m.onnx", imgsz=[SIDE, 2 * SIDE]))
    picture = pixels("bag-02.jpg", (2 * SIDE, SIDE))[..., ::-1]
    (own,) = YOLO(checkpoint).predict(np.ascontiguousarray(picture), imgsz=[SIDE, 2 * SIDE], max_det=8, verbose=False)
    expected = [
        (int(c), float(s), b) for c, s, b in zip(own.boxes.cls, own.boxes.conf, own.boxes.xyxy.tolist(), strict=True)
    ]
    assert expected and [c for c, _, _ in found] == [c for c, _, _ in expected]
    for (_, score, box), (_, other, theirs) in zip(found, expected, strict=True):
        assert score == pytest.approx(other, abs=1e-3)
        assert box == pytest.approx(theirs, abs=0.05)
