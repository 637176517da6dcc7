"""What a run says of real pictures: the model's own detections, maps that add up, pictures, odd files, the samples."""

from __future__ import annotations

import json
import textwrap
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import FAST, ROOT, SAMPLES, SHARED, Command, explain, needs, seeded_network
from PIL import Image

import detxai
from detxai import Explainer, RunConfig
from detxai.errors import DetxaiError, UsageError
from detxai.models import checkpoints
from detxai.output import ranking, records

SIXRAY = SHARED / "weights" / "sixray_yolov5nu.pt"
XRAYS = SHARED / "data" / "xray-dev" / "images"
PHOTOS = SHARED / "data" / "natural-dev" / "darknet"
ODD = SHARED / "data" / "odd-dev"
#: Boxes compared in a picture.
MOST = 5
bundled = pytest.mark.skipif(not checkpoints.BUNDLED.exists(), reason="the bundled model is not built yet")


def load(path: Path) -> records.Record:
    return records.load(path.read_bytes())


def config(**sections: Any) -> RunConfig:
    return RunConfig(**sections)


# -- the same detections -----------------------------------------------------------------------


def same_detections(model: Path, pictures: list[Path], size: int, conf: float) -> int:
    """How many boxes detxai and `YOLO.predict(rect=False)` both report; fails where they differ.

    Both get the same pixels, so that JPEG decoders do not come between.
    """
    from ultralytics import YOLO

    yolo = YOLO(model)
    settings: dict[str, Any] = {
        "model": {"path": str(model)},
        "detection": {"imgsz": size, "conf": conf, "max_det": MOST},
        "attribution": {"tolerance": 1.0, "max_evaluations": 3, "evidence": "none"},
        "output": {"overlays": False},
        "run": {"device": "cpu", "precision": "fp32"},
    }
    count = 0
    for result in Explainer(RunConfig(**settings)).explain_sources(*pictures):
        assert result.image is not None, result.record
        detections = result.record.detections or ()
        shown = np.ascontiguousarray(result.image.pixels[..., ::-1])
        options = {"imgsz": size, "conf": conf, "iou": 0.7, "max_det": MOST, "rect": False, "device": "cpu"}
        (theirs,) = yolo.predict(shown, verbose=False, **options)
        assert len(detections) == len(theirs.boxes), result.ref.path
        # By place: random networks give several boxes the same score.
        left = list(zip(theirs.boxes.xyxy.numpy(), theirs.boxes.conf, theirs.boxes.cls, strict=True))
        for ours in detections:
            at = min(range(len(left)), key=lambda i: float(np.abs(left[i][0] - ours.box).max()))
            box, score, name = left.pop(at)
            assert ours.class_id == int(name)
            assert ours.score == pytest.approx(float(score), abs=1e-3)
            np.testing.assert_allclose(ours.box, box, rtol=0, atol=0.5)
        count += len(detections)
    return count


def some_pictures() -> list[Path]:
    """The samples, and ten X-rays and photos where they are at hand."""
    more = [*sorted(XRAYS.glob("*.jpg"))[:7], *sorted(PHOTOS.glob("*.jpg"))[:3]] if XRAYS.exists() else []
    return [*sorted(SAMPLES.glob("*.jpg")), *more]


@pytest.mark.parametrize(
    ("yaml", "spread"), [("yolov8n.yaml", 2.0), pytest.param("yolo11n.yaml", 0.2, marks=pytest.mark.slow)]
)
def test_detections_of_seeded_networks_are_those_of_ultralytics(yaml: str, spread: float, tmp_path: Path) -> None:
    """Scores must not all be 1: which of equal ones is reported is nobody's promise."""
    network = seeded_network(yaml, side=128, spread=spread)
    network.args = {"imgsz": 128}
    network.task = "detect"
    torch.save({"model": network, "train_args": {"imgsz": 128}}, path := tmp_path / "seeded.pt")
    assert same_detections(path, some_pictures()[::2], 128, 0.4) > 20


@needs(SIXRAY, XRAYS, PHOTOS)
def test_detections_of_a_trained_network_are_those_of_ultralytics() -> None:
    assert same_detections(SIXRAY, some_pictures()[1::2], 384, 0.25) > 15


# -- records, maps and pictures ----------------------------------------------------------------


