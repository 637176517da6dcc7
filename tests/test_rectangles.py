"""A network's input that is no square: `--imgsz ROWS,COLUMNS`, and `--rect`, whose shape the picture alone decides."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import FAST, SIDE, explain, files, pixels, seeded_network
from PIL import Image

from detxai import Explainer
from detxai.attribution.drise import masks
from detxai.config import settings
from detxai.errors import UsageError
from detxai.models import checkpoints, detectors
from detxai.models.detector import DetectorInfo
from detxai.output.mixture import Mixture
from detxai.output.records import ImageInfo, Record, dump
from detxai.run.results import model_record

ROWS, COLUMNS = SIDE, 2 * SIDE
#: Of pictures (width, height): wide, tall, nearly square, a strip.
SIZES = {"wide.png": (150, 60), "tall.png": (70, 160), "nearly.png": (100, 96), "strip.png": (200, 20)}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("rectangles") / "m.pt"
    torch.save({"model": seeded_network("yolov8n.yaml", 2 * SIDE), "train_args": {"imgsz": 2 * SIDE}}, file)
    return file


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shapes")
    for number, (name, size) in enumerate(SIZES.items(), 2):
        Image.fromarray(pixels(f"bag-{number:02d}.jpg", size)).save(folder / name)
    return folder


def reported(checkpoint: Path, folder: Path, **options: Any) -> dict[str, list[tuple[int, float, list[float]]]]:
    """(class, score, box) of what `yolo predict` reports on each picture."""
    from ultralytics import YOLO

    model, found = YOLO(checkpoint), {}
    for name in SIZES:
        (own,) = model.predict(folder / name, max_det=8, conf=0.25, verbose=False, device="cpu", **options)
        rows = zip(own.boxes.cls, own.boxes.conf, own.boxes.xyxy.tolist(), strict=True)
        found[name] = [(int(c), float(s), b) for c, s, b in rows]
    return found


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        pytest.param({"imgsz": (ROWS, COLUMNS)}, {"imgsz": (ROWS, COLUMNS), "rect": False}, marks=pytest.mark.slow),
        pytest.param({"imgsz": "100x64"}, {"imgsz": (100, 64), "rect": False}, marks=pytest.mark.slow),
        pytest.param({"rect": True}, {}, marks=pytest.mark.slow),
        ({"rect": True, "imgsz": (COLUMNS, ROWS)}, {"imgsz": (COLUMNS, ROWS)}),
    ],
)
def test_boxes_are_those_of_predict(checkpoint: Path, folder: Path, ours: dict[str, Any], theirs: Any) -> None:
    explainer = Explainer(str(checkpoint), method="drise", max_evaluations=2, evidence="none", max_det=8, **ours)
    expected, count = reported(checkpoint, folder, **theirs), 0
    for result in explainer.explain(folder):
        detections, others = result.record.detections or (), expected[result.ref.path]
        assert [d.class_id for d in detections] == [c for c, _, _ in others], result.ref.path
        count += len(others)
        for d, (_, score, box) in zip(detections, others, strict=True):
            assert d.score == pytest.approx(score, abs=1e-4)
            assert list(d.box) == pytest.approx(box, abs=0.02)
    assert count >= 4


def records(tree: Path) -> dict[str, Any]:
    lines = (tree / "records.jsonl").read_text().splitlines()
    return {record["image"]["path"]: record for record in map(json.loads, lines)}


@pytest.mark.slow
def test_a_rectangle_is_explained_and_told(checkpoint: Path, folder: Path, tmp_path: Path) -> None:
    size = ("--imgsz", f"{ROWS},{COLUMNS}", "--maps", "npz", *FAST)
    assert explain(folder, "-m", checkpoint, "-o", tmp_path, *size) == 0
    for name, record in records(tmp_path).items():
        assert (record["model"]["imgsz"], record["model"]["shape"]) == (COLUMNS, [ROWS, COLUMNS])
        for detection in record["detections"]:
            (one,) = detection["attributions"]
            assert one["converged"] or one["evaluations"] == 24
            assert np.load(tmp_path / one["map"])["map"].shape == SIZES[name][::-1]
            assert (tmp_path / one["overlay"]).is_file()
    before = files(tmp_path)
    assert explain(folder, "-m", checkpoint, "-o", tmp_path, *size) == 0
    summary = json.loads((tmp_path / "summary.json").read_bytes())
    assert (summary["images"]["skipped"], summary["model"]["shape"]) == (4, [ROWS, COLUMNS])
    assert files(tmp_path) == before
    assert explain(folder, "-m", checkpoint, "-o", tmp_path, "--imgsz", COLUMNS, *FAST) == 0
    assert json.loads((tmp_path / "summary.json").read_bytes())["images"]["ok"] == 4, "another size is another run"
    assert all("shape" not in record["model"] for record in records(tmp_path).values())


@pytest.mark.slow
@pytest.mark.parametrize(
    "how",
    [
        ("--evidence", "full", "--method", "ig,odam,smoothgrad", "--target", "class,box,contrast"),
        ("--method", "drise,gradcam++,idgi,expected"),
    ],
)
def test_every_method_and_all_evidence_on_rectangles(
    checkpoint: Path, folder: Path, tmp_path: Path, how: tuple[str, ...]
) -> None:
    assert explain(folder, "-m", checkpoint, "-o", tmp_path, "--rect", *how, *FAST) == 0
    assert sum(len(record["detections"]) for record in records(tmp_path).values()) >= 2


@pytest.mark.slow
def test_rect_gives_every_picture_its_own_shape_and_the_same_bytes_in_any_order(
    checkpoint: Path, folder: Path, tmp_path: Path
) -> None:
    rect = ("-m", checkpoint, "--rect", "--maps", "npz", *FAST)
    assert explain(folder, "-o", tmp_path / "all", *rect, "--batch", 4) == 0
    shapes = {name: record["model"].get("shape") for name, record in records(tmp_path / "all").items()}
    assert shapes == {"wide.png": [64, 128], "tall.png": [128, 64], "nearly.png": None, "strip.png": [32, 128]}
    for part in (2, 1):
        assert explain(folder, "-o", tmp_path / "parts", *rect, "--batch", 1, "--shard", f"{part}/2") == 0
    assert files(tmp_path / "parts") == files(tmp_path / "all")


def test_a_tree_of_two_shapes_is_a_mixture_and_one_of_rect_is_not() -> None:
    def kinds(*shapes: tuple[tuple[int, int], bool]) -> Mixture:
        lines, whole = Mixture(), Mixture()
        for shape, rect in shapes:
            info = DetectorInfo("m.pt", "0" * 64, "yolov8", "one2many", 640, {}, (), sparse=True)
            model = model_record(info, max(shape), shape, "letterbox", (640, 640) if rect else None)
            record = Record(status="ok", fingerprint="0", image=ImageInfo(path="a"), model=model, detections=())
            lines.add_line(dump(record))
            whole.add(record)
        assert lines == whole
        return whole

    square, wide, other = ((640, 640), False), ((384, 640), False), ((640, 640), True)
    assert not kinds(square, square).warnings()
    assert not kinds(other, ((384, 640), True), ((640, 352), True)).warnings()
    assert "m.pt (00000000) at 640 px, m.pt (00000000) at 384x640 px;" in kinds(square, wide).warnings()[0]
    assert "at 640 px, m.pt (00000000) at 640 px with --rect;" in kinds(square, other).warnings()[0]
    assert "at 384x640 px, m.pt (00000000) at 640 px with --rect;" in kinds(wide, other, other).warnings()[0]


def test_sizes_as_people_type_them() -> None:
    def size(value: Any) -> Any:
        return settings.load(options={"imgsz": value}).detection.imgsz

    assert size("640") == size(640) == size("640,640") == 640
    assert size("384,640") == size("384x640") == size(" 384 X 640") == size((384, 640)) == (384, 640)
    for wrong in ("384,640,3", "wide", "16,640", "640,9000", (384,), 0, "-640"):
        with pytest.raises(UsageError, match=r"detection\.imgsz"):
            size(wrong)


@pytest.mark.parametrize("yaml", ["yolov8n.yaml", "yolo11n-obb.yaml", "yolov8n-p6.yaml"])
@pytest.mark.slow
def test_windows_on_rectangles_are_the_whole_map(yaml: str) -> None:
    from detxai.values import Checkpoint

    network = seeded_network(yaml, 128)
    detector = detectors.build(Checkpoint("m.pt", "", "ultralytics", network, "yolov8", network.names, 128))
    for shape in ((64, 192), (192, 64), (64, 640)):
        x = torch.rand(1, 3, *shape, generator=torch.Generator().manual_seed(1))
        assert detectors.self_test(detector, x) > 0
        assert detector.info.sparse


@pytest.mark.slow
def test_programs_of_many_shapes_make_the_maps_of_shared_packs(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where there is room for those of one shape alone."""
    from test_programs import engines, near, run, strongest

    from detxai.attribution import programs
    from detxai.attribution.methods import METHODS, Settings
    from detxai.attribution.points import Segment

    monkeypatch.setattr(programs, "MOST_PLACES", 2)
    detector = detectors.build(checkpoints.load(str(checkpoint)))
    asked = []
    for shape in ((64, 128), (128, 96), (64, 64)):
        x = torch.rand(3, *shape, generator=torch.Generator().manual_seed(2))
        asked.append((Segment(x, torch.ones_like(x)), strongest(detector, x)))
    options = Settings(max_evaluations=16, stem=detector.trunk.stem)
    both = engines(detector)
    shared, own = (run(engine, [METHODS["ig"]([p], t, options) for p, t in asked]) for engine in both)
    for one, other in zip([m for maps in shared for m in maps], [m for maps in own for m in maps], strict=True):
        assert near(one, other) <= 1e-5
    assert both[1].programs is not None
    assert len({shape.place for shape in both[1].programs.made}) <= 2


