"""Shards merged are the tree of one run; trees that disagree are refused before anything is written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import explain
from PIL import Image

from detxai.cli.app import run


@pytest.fixture(scope="module")
def shards(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`whole` and the shards `1` and `2` of the same small pictures, one of them damaged."""
    root = tmp_path_factory.mktemp("merge")
    for n in range(4):
        (root / "in" / f"d{n % 2}").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (48, 40), (255, 60 * n, 0)).save(root / "in" / f"d{n % 2}" / f"{n}.png")
    (root / "in" / "bad.png").write_bytes(b"no picture")
    options = (
        "-m",
        tiny,
        "--max-evaluations",
        4,
        "--evidence",
        "none",
        "--tolerance",
        1,
        "--candidates",
        0.01,
        "--max-det",
        3,
    )
    options += ("--candidates", 0.01, "--max-det", 3)
    for name, more in (("whole", ()), ("1", ("--shard", "1/2")), ("2", ("--shard", "2/2"))):
        assert explain(root / "in", *options, *more, "-o", root / name) in (0, 3)
    return root


def files(tree: Path) -> dict[str, bytes]:
    names = (file.relative_to(tree).as_posix() for file in tree.rglob("*") if file.is_file())
    return {name: (tree / name).read_bytes() for name in names if not name.startswith(".") and name != "summary.json"}


def test_merged_shards_are_the_whole(shards: Path) -> None:
    merged = shards / "merged"
    for _ in range(2):  # a second merge changes nothing
        assert run(["merge", str(shards / "1"), str(shards / "2"), "-o", str(merged)]) == 3
        assert files(merged) == files(shards / "whole")
    whole, own = (json.loads((shards / name / "summary.json").read_bytes()) for name in ("whole", "merged"))
    same = ("images", "detections", "candidates", "attributions", "evaluations", "classes", "failures", "model")
    assert {key: own[key] for key in same} == {key: whole[key] for key in same}


def test_unequal_records_are_named_and_nothing_is_written(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    record = (shards / "whole" / "bad.png.json").read_bytes()
    (other / "bad.png.json").write_bytes(record.replace(b'"code":"', b'"code":"un'))
    assert run(["merge", str(shards / "whole"), str(other), "-o", str(tmp_path / "new")]) == 2
    assert "bad.png" in capsys.readouterr().err and not (tmp_path / "new").exists()
    assert run(["merge", str(shards / "whole"), "-o", str(shards / "whole")]) == 2
    assert run(["merge", str(tmp_path / "none"), "-o", str(tmp_path / "new")]) == 4


def test_an_empty_shard_adds_nothing(shards: Path, tmp_path: Path) -> None:
    (empty := tmp_path / "empty").mkdir()
    (empty / "summary.json").write_text("{}")
    assert run(["merge", str(shards / "whole"), str(empty), "-o", str(tmp_path / "new")]) == 3
    assert files(tmp_path / "new") == files(shards / "whole")
