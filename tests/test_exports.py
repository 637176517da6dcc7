"""Each export read back by its owner's library, against the records."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import json
import zlib
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from detxai.cli.app import run
from detxai.cli.export import NAMES
from detxai.exports import FORMATS
from detxai.inputs import labels
from detxai.output import records
from detxai.output.store import MAP_SUFFIX, decode_map, encode_map
from detxai.values import ImageRef


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


@pytest.mark.parametrize("owner", ["faster_coco_eval", "pycocotools.coco"])
def test_coco_is_read_by_its_api(tree: Path, capsys: pytest.CaptureFixture[str], owner: str) -> None:
    api: Any = pytest.importorskip(owner)
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
    names = {0: "it, em 0", 1: "other", 2: "it, em 1"}
    drawn = labels.Folder(folder / "labels", names, scored=True).read(ImageRef("a.jpg", Path("a.jpg")))
    assert drawn and [(one.class_id, one.score) for one in drawn.at(100, 200)] == [(0, 0.75), (2, 0.75)]
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


def brush(code: list[int]) -> np.ndarray[Any, Any]:
    """The words of thi.ng's rle-pack."""
    bits = "".join(f"{byte:08b}" for byte in code)
    place = 0

    def read(count: int) -> int:
        nonlocal place
        place += count
        return int(bits[place - count : place], 2)

    total, word, widths = read(32), read(5) + 1, [read(4) + 1 for _ in range(4)]
    words: list[int] = []
    while len(words) < total:
        repeated = read(1)
        length = read(widths[read(2)]) + 1
        words += [read(word)] * length if repeated else [read(word) for _ in range(length)]
    return np.array(words, np.uint8)


def test_label_studio_brushes_lie_where_the_evidence_does(tree: Path) -> None:
    mapped(tree)
    tasks = json.loads((exported(tree, "labelstudio") / "tasks.json").read_bytes())
    result = tasks[0]["predictions"][0]["result"]
    assert [part["type"] for part in result] == ["rectanglelabels", "brushlabels"] * 2
    whole, grid = (
        brush(part["value"]["rle"]).reshape(part["original_height"], part["original_width"], 4) for part in result[1::2]
    )
    assert (whole == whole[..., :1]).all() and set(np.unique(whole)) == {0, 255}
    assert (whole[42:58, 22:38] == 255).all() and not whole[:38].any() and not whole[:, 42:].any()
    assert (grid[20:40, 10:50, 3] == 255).all() and grid.sum() == 4 * 255 * 20 * 40, "the upper half of its box"


def test_label_studio_reads_its_brushes(tree: Path) -> None:
    owner: Any = pytest.importorskip("label_studio_sdk.converter.brush")
    mapped(tree)
    result = json.loads((exported(tree, "labelstudio") / "tasks.json").read_bytes())[0]["predictions"][0]["result"]
    for part in result[1::2]:
        assert np.array_equal(owner.decode_rle(part["value"]["rle"]), brush(part["value"]["rle"]))


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


@pytest.mark.slow
def test_duckdb_reads_the_tables_alike(tree: Path) -> None:
    duckdb: Any = pytest.importorskip("duckdb")
    pytest.importorskip("pyarrow")
    mapped(tree)
    wanted = 'path, class_id, class_name, score, "left", bottom, net_inside, verdict'
    tables = [
        duckdb.sql(f"SELECT {wanted} FROM '{exported(tree, kind)}/boxes.{kind}' ORDER BY path, class_id").fetchall()
        for kind in ("csv", "parquet")
    ]
    rows = [
        ("a.jpg", 0, "it, em 0", 0.75, 10.0, 60.0, 1.0, None),
        ("a.jpg", 2, "it, em 1", 0.75, 10.0, 61.0, 1.0, None),
    ]
    assert tables == [[*rows, ("x.tif#2", 2, "it, em 1", 0.75, 10.0, 61.0, None, None)]] * 2


def test_datumaro_reads_yolo_without_the_scores(tree: Path) -> None:
    """Its reader takes five columns; the sixth is the score, as `yolo predict save_conf` writes it."""
    datumaro: Any = pytest.importorskip("datumaro")
    (tree / "x.tif#2.json").unlink()
    folder = exported(tree, "yolo")
    (folder / "classes.txt").rename(folder / "obj.names")
    (folder / "images" / "deep").mkdir(parents=True)
    for name in ("a.jpg", "deep/b.png"):
        Image.new("RGB", (100, 200)).save(folder / "images" / name)
    for file in (folder / "labels").rglob("*.txt"):
        rows = [line.rsplit(" ", 1)[0] for line in file.read_text().splitlines()]
        file.write_text("".join(f"{row}\n" for row in rows))
    items = list(datumaro.Dataset.import_from(str(folder), "yolo"))
    boxes = {item.id: [(a.label, *np.round(a.points)) for a in item.annotations] for item in items}
    assert boxes["a"] == [(0, 10, 20, 50, 60), (2, 10, 20, 50, 61)] and [] in boxes.values()


