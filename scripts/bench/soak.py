"""Does memory stay flat? Runs the main job over many small pictures and watches its resident size.

python scripts/bench/soak.py --count 2000
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
from PIL import Image

SAMPLES = Path(__file__).parents[1] / "samples" / "images"


def pictures(folder: Path, count: int, side: int, seed: int = 0) -> None:
    """Write `count` different crops of the samples, `side` pixels square, as PNG."""
    bags = [Image.open(file).convert("RGB") for file in sorted(SAMPLES.glob("*.jpg"))]
    for k in range(count):
        bag = bags[(k + seed) % len(bags)]
        left, top = (37 * k) % (bag.width - side), (53 * k) % (bag.height - side)
        bag.crop((left, top, left + side, top + side)).save(folder / f"{k:05d}.png")


def watch(command: list[str], total: int) -> list[tuple[int, float]]:
    """(images done, MiB resident) about twice a second while `command` streams records on stdout."""
    seen: list[tuple[int, float]] = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as run:
        assert run.stdout is not None
        process, last = psutil.Process(run.pid), 0.0
        for done, _ in enumerate(run.stdout, 1):
            if time.monotonic() - last > 0.5 and done <= total:
                last = time.monotonic()
                seen.append((done, process.memory_info().rss / 2**20))
    return seen


def main() -> None:
    """Print the resident size after 200 images, at its highest later on, and at the end."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--side", type=int, default=160)
    parser.add_argument("--conf", type=float, default=0.5, help="few detections, many images")
    parser.add_argument("--model")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        inputs = Path(folder, "in")
        inputs.mkdir()
        pictures(inputs, options.count, options.side)
        command = [sys.executable, "-m", "detxai", "explain", str(inputs), "-o", str(Path(folder, "out")), "--json"]
        command += ["--conf", str(options.conf), *(["-m", options.model] if options.model else [])]
        start = time.monotonic()
        seen = watch(command, options.count)
        seconds = time.monotonic() - start
        summary = json.loads(Path(folder, "out", "summary.json").read_text())
    early = max(rss for done, rss in seen if done <= 200)
    later = [rss for done, rss in seen if done > 200]
    print(
        f"{summary['images']['ok']} images, {summary['detections']} detections in {seconds:.0f} s: "
        f"{early:.0f} MiB at most in the first 200, {max(later):.0f} MiB at most later, {later[-1]:.0f} MiB at the end"
    )


if __name__ == "__main__":
    main()