def test_numbers_of_a_record_add_up(tiny: Path, pictures: Path, tmp_path: Path) -> None:
    assert explain(pictures, "-m", tiny, "-o", tmp_path, "--maps", "npz", "--max-det", 2) == 0
    seen = 0
    for file in tmp_path.rglob("*.json"):
        if file.name == "summary.json":
            continue
        for detection in load(file).detections or ():
            (a,) = detection.attributions
            assert a.value_at_input == pytest.approx(detection.logit, abs=1e-3)
            assert detection.score == pytest.approx(1 / (1 + np.exp(-detection.logit)), abs=1e-5)
            assert a.value_at_baseline is not None
            delta = a.value_at_input - a.value_at_baseline
            assert a.completeness_error == pytest.approx(abs(a.sum - delta) / max(abs(delta), 1), abs=1e-4)
            assert a.error_bound is not None
            assert a.converged == (a.error_bound <= 0.05)
            cells = np.array(a.grid.values)
            assert cells.shape == (8, 8)
            assert cells.sum() == pytest.approx(a.net_inside, abs=1e-3)
            assert a.map is not None
            values = np.load(file.parent / a.map)["map"]
            record = load(file)
            assert values.shape == (record.image.height, record.image.width)
            # The baseline keeps the letterbox padding: it gets next to nothing.
            assert values.sum(dtype=np.float64) == pytest.approx(a.sum, abs=0.02 * max(abs(a.sum), 1))
            seen += 1
    assert seen >= 6


def test_methods_targets_and_other_classes_name_their_files(tiny: Path, pictures: Path, tmp_path: Path) -> None:
    line = (pictures / "b.jpg", "-m", tiny, "-o", tmp_path, "--max-det", 1, "--max-evaluations", 16, "--maps", "png")
    others_asked = [word for i in range(3) for word in ("--as-class", f"thing {i}")]
    assert explain(*line, "--method", "ig,grad", "--target", "class,box", *others_asked) == 0
    (detection,) = load(tmp_path / "b.jpg.json").detections or ()
    others = [i for i in range(3) if i != detection.class_id]
    found = [(a.method, a.target, a.as_class, a.class_id, a.overlay, a.map) for a in detection.attributions]
    expected = [
        row
        for method in ("ig", "grad")
        for row in [
            (method, "class", False, detection.class_id, f"b.jpg.d00.{method}.png", f"b.jpg.d00.{method}.map.png"),
            *((method, edge, False, detection.class_id, f"b.jpg.d00.{method}.box.png",
               f"b.jpg.d00.{method}.{edge}.map.png") for edge in ("left", "top", "right", "bottom")),
            *((method, "class", True, i, f"b.jpg.d00.{method}.as-{i}.png", f"b.jpg.d00.{method}.as-{i}.map.png")
              for i in others),
        ]
    ]  # fmt: skip
    assert sorted(found) == sorted(expected)
    assert all((tmp_path / name).is_file() for row in found for name in row[-2:] if name)
    edges = {a.target: a.value_at_input for a in detection.attributions if a.method == "ig" and a.target != "class"}
    reported = dict(zip(("left", "top", "right", "bottom"), detection.box, strict=True))
    picture = {"left": 80, "right": 80, "top": 130, "bottom": 130}
    for edge, value in edges.items():
        assert float(np.clip(value, 0, picture[edge])) == pytest.approx(reported[edge], abs=0.01)


def test_raw_maps_as_png_can_be_read_back(tiny: Path, pictures: Path, tmp_path: Path) -> None:
    line = (pictures / "b.jpg", "-m", tiny, *FAST)
    assert explain(*line, "-o", tmp_path / "png", "--maps", "png") == 0
    assert explain(*line, "-o", tmp_path / "npz", "--maps", "npz") == 0
    with Image.open(tmp_path / "png" / "b.jpg.d00.ig.map.png") as image:
        scale = float(image.text["detxai-scale"])  # type: ignore[attr-defined]
        read = (np.asarray(image, np.float64) - 32768) / 32767 * scale
    exact = np.load(tmp_path / "npz" / "b.jpg.d00.ig.npz")["map"]
    np.testing.assert_allclose(read, exact, rtol=0, atol=scale / 32767)


