"""What saturates first on 1 to 64 GPUs, and what ten million images cost: a simulation from measured stage times.

    python scripts/bench/cluster.py --stages stages.json --scaling scaling.json --device-ms MS [--tree OUT --images DIR]

Nothing is guessed: milliseconds around the device come from `stages.py --json`, those of the one process that leads a
Ray run from `scaling.py --json` (left out: shards, which nobody leads), milliseconds of the device a detection from a
GPU's own run (--device-ms: `timings.device` of its summary.json by detections), files and bytes from a tree of it.

Each image is simulated: decoded by a core of its worker, on its GPU, painted by a core again, written, then counted by
the leading process, in the order in which they come. A worker has as many images at once as the engine gives it.
"""

from __future__ import annotations

import argparse
import heapq
import json
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

#: Images that a worker has at once: 64 on its GPU, twice as many ahead of it and as many behind.
AT_ONCE = 64 * (1 + 2 + 1)
#: Objects that one request lists.
LISTED = 1000
HOUR_MS = 3.6e6
SEED = 0


@dataclass
class Server:
    """`places` that work at one image each; the others wait in their order. `busy`: milliseconds worked."""

    places: int
    busy: float = 0.0
    _at_work: int = 0
    _waiting: deque[tuple[float, Callable[[], None]]] = field(default_factory=deque)


class Clock:
    """Time that jumps from one thing that happens to the next."""

    def __init__(self) -> None:
        self.now, self._count = 0.0, 0
        self._events: list[tuple[float, int, Callable[[], None]]] = []

    def work(self, server: Server, ms: float, then: Callable[[], None]) -> None:
        """Let `server` work for so long when it can, and do `then`."""
        server._waiting.append((ms, then))
        self._begin(server)

    def _begin(self, server: Server) -> None:
        while server._waiting and server._at_work < server.places:
            ms, then = server._waiting.popleft()
            server._at_work, server.busy = server._at_work + 1, server.busy + ms

            def done(then: Callable[[], None] = then) -> None:
                server._at_work -= 1
                self._begin(server)
                then()

            self._count += 1
            heapq.heappush(self._events, (self.now + ms, self._count, done))

    def run(self) -> None:
        """Until nothing happens any more."""
        while self._events:
            self.now, _, happens = heapq.heappop(self._events)
            happens()


@dataclass(frozen=True)
class Stages:
    """Milliseconds: to prepare an image, behind the device an image and a detection; of the device and leader."""

    prepare: float
    behind: float
    device: float
    leader: float
    write: float
    detections: float

    @classmethod
    def of(cls, options: argparse.Namespace) -> Stages:
        """Those that were measured. Raises ValueError where there are none of these overlays."""
        report: dict[str, Any] = json.loads(options.stages.read_text())["overlays"]
        if options.overlays not in report:
            raise ValueError(f"{options.stages} has {', '.join(report)}, not {options.overlays}: see --overlays")
        run = report[options.overlays]
        behind = dict(run["a_detection"])
        detections = options.detections or run["detections"] / run["images"]
        prepare = sum(run["an_image"].values())
        write = behind.pop("writing") * run["detections"] / run["images"] + options.write_ms
        return cls(prepare, sum(behind.values()), options.device_ms, _leader(options.scaling), write, detections)


def _leader(scaling: Path | None) -> float:
    """Milliseconds of the leading process an image, at most of all that was measured; 0 without one."""
    if scaling is None:
        return 0.0
    ways = json.loads(scaling.read_text())["ways"]
    return max(one["cpu_ms"]["main"] for name, rounds in ways.items() if name.startswith("Ray") for one in rounds)


@dataclass(frozen=True)
class Simulated:
    """Images a second, and the busy share of each kind of server."""

    gpus: int
    rate: float
    busy: dict[str, float]

    @property
    def bound(self) -> str:
        """The busiest."""
        return max(self.busy, key=lambda name: self.busy[name])


def simulate(stages: Stages, gpus: int, cores: int, images: int) -> Simulated:
    """A run of so many `images` a GPU, on workers with one GPU and so many `cores` each."""
    clock, dice, leader = Clock(), random.Random(SEED), Server(1)
    workers = [(Server(cores), Server(1)) for _ in range(gpus)]

    def begin(worker: tuple[Server, Server]) -> None:
        nonlocal left
        if not left:
            return
        left -= 1
        cpu, gpu = worker
        boxes = sum(dice.random() < stages.detections / 8 for _ in range(8))  # binomial: some images have none

        def counted() -> None:
            clock.work(leader, stages.leader, lambda: begin(worker))

        def drawn() -> None:
            clock.work(cpu, boxes * stages.behind + stages.write, counted)

        clock.work(cpu, stages.prepare, lambda: clock.work(gpu, boxes * stages.device, drawn))

    left = total = images * gpus
    for _ in range(min(AT_ONCE, images)):
        for worker in workers:
            begin(worker)
    clock.run()
    cores_busy = sum(cpu.busy for cpu, _ in workers) / (clock.now * gpus * cores)
    busy = {"GPUs": sum(gpu.busy for _, gpu in workers) / (clock.now * gpus), "cores": cores_busy}
    if stages.leader:
        busy["leading process"] = leader.busy / clock.now
    return Simulated(gpus, 1e3 * total / clock.now, busy)


