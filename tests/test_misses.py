"""Misses, candidates and given boxes through the real command: what is marked, explained, counted and done again."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import explain, files

from detxai.cli.app import run as command

#: Enough to be real, on two pictures.
QUICK = ("--tolerance", 0.2, "--max-evaluations", 24, "--evidence", "none", "--no-overlays", "--max-det", 4)
LOW = 0.25


def records(tree: Path) -> dict[str, dict[str, Any]]:
    lines = (tree / "records.jsonl").read_text().splitlines()
    return {record["image"]["path"]: record for record in map(json.loads, lines)}


def of(kind: str, record: dict[str, Any]) -> list[dict[str, Any]]:
    return [d for d in record["detections"] if d["kind"] == kind]


def line(item: dict[str, Any], image: dict[str, Any], *more: object) -> str:
    """A box of a record as a line of YOLO txt."""
    x0, y0, x1, y1 = item["box"]
    w, h = image["width"], image["height"]
    numbers = ((x0 + x1) / 2 / w, (y0 + y1) / 2 / h, (x1 - x0) / w, (y1 - y0) / h)
    return " ".join(map(str, (item["class_id"], *numbers, *more))) + "\n"


@pytest.fixture(scope="module")
def plain(tiny: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Two pictures explained without labels, and labels that say just what was detected."""
    root = tmp_path_factory.mktemp("plain")
    for name in ("a.png", "b.jpg"):
        (root / "images").mkdir(exist_ok=True)
        shutil.copy(pictures / name, root / "images")
    assert explain(root / "images", "-m", tiny, "-o", root / "tree", *QUICK) == 0
    found = records(root / "tree")
    (root / "labels").mkdir()
    for name, record in found.items():
        text = "".join(line(d, record["image"]) for d in record["detections"])
        (root / "labels" / name).with_suffix(".txt").write_text(text)
    assert all(len(r["detections"]) == 4 for r in found.values())
    return SimpleNamespace(root=root, images=root / "images", records=found, labels=root / "labels", model=tiny)


@pytest.fixture
def run(plain: SimpleNamespace, tmp_path: Path) -> Callable[..., dict[str, dict[str, Any]]]:
    """Explain the two pictures with more options; the records by path."""

    def go(*options: object, code: int = 0) -> dict[str, dict[str, Any]]:
        assert explain(plain.images, "-m", plain.model, "-o", tmp_path / "out", *QUICK, *options) == code
        return records(tmp_path / "out")

    return go


@pytest.fixture
def labels(plain: SimpleNamespace, tmp_path: Path) -> Path:
    return Path(shutil.copytree(plain.labels, tmp_path / "labels"))


def summary(tmp_path: Path) -> dict[str, Any]:
    return dict(json.loads((tmp_path / "out" / "summary.json").read_text()))


# -- labels -------------------------------------------------------------------------------------


def test_labels_mark_the_detections_and_change_nothing_else(run: Any, plain: SimpleNamespace, tmp_path: Path) -> None:
    for path, record in run("--labels", plain.labels).items():
        assert [d.pop("match") for d in record["detections"]] == [
            {"status": "true", "label": i, "iou": pytest.approx(1, abs=1e-4)} for i in range(4)
        ]
        assert record["detections"] == plain.records[path]["detections"]
        assert [label["status"] for label in record["labels"]] == ["found"] * 4
    counts = summary(tmp_path)
    assert (counts["detections"], counts["labelled"], counts["matches"]) == (8, 2, {"true": 8, "missed": 0})
    assert sum(c["true"] for c in counts["classes"]) == sum(c["labels"] for c in counts["classes"]) == 8


@pytest.mark.parametrize("method", ["ig", "drise"])
def test_an_item_that_is_not_reported_is_missed_and_explained(
    run: Any, plain: SimpleNamespace, tmp_path: Path, method: str
) -> None:
    weakest = plain.records["b.jpg"]["detections"][-1]
    found = run("--labels", plain.labels, "--conf", weakest["score"] + 1e-4, "--method", method)
    (miss,) = of("missed", found["b.jpg"])
    assert miss["class_id"] == weakest["class_id"]
    assert miss["box"] == pytest.approx(weakest["box"], abs=1e-2)
    assert miss["score"] == pytest.approx(weakest["score"], abs=1e-5)
    assert miss["nearest"] == {"box": weakest["box"], "iou": pytest.approx(1, abs=1e-3), "score": miss["score"]}
    assert miss["match"] == {"status": "missed", "label": 3, "iou": miss["nearest"]["iou"]}
    (a,) = miss["attributions"]
    assert math.isfinite(a["sum"]) and a["sum"] != 0
    if method == "ig":
        assert a["net_inside"] == pytest.approx(weakest["attributions"][0]["net_inside"], abs=1e-2)
    assert [label["status"] for label in found["b.jpg"]["labels"]] == ["found"] * 3 + ["missed"]
    assert len(of("missed", found["a.png"])) == 4 and not of("detection", found["a.png"])
    counts = summary(tmp_path)
    assert (counts["detections"], counts["matches"]) == (3, {"true": 3, "missed": 5})
    assert sum(c["missed"] for c in counts["classes"]) == 5