@pytest.mark.slow
def test_which_pictures_are_written(tiny: Path, tmp_path: Path) -> None:
    line = (SAMPLES / "bag-01.jpg", "-m", tiny, "-o", tmp_path, *FAST, "--candidates", "0.2")
    pictured: dict[str, list[str | None]] = {}
    for mode in ("all", "look", "overview", "none"):
        assert explain(*line, "--overlays", mode) == 0
        record = records.load((tmp_path / "bag-01.jpg.json").read_bytes())
        assert record.overview == (None if mode == "none" else "bag-01.jpg.png")
        assert {file.name for file in tmp_path.glob("bag-01.jpg.*")} == {*record.files(), "bag-01.jpg.json"}
        pictured[mode] = [d.attributions[0].overlay for d in record.detections or ()]
        assert all(f.overlay for f in ranking.findings(record)) == (mode != "none"), "the list always has a picture"
    assert all(pictured["all"]) and not any(pictured["overview"] + pictured["none"])
    boxes = record.detections or ()
    asks = [d.kind != "detection" or bool(d.evidence and d.evidence.verdict != "supported") for d in boxes]
    assert [bool(name) for name in pictured["look"]] == asks and any(asks)


@pytest.mark.slow
def test_overlays_are_of_the_type_that_was_asked_for(tiny: Path, tmp_path: Path) -> None:
    """Names and records follow, another type is another run, and what it replaces is swept; raw maps stay PNG."""
    line = (SAMPLES / "bag-01.jpg", "-m", tiny, "-o", tmp_path, "--maps", "png", "--evidence", "none", *FAST)
    for kind, form in (("jpg", "JPEG"), ("webp", "WEBP"), ("png", "PNG")):
        assert explain(*line, "--overlay-format", kind) == 0
        record = json.loads((tmp_path / "bag-01.jpg.json").read_bytes())
        named = {a[part] for d in record["detections"] for a in d["attributions"] for part in ("overlay", "map")}
        named.add(record["overview"])
        assert named == {file.name for file in tmp_path.glob("bag-01.jpg.*")} - {"bag-01.jpg.json"}
        overlays = [name for name in named if not name.endswith(".map.png")]
        assert overlays and all(name.endswith(f".{kind}") for name in overlays)
        with Image.open(tmp_path / overlays[0]) as picture:
            assert picture.format == form
            assert picture.width >= 400


def test_overlays_show_the_scan_at_its_size_and_a_strip_both(tiny: Path, tmp_path: Path) -> None:
    sizes = []
    for options in ((), ("--strip",)):
        assert explain(SAMPLES / "bag-01.jpg", "-m", tiny, "-o", tmp_path, *FAST, *options) == 0
        with Image.open(next(tmp_path.glob("*.png"))) as overlay, Image.open(SAMPLES / "bag-01.jpg") as scan:
            sizes.append(overlay.size)
            assert overlay.size[0] >= scan.size[0]
            assert overlay.size[1] > scan.size[1]
    assert sizes[1] > sizes[0]


def test_a_baseline_of_ones_own(tiny: Path, pictures: Path, tmp_path: Path) -> None:
    Image.new("RGB", (9, 5), (250, 250, 250)).save(ground := tmp_path / "ground.png")
    for name, label in ((ground, "ground.png"), ("blur", "blur"), ("auto", "auto:#ddddd2")):
        assert explain(pictures / "b.jpg", "-m", tiny, "-o", tmp_path / "out", *FAST, "--baseline", name) == 0
        assert (load(tmp_path / "out" / "b.jpg.json").detections or ())[0].attributions[0].baseline == label


def test_only_the_classes_and_boxes_asked_for(tiny: Path, pictures: Path, tmp_path: Path) -> None:
    assert explain(pictures, "-m", tiny, "-o", tmp_path, *FAST, "--classes", "thing 1", "--conf", "0.4") == 0
    lines = (tmp_path / "records.jsonl").read_bytes().splitlines()
    found = [d for line in lines for d in records.load(line).detections or ()]
    assert found
    assert {d.class_name for d in found} == {"thing 1"}
    assert min(d.score for d in found) >= 0.4


