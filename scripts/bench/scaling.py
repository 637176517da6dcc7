"""What do two workers give, and what does Ray cost? The same images by local processes and by Ray's workers.

    python scripts/bench/scaling.py --images DIR [--labels DIR] [--model FILE] --count 500 --pack-ms 1000 [--json OUT]

Every pack of path points waits --pack-ms before it is computed, as if a device of its own worked at it: so two workers
have two devices on a machine with one, and seconds say something on one that is busy. It is this script that makes
the packs of its processes wait. Local workers are processes with a shard each. The ways take turns, and seconds of
the clock and of the processor count from the record at which a tenth of the images is done to the last one.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import psutil

#: Seconds between looks at what the processes have used.
LOOK_EVERY = 0.5
#: The share of the images after which all workers are taken to be there.
WARM = 0.1
#: Runs of `detxai` below this script, told apart by their command line.
CHILD = "--child"


def slow_down(seconds: float) -> Any:
    """While open, each pack of this process waits so long."""
    from detxai.attribution.engine import Engine

    real = vars(Engine)["_launch"]

    def waits(engine: Engine, packs: Sequence[Any]) -> Any:
        time.sleep(seconds * len(packs))
        return real(engine, packs)

    return patch.object(Engine, "_launch", waits)


def child(seconds: float, line: list[str]) -> int:
    """The command `line`, its packs slowed down, and so those of Ray's workers; the exit code."""
    from detxai.cli.app import run

    with slow_down(seconds):
        if "ray" not in line:
            return run(line)
        from detxai.run import ray_engine

        class SlowActor(ray_engine.Actor):
            """An actor whose packs wait, too."""

            def __init__(self, *arguments: Any) -> None:
                slow_down(seconds).start()
                super().__init__(*arguments)

        with patch.object(ray_engine, "Actor", SlowActor):
            return run(line)


@dataclass
class Moment:
    """Seconds of the clock, and of the processor by kind of process, when `images` records had come."""

    images: int
    clock: float
    cpu: dict[str, float]


@dataclass
class Watch:
    """What some processes, and all that they start, use of the processor while they live; looked at now and then."""

    processes: list[psutil.Process]
    images: int = 0
    moments: list[Moment] = field(default_factory=list)
    _used: dict[tuple[int, float], tuple[str, float]] = field(default_factory=dict)

    def look(self) -> None:
        """Add a moment."""
        for process in self.processes:
            try:
                below = process.children(recursive=True)
            except psutil.Error:
                continue
            for one in [process, *below]:
                try:
                    with one.oneshot():
                        times, key = one.cpu_times(), (one.pid, one.create_time())
                        self._used[key] = (self._kind(one), times.user + times.system)
                except psutil.Error:
                    continue
        cpu: dict[str, float] = {}
        for kind, seconds in self._used.values():
            cpu[kind] = cpu.get(kind, 0.0) + seconds
        self.moments.append(Moment(self.images, time.monotonic(), cpu))

    def _kind(self, process: psutil.Process) -> str:
        if process in self.processes:
            return "main"
        return "workers" if "MapWorker" in "".join(process.cmdline()) else "ray"


def watched(commands: Sequence[Sequence[str]]) -> Watch:
    """Run `commands` at once and count the records that they stream. Raises RuntimeError where one fails."""
    # Ray gives its workers less of the processor than others have: then a busy machine is what is measured.
    env = os.environ | {"OMP_NUM_THREADS": "1", "RAY_worker_niceness": "0"}
    runs = [subprocess.Popen(line, stdout=subprocess.PIPE, env=env) for line in commands]
    watch = Watch([psutil.Process(run.pid) for run in runs])
    lock, ended = threading.Lock(), threading.Event()

    def read(run: subprocess.Popen[bytes]) -> None:
        assert run.stdout is not None
        for line in run.stdout:
            if not line.startswith(b'{"schema":"detxai.record/'):
                continue
            with lock:
                watch.images += 1

    def look() -> None:
        while not ended.wait(LOOK_EVERY):
            with lock:
                watch.look()

    readers = [threading.Thread(target=read, args=(run,)) for run in runs]
    looker = threading.Thread(target=look)
    for thread in (*readers, looker):
        thread.start()
    for thread in readers:
        thread.join()
    ended.set()
    looker.join()
    if codes := [run.wait() for run in runs if run.wait()]:
        raise RuntimeError(f"detxai ended with {codes}")
    return watch


@dataclass
class Spent:
    """Seconds an image of the clock, and milliseconds of the processor by kind of process, once all workers work."""

    clock: float
    cpu_ms: dict[str, float]