@pytest.mark.slow
def test_a_miss_is_explained_by_every_method_target_and_class(run: Any, plain: SimpleNamespace) -> None:
    more = ("--method", "ig,grad", "--target", "class,left", *[w for i in range(3) for w in ("--as-class", i)])
    found = run("--labels", plain.labels, "--conf", 0.999, *more)
    for record in found.values():
        assert [d["kind"] for d in record["detections"]] == ["missed"] * 4
        assert all(len(d["attributions"]) == 2 * (2 + 2) for d in record["detections"])
        assert [d["score"] for d in record["detections"]] == sorted(d["score"] for d in record["detections"])[::-1]


def test_no_label_file_marks_nothing_and_an_empty_one_says_background(run: Any, labels: Path) -> None:
    (labels / "a.txt").unlink()
    (labels / "b.txt").write_text("")
    found = run("--labels", labels)
    assert "labels" not in found["a.png"] and not any("match" in d for d in found["a.png"]["detections"])
    assert found["b.jpg"]["labels"] == []
    assert {d["match"]["status"] for d in found["b.jpg"]["detections"]} == {"background"}


def test_a_label_of_a_class_that_the_model_lacks_is_kept_but_not_explained(run: Any, labels: Path) -> None:
    (labels / "b.txt").write_text("9 0.5 0.5 0.4 0.4\n")
    (label,) = run("--labels", labels)["b.jpg"]["labels"]
    assert (label["class_id"], label["class_name"], label["status"]) == (None, "class 9", "unknown-class")


def test_classes_that_were_left_out_are_not_missed(run: Any, labels: Path) -> None:
    (labels / "b.txt").write_text("0 0.5 0.5 0.4 0.4\n1 0.1 0.1 0.1 0.1\n")
    found = run("--labels", labels, "--classes", "thing 0", "--conf", 0.999)["b.jpg"]
    assert [label["status"] for label in found["labels"]] == ["missed", "not-asked"]
    assert [d["class_id"] for d in of("missed", found)] == [0]


def test_a_changed_label_does_that_image_again_and_no_other(
    run: Any, plain: SimpleNamespace, labels: Path, tmp_path: Path
) -> None:
    run("--labels", labels)
    before = files(tmp_path / "out")
    run("--labels", labels)
    assert files(tmp_path / "out") == before and summary(tmp_path)["images"]["skipped"] == 2
    (labels / "b.txt").write_text((labels / "b.txt").read_text().splitlines(keepends=True)[0])
    found = run("--labels", labels)
    assert {name for name, content in files(tmp_path / "out").items() if before.get(name) != content} == {
        *("b.jpg.json", "records.jsonl")
    }
    images = summary(tmp_path)["images"]
    assert (images["ok"], images["skipped"]) == (1, 1)
    assert len(found["b.jpg"]["labels"]) == 1


def test_a_malformed_label_fails_its_image_only(run: Any, labels: Path, tmp_path: Path) -> None:
    (labels / "a.txt").write_text("0 0.5 0.5 0.1 0.1\n0 0.5 oops 0.1 0.1\n")
    found = run("--labels", labels, code=3)
    assert found["a.png"]["error"]["code"] == "labels"
    assert found["a.png"]["error"]["message"].startswith("a.txt, line 2: ")
    assert found["b.jpg"]["status"] == "ok"


# -- candidates ---------------------------------------------------------------------------------


def test_candidates_come_after_the_detections_and_do_not_change_them(
    run: Any, plain: SimpleNamespace, tmp_path: Path
) -> None:
    weakest = [plain.records[path]["detections"][-1]["score"] for path in ("a.png", "b.jpg")]
    found = run("--conf", min(weakest) + 0.01, "--candidates", min(weakest) - 0.01)
    for path, record in found.items():
        kinds = [d["kind"] for d in record["detections"]]
        assert kinds == sorted(kinds, reverse=True) and [d["id"] for d in record["detections"]] == list(range(4))
        for old, new in zip(plain.records[path]["detections"], record["detections"], strict=True):
            assert new["kind"] == ("detection" if new["score"] > min(weakest) + 0.01 else "candidate")
            assert new | {"kind": "detection"} == old
    counts = summary(tmp_path)
    assert counts["candidates"] >= 1 and counts["detections"] + counts["candidates"] == 8


def test_an_image_without_any_box_gives_its_strongest_candidate(run: Any, plain: SimpleNamespace) -> None:
    for path, record in run("--conf", 0.9999, "--candidates", 0.999).items():
        (candidate,) = record["detections"]
        assert candidate["kind"] == "candidate"
        assert candidate["box"] == plain.records[path]["detections"][0]["box"]


