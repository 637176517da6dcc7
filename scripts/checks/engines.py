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
        line = ["explain", *samples, trees / "generated", "--imgsz", options.side, "--conf", 0.1, "--max-det", 1]
        line += ["--max-evaluations", 8, "--tolerance", 0.5, "--maps", "npz", "-q"]
        line += ["-m", options.model] if options.model else []
        seconds = {"local": detxai(*line, "-o", trees / "local")}
        parts = [trees / f"part-{n}" for n in range(1, options.shards + 1)]
        shards = [detxai(*line, "-o", part, "--shard", f"{n}/{len(parts)}") for n, part in enumerate(parts, 1)]
        seconds["merged"] = sum(shards) + detxai("merge", *parts, "-o", trees / "merged")
        if find_spec("ray"):
            ray = ("--engine", "ray", "--ray-cpus", 1, "--ray-workers", options.workers)
            seconds["ray"] = detxai(*line, "-o", trees / "ray", *ray)
        else:
            print("Ray is not here: pip install 'detxai[ray]'")
        local = [file for file in (trees / "local").rglob("*") if file.is_file() and counts(file)]
        maps = sum(file.suffix == ".npz" for file in local)
        differ = {way: unlike(trees / "local", trees / way) for way in list(seconds)[1:]}
    print(f"{len(samples) + options.count} images, {maps} maps, {len(local)} files")
    print(f"local: {seconds['local']:.0f} s")
    for way, names in differ.items():
        told = "the same bytes" if not names else f"{len(names)} files differ, such as {names[0]}"
        print(f"{way}: {seconds[way]:.0f} s, {told}")
    sys.exit(any(differ.values()) or not maps)


if __name__ == "__main__":
    main()
