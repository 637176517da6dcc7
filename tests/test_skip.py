"""`--skip by-stat`: what is done already is known without opening one input, and what changed is read."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path

import pytest
from conftest import FAST, explain, files

from detxai.inputs import decode
from detxai.output import bucket
from detxai.output.seen import FILE, Seen
from detxai.values import ImageRef


@pytest.fixture
def scans(pictures: Path, tmp_path: Path) -> Path:
    """Three pictures of yesterday."""
    (folder := tmp_path / "scans").mkdir()
    for name in ("a.png", "b.png", "b.jpg"):
        shutil.copy(pictures / name, folder / name)
        os.utime(folder / name, (time.time() - 86400,) * 2)
    return folder


def counts(tree: Path) -> tuple[int, int]:
    """(explained, skipped) of the last run."""
    images = json.loads((tree / "summary.json").read_bytes())["images"]
    return images["ok"], images["skipped"]


@pytest.mark.slow
def test_size_and_time_suffice_where_they_are_asked_for(
    scans: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = tmp_path / "tree"
    line = (scans, "-m", tiny, "-o", tree, *FAST)
    assert explain(*line) == 0
    before = files(tree)
    opened: list[str] = []
    real = decode.digest
    monkeypatch.setattr(decode, "digest", lambda ref, *more: opened.append(ref.path) or real(ref, *more))
    assert explain(*line, "--skip", "by-stat") == 0
    assert (opened, counts(tree), files(tree)) == ([], (0, 3), before)
    # Other settings; bytes of the same size but of now; a line that was cut short by a kill.
    assert explain(*line, "--skip", "by-stat", "--conf", 0.3) == 0
    assert (counts(tree), opened) == ((3, 0), [])
    (scans / "a.png").write_bytes((scans / "a.png").read_bytes())
    with (tree / FILE).open("ab") as index:
        index.write(b'["b.png", 12')
    assert explain(*line, "--skip", "by-stat", "--conf", 0.3) == 0
    assert (counts(tree), opened) == ((0, 3), ["a.png"])
    (tree / FILE).unlink()
    assert explain(*line, "--skip", "by-stat", "--conf", 0.3) == 0
    assert sorted(opened[1:]) == ["a.png", "b.jpg", "b.png"]


def test_what_was_changed_just_now_is_not_trusted(scans: Path, tiny: Path, tmp_path: Path) -> None:
    os.utime(scans / "a.png", (time.time() + 600,) * 2)
    tree = tmp_path / "tree"
    assert explain(scans, "-m", tiny, "-o", tree, *FAST) == 0
    noted = {json.loads(line)[0] for line in (tree / FILE).read_bytes().splitlines() if line}
    assert noted == {"b.png", "b.jpg"}


def test_what_is_not_there_any_more_is_not_trusted(tmp_path: Path) -> None:
    ref, known = ImageRef("gone.png", tmp_path / "gone.png"), (1, 2, "00" * 32)
    seen = Seen(tmp_path)
    seen.load()
    seen.learn("gone.png", known)
    seen.learn("never.png", None)
    assert (seen.entry("gone.png"), seen.entry("never.png")) == (known, None)
    assert not seen.trusts(ref, known[2]) and seen.begin(ref) is ref
    pytest.importorskip("fsspec")
    nowhere = Seen(bucket.place("memory://seen"))  # nothing is appended to an object
    nowhere.load()
    assert nowhere.begin(ref) is ref and nowhere.entry("gone.png") is None
