"""The script that counts CPU time by stage runs on two samples, and every stage that ran has its time."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
from conftest import ROOT, SAMPLES


def test_every_stage_is_where_it_is_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts" / "bench"))
    stages = import_module("stages")
    with stages.clocked(stages.Clock()):
        assert stages.overlays.encode.__name__ == "counted"


@pytest.mark.slow
def test_every_stage_is_counted(tmp_path: Path) -> None:
    script, out = ROOT / "scripts" / "bench" / "stages.py", tmp_path / "stages.json"
    line = [sys.executable, script, "--images", SAMPLES, "--count", "2", "--imgsz", "128", "--max-evaluations", "4"]
    line += ["--overlay-format", "png", "none", "--json", out]
    done = subprocess.run([str(part) for part in line], check=True, capture_output=True, text=True)
    runs = json.loads(out.read_text())["overlays"]
    assert list(runs) == ["png", "none"]
    for kind, run in runs.items():
        assert run["images"] == 2 and run["detections"] >= 1
        idle = {stage for stage, ms in (run["an_image"] | run["a_detection"]).items() if ms == 0}
        assert idle == (set() if kind == "png" else {"painting", "encoding"})
    assert "| ms a detection | png | none |" in done.stdout