def test_label_studio_takes_its_tasks(tree: Path) -> None:
    owner: Any = pytest.importorskip("label_studio_sdk.label_interface")
    mapped(tree)
    folder = exported(tree, "labelstudio")
    interface = owner.LabelInterface((folder / "config.xml").read_text())
    interface.validate()
    for task in json.loads((folder / "tasks.json").read_bytes()):
        predictions = task.pop("predictions")  # its own way to those within a task passes them nowhere
        assert interface.validate_task(task)
        assert all(interface.validate_prediction(prediction) for prediction in predictions)


def test_unknown_formats_and_missing_trees(tree: Path) -> None:
    assert run(["export", str(tree), "--to", "voc", "-o", str(tree.parent / "v")]) == 2
    assert run(["export", str(tree.parent / "none"), "--to", "csv", "-o", str(tree.parent / "v")]) == 4


def mapped(tree: Path) -> np.ndarray[Any, Any]:
    """Give the first box of a.jpg a map, an overlay and a grid, and return the map, (200, 100)."""
    values = np.zeros((200, 100), np.float32)
    values[40:60, 20:40], values[20, 10] = 0.01, -1
    (tree / "a.jpg.d00.ig.npz").write_bytes(encode_map(values, "npz"))
    Image.new("RGB", (120, 230), (255, 128, 0)).save(tree / "a.jpg.d00.ig.png")
    grid = records.Grid(rows=2, cols=2, values=((1.0, 0.5), (0.0, -1.0)))
    made = records.AttributionRecord(
        method="ig", target="class", class_id=0, class_name="it, em 0", baseline="white", precision="fp32",
        path="dense", value_at_input=1, value_at_baseline=-1, sum=2, completeness_error=0, error_bound=0,
        converged=True, evaluations=9,
        net_inside=1, inside_share=1, peak=(30, 50), grid=grid, overlay="a.jpg.d00.ig.png", map="a.jpg.d00.ig.npz",
    )  # fmt: skip
    record = records.load((tree / "a.jpg.json").read_bytes())
    assert record.detections
    first, second, *others = record.detections
    plain = made.model_copy(update={"map": None})
    boxes = (
        first.model_copy(update={"attributions": (made,)}),
        second.model_copy(update={"attributions": (plain,)}),
        *others,
    )
    (tree / "a.jpg.json").write_bytes(records.dump(record.model_copy(update={"detections": boxes})))
    return values


def test_cvat_holds_boxes_and_attributes(tree: Path) -> None:
    root = ElementTree.parse(exported(tree, "cvat") / "annotations.xml").getroot()
    assert root.findtext("version") == "1.1" and root.findtext("meta/task/size") == "3"
    names = [image.get("name") for image in root.iter("image")]
    assert names == ["a.jpg", "deep/b.png", "x.tif#2"]
    known = {label.findtext("name"): label for label in root.iter("label")}
    for box in root.iter("box"):
        offered = {a.findtext("name") for a in known[box.get("label")].iter("attribute")}
        assert {a.get("name") for a in box.iter("attribute")} == offered == {"score", "verdict", "reason"}
    first = next(root.iter("box"))
    assert [float(first.get(edge, "")) for edge in ("xtl", "ytl", "xbr", "ybr")] == [10, 20, 50, 60]


def test_datumaro_reads_cvat(tree: Path) -> None:
    datumaro: Any = pytest.importorskip("datumaro")
    (tree / "x.tif#2.json").unlink()
    folder = exported(tree, "cvat")
    (folder / "images" / "deep").mkdir(parents=True)
    for name in ("a.jpg", "deep/b.png"):  # datumaro wants to see them
        Image.new("RGB", (100, 200)).save(folder / "images" / name)
    items = list(datumaro.Dataset.import_from(str(folder), "cvat"))
    boxes = {item.id: [annotation.points for annotation in item.annotations] for item in items}
    assert boxes == {"a": [[10, 20, 50, 60], [10, 20, 50, 61]], "deep/b": []}


