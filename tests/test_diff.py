"""Two runs compared: every kind of change is found where it was made, and nowhere else."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from make_tree import write

from detxai.cli.app import run
from detxai.output.tree import Tree
from detxai.review.diff import ALIKE, Change, compare
from detxai.values import iou


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "before"
    write(folder, 40, seed=7, overlays=True)
    return folder


@pytest.fixture
def after(before: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(before, tmp_path / "after"))


def edit(
    tree: Path, wanted: Callable[[dict[str, Any]], bool], change: Callable[[dict[str, Any]], None]
) -> tuple[str, int]:
    """Change the first box that is wanted, and say which it was."""
    for file in sorted(tree.rglob("*.json")):
        record = json.loads(file.read_bytes())
        for box in record.get("detections", ()):
            if wanted(box):
                change(box)
                record["detections"] = [b for b in record["detections"] if b]
                file.write_text(json.dumps(record))
                return record["image"]["path"], box.get("id", -1)
    raise AssertionError("no such box")


def anything(_: dict[str, Any]) -> bool:
    return True


def only(before: Path, after: Path) -> Change:
    found = compare(Tree(before), Tree(after))
    (change,) = found.changes
    assert found.worse == [change] * change.worse
    return change


def test_a_run_is_like_itself(before: Path, after: Path, capfd: pytest.CaptureFixture[str]) -> None:
    found = compare(Tree(before), Tree(after))
    assert found.changes == [] and found.common == 40
    assert all(c.iou == 1 and c.correlation == pytest.approx(1) for c in found.boxes) and len(found.boxes) > 50
    assert run(["diff", str(before), str(after), "--fail-on", "change"]) == 0
    assert "nothing changed" in capfd.readouterr().out


def test_a_box_is_gone_and_back(before: Path, after: Path) -> None:
    path, _ = edit(after, anything, dict.clear)
    gone, new = only(before, after), only(after, before)
    assert (gone.path, gone.what, gone.worse, gone.after) == (path, ("gone",), True, None)
    assert (new.path, new.what, new.worse, new.before) == (path, ("new",), False, None)


def test_another_class(before: Path, after: Path) -> None:
    edit(after, anything, lambda box: box.update(class_id=8, class_name="drill"))
    change = only(before, after)
    assert change.what == ("class",) and change.worse and change.iou == 1


def test_a_verdict_that_falls_is_worse_and_one_that_rises_is_not(before: Path, after: Path) -> None:
    edit(after, lambda b: b["evidence"]["verdict"] == "supported", lambda b: b["evidence"].update(verdict="weak"))
    fallen, risen = only(before, after), only(after, before)
    assert fallen.what == risen.what == ("verdict",) and fallen.worse and not risen.worse


def test_a_box_that_moved_and_evidence_elsewhere(before: Path, after: Path) -> None:
    def move(box: dict[str, Any]) -> None:
        left, top, right, bottom = box["box"]
        step = 0.15 * (right - left)
        box["box"] = [left + step, top, right + step, bottom]

    edit(after, anything, move)
    moved = only(before, after)
    assert moved.what == ("moved",) and moved.iou == pytest.approx(0.85 / 1.15, rel=1e-4) and not moved.worse

    def turn(box: dict[str, Any]) -> None:
        grid = box["attributions"][0]["grid"]
        grid["values"] = [row[::-1] for row in grid["values"][::-1]]

    edit(after, anything, turn)
    turned = only(before, after)
    assert turned.what == ("evidence", "moved") and turned.correlation is not None and turned.correlation < ALIKE


def test_labels_say_what_is_worse(before: Path, after: Path) -> None:
    """A false report that goes is no loss, a false one that comes is one."""
    wrong = {"status": "background", "label": None, "iou": 0.0}
    for tree in (before, after):
        shutil.copytree(tree, after.parent / f"{tree.name}-labelled")
    one, other = (after.parent / f"{tree.name}-labelled" for tree in (before, after))
    for tree in (one, other):
        edit(tree, anything, lambda box: box.update(match=wrong))
        for file in tree.rglob("*.json"):
            record = json.loads(file.read_bytes())
            if record["status"] == "ok":
                file.write_text(json.dumps(record | {"labels": []}))
    edit(other, anything, dict.clear)
    assert only(one, other).what == ("gone",) and not only(one, other).worse
    assert only(other, one).what == ("new",) and only(other, one).worse


def test_images_that_fail_or_lack(before: Path, after: Path) -> None:
    files = sorted(f for f in after.rglob("*.json"))
    record = json.loads(files[0].read_bytes())
    failed = {"schema": record["schema"], "status": "failed", "image": record["image"]}
    files[0].write_text(json.dumps(failed | {"error": {"code": "truncated", "message": "cut"}}))
    files[1].unlink()
    found = compare(Tree(before), Tree(after))
    assert [c.what for c in found.changes] == [("absent",), ("failed",)] and len(found.worse) == 2
    assert [c.what for c in compare(Tree(after), Tree(before)).changes] == [("mended",)]


def test_the_gate_and_its_formats(before: Path, after: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    name = "</td><script>\x1b[31mdrill"
    path, number = edit(after, anything, lambda box: box.update(class_id=8, class_name=name))
    page = tmp_path / "pages" / "diff.html"
    both = ["diff", str(before), str(after)]
    assert run([*both, "--json", "--html", str(page), "--fail-on", "worse"]) == 10
    said = json.loads(capfd.readouterr().out)
    assert said["schema"] == "detxai.diff/1" and said["worse"] == said["changed"] == 1
    ((image, (change,)),) = [(i["path"], i["changes"]) for i in said["images"]]
    assert (image, change["a"]["id"], change["b"]["class_name"]) == (path, number, name)
    assert sum(row["class"] for row in said["classes"]) == 1
    text = page.read_text(encoding="utf-8")
    assert "<script>" not in text and "&lt;/td&gt;&lt;script&gt;" in text
    pictures = [part.partition('"')[0] for part in text.split('src="')[1:]]
    assert len(pictures) == 2 and all((page.parent / p).resolve().is_file() for p in pictures)
    assert run(both) == 0
    out = capfd.readouterr().out
    assert "1 changes, 1 for worse" in out and "\x1b" not in out and "another class" in out


def test_what_cannot_be_compared_is_told(before: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "other", 3, seed=1)
    for file in (tmp_path / "other").rglob("*.json"):
        record = json.loads(file.read_bytes())
        record["image"] |= {"path": f"x/{file.stem}", "sha256": "f" * 64}
        (tmp_path / "other" / "x").mkdir(exist_ok=True)
        (tmp_path / "other" / "x" / file.name).write_text(json.dumps(record))
        file.unlink()
    assert run(["diff", str(before), str(tmp_path / "other")]) == 4
    assert "No image is in both" in capfd.readouterr().err
    assert run(["diff", str(before), str(before), "--fail-on", "weak"]) == 2
    assert "worse or change" in capfd.readouterr().err


def test_overlap_of_boxes() -> None:
    assert iou((0, 0, 2, 2), (1, 0, 3, 2)) == pytest.approx(1 / 3)
    assert iou((0, 0, 1, 1), (1, 1, 2, 2)) == iou((0, 0, 0, 0), (0, 0, 0, 0)) == 0