def test_a_miss_does_not_depend_on_candidates(run: Any, plain: SimpleNamespace) -> None:
    asked = ("--labels", plain.labels, "--conf", 0.8, "--force")
    without = run(*asked)
    for path, record in run(*asked, "--candidates", 0.01, "--max-det", 8).items():
        misses = [[d | {"id": 0} for d in of("missed", r)] for r in (without[path], record)]
        assert misses[0] == misses[1]
        assert {d["match"]["status"] for d in of("candidate", record)} >= {"true"}


# -- given boxes --------------------------------------------------------------------------------


def given_json(plain: SimpleNamespace, at: Path) -> Path:
    entries = [
        {"image_id": Path(path).stem, "category_id": d["class_id"], "score": d["score"],
         "bbox": [d["box"][0], d["box"][1], d["box"][2] - d["box"][0], d["box"][3] - d["box"][1]]}
        for path, record in plain.records.items() for d in record["detections"]
    ]  # fmt: skip
    (at / "results.json").write_text(json.dumps(entries))
    return at / "results.json"


def given_folder(plain: SimpleNamespace, at: Path) -> Path:
    (at / "given").mkdir()
    for path, r in plain.records.items():
        text = "".join(line(d, r["image"], d["score"]) for d in r["detections"])
        (at / "given" / path).with_suffix(".txt").write_text(text)
    return at / "given"


@pytest.mark.parametrize("written", [given_json, given_folder])
def test_the_models_own_boxes_given_back_are_explained_alike(
    run: Any, plain: SimpleNamespace, tmp_path: Path, written: Callable[..., Path]
) -> None:
    found = run("--predictions", written(plain, tmp_path), "--labels", plain.labels)
    for path, record in found.items():
        for old, new in zip(plain.records[path]["detections"], record["detections"], strict=True):
            assert (new["kind"], new["class_id"], new["match"]["status"]) == ("detection", old["class_id"], "true")
            assert new["box"] == pytest.approx(old["box"], abs=1e-2)
            assert new["nearest"]["iou"] > 0.999 and new["nearest"]["box"] == old["box"]
            assert new["score"] == pytest.approx(old["score"]) == pytest.approx(new["nearest"]["score"])
            ours, theirs = new["attributions"][0], old["attributions"][0]
            assert (ours["value_at_input"], ours["sum"]) == (theirs["value_at_input"], theirs["sum"])
            assert ours["net_inside"] == pytest.approx(theirs["net_inside"], abs=1e-2)


def test_given_boxes_keep_their_score_and_other_images_have_none(run: Any, tmp_path: Path) -> None:
    entry = {"file_name": "b.jpg", "category_id": 1, "bbox": [10, 40, 50, 60]}
    (tmp_path / "r.json").write_text(json.dumps([entry | {"score": 0.125}, entry]))
    found = run("--predictions", tmp_path / "r.json", "--predictions-base", 0)
    assert found["a.png"]["detections"] == []
    scores = sorted((d["score"], d["nearest"]["score"]) for d in found["b.jpg"]["detections"])
    assert scores[0][0] == 0.125 and scores[1][0] == scores[1][1] == scores[0][1]
    assert all(d["box"] == [10, 40, 60, 100] for d in found["b.jpg"]["detections"])


# -- what makes no sense ------------------------------------------------------------------------


def said(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    """The exit code of the command in this process, and what it said."""
    code = command(["explain", *map(str, arguments)])
    return code, " ".join(capsys.readouterr().err.split())


def test_impossible_wishes_are_usage_errors(
    capsys: pytest.CaptureFixture[str], plain: SimpleNamespace, tmp_path: Path
) -> None:
    bad = tmp_path / "bad.json"
    bad.write_text('[{"image_id": "a", "category_id": 0, "bbox": [0, 0, 5, 5]}, {"image_id": "a"}]')
    for options, what in [
        (("--candidates", 0.3), "--candidates 0.3 must be below --conf 0.25"),
        (("--candidates", 0.1, "--predictions", bad), "Leave one out"),
        (("--predictions", bad), "entry 2: 'category_id'"),
        (("--predictions", tmp_path / "none.json"), "No such file"),
        (("--labels", tmp_path / "none"), "detection.labels"),
    ]:
        code, text = said(capsys, plain.images, "-m", plain.model, "-o", tmp_path / "out", *options)
        assert code == 2 and what in text


def test_labels_that_belong_to_no_image_are_noticed(
    capsys: pytest.CaptureFixture[str], plain: SimpleNamespace, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    asked = ("-m", plain.model, "-o", tmp_path / "out", *QUICK, "--method", "grad")
    code, text = said(capsys, plain.images, *asked, "--labels", tmp_path / "empty")
    assert code == 0 and "no image has a label file" in text
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["labelled"] == 0
