"""How much of a machine's memory a run takes, and what fits into that at once."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from detxai.attribution.integral import AT_ONCE
from detxai.errors import UsageError
from detxai.values import written

#: Share of the memory of a machine, and of a GPU, that a run takes under `memory: auto`.
SHARE = {"cuda": 0.5}
SHARE_OF_MACHINE = 0.25
#: What the memory of a container is limited to.
CONTAINER = Path("/sys/fs/cgroup/memory.max")
#: Images in flight on the device under `batch: auto`: enough to fill its packs.
IN_FLIGHT = {"cpu": 6, "mps": 6, "cuda": 64}
#: Nodes of a target for which there should be room: most need no more.
NODES = 16
#: Float pictures (channels, rows, columns) an image in flight: image, baselines, fills, read ahead and on the device.
PICTURES = 16
#: Path ends of an image in flight, as large as its gradients.
ENDS = 3
#: What libraries take when they first work, records, and pictures being drawn: measured beside 300 detections.
AT_WORK = 128 * 2**20
#: A backward pass makes gradients beside what the forward pass has kept for it.
BACKWARD = 1.25


@dataclass(frozen=True)
class Budget:
    """`room`: bytes for gradients whose weights are not known yet; `in_flight` images, `targets_at_once` of each."""

    memory: int
    room: int
    in_flight: int
    targets_at_once: int


def memory_of(device: torch.device) -> int:
    """Bytes that a run takes on `device` if nobody says how many."""
    if device.type == "cuda":
        return int(SHARE["cuda"] * torch.cuda.get_device_properties(device).total_memory)
    machine = int(psutil.virtual_memory().total)
    limit = CONTAINER.read_text().strip() if CONTAINER.is_file() else "max"
    return int(SHARE_OF_MACHINE * (machine if limit == "max" else min(machine, int(limit))))


def budget(
    memory: int | None,
    device: torch.device,
    share: float = 1.0,
    *,
    picture: tuple[int, int, int],
    pack: int,
    gradient: int,
    in_flight: int | None,
    targets: int,
) -> Budget:
    """What fits at once into `memory` bytes: a `pack` of so many, and `gradient`s of so many.

    None takes its `share` of what `memory_of` the device gives, or what one image needs; as many images in flight as
    fit, at most IN_FLIGHT. Raises UsageError where what is asked for does not fit.
    """
    image = PICTURES * 4 * math.prod(picture) + (ENDS + AT_ONCE) * gradient
    always = AT_WORK + int(BACKWARD * pack)
    least = always + image * (in_flight or 1)
    total = max(int(share * memory_of(device)), least) if memory is None else memory
    if least > total:
        raise UsageError(
            f"--memory: {total >> 20} MiB are less than the {least >> 20} MiB that {in_flight or 1} images in flight"
            f" at {written(picture[1:])} pixels need.",
            "Give more, or use a smaller --imgsz or --batch.",
        )
    left = total - always
    at_once = in_flight or max(1, min(IN_FLIGHT[device.type], left // (2 * image)))
    room = left - at_once * image
    return Budget(total, room, at_once, max(1, min(targets, room // (at_once * NODES * gradient))))