@pytest.mark.slow
def test_rtdetr_stretches_to_the_rectangle_as_predict_does(tmp_path: Path, folder: Path) -> None:
    from ultralytics import RTDETR
    from ultralytics.nn.tasks import RTDETRDetectionModel

    torch.manual_seed(0)
    network = RTDETRDetectionModel("rtdetr-l.yaml", nc=3, verbose=False)
    torch.save({"model": network.eval(), "train_args": {"imgsz": 2 * SIDE}}, file := tmp_path / "r.pt")
    options = {"method": "drise", "max_evaluations": 2, "evidence": "none", "max_det": 3, "conf": 0.001}
    (result,) = Explainer(str(file), imgsz=(ROWS, COLUMNS), **options).explain(folder / "wide.png")
    (own,) = RTDETR(file).predict(
        folder / "wide.png", imgsz=(ROWS, COLUMNS), conf=0.001, max_det=3, verbose=False, device="cpu"
    )
    detections = result.record.detections or ()
    assert result.record.model is not None and result.record.model.letterbox == "stretch"
    assert [d.score for d in detections] == pytest.approx(own.boxes.conf.tolist(), abs=1e-4)
    for d, box in zip(detections, own.boxes.xyxy.tolist(), strict=True):
        assert list(d.box) == pytest.approx(box, abs=0.05)


def test_masks_of_a_rectangle_have_square_cells() -> None:
    batch = masks(64, (96, 320), torch.Generator().manual_seed(0))
    assert batch.shape == (64, 1, 96, 320)
    assert 0.4 < float(batch.mean()) < 0.6
    steps = [float((batch.diff(dim=axis) != 0).float().mean()) for axis in (-2, -1)]
    assert steps[0] == pytest.approx(steps[1], rel=0.1)
