"""ONNX files as ultralytics exports them report the boxes of their checkpoint."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SAMPLES, SIDE, pixels, seeded_network
from families import FAMILIES, network

from detxai import Explainer
from detxai.cli.app import run
from detxai.models import checkpoints

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


def boxes(model: Path, picture: Any = None, **more: Any) -> list[tuple[int, float, list[float]]]:
    """(class, score, box and what turns it) of what is reported on one picture, strongest first."""
    explainer = Explainer(str(model), method="drise", max_evaluations=2, evidence="none", max_det=8, **more)
    if picture is None:
        picture = np.ascontiguousarray(pixels("bag-02.jpg", (2 * SIDE, SIDE)))
    (result,) = explainer.explain(picture)
    assert result.record.status == "ok"
    return [(d.class_id, d.score, [*d.box, *(d.obb or ())]) for d in result.record.detections]


def exported(checkpoint: Path, target: Path, **options: Any) -> Path:
    from ultralytics import RTDETR, YOLO

    kind = RTDETR if "rtdetr" in checkpoint.name else YOLO
    made = kind(checkpoint).export(format="onnx", simplify=False, device="cpu", **{"imgsz": SIDE} | options)
    return Path(shutil.move(made, target))


def same(
    found: list[tuple[int, float, list[float]]],
    expected: list[tuple[int, float, list[float]]],
    score: float,
    box: float,
) -> None:
    """See that both say the same, but for `score` and `box` (pixels, radians)."""
    assert len(expected) >= 2
    assert [c for c, _, _ in found] == [c for c, _, _ in expected]
    for (_, ours, place), (_, theirs, other) in zip(found, expected, strict=True):
        assert ours == pytest.approx(theirs, abs=score)
        assert place == pytest.approx(other, abs=box)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_export_reports_the_boxes_of_its_checkpoint(checkpoint: Path, tmp_path: Path, layout: str) -> None:
    same(boxes(exported(checkpoint, tmp_path / "m.onnx", **LAYOUTS[layout])), boxes(checkpoint), 1e-4, 0.02)


NMS = {"nms": True, "conf": 0.001, "iou": 0.7, "max_det": 20}
TASKS = {"SegmentationModel": "segment", "PoseModel": "pose", "OBBModel": "obb"}
CASES = {
    "v8-seg": ({}, NMS), "11-pose": ({}, NMS), "11-obb": ({}, NMS), "rtdetr-v8": ({}, NMS), "world-v2": ({},),
    "26": ({"end2end": True},), "26-seg": (NMS, {"end2end": True}), "26-pose": ({"end2end": True},),
    "26-obb": ({}, {"end2end": True}), "v10": ({"end2end": True},),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_other_tasks_and_heads(tmp_path: Path, name: str) -> None:
    """With and without NMS and end to end: boxes and angles are those of the checkpoint with that head."""
    module = network(FAMILIES[name]._replace(size=SIDE))
    head = module.model[-1]
    last = [branch[-1] for part in ("cv3", "one2one_cv3") for branch in getattr(head, part, None) or ()]
    for part in head.cv4 if name == "world-v2" else last:
        part.bias.data.zero_()  # else no score is worth a box
    task = TASKS.get(FAMILIES[name].model, "detect")
    torch.save({"model": module, "train_args": {"imgsz": SIDE, "task": task}}, file := tmp_path / f"{name}.pt")
    for number, options in enumerate(CASES[name]):
        branch = {"head": "one2one"} if "end2end" in options else {}
        expected = boxes(file, conf=0.01, iou=0.7, **branch)
        assert all(len(place) == (9 if task == "obb" else 4) for _, _, place in expected)
        same(boxes(exported(file, tmp_path / f"{number}.onnx", **options), conf=0.01, iou=0.7), expected, 1e-4, 0.02)


def test_halves_are_off_by_their_rounding_alone(tmp_path: Path) -> None:
    """A trained network: a random one makes of the same rounding a score that is 0.02 off, as its own halves do."""
    from onnx import load, save
    from onnxruntime.transformers.float16 import convert_float_to_float16

    bundled = checkpoints.load()
    bundled.module.names = bundled.names
    torch.save({"model": bundled.module, "train_args": {"imgsz": 320}}, file := tmp_path / "bags.pt")
    expected = boxes(file, SAMPLES / "bag-01.jpg")
    inside = exported(file, tmp_path / "inside.onnx", quantize=16, imgsz=320)
    whole = exported(file, tmp_path / "whole.onnx", imgsz=320)
    save(convert_float_to_float16(load(whole), keep_io_types=False), throughout := tmp_path / "throughout.onnx")
    same(boxes(whole, SAMPLES / "bag-01.jpg"), expected, 1e-4, 0.02)
    assert run(["doctor", "-m", str(throughout)]) == 0
    for halves in (inside, throughout):
        same(boxes(halves, SAMPLES / "bag-01.jpg"), expected, 2e-3, 0.4)


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
