"""A million images: how soon the first is begun, and what it takes to pass over all that are done, none of them opened.

    python scripts/bench/million.py --count 1000000 [--engine local ray] [--folders 100] [--keep DIR]

A few pictures are explained; links to them stand for all the others, and copies of their records, each with its own
path, for a run that has finished. Then two runs are watched. *begin*: a new tree, until the first record is there.
*skip*: the finished tree once more with `--skip by-stat`. Every file that Python opens below the pictures is counted
in all processes; the pictures that *begin* reads show that it is. Seconds are of the clock, and of the processor,
which other programs disturb less; MiB is the most that the first process, or any other, had resident.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from PIL import Image

ROOT = Path(__file__).parents[2]
SAMPLES = ROOT / "samples" / "images"
#: Pixels a side, of the pictures and of the detector's input: neither is what is measured.
SIDE = 64
OPTIONS = ("--imgsz", SIDE, "--max-det", 1, "--method", "grad", "--evidence", "none", "--no-overlays", "--conf", 0.1)
RAY = ("--engine", "ray", "--ray-cpus", 1, "--ray-workers", 2)
#: Opened below a folder, each file is a byte in a log.
HOOK = """
import os, sys
folder, log = os.environ["WATCHED"], os.open(os.environ["WATCHED_LOG"], os.O_WRONLY | os.O_APPEND)
sys.addaudithook(lambda e, a: e == "open" and str(a[0]).startswith(folder) and os.write(log, b"."))
"""
#: Links that a file system lets a file have (ext4: 65,000).
MOST_LINKS = 60_000
#: Seconds between looks at the processes.
LOOK_EVERY = 0.2


def line(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "detxai", "explain", *map(str, arguments), *map(str, OPTIONS), "-q"]


def build(root: Path, count: int, folders: int) -> None:
    """Pictures in `root/in`, and in `root/done` the tree of a run that has explained all of them."""
    (few := root / "few").mkdir()
    samples = sorted(SAMPLES.iterdir())
    for number in range(1 + count // (MOST_LINKS * len(samples))):
        for file in samples:
            small = few / f"{file.stem}-{number}.png"
            with Image.open(file) as picture:
                picture.convert("RGB").resize((SIDE, SIDE)).save(small)
            os.utime(small, (time.time() - 86400,) * 2)  # what is younger is not trusted
    subprocess.run(line(few, "-o", root / "model"), check=True)
    kinds = [(few / name, *_parts(root / "model", name)) for name in sorted(f.name for f in few.iterdir())]
    for number in range(folders):
        for name in ("in", "done"):
            (root / name / f"{number:05d}").mkdir(parents=True)
    with (root / "done" / ".detxai.seen").open("w") as seen:
        for number, (file, before, behind, digest) in zip(range(count), itertools.cycle(kinds), strict=False):
            path = f"{number * folders // count:05d}/{number:07d}.png"
            os.link(file, root / "in" / path)
            (root / "done" / f"{path}.json").write_bytes(before + path.encode() + behind)
            status = file.stat()
            seen.write(json.dumps([path, status.st_size, status.st_mtime_ns, digest]) + "\n")


def _parts(tree: Path, name: str) -> tuple[bytes, bytes, str]:
    """The record of a picture before and behind its path, and the hash of the picture."""
    record = (tree / f"{name}.json").read_bytes()
    before, _, behind = record.partition(name.encode())
    return before, behind, json.loads(record)["image"]["sha256"]


@dataclass
class Used:
    """What a run took: seconds of the clock and of all its processors, MiB of its first process and of any other."""

    seconds: float = 0.0
    cpu: float = 0.0
    mib: float = 0.0
    other_mib: float = 0.0
    opened: int = 0
    said: str = ""

    def look(self, first: psutil.Process, cpu: dict[int, float]) -> None:
        """Look at the process and all below it; `cpu` is by process."""
        for process in [first, *first.children(recursive=True)]:
            try:
                with process.oneshot():
                    times, mib = process.cpu_times(), process.memory_info().rss / 2**20
            except psutil.Error:
                continue
            cpu[process.pid] = times.user + times.system
            if process.pid == first.pid:
                self.mib = max(self.mib, mib)
            else:
                self.other_mib = max(self.other_mib, mib)
        self.cpu = sum(cpu.values())


def run(root: Path, arguments: Sequence[object], until: Callable[[bytes], bool]) -> Used:
    """Watch a run until it writes a line that `until` holds of, which ends it, or to its end."""
    (hook := root / "hook").mkdir(exist_ok=True)
    (hook / "sitecustomize.py").write_text(HOOK)
    (log := root / "opened").write_bytes(b"")
    path = os.pathsep.join(filter(None, [str(hook), str(ROOT), os.environ.get("PYTHONPATH")]))
    env = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": path,
        "WATCHED": str(root / "in"),
        "WATCHED_LOG": str(log),
    }
    used, cpu, started = Used(), {}, time.monotonic()
    with subprocess.Popen(line(root / "in", *arguments, "--json"), stdout=subprocess.PIPE, env=env) as process:
        over = threading.Event()
        first = psutil.Process(process.pid)

        def look() -> None:
            while not over.wait(LOOK_EVERY):
                try:
                    used.look(first, cpu)
                except psutil.Error:
                    return

        looker = threading.Thread(target=look)
        looker.start()
        assert process.stdout is not None
        for told in process.stdout:
            used.said = told.decode()
            if until(told):
                break
        over.set()
        looker.join()
        used.seconds = time.monotonic() - started
        process.send_signal(signal.SIGINT)
        process.stdout.read()
    used.opened = log.stat().st_size
    return used


def measure(root: Path, engine: str, count: int) -> Iterator[tuple[str, Used]]:
    """Both runs by one engine. Raises RuntimeError where an image was opened or not passed over."""
    more = RAY if engine == "ray" else ()
    begun = run(root, ["-o", root / f"new-{engine}", *more], lambda told: True)
    if not begun.opened:
        raise RuntimeError("no picture was opened, or none was counted")
    yield "begin", begun
    tree = root / "done"
    passed = run(root, ["-o", tree, "--skip", "by-stat", *more], lambda told: b'"detxai.summary' in told[:40])
    images: dict[str, Any] = json.loads(passed.said)["images"]
    if passed.opened or images["skipped"] != count:
        raise RuntimeError(f"{passed.opened} pictures were opened; of {count}: {images}")
    yield "skip", passed


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--count", type=int, default=1_000_000)
    parser.add_argument("--folders", type=int, default=1, help="that they lie in (default: all in one)")
    parser.add_argument("--engine", nargs="+", default=["local"], choices=["local", "ray"])
    parser.add_argument("--keep", type=Path, metavar="DIR", help="where to make pictures and tree, and leave them")
    options = parser.parse_args(argv)
    root = options.keep or Path(tempfile.mkdtemp())
    try:
        if not (root / "done").exists():
            root.mkdir(exist_ok=True)
            build(root, options.count, options.folders)
        print("| engine | run | seconds | CPU seconds | MiB | MiB of any other | images opened |")
        print("|---" * 7 + "|")
        for engine in options.engine:
            for what, used in measure(root, engine, options.count):
                told = f"{used.seconds:.1f} | {used.cpu:.1f} | {used.mib:.0f} | {used.other_mib:.0f} | {used.opened}"
                print(f"| {engine} | {what} | {told} |", flush=True)
    finally:
        if options.keep is None:
            shutil.rmtree(root)


if __name__ == "__main__":
    main()
