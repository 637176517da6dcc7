"""The report of a device runs where there is no GPU, with small counts, and says what it must."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, SAMPLES

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def test_the_report_on_a_cpu(tmp_path: Path) -> None:
    script, out = ROOT / "scripts" / "bench" / "gpu_report.py", tmp_path / "report.json"
    line = [sys.executable, script, "--images", SAMPLES, "--quick", "--device", "cpu", "--json", out]
    subprocess.run([str(part) for part in line], check=True, capture_output=True)
    found = json.loads(out.read_text())
    assert set(found) == {"machine", "maps", "repeat", "rows", "engine", "command", "captum", "criteria"}
    assert found["maps"]["fp32"]["most"] < 1e-4, "the CPU against itself"
    assert found["repeat"]["same"] and found["repeat"]["files"] > 1
    assert all(milliseconds > 0 for milliseconds in found["rows"]["yolov8n.yaml"].values() if milliseconds)
    assert found["engine"]["converged"] == 1
    assert found["engine"]["detections_s"] > 0 and found["engine"]["device_at_work"] > 0.5
    assert all(0 < done["device_at_work"] < 1 for name, done in found["command"].items() if name != "seconds")
    assert found["captum"]["equal"]["ratio_captum"] > 0
    for name in "AB":
        assert found["criteria"][name]["converged"] == 1 and found["criteria"][name]["ratio_captum"]["all"] > 0