def spent(watch: Watch, count: int) -> Spent:
    """From the first look at which a tenth was done to the first at which all was."""
    first = next(m for m in watch.moments if m.images >= WARM * count)
    last = next((m for m in watch.moments if m.images >= count), watch.moments[-1])
    images = max(1, last.images - first.images)
    cpu = {kind: 1e3 * (last.cpu[kind] - first.cpu.get(kind, 0.0)) / images for kind in last.cpu}
    return Spent((last.clock - first.clock) / images, cpu)


def ways(options: argparse.Namespace, images: Path, out: Path) -> Iterator[tuple[str, list[list[str]]]]:
    """Name and commands of each way: local and Ray, by number of workers."""
    start = [sys.executable, str(Path(__file__).resolve()), CHILD, str(options.pack_ms / 1e3)]
    line = [*start, "explain", str(images), "--imgsz", str(options.imgsz), "--method", options.method, "--json", "-q"]
    line += ["--evidence", "none", "--max-evaluations", "8", "--conf", "0", "--max-det", "1"]  # a box each
    line += ["-m", options.model] if options.model else []
    line += ["--labels", str(options.labels)] if options.labels else []
    for workers in options.workers:
        shards = [f"{n}/{workers}" for n in range(1, workers + 1)]
        local = [[*line, "-o", str(out / f"local-{workers}-{n[0]}"), "--shard", n] for n in shards]
        yield f"local, {workers}", local
        ray = ["--engine", "ray", "--ray-cpus", str(options.ray_cpus), "--ray-workers", str(workers)]
        yield f"Ray, {workers}", [[*line, "-o", str(out / f"ray-{workers}"), *ray]]


def chosen(options: argparse.Namespace, folder: Path) -> Path:
    """A folder of links to as many pictures as are wanted, some of them several times where there are too few."""
    from detxai.inputs.sources import find

    pictures = [ref.file.resolve() for ref in find([str(options.images)]).refs]
    (images := folder / "images").mkdir()
    for number, picture in zip(range(options.count), itertools.cycle(pictures), strict=False):
        (images / f"{number:06d}{picture.suffix}").symlink_to(picture)
    return images


def measure(options: argparse.Namespace) -> dict[str, list[Spent]]:
    """What each way took, once a round."""
    taken: dict[str, list[Spent]] = {}
    with tempfile.TemporaryDirectory() as folder:
        images = chosen(options, Path(folder))
        for turn in range(options.repeat):
            named = dict(ways(options, images, Path(folder) / f"turn-{turn}"))
            with ThreadPoolExecutor(len(named) if options.together else 1) as pool:
                for name, watch in zip(named, pool.map(watched, named.values()), strict=True):
                    taken.setdefault(name, []).append(spent(watch, options.count))
                    print(f"{name}: {taken[name][-1]}", file=sys.stderr, flush=True)
    return taken


def markdown(taken: dict[str, list[Spent]]) -> str:
    """A row a way: medians of its rounds, and Ray beside as many local workers."""
    clock = {name: statistics.median(one.clock for one in rounds) for name, rounds in taken.items()}
    lines = ["| workers | ms an image | beside as many local ones | CPU ms an image: workers, main, Ray's own |"]
    lines.append("|---|---|---|---|")
    for name, rounds in taken.items():
        local = clock[f"local, {name.rpartition(' ')[2]}"]
        kinds = ("workers", "main", "ray")
        cpu = (statistics.median(one.cpu_ms.get(kind, 0.0) for one in rounds) for kind in kinds)
        said = ", ".join(f"{ms:.0f}" for ms in cpu)
        lines.append(f"| {name} | {1e3 * clock[name]:.0f} | {clock[name] / local - 1:+.1%} | {said} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--images", type=Path, required=True, help="folder of images")
    parser.add_argument("--labels", type=Path, help="their labels, YOLO txt")
    parser.add_argument("--model", help="default: the bundled detector")
    parser.add_argument("--count", type=int, default=500, help="images")
    parser.add_argument("--imgsz", type=int, default=64, help="small: the network's time is not what is measured")
    parser.add_argument("--method", default="grad")
    parser.add_argument("--pack-ms", type=float, default=1000, help="what a pack waits (default: 1000)")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--ray-cpus", type=float, default=1, help="of a worker, as for detxai explain")
    together = "all ways at a time: where packs wait long, they meet the same hours of a busy machine"
    parser.add_argument("--together", action="store_true", help=together)
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--json", type=Path, metavar="OUT")
    options = parser.parse_args(argv)
    taken = measure(options)
    print(markdown(taken))
    if options.json is not None:
        rows = {name: [asdict(one) for one in rounds] for name, rounds in taken.items()}
        options.json.write_text(json.dumps({"count": options.count, "ways": rows}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:2] == [CHILD]:
        sys.exit(child(float(sys.argv[2]), sys.argv[3:]))
    main()
