"""Where the CPU's time goes around the device: milliseconds an image, and a detection, of every stage on one core.

    python scripts/bench/stages.py --images DIR [--labels DIR] [--model FILE] [--imgsz 640] [--json OUT]

The command runs as it would, once for each of --overlay-format, and each stage counts the CPU time of its own thread:
neither waiting nor what other programs do is in it. What the network takes is left out, and so are stages within a
stage, which count for themselves. A picture that is decoded, letterboxed and compared is *prepared*; what is made of a
detection's map, once it is there, comes *behind* the device. Last, what the engine itself takes: it integrates as it
does on a GPU, in packs and sums of the same size, a network that costs next to nothing on pictures of a few pixels.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import cv2
import torch
from arguments import parser_of
from machine import machine, say
from torch.utils._python_dispatch import TorchDispatchMode

from detxai.attribution import ablation, baselines
from detxai.attribution.devices import PROGRAM_ROWS, SUMS
from detxai.attribution.engine import Engine
from detxai.attribution.integral import integrated_gradients
from detxai.attribution.points import Entered, Segment
from detxai.attribution.programs import Programs
from detxai.attribution.sums import Sums
from detxai.config.settings import RunConfig
from detxai.inputs import decode, sources
from detxai.output import overlays, overview, recording, store
from detxai.run import assess, pipeline, prepare, publish
from detxai.run.budget import IN_FLIGHT
from detxai.run.console import keep_freed_memory
from detxai.run.pipeline import Explainer
from detxai.run.plan import Plan
from detxai.values import InputShape, Target

#: Stage -> what does it, as (where its name is looked up, the name). The first of each is the rest of the whole.
AN_IMAGE: dict[str, tuple[tuple[Any, str], ...]] = {
    "the rest of preparing": ((pipeline, "prepared_image"),),
    "read, hash, decode": ((decode, "load"),),
    "letterbox": ((Plan, "letterboxed"),),
    "baseline by name": ((prepare, "_baselines"),),
    "baselines, fills, softened picture, on the device": ((prepare.Pictures, "of"),),
    "ground colour": ((baselines, "ground"),),
}
A_DETECTION: dict[str, tuple[tuple[Any, str], ...]] = {
    "the rest behind the device": ((publish.Publisher, "group"), (publish.Publisher, "image")),
    "parts that trials hide": ((ablation, "top_part"), (ablation, "within")),
    "map to source pixels": ((publish, "map_to_source"),),
    "sums of the map": ((publish, "map_sums"),),
    "evidence": ((publish, "ground_mask"), (assess, "evidence")),
    "record": ((recording, "attribution_record"), (recording, "detection_record")),
    "painting": ((overlays, "draw"), (overlays, "draw_edges"), (overview, "draw"), (overview, "stamp")),
    "encoding": ((overlays, "encode"),),
    "writing": ((store.Store, "write_image"),),
}

#: Runs of the engine of which the quickest counts: what other programs do only adds to it.
REPEATS = 5


class Clock:
    """CPU seconds by stage, of all threads; a stage within a stage counts for itself only."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._open = threading.local()

    def timed(self, stage: str, work: Callable[..., Any]) -> Callable[..., Any]:
        """`work`, its time counted for `stage`."""

        def counted(*args: Any, **options: Any) -> Any:
            around: list[float] = self._open.__dict__.setdefault("within", [0.0])
            around.append(0.0)
            start = time.thread_time()
            try:
                return work(*args, **options)
            finally:
                spent = time.thread_time() - start
                self.seconds[stage] += spent - around.pop()
                around[-1] += spent

        return counted


@contextmanager
def clocked(clock: Clock) -> Iterator[None]:
    """While open, `clock` counts every stage."""
    with ExitStack() as stack:
        for stage, places in (AN_IMAGE | A_DETECTION).items():
            for owner, name in places:
                stack.enter_context(patch.object(owner, name, clock.timed(stage, getattr(owner, name))))
        yield


def stages(options: argparse.Namespace, kind: str) -> dict[str, Any]:
    """Milliseconds by stage of the command with overlays of one `kind`, the first two images left out."""
    refs = list(sources.find([str(options.images)]).refs)[: options.count + 2]
    with tempfile.TemporaryDirectory() as folder:
        explainer = Explainer(_config(options, kind, Path(folder)))
        clock, spent = Clock(), []
        with store.Store(Path(folder), 0) as tree:
            list(explainer.explain(refs[:2], tree))  # warmed up
            with clocked(clock):
                spent = [len(r.record.detections or ()) for r in explainer.explain(refs[2:], tree)]
    an_image = {stage: 1e3 * clock.seconds[stage] / max(len(spent), 1) for stage in AN_IMAGE}
    a_detection = {stage: 1e3 * clock.seconds[stage] / max(sum(spent), 1) for stage in A_DETECTION}
    return {"images": len(spent), "detections": sum(spent), "an_image": an_image, "a_detection": a_detection}


