"""Each export read back by its owner's library, against the records."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from detxai.cli.app import run
from detxai.cli.export import NAMES
from detxai.exports import FORMATS
from detxai.output import records


def detection(number: int, kind: str = "detection") -> records.DetectionRecord:
    return records.DetectionRecord(
        id=number, kind=kind, class_id=2 * number, class_name=f"it, em {number}", score=0.75, logit=1.1,  # type: ignore[arg-type]
        top_classes=(), box=(10, 20, 50, 60 + number), attributions=(),
    )  # fmt: skip


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    model = records.ModelInfo(name="m.pt", sha256="0" * 64, family="yolov8", head="one2many", imgsz=640)
    boxes = {
        "a.jpg": [detection(0), detection(1), detection(2, "candidate")],
        "deep/b.png": [],
        "x.tif#2": [detection(1)],
    }
    for path, found in boxes.items():
        image = records.ImageInfo(path=path, sha256="1" * 64, width=100, height=200)
        record = records.Record(status="ok", fingerprint="f", image=image, model=model, detections=tuple(found))
        (tmp_path / "out" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "out" / f"{path}.json").write_bytes(records.dump(record))
    error = records.ErrorInfo(code="truncated", message="cut")
    failed = records.Record(status="failed", image=records.ImageInfo(path="c.jpg"), error=error)
    (tmp_path / "out" / "c.jpg.json").write_bytes(records.dump(failed))
    return tmp_path / "out"


def exported(tree: Path, kind: str) -> Path:
    assert run(["export", str(tree), "--to", kind, "-o", str(tree.parent / kind)]) == 0
    return tree.parent / kind


def test_every_format_is_named_once() -> None:
    assert tuple(FORMATS) == NAMES


def test_coco_is_read_by_its_api(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    api: Any = pytest.importorskip("faster_coco_eval")
    folder = exported(tree, "coco")
    assert "1 failed images are not in the export" in capsys.readouterr().err
    truth = api.COCO(str(folder / "instances.json"))
    assert [image["file_name"] for image in truth.loadImgs(truth.getImgIds())] == ["a.jpg", "deep/b.png", "x.tif#2"]
    results = truth.loadRes(str(folder / "results.json"))
    assert [a["bbox"] for a in results.loadAnns(results.getAnnIds(imgIds=[1]))] == [[10, 20, 40, 40], [10, 20, 40, 41]]
    assert truth.loadCats([2])[0]["name"] == "it, em 1"


def test_yolo_is_read_as_labels(tree: Path) -> None:
    folder = exported(tree, "yolo")
    lines = (folder / "labels/a.txt").read_text().splitlines()
    assert lines == ["0 0.3 0.2 0.4 0.2 0.75", "2 0.3 0.2025 0.4 0.205 0.75"]
    assert (folder / "labels/deep/b.txt").read_text() == "" and (folder / "labels/x.tif#2.txt").is_file()
    assert (folder / "classes.txt").read_text().splitlines() == ["it, em 0", "class1", "it, em 1"]
    (tree / "a.png.json").write_bytes((tree / "a.jpg.json").read_bytes().replace(b'"a.jpg"', b'"a.png"'))
    assert run(["export", str(tree), "--to", "yolo", "-o", str(tree.parent / "again")]) == 2


def test_label_studio_tasks_fit_their_interface(tree: Path) -> None:
    folder = exported(tree, "labelstudio")
    view = ElementTree.fromstring((folder / "config.xml").read_text())
    known = {label.get("value") for label in view.iter("Label")}
    tasks = json.loads((folder / "tasks.json").read_bytes())
    assert [len(task["predictions"][0]["result"]) for task in tasks] == [2, 0, 1]
    for part in (part for task in tasks for part in task["predictions"][0]["result"]):
        assert set(part["value"]["rectanglelabels"]) <= known
        assert part["value"]["x"] == 10 and part["value"]["width"] == 40 and part["original_height"] == 200
    assert tasks[2]["data"]["image"].endswith("x.tif%232")


def test_tables_agree(tree: Path) -> None:
    with open(exported(tree, "csv") / "boxes.csv", newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    assert [(row["path"], row["class_name"]) for row in rows] == [
        ("a.jpg", "it, em 0"), ("a.jpg", "it, em 1"), ("x.tif#2", "it, em 1"),
    ]  # fmt: skip
    parquet: Any = pytest.importorskip("pyarrow.parquet")
    table = parquet.read_table(exported(tree, "parquet") / "boxes.parquet")
    assert table.column_names == list(rows[0])
    assert [row["bottom"] for row in table.to_pylist()] == [float(row["bottom"]) for row in rows]
    assert table.to_pylist()[0]["verdict"] is None


def test_unknown_formats_and_missing_trees(tree: Path) -> None:
    assert run(["export", str(tree), "--to", "voc", "-o", str(tree.parent / "v")]) == 2
    assert run(["export", str(tree.parent / "none"), "--to", "csv", "-o", str(tree.parent / "v")]) == 4
