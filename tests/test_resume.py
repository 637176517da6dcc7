"""A picture with many boxes: what is done of it when the run ends stays done, and the record is the same in the end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import Command, Inside, files, pixels
from PIL import Image

from detxai import Explainer
from detxai.output import overlays, overview
from detxai.output.store import Store
from detxai.run import leaving
from detxai.run.console import Signals, Stopped

#: Boxes of the crowd, and how many are explained at a time.
BOXES, AT_ONCE = 6, 2
MANY = {"max_det": BOXES, "conf": 0.001, "iou": 0.95, "tolerance": 0.9, "max_evaluations": 4, "scale": "common"}


def parts(tree: Path) -> list[Path]:
    return sorted(tree.rglob(".detxai-*.part"))


@pytest.fixture(scope="module")
def crowd(tiny: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A picture of many boxes, its tree, one explainer for all, the points that it took, scales of its pictures."""
    tree, scales = tmp_path_factory.mktemp("crowd") / "tree", []

    def spied(draw: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *given, **named: scales.append(named["scale"]) or draw(*given, **named)

    with pytest.MonkeyPatch.context() as patch, Store(tree) as store:
        patch.setattr("detxai.run.plan.TARGETS_AT_ONCE", AT_ONCE)
        patch.setattr(overlays, "draw", spied(overlays.draw))
        patch.setattr(overview, "draw", spied(overview.draw))
        explainer = Explainer(tiny, **MANY)
        (result,) = explainer.explain(pictures / "a.png", store)
    assert len(result.record.detections) == BOXES
    assert not explainer.cut_short
    assert parts(tree) == []
    return SimpleNamespace(
        picture=pictures / "a.png", tree=tree, explainer=explainer, points=explainer.points, scales=scales
    )


@pytest.fixture
def left(crowd: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tree whose run was over when the first group of boxes was done."""
    monkeypatch.setattr(leaving, "DEVICE_GRACE", 0.0)
    tree = tmp_path / "tree"
    with Store(tree) as store:
        assert list(crowd.explainer.explain(crowd.picture, store, lambda: bool(parts(tree)))) == []
    assert crowd.explainer.cut_short
    (work,) = crowd.explainer.unfinished()
    assert AT_ONCE <= work.done < BOXES
    assert work.done == AT_ONCE * len(parts(tree))
    assert "a.png.json" not in files(tree)
    monkeypatch.undo()
    return tree


def resumed(crowd: SimpleNamespace, tree: Path) -> int:
    """The points that the network saw until the tree is that of a run that nothing stopped."""
    with Store(tree) as store:
        (result,) = crowd.explainer.explain(crowd.picture, store)
    assert result.record.error is None
    assert not crowd.explainer.cut_short
    assert files(tree) == files(crowd.tree)
    assert parts(tree) == []
    return int(crowd.explainer.points)


def test_a_common_scale_is_that_of_all_pictures_of_an_image(crowd: SimpleNamespace) -> None:
    assert len(crowd.scales) == BOXES + 1, "single ones and the overview"
    assert len(set(crowd.scales)) == 1 and crowd.scales[0] > 0


def test_finished_groups_are_not_done_again(crowd: SimpleNamespace, left: Path) -> None:
    share = AT_ONCE * len(parts(left)) / BOXES
    assert resumed(crowd, left) <= crowd.points * (1 - share / 2)


@pytest.mark.parametrize("fault", ["picture", "part", "settings", "version"])
def test_what_does_not_fit_any_more_is_done_again(
    crowd: SimpleNamespace, left: Path, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if fault == "picture":
        for picture in left.glob("*.png"):
            picture.write_bytes(b"changed")
    elif fault == "version":
        monkeypatch.setattr("detxai.run.resume.__version__", "0")
    for part in parts(left) if fault == "part" else ():
        part.write_bytes(part.read_bytes()[:-1])
    for part in parts(left) if fault == "settings" else ():
        place, image, _, number = part.name.split("-")
        part.rename(part.with_name("-".join((place, image, "0123456789abcdef", number))))
    assert resumed(crowd, left) == crowd.points


def test_readers_of_a_tree_pass_over_what_is_not_finished(crowd: SimpleNamespace, left: Path, inside: Inside) -> None:
    assert inside("list", left).code == 4
    (left / "summary.json").write_text("{}")
    whole = inside("merge", left, crowd.tree, "-o", "merged")
    assert whole.code == 0, whole.err
    assert {n: c for n, c in files(inside.cwd / "merged").items() if n != "records.jsonl"} == files(crowd.tree)
    assert parts(inside.cwd) == []


@pytest.fixture
def dense(detxai: Command) -> Path:
    """Nine X-rays as one picture."""
    sheet = Image.new("RGB", (480, 480))
    for number in range(9):
        tile = Image.fromarray(pixels(f"bag-{number + 1:02d}.jpg", (160, 160)))
        sheet.paste(tile, (number % 3 * 160, number // 3 * 160))
    sheet.save(detxai.cwd / "dense.png")
    return detxai.cwd / "dense.png"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_kill_within_a_picture_loses_the_group_in_flight_alone(detxai: Command, dense: Path) -> None:
    boxes = ("--conf", "0.001", "--iou", "0.95", "--max-det", "64", "--evidence", "none")
    line = ("explain", dense, *boxes, "--imgsz", "160", "--max-evaluations", "16", "-o")
    assert detxai(*line, "whole").code == 0
    tree = detxai.cwd / "tree"
    with detxai.start(*line, tree, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as running:
        while not parts(tree) and running.poll() is None:
            time.sleep(0.01)
        running.kill()
    assert running.returncode == -9, "the picture was done before it could be killed: give it more boxes"
    outcome = detxai(*line, tree)
    assert outcome.code == 0, outcome.err
    assert files(tree) == files(detxai.cwd / "whole")
    assert parts(tree) == []
    whole, last = (json.loads((detxai.cwd / t / "summary.json").read_text()) for t in ("whole", "tree"))
    assert whole["detections"] >= 40, "several groups"
    assert last["timings"]["points"] < 0.8 * whole["timings"]["points"]


@pytest.mark.slow
@pytest.mark.parametrize("signalled", [False, True])
def test_a_dense_picture_is_left_within_ten_seconds(detxai: Command, dense: Path, signalled: bool) -> None:
    line = ("explain", dense, "--conf", "0.001", "--max-det", "300", "--tolerance", "0.0001", "-o", "tree")
    limit = 60  # of which the half may go to loading, on a busy machine
    with detxai.start(*line, *(() if signalled else ("--max-seconds", limit))) as running:
        if signalled:
            while not (detxai.cwd / "tree" / ".detxai.lock").exists():
                time.sleep(0.1)
            time.sleep(limit / 6)
            asked = time.monotonic()
            running.terminate()
        _, err = running.communicate()
    if signalled:
        assert time.monotonic() - asked <= 10
    assert running.returncode == (143 if signalled else 8), err
    summary = json.loads((detxai.cwd / "tree" / "summary.json").read_text())
    assert summary["seconds"] <= limit + 10
    (left,) = summary["unfinished"]
    assert left["path"] == "dense.png"
    assert left["kept"] <= left["detections"]
    assert f"dense.png is not finished: {left['kept']} of {left['detections']} boxes".encode() in err
    assert summary["images"] == {"ok": 0, "failed": 0, "skipped": 0, "ignored": 0}
    assert signalled or b" evaluations, 0 of " in err, "progress moves"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_signal_that_python_drops_is_heard_at_the_next_pack() -> None:
    class Awkward:
        def __del__(self) -> None:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)

    with Signals() as signals:
        Awkward()
        with pytest.raises(Stopped):
            signals.check()