def _config(options: argparse.Namespace, kind: str, out: Path) -> RunConfig:
    output: dict[str, Any] = {"dir": out, "overlays": kind != "none"}
    if kind != "none":
        output["overlay_format"] = kind
    return RunConfig.model_validate(
        {
            "model": {"path": options.model},
            "detection": {"imgsz": options.imgsz, "labels": options.labels},
            "attribution": {
                "baseline": options.baseline,
                "evidence": options.evidence,
                "max_evaluations": options.max_evaluations,
            },
            "output": output,
            "run": {"device": options.device},
        }
    )


class Curve:
    """A network with one bend: what is integrated is not straight, and computing it takes no time."""

    def address(self, target: Target, shape: InputShape) -> tuple[str, tuple[int, ...]]:
        return target.kind, (target.anchor, target.class_id)

    def pinned(self, x: torch.Tensor, kind: Any, index: torch.Tensor, *, entered: bool = False) -> torch.Tensor:
        middle = x.flatten(1).mean(1)
        return 3 * torch.tanh(6 * middle) + torch.sin(9 * middle) / 2


def of_the_engine(sums: int, images: int = 200, targets: int = 2) -> dict[str, float]:
    """Microseconds of the CPU a detection at best, evaluations, operations but views; `sums`: maps made together."""
    cpu, conv = torch.device("cpu"), torch.nn.Conv2d(3, 16, 3, 2, 1).requires_grad_(False)
    conv.weight.fill_(0.05)
    conv.bias = torch.nn.Parameter(torch.zeros(16), requires_grad=False)
    lines = [Entered(Segment(torch.rand(3, 8, 8) / 2 + 0.3, torch.zeros(3, 8, 8)), conv) for _ in range(images)]
    wanted = [Target(i, 0, class_id=i) for i in range(targets)]

    def run() -> tuple[float, int]:
        programs = Programs({torch.float32: Curve()}, cpu, PROGRAM_ROWS["cuda"])
        one = Engine(lambda x, pins: x, cpu, programs=programs, sums=Sums(sums))
        start = time.thread_time()
        jobs = ((i, integrated_gradients(line, wanted)) for i, line in enumerate(lines))
        made = [m for _, maps in one.run(jobs, IN_FLIGHT["cuda"]) for m in maps]
        return time.thread_time() - start, sum(m.evaluations for m in made)

    run()  # warmed up
    seconds, evaluations = min(run() for _ in range(REPEATS))
    with Operations() as done:
        run()
    count = images * targets
    return {"us": 1e6 * seconds / count, "evaluations": evaluations / count, "operations": done.count / count}


class Operations(TorchDispatchMode):
    """Counts operations, each of which a GPU is launched for; views cost next to nothing."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def markdown(report: dict[str, Any]) -> str:
    """A table of images, prepared once whatever is painted, and one of detections with a column a file type."""
    runs = report["overlays"]
    first = next(iter(runs.values()))
    said = f"{first['images']} images, {first['detections']} detections; {report['machine']['cpu']}"
    lines = [said, "", "| ms an image | |", "|---|---|", *(f"| {k} | {v:.2f} |" for k, v in first["an_image"].items())]
    lines += [f"| **together** | **{sum(first['an_image'].values()):.2f}** |", ""]
    lines += [f"| ms a detection | {' | '.join(runs)} |", "|---" * (1 + len(runs)) + "|"]
    for stage in A_DETECTION:
        lines.append(f"| {stage} | {' | '.join(format(run['a_detection'][stage], '.2f') for run in runs.values())} |")
    sums = (f"**{sum(run['a_detection'].values()):.2f}**" for run in runs.values())
    lines += [
        f"| **together** | {' | '.join(sums)} |",
        "",
        "| the engine itself, a detection | µs | operations |",
        "|---|---|---|",
    ]
    for own in report["engine"]:
        said = f"{own['evaluations']:.1f} evaluations, {own['maps']} maps together"
        lines.append(f"| {said} | {own['us']:.0f} | {own['operations']:.1f} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = parser_of(__doc__)
    parser.add_argument("--labels", type=Path, help="their labels, YOLO txt")
    parser.add_argument("--count", type=int, default=20, help="images, beside two to warm up (default: 20)")
    parser.add_argument("--baseline", default="auto", help="as for detxai explain (default: auto, which costs most)")
    parser.add_argument("--evidence", default="basic")
    parser.add_argument("--max-evaluations", type=int, default=8, help="few: the network's time does not count")
    parser.add_argument("--overlay-format", nargs="+", default=["png", "jpg", "none"], metavar="KIND")
    parser.add_argument("--json", type=Path, metavar="OUT")
    options = parser.parse_args(argv)
    keep_freed_memory()  # as the command does
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    report: dict[str, Any] = {"machine": machine(torch.device("cpu")), "overlays": {}}
    for kind in options.overlay_format:
        say(f"overlays: {kind}")
        report["overlays"][kind] = stages(options, kind)
    report["engine"] = [{"maps": sums} | of_the_engine(sums) for sums in (SUMS["cuda"], 1)]
    print(markdown(report))
    if options.json is not None:
        options.json.write_text(json.dumps(report, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
