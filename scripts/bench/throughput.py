"""How much of the machine a batch job uses: end to end, without output, against the matrix-product ceiling.

    python scripts/bench/throughput.py --images DIR --model FILE --count 500
    python scripts/bench/throughput.py --images DIR --seed-model yolov8n.yaml yolov8s.yaml yolo11n.yaml yolov3.yaml

Everything a GPU has to show, printed in one go; runs on a CPU too. *Without output*: the same from Python, nothing
painted and nothing written. *End to end*: the command, from files to the tree, its start left out. *Busy*: the share
of the wall clock in which the calling thread computed (detection and attribution). *Ceiling*: floating-point operations
of the convolutions and products that were really run, a second, over those of a square matrix product as precise.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from compare_rules import lines
from machine import machine, say, seeded, spread
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from detxai.attribution.engine import Engine, rows_for
from detxai.attribution.integral import integrated_gradients
from detxai.attribution.points import Segment
from detxai.config.settings import RunConfig
from detxai.inputs import sources
from detxai.models import detectors
from detxai.output.store import Store
from detxai.run.pipeline import Explainer
from detxai.run.plan import DTYPES, Plan, device_of

#: Side of the square matrices of the ceiling.
SIDE = {"cpu": 2048, "cuda": 8192}


def seconds(run: Callable[[], Any], device: torch.device, repeats: int = 3) -> float:
    """Median wall clock of `run`, after one to warm up."""
    found = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        found.append(time.perf_counter() - start)
    return statistics.median(found[1:])


def ceiling(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second of a large matrix product."""
    side = SIDE.get(device.type, 2048)
    a = torch.randn(side, side, device=device, dtype=dtype)
    return float(2 * side**3 / seconds(lambda: a @ a, device, 5))


class Flops(TorchDispatchMode):
    """Counts the floating-point operations of convolutions and matrix products, forward and backward."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func._overloadpacket in flop_registry:
            self.total += flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=out)
        return out


def copies(folder: Path, images: Path, count: int) -> None:
    """`count` files in `folder`, the images in turn."""
    files = [ref.file for ref in sources.find([str(images)]).refs]
    for i, file in enumerate(islice(cycle(files), count)):
        shutil.copyfile(file, folder / f"{i:05d}{file.suffix}")


def batch_job(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The main job on `--count` files and the same work without output."""
    run = {"device": options.device, "precision": options.precision}
    config = RunConfig.model_validate({"run": run, "model": {"path": options.model}, "output": {"dir": folder / "out"}})
    copies(folder, options.images, options.count)
    explainer = Explainer(config)
    plan = explainer.plan
    refs = list(sources.find([str(folder)], exclude=config.output.dir).refs)
    list(explainer.explain(refs[: plan.in_flight]))  # warmed up
    start = time.perf_counter()
    done = sum(1 for _ in explainer.explain(refs))
    unwritten = time.perf_counter() - start
    before = explainer.timings.device
    start = time.perf_counter()
    with Store(config.output.dir, 0) as tree:
        found = [len(r.record.detections or ()) for r in explainer.explain(refs, tree)]
    whole = time.perf_counter() - start
    return {
        "images": done,
        "detections": sum(found),
        "unwritten_images_s": done / unwritten,
        "end_to_end_images_s": done / whole,
        "end_to_end_share": unwritten / whole,
        "busy": (explainer.timings.device - before) / whole,
        "detections_s": sum(found) / whole,
    }


def network(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Detections a second of one network with random weights, at 16 nodes, and its share of the ceiling."""
    pictures = list(islice(lines(options.images, "black", options.imgsz), options.pictures))
    detector = detectors.build(seeded(name, torch.stack([line.x for _, _, line in pictures])))
    run = {"device": options.device, "precision": options.precision}
    config = RunConfig.model_validate({"run": run, "detection": {"imgsz": options.imgsz}})
    plan = Plan(config, None, detector)
    moved = [(n, key, Segment(line.x.to(plan.device), line.b.to(plan.device))) for n, key, line in pictures]
    work = spread(moved, detector, options.detections)

    def explain() -> None:
        engine = Engine(detector.values, plan.device, rows_for(plan.device, plan.size))
        jobs = (
            (i, integrated_gradients(c.line, c.targets, tolerance=1.0, max_evaluations=16, dtype=plan.dtype))
            for i, c in enumerate(work)
        )
        list(engine.run(jobs, plan.in_flight))

    with Flops() as counter:
        explain()
    taken = seconds(explain, plan.device)
    count = sum(len(case.targets) for case in work)
    top = ceiling(plan.device, plan.dtype)
    return {
        "model": name,
        "detections_s": count / taken,
        "gflop_a_detection": counter.total / count / 1e9,
        "ceiling_tflop_s": top / 1e12,
        "ceiling_share": counter.total / taken / top,
        "precision": next(k for k, v in DTYPES.items() if v == plan.dtype),
    }


def markdown(report: dict[str, Any]) -> str:
    """Tables for the README."""
    m = report["machine"]
    lines = [f"{m['device']} ({m['cpu']}, {m['cores']} cores, {m['threads']} threads), torch {m['torch']}.", ""]
    if job := report.get("job"):
        lines += [
            f"{job['images']} images, {job['detections']} detections: "
            f"{job['unwritten_images_s']:.1f} images/s without output,",
            f"{job['end_to_end_images_s']:.1f} end to end ({100 * job['end_to_end_share']:.0f} %), "
            f"device busy {100 * job['busy']:.0f} %.",
            "",
        ]
    if report["networks"]:
        lines += ["| network | detections/s | GFLOP a detection | share of the ceiling |", "|---|---|---|---|"]
    lines += [
        f"| {n['model']}, {n['precision']} | {n['detections_s']:.2f} | {n['gflop_a_detection']:.0f} | "
        f"{100 * n['ceiling_share']:.0f} % of {n['ceiling_tflop_s']:.2f} TFLOP/s |"
        for n in report["networks"]
    ]
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=Path, required=True, help="folder of images")
    parser.add_argument("--model", help="for the batch job; default: the bundled detector")
    parser.add_argument("--seed-model", nargs="*", default=[], metavar="YAML", help="networks to time, random weights")
    parser.add_argument("--count", type=int, default=500, help="files of the batch job; 0: leave it out")
    parser.add_argument("--imgsz", type=int, default=640, help="of the networks to time")
    parser.add_argument("--pictures", type=int, default=8, help="for the networks to time")
    parser.add_argument("--detections", type=int, default=4, help="a picture, for the networks to time")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="auto", choices=("auto", *DTYPES))
    parser.add_argument("--json", type=Path, metavar="OUT")
    options = parser.parse_args(argv)
    report: dict[str, Any] = {"networks": []}
    with tempfile.TemporaryDirectory() as folder:
        if options.count:
            report["job"] = batch_job(options, Path(folder))
            say(json.dumps(report["job"]))
    for name in options.seed_model:
        report["networks"].append(network(name, options))
        say(json.dumps(report["networks"][-1]))
    report["machine"] = machine(device_of(options.device))
    if options.json is not None:
        options.json.write_text(json.dumps(report, indent=1), encoding="utf-8")
    print(markdown(report), end="")


if __name__ == "__main__":
    main()
