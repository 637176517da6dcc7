"""Laws of a run: what was done stays done, and neither order, shards, batches nor kills change a byte."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jsonschema
import numpy as np
import pytest
from conftest import FAST, ROOT, Command, explain, files
from PIL import Image

from detxai.output import json_schema, records

SEED = 20
#: A kill at every single step of the file system is the business of the store's own tests.
KILLS = 3
#: Resident memory that a run may gain once its buffers are filled, in MiB for 300 pictures.
GAIN = 32


def stamps(root: Path) -> dict[str, int]:
    return {name: (root / name).stat().st_mtime_ns for name in files(root)}


def test_a_second_run_does_nothing(finished: Callable[[], Path], pictures: Path, tiny: Path) -> None:
    tree = finished()
    before, when = files(tree), stamps(tree)
    assert explain(pictures, "-m", tiny, "-o", tree, "--maps", "npz", *FAST) == 0
    assert files(tree) == before
    assert stamps(tree) == when
    summary = json.loads((tree / "summary.json").read_bytes())
    assert (summary["images"]["skipped"], summary["images"]["ok"], summary["evaluations"]) == (6, 0, 0)


def test_neither_device_nor_batch_nor_place_is_a_reason_to_run_again(
    finished: Callable[[], Path], pictures: Path, tiny: Path, tmp_path: Path
) -> None:
    tree = finished()
    when = stamps(tree)
    (moved := tmp_path / "elsewhere").symlink_to(pictures)
    assert explain(moved, "-m", tiny, "-o", tree, "--maps", "npz", *FAST, "--batch", 3, "--device", "cpu") == 0
    assert stamps(tree) == when


@pytest.mark.parametrize(
    "option",
    [
        ("--tolerance", 0.5),
        ("--force",),
        *(pytest.param(o, marks=pytest.mark.slow) for o in (("--conf", 0.3), ("--no-overlays",))),
    ],
)
def test_what_changes_a_file_runs_again(
    finished: Callable[[], Path], pictures: Path, tiny: Path, option: tuple[object, ...]
) -> None:
    tree = finished()
    before = files(tree)
    assert explain(pictures, "-m", tiny, "-o", tree, "--maps", "npz", *FAST, *option) == 0
    images = json.loads((tree / "summary.json").read_bytes())["images"]
    assert (images["ok"], images["skipped"]) == (6, 0)
    assert (files(tree) == before) == (option == ("--force",))
    named = {name for file in tree.rglob("*.json") if file.name != "summary.json"
             for name in records.load(file.read_bytes()).files()}  # fmt: skip
    there = {p.name for p in tree.rglob("*") if p.suffix in (".png", ".npz")}
    assert there == named, "superseded pictures are gone"


def test_an_image_that_changed_runs_again_alone(tmp_path: Path, pictures: Path, tiny: Path) -> None:
    (folder := tmp_path / "in").mkdir()
    for name in ("a.png", "b.png"):
        (folder / name).write_bytes((pictures / name).read_bytes())
    assert explain(folder, "-m", tiny, "-o", tmp_path / "out", *FAST) == 0
    (folder / "b.png").write_bytes((pictures / "gray one.png").read_bytes())
    assert explain(folder, "-m", tiny, "-o", tmp_path / "out", *FAST) == 0
    images = json.loads((tmp_path / "out" / "summary.json").read_bytes())["images"]
    assert (images["ok"], images["skipped"]) == (1, 1)


def test_shards_make_the_whole(finished: Callable[[], Path], pictures: Path, tiny: Path, tmp_path: Path) -> None:
    counts = []
    for part in (3, 1, 2):
        assert explain(pictures, "-m", tiny, "-o", tmp_path, "--maps", "npz", *FAST, "--shard", f"{part}/3") == 0
        counts.append(json.loads((tmp_path / "summary.json").read_bytes())["images"]["ok"])
    assert sum(counts) == 6
    assert max(counts) < 6
    assert files(tmp_path) == files(finished())


def test_an_empty_shard_is_no_failure(pictures: Path, tiny: Path, tmp_path: Path) -> None:
    codes = [explain(pictures / "a.png", "-m", tiny, "-o", tmp_path, *FAST, "--shard", f"{i}/2") for i in (1, 2)]
    assert codes == [0, 0]
    assert len(list(tmp_path.glob("*.png.json"))) == 1


def test_order_does_not_matter(pictures: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(pictures)
    names = [str(path.relative_to(pictures)) for path in pictures.rglob("*.*") if path.suffix != ".txt"]
    trees = []
    for number in range(2):
        random.Random(SEED + number).shuffle(names)
        trees.append(tmp_path / str(number))
        with open(tmp_path / "list", "w+") as stream:
            stream.write("\n".join(names))
            stream.seek(0)
            monkeypatch.setattr(sys, "stdin", stream)
            assert explain("-", "-m", tiny, "-o", trees[-1], "--maps", "npz", *FAST) == 0
    first, *others = map(files, trees)
    assert len(first) > 12
    assert all(other == first for other in others)


def test_batches_agree(pictures: Path, tiny: Path, tmp_path: Path) -> None:
    trees = {}
    for batch in (1, 8, 32):
        trees[batch] = tmp_path / str(batch)
        line = (pictures, "-m", tiny, "-o", trees[batch], "--maps", "npz", "--precision", "fp32", *FAST)
        assert explain(*line, "--batch", batch) == 0
    names = [str(path.relative_to(trees[1])) for path in trees[1].rglob("*.npz")]
    assert len(names) >= 6
    for batch in (8, 32):
        for name in names:
            one, other = (np.load(trees[b] / name)["map"].ravel() for b in (1, batch))
            assert np.corrcoef(one, other)[0, 1] >= 0.9999
        lines = [(trees[b] / "records.jsonl").read_text().splitlines() for b in (1, batch)]
        for mine, theirs in zip(*lines, strict=True):
            boxes = [[d["box"] for d in json.loads(text)["detections"]] for text in (mine, theirs)]
            np.testing.assert_allclose(*boxes, rtol=0, atol=1e-3)


def test_every_line_keeps_to_its_schema(finished: Callable[[], Path]) -> None:
    tree = finished()
    schema = jsonschema.Draft202012Validator(json_schema.schema("record"))
    lines = (tree / "records.jsonl").read_text().splitlines()
    for line in lines:
        schema.validate(json.loads(line))
    jsonschema.validate(json.loads((tree / "summary.json").read_text()), json_schema.schema("summary"))
    wrong = json.loads(lines[0])
    del wrong["image"]["path"]
    assert not schema.is_valid(wrong)


@pytest.mark.parametrize("name", ["ci.yaml", "default.yaml", "xray.yaml"])
def test_shipped_configs_run(name: str, pictures: Path, tiny: Path, tmp_path: Path) -> None:
    config = ROOT / "configs" / name
    assert explain(pictures / "deeper", "-m", tiny, "-c", config, "-o", tmp_path, *FAST) == 0
    assert len(list(tmp_path.rglob("*.json"))) == 3


@pytest.mark.slow
def test_kills_leave_a_tree_that_a_second_run_completes(detxai: Command, tiny: Path, pictures: Path) -> None:
    (many := detxai.cwd / "many").mkdir()
    with Image.open(pictures / "b.png") as picture:
        for number in range(24):
            picture.crop((number % 9, number % 7, 80, 90)).save(many / f"{number:02d}.png")
    line = ("explain", many, "-m", tiny, *FAST, "--evidence", "none", "-o")
    whole, tree = detxai.cwd / "whole", detxai.cwd / "tree"
    assert explain(*line[1:], whole) == 0
    chance = random.Random(SEED)
    for _ in range(KILLS):
        before = len(files(tree)) if tree.exists() else 0
        wanted = before + chance.randrange(6)
        running = detxai.start(*line, tree, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        with running:
            while (not tree.exists() or len(os.listdir(tree)) < wanted) and running.poll() is None:
                time.sleep(0.002)
            time.sleep(chance.random() * 0.05)
            running.kill()
        assert running.returncode == -9, "the run was over before it could be killed: give it more pictures"
    assert len(files(tree)) < len(files(whole))
    assert detxai(*line, tree).code == 0
    assert files(tree) == files(whole)
    assert not list(tree.rglob("*.tmp"))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
@pytest.mark.slow
def test_memory_stays_flat(detxai: Command, tiny: Path, pictures: Path) -> None:
    (many := detxai.cwd / "many").mkdir()
    with Image.open(pictures / "b.png") as picture:
        for number in range(500):
            picture.crop((number % 30, number % 20, 90, 90)).save(many / f"{number:03d}.png")
    line = ("explain", many, "-m", tiny, "-o", "tree", "--json", "--conf", "0.9", "--no-overlays", *FAST)
    resident = []
    with detxai.start(*line) as running:
        assert running.stdout is not None
        for number, _ in enumerate(running.stdout):
            if number in (200, 499):
                status = Path(f"/proc/{running.pid}/status").read_text()
                resident.append(int(status.split("VmRSS:")[1].split()[0]) / 1024)
        _, err = running.communicate()
    assert running.returncode == 0, err
    print(f"memory after 200 pictures {resident[0]:.0f} MiB, after 500 {resident[1]:.0f} MiB")
    assert resident[1] - resident[0] < GAIN
