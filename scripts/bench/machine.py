"""The machine, and networks with random weights to time on it."""

from __future__ import annotations

import contextlib
import os
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from compare_rules import Case, predicted
from torch import Tensor, nn

from detxai.attribution.points import Segment
from detxai.models import checkpoints
from detxai.models.detector import Detector
from detxai.values import Checkpoint, Target


def say(text: str) -> None:
    """Progress, on stderr."""
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


def seeded(name: str, pictures: Tensor) -> Checkpoint:
    """The network of a yaml, random weights, BatchNorm statistics of `pictures`: for timing alone."""
    from ultralytics.nn.tasks import yaml_model_load

    torch.manual_seed(0)
    architecture = yaml_model_load(name)
    names = {i: str(i) for i in range(int(architecture["nc"]))}
    module = checkpoints.build(architecture, names)
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.reset_running_stats()
            part.momentum = None
    with torch.no_grad():
        module.train()(pictures)
    return Checkpoint(name, "0" * 64, "ultralytics", module.eval(), Path(name).stem, names, 640)


def spread(work: Sequence[tuple[str, str, Segment]], detector: Detector, count: int) -> list[Case]:
    """The images with `count` anchors each, of all levels in turn: with random weights, any is as good."""
    boxes = []
    for i, (name, key, line) in enumerate(work):
        levels = predicted(detector, line).levels
        of = [(levels == level).nonzero()[:, 0].tolist() for level in range(int(levels.max()) + 1)]
        turns = [((i + k) % len(of), k) for k in range(count)]
        targets = (Target(of[level][len(of[level]) // 2 + k], level) for level, k in turns)
        boxes.append(Case(name, line, tuple(targets), key))
    return boxes


def machine(device: torch.device) -> dict[str, Any]:
    """What the figures were measured on."""
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
    }
