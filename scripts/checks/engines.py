"""Do one run, shards that are merged, and Ray write the same bytes? All three over the samples and cuttings of them.

Every record and picture is compared, `summary.json` and dot-files left out. Leaves with 1 where a byte differs.

    python scripts/checks/engines.py --count 300
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).parents[2]
SAMPLES = ROOT / "samples" / "images"


def generated(folder: Path, count: int, side: int, seed: int) -> None:
    """Write `count` different cuttings of the samples, shrunk to `side` pixels square, turned and dimmed, as PNG."""
    folder.mkdir()
    dice, bags = np.random.default_rng(seed), []
    for file in sorted(SAMPLES.iterdir()):
        with Image.open(file) as picture:
            bags.append(picture.convert("RGB"))
    for number in range(count):
        bag = bags[number % len(bags)]
        width = int(dice.integers(min(bag.size) // 2, min(bag.size)))
        left, top = (int(dice.integers(whole - width + 1)) for whole in bag.size)
        cutting = bag.crop((left, top, left + width, top + width)).resize((side, side), Image.Resampling.BOX)
        turned = np.rot90(np.asarray(cutting), number % 4) * dice.uniform(0.8, 1.0)
        Image.fromarray(turned.astype(np.uint8)).save(folder / f"{number:05d}.png")


def detxai(*arguments: object) -> float:
    """Seconds of a command. Raises CalledProcessError where it fails."""
    started = time.monotonic()
    subprocess.run([sys.executable, "-m", "detxai", *map(str, arguments)], check=True)
    return time.monotonic() - started


def unlike(one: Path, other: Path) -> list[str]:
    """The files of two trees that only one of them has, or that differ."""
    ours, theirs = (
        {str(file.relative_to(tree)): file for file in tree.rglob("*") if file.is_file() and counts(file)}
        for tree in (one, other)
    )
    return sorted(
        name
        for name in ours.keys() | theirs.keys()
        if name not in ours or name not in theirs or ours[name].read_bytes() != theirs[name].read_bytes()
    )


def counts(file: Path) -> bool:
    """Whether a file of a tree is the same after every run."""
    return file.name != "summary.json" and not file.name.startswith(".")


def merged(line: list[object], trees: Path, count: int) -> float:
    """Seconds of `count` shards, one after the other, and of their union in `trees`/merged."""
    parts = [trees / f"part-{n}" for n in range(1, count + 1)]
    shards = [detxai(*line, "-o", part, "--shard", f"{n}/{count}") for n, part in enumerate(parts, 1)]
    return sum(shards) + detxai("merge", *parts, "-o", trees / "merged")


def by_ray(line: list[object], trees: Path, workers: int) -> float:
    """Seconds of a local Ray with so many workers, into `trees`/ray."""
    return detxai(*line, "-o", trees / "ray", "--engine", "ray", "--ray-cpus", 1, "--ray-workers", workers)


def main() -> None:
    """Run the ways one after the other, and say of each how many files are as in one run."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--count", type=int, default=300, help="cuttings, beside the samples")
    parser.add_argument("--samples", type=int, help="so many of the samples (default: all)")
    parser.add_argument("--side", type=int, default=64, help="pixels, of the cuttings and of the detector's input")
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--workers", type=int, default=2, help="of Ray, a CPU each")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", help="the bundled detector if left out")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        trees = Path(folder)
        generated(trees / "generated", options.count, options.side, options.seed)
        samples = sorted(SAMPLES.iterdir())[: options.samples]
        line: list[object] = ["explain", *samples, trees / "generated", "--imgsz", options.side]
        line += ["--conf", 0.1, "--max-det", 1]
        line += ["--max-evaluations", 8, "--tolerance", 0.5, "--maps", "npz", "-q"]
        line += ["-m", options.model] if options.model else []
        seconds = detxai(*line, "-o", trees / "local")
        files = [file.suffix for file in (trees / "local").rglob("*") if file.is_file() and counts(file)]
        said = f"{len(samples) + options.count} images, {files.count('.npz')} maps, {len(files)} files"
        print(f"{said}\nlocal: {seconds:.0f} s", flush=True)
        same = "npz" in "".join(files)
        for way in ("merged", *(("ray",) if find_spec("ray") else ())):
            seconds = merged(line, trees, options.shards) if way == "merged" else by_ray(line, trees, options.workers)
            names = unlike(trees / "local", trees / way)
            told = "the same bytes" if not names else f"{len(names)} files differ, such as {names[0]}"
            print(f"{way}: {seconds:.0f} s, {told}", flush=True)
            same = same and not names
    sys.exit(not same)


if __name__ == "__main__":
    main()