def table(runs: Sequence[Simulated]) -> str:
    """A row a number of GPUs."""
    names = list(runs[0].busy)
    lines = [f"| GPUs | images/s | of as many times one | {' | '.join(f'{n} busy' for n in names)} | bound by |"]
    lines.append("|---" * (4 + len(names)) + "|")
    for run in runs:
        share = run.rate / (run.gpus * runs[0].rate / runs[0].gpus)
        busy = " | ".join(f"{run.busy[name]:.0%}" for name in names)
        lines.append(f"| {run.gpus} | {run.rate:.1f} | {share:.0%} | {busy} | {run.bound} |")
    return "\n".join(lines)


def cost(stages: Stages, runs: Sequence[Simulated], images: int, tree: Path | None, inputs: Path | None) -> str:
    """What `images` take, by the sums of the stages; files and bytes as in a tree of the same settings."""
    gpu, cpu = stages.device * stages.detections, stages.prepare + stages.behind * stages.detections + stages.write
    lines = [f"{images:,} images of {stages.detections:.2f} detections:", "", "| | |", "|---|---|"]
    lines.append(f"| the device at work | {images * gpu / HOUR_MS:,.1f} GPU hours |")
    lines.append(f"| around it | {images * cpu / HOUR_MS:,.0f} core hours |")
    for run in runs:
        hours, idle = images / run.rate / 3600, f"GPUs {run.busy['GPUs']:.0%} busy"
        lines.append(f"| on {run.gpus} GPUs | {hours:,.1f} h, {hours * run.gpus:,.0f} GPU hours held ({idle}) |")
    if tree is not None:
        files, size, records = _files(tree)
        objects = images * files / records
        lines.append(f"| files written | {objects:,.0f}: a record and {files / records - 1:.2f} pictures an image |")
        lines.append(f"| bytes written | {images * size / records / 1e12:,.2f} TB |")
        said = f"{objects:,.0f} puts, {images / LISTED:,.0f} listings of {LISTED}, {images:,} gets"
        lines.append(f"| requests, if scans and tree lie in an object store | {said} |")
    if inputs is not None:
        sizes = [file.stat().st_size for file in inputs.rglob("*") if file.is_file()]
        lines.append(f"| bytes read | {images * sum(sizes) / len(sizes) / 1e12:,.2f} TB |")
    return "\n".join(lines)


def _files(tree: Path) -> tuple[int, int, int]:
    """Files of the images of a tree, their bytes, and how many of them are records."""
    own = [f for f in tree.rglob("*") if f.is_file() and not f.name.startswith(".")]
    own = [f for f in own if f not in (tree / "summary.json", tree / "records.jsonl")]
    return len(own), sum(f.stat().st_size for f in own), sum(f.suffix == ".json" for f in own)


def main(argv: Sequence[str] | None = None) -> None:
    """Simulate and print."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--stages", type=Path, required=True, help="what stages.py --json wrote")
    parser.add_argument("--scaling", type=Path, help="what scaling.py --json wrote; left out: shards")
    parser.add_argument(
        "--device-ms", type=float, required=True, help="of the device a detection, as a GPU measured it"
    )
    parser.add_argument("--detections", type=float, help="an image, up to 8 (default: as in --stages)")
    parser.add_argument("--overlays", default="png", help="a file type of --stages, or none")
    parser.add_argument("--write-ms", type=float, default=0.0, help="more an image, for a slow file system or a store")
    parser.add_argument("--cores", type=int, default=16, help="beside each GPU")
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--simulated", type=int, default=2000, help="images a GPU")
    parser.add_argument("--count", type=int, default=10_000_000, help="images that the costs are of")
    parser.add_argument("--tree", type=Path, help="an output tree, whose files and bytes are counted")
    parser.add_argument("--images", type=Path, help="its images, whose bytes are counted")
    options = parser.parse_args(argv)
    try:
        stages = Stages.of(options)
    except ValueError as error:
        parser.error(str(error))
    runs = [simulate(stages, gpus, options.cores, options.simulated) for gpus in options.gpus]
    print(table(runs))
    print()
    print(cost(stages, runs, options.count, options.tree, options.images))


if __name__ == "__main__":
    main()