@pytest.mark.slow
def test_half_precision_keeps_its_promise(tiny: Path, pictures: Path, tmp_path: Path) -> None:
    """The record says what was used; a map that did not converge in bf16 is done again in fp32."""
    assert explain(pictures, "-m", tiny, "-o", tmp_path, "--max-det", 2, "--precision", "bf16") == 0
    found = [a for line in (tmp_path / "records.jsonl").read_bytes().splitlines()
             for d in records.load(line).detections or () for a in d.attributions]  # fmt: skip
    assert {a.precision for a in found} <= {"bf16", "fp32"}
    assert all(a.converged for a in found if a.precision == "bf16")
    assert "bf16" in {a.precision for a in found}


# -- the Python API ----------------------------------------------------------------------------


def test_the_python_api_gives_maps_and_the_records_of_the_command(tiny: Path, pictures: Path, tmp_path: Path) -> None:
    wanted = config(model={"path": str(tiny)}, detection={"max_det": 2}, attribution={"tolerance": 0.2})
    results = list(Explainer(wanted).explain_sources(pictures))
    line = (pictures, "-m", tiny, "-o", tmp_path, "--max-det", 2, "--tolerance", 0.2, "--no-overlays")
    assert explain(*line) == 0
    for result, text in zip(results, (tmp_path / "records.jsonl").read_bytes().splitlines(), strict=True):
        kept = records.load(text)
        assert result.record.image == kept.image
        assert result.image is not None
        assert len(result.explanations) == len(kept.detections or ())
        for explanation, detection in zip(result.explanations, kept.detections or (), strict=True):
            attribution = explanation.attribution
            assert attribution.map.shape == result.image.pixels.shape[:2]
            assert attribution.value_at_input == pytest.approx(detection.logit, abs=1e-3)
    assert sum(len(result.explanations) for result in results) > 4
    assert not list(tmp_path.rglob("*.png"))


def test_the_python_api_refuses_as_the_command_does(tiny: Path) -> None:
    with pytest.raises(UsageError, match="nowhere"):
        next(iter(Explainer(config(model={"path": str(tiny)})).explain_sources("nowhere")))


@pytest.fixture(scope="module")
def quick(tiny: Path) -> Explainer:
    return Explainer(tiny, max_det=1, tolerance=0.2, max_evaluations=24)


def test_python_takes_what_people_have(quick: Explainer, pictures: Path) -> None:
    file = pictures / "a.png"
    with Image.open(file) as opened:
        images = [file, str(file), opened.copy(), np.asarray(opened.convert("RGB")), [file], (f for f in [file])]
        results = quick(*images)
    assert len(results) == len(images)
    first = results[0].record.detections
    assert first and all(result.record.detections == first for result in results)
    assert {"image-0", "image-1"} < {result.ref.path for result in results}
    (other,) = quick(np.zeros((9, 9, 5), np.uint8))
    assert other.record.error is not None and other.record.error.code == "channels"
    with Image.open(pictures / "gray one.png") as gray:
        (found,) = quick(gray)
    assert found.record.image.width == 110


def test_python_is_never_silent(quick: Explainer, tiny: Path, tmp_path: Path) -> None:
    flat, deep = np.zeros((9, 9), np.uint8), np.zeros((9, 9, 3), np.float32)
    for wrong, words in ((flat, r"\(9, 9\) uint8"), (deep, "float32"), (3, "int is no image"), (tmp_path, "No image")):
        with pytest.raises(DetxaiError, match=words):
            quick(wrong)
    for options, words in (({"cnf": 0.3}, "did you mean 'conf'"), ({"conf": 2}, "--conf"), ({"method": "igg"}, "'ig'")):
        with pytest.raises(UsageError, match=words):
            Explainer(tiny, **options)
    with pytest.raises(UsageError, match="RunConfig"):
        Explainer(RunConfig(), conf=0.3)
    assert quick() == []


@pytest.mark.slow
def test_what_was_closed_begins_again(tiny: Path, pictures: Path) -> None:
    explainer = Explainer(tiny, method="grad", evidence="none", max_det=1, batch=1)
    before = [result.record for result in explainer(pictures)]
    explainer.close()
    assert len(before) == 6 and [result.record for result in explainer(pictures)] == before


def test_results_show_themselves(quick: Explainer, pictures: Path) -> None:
    (result,) = quick(pictures / "a.png")
    (item,) = result.explanations
    for shown in (result, item):
        png, overlay = shown._repr_png_(), shown.overlay()
        assert png is not None and png.startswith(b"\x89PNG") and overlay is not None
        assert overlay.width >= 120 and overlay.height > 90
        assert shown.map is not None and shown.map.shape == (90, 120)
    assert quick(np.full((40, 50, 3), 255, np.uint8))[0].overlay() is not None, "nothing found: the plain image"


