"""Side by side on this machine, on the same detections: detxai, Captum at its best, and the plain loop.

    python scripts/bench/bench.py --images DIR --model FILE --baseline white --quick --markdown bench.md
    python scripts/bench/bench.py --images DIR --seed-model yolov8n.yaml yolo11n.yaml --baseline black --quick

The rivals run the whole network (but decode no boxes), one detection at a time, fused, frozen, channels
last, with the batch of steps that is fastest here; detxai runs its engine as `detxai explain` does. How many
nodes a rival needs is the smallest of NODES with which 95 % of the detections meet a criterion
(A: completeness error ≤ 5 % of max(|Δ|, 1); B: map within 10 % L2 of a dense reference): one number a set,
as a user must choose it. detxai's tolerance for B is the loosest of TOLERANCES with which 95 % do. Rivals are
timed on the first of the same detections.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from bench_tables import markdown
from compare_rules import Case, cases, lines
from contenders import Bench, pins_of, with_nodes
from machine import machine, say, seeded, spread
from quality import criteria
from timing import agreement, equal, peak, scaling, tuned

from detxai.attribution.points import Segment
from detxai.config.settings import RunConfig
from detxai.models import checkpoints, detectors
from detxai.models.detector import Detector
from detxai.run.checks import device_of
from detxai.run.console import keep_freed_memory
from detxai.run.plan import Plan, make_plan
from detxai.vocabulary import BASELINES

#: Steps a batch that the rivals try.
BATCHES = {"cpu": (1, 2, 4, 8, 16), "cuda": (8, 16, 32, 64, 128)}


def measured(bench: Bench, work: list[Case], extended: dict[int, list[Case]], full: bool) -> dict[str, Any]:
    """Everything about one model. `extended`: the same images with this many detections each."""
    o = bench.options
    few = [replace(case, targets=case.targets[:1]) for case in work]
    batch, at_once = tuned(bench, few)
    bench.detxai(few[:2])
    result: dict[str, Any] = {
        "model": bench.detector.info.name,
        "imgsz": int(work[0].line.x.shape[-1]),
        "baseline": o.baseline,
        "captum": {"batch": batch, "at_once": at_once},
        "agreement": agreement(bench, work, 8, batch, at_once),
        "equal": [],
    }
    for count, part in extended.items():
        row = equal(bench, part, o.nodes, batch, at_once)
        say(f"{count} an image: {row['ratio_captum']:.2f}× Captum, convolutions take {row['limit_share']} of it")
        result["equal"].append(row)
    rule, most = with_nodes(o.nodes), list(extended.values())[-1]
    pins = pins_of(most, 1)
    result["peak_mib"] = {
        "detxai": peak(lambda: bench.detxai(most, rule=rule), bench.device),
        "captum": peak(lambda: bench.captum(pins, o.nodes, batch, at_once), bench.device),
        "plain": peak(lambda: bench.plain(pins, o.nodes, batch), bench.device),
    }
    result["scaling"] = scaling(bench, work, batch, at_once)
    if full:
        result["criteria"] = criteria(bench, work, batch, at_once)
    return result


def planned(options: argparse.Namespace, detector: Detector, size: int | None) -> Plan:
    """What `detxai explain` would run with."""
    run = {"device": options.device, "precision": options.precision}
    config = RunConfig.model_validate({"run": run, "detection": {"imgsz": size}})
    return make_plan(config, None, detector)


def on_model(options: argparse.Namespace) -> dict[str, Any]:
    """The set of `--model`: real detections, filled up with the next best anchors where more are wanted."""
    detector = detectors.build(checkpoints.load(options.model))
    bench = Bench(planned(options, detector, options.imgsz), options)
    size, device = bench.plan.side, bench.device
    common: dict[str, Any] = {"size": size, "device": device}
    common |= {"baseline": options.baseline, "conf": options.conf}
    work = list(islice(cases(detector, options.images, **common), options.count))
    if not work:
        raise SystemExit(f"No detections above {options.conf} in {options.images}.")
    most = max(options.detections)
    few = list(islice(cases(detector, options.images, **common, at_least=most), options.equal_images))
    extended = {n: [replace(case, targets=case.targets[:n]) for case in few] for n in options.detections}
    return measured(bench, work, extended, full=not options.timing_only)


def on_yaml(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """A network with random weights, for timing alone."""
    size = options.imgsz or 640
    some = list(islice(lines(options.images, options.baseline, size), options.equal_images))
    detector = detectors.build(seeded(name, torch.stack([line.x for _, _, line in some])))
    bench = Bench(planned(options, detector, size), options)
    some = [(n, key, Segment(line.x.to(bench.device), line.b.to(bench.device))) for n, key, line in some]
    extended = {n: spread(some, detector, n) for n in options.detections}
    return measured(bench, extended[min(extended)], extended, full=False)


#: (full, quick) of every setting that `--quick` shortens.
EFFORT: dict[str, tuple[Any, Any]] = {
    "count": (32, 8),
    "equal_images": (8, 4),
    "detections": ([1, 4, 16], [1, 4]),
    "nodes": (32, 16),
    "repeats": (5, 3),
    "rival_detections": (8, 2),
    "rival_nodes": (800, 32),
    "reference_nodes": (2000, 256),
    "reference_count": (32, 8),
    "scaling_nodes": ([8, 16, 32, 64], [8, 32]),
}


def parsed(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; what is not given is taken from EFFORT."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--images", type=Path, required=True, help="folder of images")
    parser.add_argument("--model", help=".pt or .safetensors")
    parser.add_argument("--seed-model", nargs="+", default=[], metavar="YAML", help="for timing alone")
    parser.add_argument("--baseline", required=True, choices=BASELINES)
    parser.add_argument("--conf", type=float, default=0.25)
    parser.add_argument("--imgsz", type=int, help="default: the model's own; 640 with --seed-model")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16", "fp16", "auto"))
    parser.add_argument("--quick", action="store_true", help="about 3 minutes on 2 cores")
    parser.add_argument("--timing-only", action="store_true", help="leave out the criteria A and B")
    parser.add_argument("--batches", type=int, nargs="+", help="steps a batch that the rivals try")
    for name, (full, quick) in EFFORT.items():
        words: dict[str, Any] = {"nargs": "+"} if isinstance(full, list) else {}
        words["help"] = f"default {full}, with --quick {quick}"
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, **words)
    parser.add_argument("--json", type=Path, metavar="OUT")
    parser.add_argument("--markdown", type=Path, metavar="OUT", help="default: stdout")
    options = parser.parse_args(argv)
    if not options.model and not options.seed_model:
        parser.error("give --model, --seed-model or both")
    for name, values in EFFORT.items():
        if getattr(options, name) is None:
            setattr(options, name, values[options.quick])
    return options


def main(argv: list[str] | None = None) -> None:
    """Measure, and write the reports."""
    options = parsed(argv)
    keep_freed_memory()  # as the command does, for all contenders
    device = device_of(options.device)
    options.batches = options.batches or BATCHES.get(device.type, BATCHES["cuda"])
    report: dict[str, Any] = {
        "machine": machine(device), "precision": options.precision, "repeats": options.repeats, "sets": []
    }  # fmt: skip
    if options.model:
        report["sets"].append(on_model(options))
    for name in options.seed_model:
        say(name)
        report["sets"].append(on_yaml(name, options))
    text = markdown(report)
    if options.markdown is None:
        print(text, end="")
    else:
        options.markdown.write_text(text, encoding="utf-8")
    if options.json is not None:
        options.json.write_text(json.dumps(report, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
