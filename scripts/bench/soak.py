"""Do memory, open files and speed stay as they were? Runs the main job over many small pictures and watches it.

Leaves with 1 where memory grows by more than 1 MiB every 10,000 pictures, where files stay open, or where the last
tenth of the pictures costs over 5 % more seconds of the processor than the first.

    python scripts/bench/soak.py --count 20000
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
from PIL import Image

SAMPLES = Path(__file__).parents[2] / "samples" / "images"
#: The share of the pictures after which caches, threads and libraries are taken to be warm.
WARM = 0.05


@dataclass(frozen=True)
class Moment:
    """What the run held when `images` were done: MiB resident, open files, seconds of the processor until then."""

    images: int
    mib: float
    files: int
    cpu: float


def pictures(folder: Path, count: int, side: int, seed: int = 0) -> None:
    """Write `count` different crops of the samples, `side` pixels square, as JPEG."""
    bags = [Image.open(file).convert("RGB") for file in sorted(SAMPLES.glob("*.jpg"))]
    dice = np.random.default_rng(seed)
    for k in range(count):
        bag = bags[k % len(bags)]
        left, top = int(dice.integers(bag.width - side)), int(dice.integers(bag.height - side))
        bag.crop((left, top, left + side, top + side)).save(folder / f"{k:06d}.jpg", quality=90)


def watch(command: list[str], count: int) -> list[Moment]:
    """A thousand moments of `command` while it streams `count` records on stdout."""
    seen = []
    with subprocess.Popen(command, stdout=subprocess.PIPE) as run:
        assert run.stdout is not None
        process = psutil.Process(run.pid)
        for done, _ in enumerate(run.stdout, 1):
            if done % max(1, count // 1000) == 0 and done <= count:
                with process.oneshot():
                    cpu = process.cpu_times()
                    mib = process.memory_info().rss / 2**20
                seen.append(Moment(done, mib, process.num_fds(), cpu.user + cpu.system))
    return seen


def slope(moments: list[Moment]) -> float:
    """MiB that 10,000 pictures add, by least squares."""
    return float(np.polyfit([m.images for m in moments], [m.mib for m in moments], 1)[0]) * 10_000


def milliseconds(moments: list[Moment]) -> float:
    """Of the processor, an image."""
    first, last = moments[0], moments[-1]
    return (last.cpu - first.cpu) / (last.images - first.images) * 1000


def main() -> None:
    """Print the growth, the open files and the speed of the first and last tenth."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--side", type=int, default=64, help="pixels, of the pictures and of the detector's input")
    parser.add_argument("--conf", type=float, default=0.25, help="few detections, many images")
    parser.add_argument("--method", default="grad")
    parser.add_argument("--model")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        inputs = Path(folder, "in")
        inputs.mkdir()
        pictures(inputs, options.count, options.side)
        command = [sys.executable, "-m", "detxai", "explain", str(inputs), "-o", str(Path(folder, "out")), "--json"]
        command += ["--conf", str(options.conf), "--imgsz", str(options.side), "--method", options.method]
        command += ["-q", "--evidence", "none", "--no-overlays", *(["-m", options.model] if options.model else [])]
        start = time.monotonic()
        seen = watch(command, options.count)
        seconds = time.monotonic() - start
        summary = json.loads(Path(folder, "out", "summary.json").read_text())
    warm = [m for m in seen if m.images > WARM * options.count]
    first = milliseconds([m for m in warm if m.images <= (WARM + 0.1) * options.count])
    last = milliseconds([m for m in warm if m.images > 0.9 * options.count])
    files = sorted({m.files for m in warm})
    print(f"{summary['images']['ok']} images, {summary['detections']} detections in {seconds:.0f} s")
    most = max(m.mib for m in warm)
    print(f"memory: {warm[0].mib:.0f} MiB when warm, {most:.0f} at most, {warm[-1].mib:.0f} at the end")
    print(f"slope: {slope(warm):.2f} MiB every 10,000 images; second half {slope(warm[len(warm) // 2 :]):.2f}")
    print(f"open files: {files[0]} to {files[-1]}; at the end {warm[-1].files}")
    print(f"processor: {first:.2f} ms an image in the first tenth, {last:.2f} in the last: {first / last:.1%} as fast")
    sys.exit(slope(warm) > 1 or warm[-1].files > warm[0].files + 4 or first / last < 0.95)


if __name__ == "__main__":
    main()
