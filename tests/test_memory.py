"""Memory does not grow with the number of detections, and a model takes little more than its weights."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from ultralytics.nn.tasks import DetectionModel

from detxai.models import checkpoints

pytestmark = pytest.mark.slow
SAMPLE = Path(__file__).parents[1] / "samples" / "images" / "bag-01.jpg"
#: A map in source pixels takes 1.9 MB: 200 of them at once would be 384 MB.
SIZE = (800, 600)
MEASURED = """
import resource, sys
from detxai.cli.app import run
code = run(sys.argv[1:])
print(code, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024, file=sys.stderr)
"""


def most_mib(folder: Path, count: int, *options: str) -> int:
    """MiB resident at most while `count` detections of one large picture are explained."""
    picture = folder / "large.png"
    Image.open(SAMPLE).convert("RGB").resize(SIZE).save(picture)
    out = folder / str(count)
    line = ["explain", str(picture), "-o", str(out), "--conf", "0", "--iou", "1", "--max-det", str(count), *options]
    done = subprocess.run([sys.executable, "-c", MEASURED, *line], capture_output=True, text=True, check=True)
    code, mib = map(int, done.stderr.splitlines()[-1].split())
    assert code == 0, done.stderr
    assert len(json.loads((out / "large.png.json").read_text())["detections"]) == count
    return mib


def test_two_hundred_detections_take_hardly_more_memory_than_two(tmp_path: Path) -> None:
    options = ("--imgsz", "128", "--method", "grad", "--evidence", "none", "--no-overlays")
    few, many = (most_mib(tmp_path, count, *options) for count in (2, 200))
    print(f"2 detections: {few} MiB, 200: {many} MiB")
    assert many - few < 150


LOADED = """
import os, re, sys
from detxai.models import checkpoints, detectors
import ultralytics.nn.tasks

def kib(name):
    return int(re.search(name + r":\\s+(\\d+)", open("/proc/self/status").read())[1])

detectors.build(checkpoints.load(sys.argv[1]), keep=False)  # what is imported for the first time
open("/proc/self/clear_refs", "w").write("5")
before = kib("VmRSS")
detectors.build(checkpoints.load(sys.argv[2]), keep=False)
print((kib("VmHWM") - before) * 1024 / os.path.getsize(sys.argv[2]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("half", [True, False])
def test_a_model_takes_less_than_three_times_its_file(tmp_path: Path, half: bool, suffix: str) -> None:
    """Read and made ready to run. The weights of a file of halves are twice as large in float32."""
    for name, yaml in (("small", "yolov8n.yaml"), ("large", "yolov8m.yaml")):
        network = DetectionModel(yaml, nc=2, verbose=False)
        torch.save({"model": network.half() if half else network}, file := tmp_path / f"{name}.pt")
        if suffix == ".safetensors":
            checkpoints.save(checkpoints.load(str(file)), file.with_suffix(suffix), half=half)
    line = [sys.executable, "-c", LOADED, *(str(tmp_path / f"{name}{suffix}") for name in ("small", "large"))]
    times = float(subprocess.run(line, capture_output=True, text=True, check=True).stdout)
    print(f"{times:.2f} times the file")
    assert (1.5 if half else 0.8) < times < 3
