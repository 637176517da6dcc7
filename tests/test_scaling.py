"""The scripts about many images and many workers run on a few, and what they find holds there."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from conftest import ROOT, SAMPLES

BENCH = ROOT / "scripts" / "bench"
pytestmark = pytest.mark.slow
needs_ray = pytest.mark.skipif(find_spec("ray") is None, reason="needs ray, which is not here")


def run(script: Path, *arguments: object) -> str:
    line = [sys.executable, str(script), *map(str, arguments)]
    return subprocess.run(line, check=True, capture_output=True, text=True).stdout


def test_the_ways_write_the_same_bytes() -> None:
    said = run(ROOT / "scripts" / "checks" / "engines.py", "--count", 2, "--shards", 2, "--samples", 2)
    assert "merged" in said and "the same bytes" in said


def test_what_is_done_is_passed_over_without_opening_it() -> None:
    said = run(BENCH / "million.py", "--count", 10_000, "--folders", 3)
    (begin, skip) = (row.split("|")[1:-1] for row in said.splitlines()[2:])
    assert (begin[1].strip(), skip[1].strip()) == ("begin", "skip")
    assert int(begin[6]) > 0 and int(skip[6]) == 0


@needs_ray
def test_two_workers_are_faster_than_one(tmp_path: Path) -> None:
    options = ("--images", SAMPLES, "--count", 60, "--pack-ms", 2000, "--json", tmp_path / "out.json")
    said = run(BENCH / "scaling.py", *options)
    ways = json.loads((tmp_path / "out.json").read_text())["ways"]
    assert list(ways) == ["local, 1", "Ray, 1", "local, 2", "Ray, 2"]
    assert all(name in said for name in ways)
    assert ways["local, 2"][0]["clock"] < 0.85 * ways["local, 1"][0]["clock"]
    assert ways["Ray, 1"][0]["cpu_ms"]["workers"] > 0


def test_the_busiest_is_what_saturates(tmp_path: Path) -> None:
    """With a leading process of 5 ms an image, 200 images a second are the most."""
    stages = {"images": 10, "detections": 20, "an_image": {"load": 10.0}, "a_detection": {"paint": 5.0, "writing": 1.0}}
    (tmp_path / "stages.json").write_text(json.dumps({"overlays": {"png": stages}}))
    rounds = [{"clock": 0.1, "cpu_ms": {"main": 5.0}}]
    (tmp_path / "scaling.json").write_text(json.dumps({"ways": {"Ray, 1": rounds}}))
    options = ("--stages", tmp_path / "stages.json", "--device-ms", 10, "--simulated", 500, "--gpus", 1, 8)
    shards = [row.split("|") for row in run(BENCH / "cluster.py", *options).splitlines()[2:4]]
    assert [float(row[2]) for row in shards] == pytest.approx([50, 400], rel=0.1)
    led = [
        row.split("|")
        for row in run(BENCH / "cluster.py", *options, "--scaling", tmp_path / "scaling.json").splitlines()[2:4]
    ]
    assert float(led[1][2]) == pytest.approx(200, rel=0.02)
    assert (led[0][-2].strip(), led[1][-2].strip()) == ("GPUs", "leading process")