def test_fiftyone_samples_are_documents_of_its_kind(tree: Path) -> None:
    values = mapped(tree)
    folder = exported(tree, "fiftyone")
    assert "version" not in json.loads((folder / "metadata.json").read_bytes())
    first, second, _ = json.loads((folder / "samples.json").read_bytes())["samples"]
    assert first["filepath"] == "data/a.jpg" and "why" not in second
    boxes = first["detections"]["detections"]
    assert boxes[0]["bounding_box"] == [0.1, 0.1, 0.4, 0.2] and boxes[0]["label"] == "it, em 0"
    coded = base64.b64decode(first["why"]["map"]["$binary"]["base64"])
    heat = np.load(io.BytesIO(zlib.decompress(coded)))
    assert heat.shape == (128, 64) and np.abs(heat).max() <= 1
    assert heat.argmin() != heat.argmax() and values.argmin() != values.argmax()
    core: Any = pytest.importorskip("fiftyone")
    sample = core.Sample.from_dict(first)
    assert sample.detections.detections[0].confidence == 0.75 and np.array_equal(sample.why.map, heat)


def test_heat_maps_lie_where_the_map_does(tree: Path) -> None:
    values = mapped(tree)
    lines = [json.loads(line) for line in (exported(tree, "heatmaps") / "heatmaps.jsonl").read_text().splitlines()]
    whole, grid = lines
    assert whole["bounds"] == {"x": 50, "y": 100, "width": 100, "height": 200}
    cells = np.reshape(whole["values"], (whole["height"], whole["width"]))
    assert cells.sum() == pytest.approx(values.sum(), rel=1e-3)
    row, column = np.unravel_index(cells.argmax(), cells.shape)
    assert 40 <= (row + 0.5) * 200 / 128 < 60 and 20 <= (column + 0.5) * 100 / 64 < 40
    assert cells.max() * whole["valueScale"] == pytest.approx(1, rel=1e-3) and 0 < whole["threshold"] < 1
    assert grid["bounds"] == {"x": 30, "y": 40.5, "width": 40, "height": 41} and grid["values"] == [1, 0.5, 0, -1]


@pytest.mark.parametrize("kind", ["npz", "png"])
def test_a_map_is_read_as_it_was_written(kind: Any) -> None:
    values = np.random.default_rng(0).normal(size=(9, 7)).astype(np.float32)
    assert np.allclose(decode_map(encode_map(values, kind), f"m{MAP_SUFFIX[kind]}"), values, atol=1e-4)


def test_dicom_keeps_nobody_unless_asked(tree: Path, tmp_path: Path) -> None:
    pydicom: Any = pytest.importorskip("pydicom")
    assert run(["export", str(tree), "--to", "dicom", "-o", str(tmp_path / "none")]) == 0, "no box is explained"
    mapped(tree)
    source = pydicom.Dataset()
    source.file_meta = pydicom.dataset.FileMetaDataset()
    source.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    source.SpecificCharacterSet, source.PatientName, source.PatientID = "ISO_IR 100", "Quillfeather^Jörg", "PAT-4711"
    source.SOPClassUID, source.SOPInstanceUID, source.StudyInstanceUID = "1.2.840.10008.5.1.4.1.1.1.1", "1.2.3", "1.2.4"
    (tmp_path / "scans").mkdir()
    file = tmp_path / "scans" / "a.jpg"  # bytes decide, not the name
    source.save_as(file, enforce_file_format=True)
    record = json.loads((tree / "a.jpg.json").read_bytes())
    record["image"]["sha256"] = hashlib.sha256(file.read_bytes()).hexdigest()
    (tree / "a.jpg.json").write_text(json.dumps(record))
    (tree / "x.tif#2.json").unlink()
    (tree / "deep" / "b.png.json").unlink()
    plain = pydicom.dcmread(exported(tree, "dicom") / "a.jpg.d00.dcm")
    assert plain.SOPClassUID == pydicom.uid.SecondaryCaptureImageStorage and plain.PatientName == ""
    assert np.array_equal(plain.pixel_array, np.full((230, 120, 3), (255, 128, 0), np.uint8))
    first, again = (tree.parent / "dicom" / "a.jpg.d00.dcm").read_bytes(), exported(tree, "dicom") / "a.jpg.d00.dcm"
    assert b"Quillfeather" not in first and again.read_bytes() == first and plain.StudyInstanceUID != "1.2.4"
    kept = ["export", str(tree), "--to", "dicom", "--keep-identifiers", str(file.parent), "-o", str(tmp_path / "kept")]
    assert run(kept) == 0
    named = pydicom.dcmread(tmp_path / "kept" / "a.jpg.d00.dcm")
    assert (str(named.PatientName), named.PatientID, named.StudyInstanceUID) == (
        "Quillfeather^Jörg",
        "PAT-4711",
        "1.2.4",
    )
    assert named.SourceImageSequence[0].ReferencedSOPInstanceUID == "1.2.3"
    file.write_bytes(file.read_bytes() + b"\0")
    assert run(kept) == 2, "not the file that was explained"
    assert run(["export", str(tree), "--to", "csv", "--keep-identifiers", ".", "-o", str(tmp_path / "c")]) == 2