def test_the_example_of_the_package_runs(
    tiny: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "scans").symlink_to(pictures)
    text = textwrap.dedent((detxai.__doc__ or "").partition("\n\n")[2])
    text = text.replace("best.pt", str(tiny)).replace("conf=0.3", "max_det=1, max_evaluations=24, tolerance=0.2")
    exec(compile(text, "detxai/__init__.py", "exec"), {})
    assert "deeper/c.webp thing" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["scans"]


def test_the_demo_detector_is_for_trying(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for image, foreign in ((SAMPLES / "bag-12.jpg", False), (tmp_path / "own.png", True)):
        if foreign:
            Image.new("RGB", (32, 32)).save(image)
        assert explain(image, "-o", tmp_path / "out", "--evidence", "none", "--max-evaluations", 2) in (0, 3)
        said = json.loads((tmp_path / "out" / "summary.json").read_bytes())["warnings"]
        assert any("-m" in line for line in said) == foreign


# -- whole folders -----------------------------------------------------------------------------


@needs(PHOTOS, ODD)
def test_every_odd_file_ends_in_a_record(detxai: Command, tiny: Path) -> None:
    outcome = detxai("explain", PHOTOS, ODD, "-m", tiny, "-o", "tree", *FAST, "--max-det", 1, "--evidence", "none")
    assert outcome.code == 3, outcome.err
    tree = detxai.cwd / "tree"
    lines = [records.load(line) for line in (tree / "records.jsonl").read_bytes().splitlines()]
    given = {f"{path.parent.name}/{path.name}" for folder in (PHOTOS, ODD) for path in folder.iterdir()}
    counts = json.loads((tree / "summary.json").read_bytes())["images"]
    assert counts["ok"] + counts["failed"] == len(lines)
    assert len(lines) + counts["ignored"] == sum(len(list(f.iterdir())) for f in (PHOTOS, ODD))
    assert {record.image.path for record in lines} <= given
    failed = {record.image.path.split("/")[1]: record.error.code for record in lines if record.error}
    assert failed["xray_truncated60pct.jpg"] == failed["sk_truncated.jpg"] == "truncated"
    assert failed["pil_decompression_bomb.gif"] == "too_large"
    assert failed.get("dicom_CT_small.dcm") == (None if find_spec("pydicom") else "unsupported")
    assert "internal" not in failed.values()
    assert {p.name for p in detxai.cwd.iterdir()} == {"tree"}


@bundled
@pytest.mark.slow
def test_the_samples_with_the_bundled_model(detxai: Command) -> None:
    """The README's first command: every detection explained and shown, the right item found in 10 of 12."""
    start = time.perf_counter()
    outcome = detxai("explain", SAMPLES, env={"OMP_NUM_THREADS": "2"})
    seconds = time.perf_counter() - start
    print(f"12 samples: {seconds:.0f} s")
    assert outcome.code == 0, outcome.err
    tree = detxai.cwd / "runs" / "explain"
    classes = (ROOT / "samples" / "classes.txt").read_text().split()
    right = 0
    for label in sorted((ROOT / "samples" / "labels").glob("bag-*.txt")):
        record = load(tree / f"{label.stem}.jpg.json")
        rows = [line.split() for line in label.read_text().splitlines()]
        wanted = {classes[int(row[0])] for row in rows}
        found = {d.class_name for d in record.detections or ()}
        right += bool(wanted & found) if wanted else not found
        for number, detection in enumerate(record.detections or ()):
            (a,) = detection.attributions
            assert a.converged, (label.stem, number, a.error_bound)
            assert a.overlay == f"{label.stem}.jpg.d{number:02d}.ig.png"
            with Image.open(tree / a.overlay) as overlay:
                overlay.load()
    assert right >= 10
    assert seconds < 180, "the promise for two cores"


@bundled
def test_the_bundled_model_is_the_one_that_is_pinned() -> None:
    assert len(checkpoints.BUNDLED_SHA256) == 64, "pin the model that ships"
    assert checkpoints.load().sha256 == checkpoints.BUNDLED_SHA256
    assert checkpoints.BUNDLED.stat().st_size <= 6.5e6
