"""All that a device has to show, on one page: is it right, does it repeat, how fast is it, and against Captum.

    python scripts/bench/gpu_report.py --images DIR [--labels DIR] [--model FILE] [--markdown OUT] [--json OUT]
    python scripts/bench/gpu_report.py --images DIR --quick          small counts: on a CPU, or to see that all works

About 6 minutes on a GPU, what matters most first. It prints as it goes, and writes what it has after every part; a
part that fails, or one row of it, says why, and the others go on.

*machine*: what it ran on. *maps*: integrals of the device in float32, and in its own precision, against the CPU's.
*repeat*: the command twice, byte by byte. *rows*: milliseconds of one row (a forward pass and a gradient) of networks
with random weights, by the stride of the scale that is read. *engine*: detections a second from pictures that lie on
the device already, and the share of the wall clock in which a kernel ran, as the profiler sees it. *command*: images a
second from files to the tree, by overlays and evidence, the share of the wall clock that the device was at work by its
own events, and how near the detections a second come to those of *engine*. *captum*: detxai against Captum at the
batch that is fastest for it, on the same detections, at equal evaluations and where 95 % of them meet criterion A or B
(see bench.py).
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property, partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from arguments import parser_of
from compare_rules import Case, cases, lines
from contenders import Bench
from machine import machine, say, seeded
from quality import criteria
from timing import equal, tuned
from torch.autograd import DeviceType

from detxai.attribution.devices import PROGRAM_ROWS, ROWS, rows_for
from detxai.attribution.engine import Engine
from detxai.attribution.methods import METHODS
from detxai.attribution.points import TargetMap
from detxai.attribution.programs import Program, Shape
from detxai.config.settings import RunConfig
from detxai.inputs import sources
from detxai.models import detectors
from detxai.models.detector import Differentiable, differentiable
from detxai.models.fused import fuse_kernels
from detxai.output.store import Store
from detxai.run.checks import device_of
from detxai.run.console import keep_freed_memory
from detxai.run.engine import engine
from detxai.run.pipeline import Explainer, Timings
from detxai.run.plan import DTYPES, Plan, make_plan
from detxai.values import Target

Made = TypeVar("Made")
#: Networks whose rows are timed, at NETWORK_SIZE pixels.
NETWORKS, NETWORK_SIZE = ("yolov8n.yaml", "yolov8s.yaml", "yolo11n.yaml", "yolo26s.yaml", "yolov3.yaml"), 640
#: (overlays, evidence) of the whole command.
COMMANDS = (("png", "none"), ("jpg", "none"), ("none", "none"), ("png", "basic"), ("jpg", "basic"))
#: (full, --quick): pictures compared with the CPU, of the engine, how often it runs them, of the command and of its
#: warm-up, repeats of a timing, pictures for Captum.
COUNTS = {
    "maps": (8, 1), "engine": (200, 1), "rounds": (5, 1), "command": (200, 2), "warm": (32, 1), "repeats": (20, 1),
    "rival": (16, 1),
}  # fmt: skip
#: Steps a batch that Captum tries.
BATCHES = {"cpu": [8], "cuda": [64, 128, 256]}


class Report:
    """The parts of the report, each a dict; one after the other, so that what fails takes no other with it."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.device = options, device_of(options.device)
        self.model = options.model and str(options.model)
        self.preloaded: float | None = None

    def count(self, name: str) -> int:
        """How many of what COUNTS names."""
        full, quick = COUNTS[name]
        return quick if self.options.quick else full

    def parts(self) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
        """Name and work of every part."""
        yield "machine", lambda: machine(self.device)
        yield "maps", self.maps
        yield "engine", self.engine
        yield "captum", self.captum
        yield "command", self.command
        yield "repeat", self.repeat
        yield "rows", self.rows
        yield "criteria", self.criteria

    def plan(self, device: torch.device | None = None, **run: Any) -> Plan:
        """What `detxai explain` would do on a device with these settings of the section `run`."""
        where = str(device or self.device)
        sections: dict[str, Any] = {"run": {"device": where} | run, "model": {"path": self.model}}
        sections["attribution"] = {"baseline": self.options.baseline, "evidence": "none"}
        sections["detection"] = {"imgsz": self.options.imgsz}
        return make_plan(RunConfig.model_validate(sections))

    def work(self, plan: Plan, count: int) -> list[Case]:
        """The first pictures with detections, and these, on the plan's device."""
        common: dict[str, Any] = {"size": plan.side, "device": plan.device, "baseline": self.options.baseline}
        return list(islice(cases(plan.detector, self.options.images, conf=self.options.conf, **common), count))

    def maps(self) -> dict[str, Any]:
        """Relative L2 distance of the device's maps to the CPU's in float32."""
        cpu = self.plan(torch.device("cpu"), precision="fp32")
        work = self.work(cpu, self.count("maps"))
        exact = explained(engine(cpu), cpu, work)
        figures: dict[str, Any] = {"detections": len(exact)}
        for precision in ("fp32", "auto"):
            plan = self.plan(precision=precision)
            here = [
                replace(case, line=type(case.line)(case.line.x.to(plan.device), case.line.b.to(plan.device)))
                for case in work
            ]
            maps = explained(engine(plan), plan, here)
            far = [float((a.map.cpu() - b.map).norm() / b.map.norm()) for a, b in zip(maps, exact, strict=True)]
            name = next(k for k, v in DTYPES.items() if v == plan.dtype)
            figures[precision] = {"precision": name, "median": float(np.median(far)), "most": max(far)}
            figures[precision]["converged"] = sum(bool(one.converged) for one in maps) / len(maps)
        return figures

    def repeat(self) -> dict[str, Any]:
        """Whether two runs of the command make the same bytes."""
        trees = []
        with tempfile.TemporaryDirectory() as folder:
            for turn in ("first", "second"):
                out = Path(folder) / turn
                self.explained(self.count("maps"), out, "png", "basic")
                files = (file for file in out.rglob("*") if file.is_file() and not file.name.startswith("."))
                trees.append({str(f.relative_to(out)): f.read_bytes() for f in files if f.name != "summary.json"})
        one, other = trees
        differ = sorted(name for name in one if one[name] != other.get(name))
        return {"files": len(one), "differ": len(differ), "first": differ[:3], "same": one == other}

    def rows(self) -> dict[str, Any]:
        """Milliseconds a row of each network, by stride."""
        figures: dict[str, Any] = {}
        names = NETWORKS[:1] if self.options.quick else NETWORKS
        size = 128 if self.options.quick else NETWORK_SIZE
        pictures = [line.x for _, _, line in islice(lines(self.options.images, "black", size), 2)]
        for name in names:
            figures[name] = tried(partial(self.network, name, torch.stack(pictures), size))
            say(f"{name}: {_figures(figures[name])}")
        return figures

    def network(self, name: str, pictures: torch.Tensor, size: int) -> dict[str, Any]:
        """Milliseconds a row of one network."""
        return rows_of(detectors.build(seeded(name, pictures)), size, self.device, self.count("repeats"))

    def engine(self) -> dict[str, Any]:
        """Detections a second from pictures on the device, and how busy it is."""
        plan = self.plan()
        work = self.work(plan, self.count("engine"))
        one = engine(plan)
        _, making = timed(lambda: explained(one, plan, work), plan.device)
        work, before = work * self.count("rounds"), one.clock.seconds
        maps, seconds = timed(lambda: explained(one, plan, work), plan.device)
        at_work = one.clock.seconds - before
        self.preloaded = len(maps) / seconds
        return {
            "detections": len(maps),
            "detections_s": self.preloaded,
            "ms_a_detection": 1e3 * seconds / len(maps),
            "device_at_work": at_work / seconds,
            "device_busy": busy(lambda: explained(one, plan, work), plan.device),
            "first_run_seconds": making,
            "evaluations": float(np.median([a.evaluations for a in maps])),
            "converged": sum(bool(a.converged) for a in maps) / len(maps),
            "fill": 1 - one.padded / max(one.points, 1),
            "halved": one.halved,
            "graphs_refused": one.programs.refused() if one.programs else [],
        }

    def command(self) -> dict[str, Any]:
        """Images a second of the whole command, the model loaded."""
        figures: dict[str, Any] = {}
        for overlays, evidence in COMMANDS[: 1 if self.options.quick else None]:
            with tempfile.TemporaryDirectory() as folder:
                name, out = f"{overlays}, {evidence}", Path(folder) / "out"
                figures[name] = tried(partial(self.explained, self.count("command"), out, overlays, evidence))
            say(f"overlays, evidence {name}: {_figures(figures[name])}")
        return figures

    def explained(self, count: int, out: Path, overlays: str, evidence: str) -> dict[str, Any]:
        """The command on `count` files, the images in turn: how fast it was."""
        files = [ref.file for ref in sources.find([str(self.options.images)]).refs]
        output: dict[str, Any] = {"dir": out, "overlays": overlays != "none"}
        if overlays not in ("none", "png"):
            output["overlay_format"] = overlays
        attribution = {"baseline": self.options.baseline, "evidence": evidence}
        settings: dict[str, Any] = {"output": output, "attribution": attribution, "model": {"path": self.model}}
        settings["detection"] = {"imgsz": self.options.imgsz, "labels": self.options.labels}
        config = RunConfig.model_validate(settings | {"run": {"device": str(self.device)}})
        with tempfile.TemporaryDirectory() as folder:
            for i, file in enumerate(islice(cycle(files), count)):
                shutil.copyfile(file, Path(folder) / f"{i:05d}{file.suffix}")
            explainer = Explainer(config)
            refs = list(sources.find([folder]).refs)
            list(explainer.explain(refs[: self.count("warm")]))  # programs are made
            explainer.timings = Timings()
            start = time.perf_counter()
            with Store(config.output.dir, 0) as tree:
                counts = [len(result.record.detections or ()) for result in explainer.explain(refs, tree)]
            seconds = time.perf_counter() - start
        t, detections_s = explainer.timings, sum(counts) / seconds
        explainer.close()
        return {
            "images_s": count / seconds,
            "detections_s": detections_s,
            "share_of_preloaded": detections_s / self.preloaded if self.preloaded else None,
            "device_at_work": t.device / seconds,
            "waiting_for_input": t.waiting_for_input / seconds,
            "waiting_for_output": t.waiting_for_output / seconds,
            "packs_halved": t.packs_halved,
        }

    @cached_property
    def bench(self) -> Bench:
        """What bench.py measures with."""
        kind, quick = self.device.type, self.options.quick
        options = argparse.Namespace(
            **vars(self.options),
            batches=BATCHES.get(kind, [8]),
            repeats=1 if quick else 3,
            rival_detections=1 if quick else 8,
            rival_nodes=8 if quick else 64,
            reference_nodes=32 if quick else 400,
            reference_count=1 if quick else 16,
        )
        return Bench(self.plan(precision="fp32" if kind == "cpu" else "auto"), options)

    @cached_property
    def rivals(self) -> tuple[list[Case], int, int]:
        """Pictures, and the steps a batch and detections at once that are fastest for Captum on them."""
        work = self.work(self.bench.plan, self.count("rival"))
        self.bench.detxai(work)  # programs are made
        return work, *tuned(self.bench, work)

    def captum(self) -> dict[str, Any]:
        """Ratios to Captum at equal evaluations."""
        work, batch, at_once = self.rivals
        few = equal(self.bench, work, 8 if self.options.quick else 16, batch, at_once)
        return {"batch": batch, "at_once": at_once, "equal": few}

    def criteria(self) -> dict[str, Any]:
        """Ratios to Captum where 95 % of the detections meet criterion A or B."""
        work, batch, at_once = self.rivals
        return {name: row for name, row in criteria(self.bench, work, batch, at_once).items() if name in "AB"}


def tried(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `work` gives; why nothing, where it fails."""
    try:
        return work()
    except Exception as error:  # noqa: BLE001  (a report of what works and what does not)
        traceback.print_exc()
        return {"failed": f"{type(error).__name__}: {error}"}


def explained(one: Engine, plan: Plan, work: Sequence[Case]) -> list[TargetMap]:
    """The integrals of all targets, as the command makes them."""
    jobs = ((i, METHODS["ig"]([case.line], case.targets, plan.settings)) for i, case in enumerate(work))
    done = dict(one.run(jobs, plan.in_flight))
    return [target_map for i in range(len(work)) for target_map in done[i]]


def timed(run: Callable[[], Made], device: torch.device) -> tuple[Made, float]:
    """What `run` makes, and its seconds by the wall."""
    _synchronize(device)
    start = time.perf_counter()
    made = run()
    _synchronize(device)
    return made, time.perf_counter() - start


def busy(run: Callable[[], Any], device: torch.device) -> float | None:
    """The share of the seconds of `run` in which a kernel ran, as the profiler sees it; None where it sees none."""
    if device.type != "cuda":
        return None
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        _, seconds = timed(run, device)
    seen = (event for event in profile.key_averages() if event.device_type == DeviceType.CUDA)  # not who launched it
    kernels = sum(event.self_device_time_total for event in seen)
    return min(kernels / 1e6 / seconds, 1.0) if kernels else None


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def rows_of(detector: Any, size: int, device: torch.device, repeats: int) -> dict[str, Any]:
    """Milliseconds a row of a class logit, by stride, as the device computes it, and by torch's kernels alone."""
    network = differentiable(detector)
    network.module.to(device)
    with torch.no_grad():
        levels = network.predict(torch.zeros(1, 3, size, size, device=device))[0].levels
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    rows = rows_for(device, (size, size), PROGRAM_ROWS if device.type in PROGRAM_ROWS else ROWS)
    like = torch.empty(rows, 0, dtype=dtype, device=device)
    if dtype == torch.float32:
        return _strides(network, levels, size, like, repeats)
    half = network.in_precision(dtype, (size, size))
    plain = _strides(half, levels, size, like, repeats)
    refused = fuse_kernels(half.trunk, like)
    ours = {"kernels refused": refused} if refused else _strides(half, levels, size, like, repeats)
    return ours | {"by torch's kernels": plain}


def _strides(
    network: Differentiable, levels: torch.Tensor, size: int, like: torch.Tensor, repeats: int
) -> dict[str, float]:
    """Milliseconds a row by stride; the `rows` of a pack that fit, of those of `like`."""
    figures: dict[str, float] = {}
    for level in range(int(levels.max()) + 1):
        middle = (levels == level).nonzero()[:, 0]
        seconds, rows = _row(network, Target(int(middle[len(middle) // 2]), level), size, like, repeats)
        figures[f"stride {round(size / len(middle) ** 0.5)}"], like = 1e3 * seconds, like[:rows]
    return figures | {"rows": len(like)}


def _row(network: Differentiable, target: Target, size: int, like: torch.Tensor, repeats: int) -> tuple[float, int]:
    """Seconds a row of `target`, and the rows of its program: of those of `like`, half as long as memory runs out."""
    stem, rows = network.trunk.stem, len(like)
    kind, index = network.address(target, (size, size))
    place = (3, size, size) if stem is None else (stem.out_channels, size // stem.stride[0], size // stem.stride[1])
    shape = Shape("value" if stem is None else "entered", kind, len(index), True, like.dtype, torch.Size(place))
    while True:
        try:
            program = Program(network, shape, rows, like.device, None)
            program.index.copy_(torch.tensor(index).expand(rows, -1))
            program()  # what a graph needs once
            _, seconds = timed(partial(_repeated, program, repeats), like.device)
            return seconds / repeats / rows, rows
        except torch.OutOfMemoryError:
            if rows == 1:
                raise
            rows //= 2


def _repeated(program: Program, times: int) -> None:
    for _ in range(times):
        program()


def markdown(report: dict[str, Any]) -> str:
    """The report for people: a section a part, a line a figure."""
    text = []
    for name, part in report.items():
        text += [f"## {name}", ""]
        text += [f"- {key}: {_figures(value)}" for key, value in part.items()]
        text.append("")
    return "\n".join(text)


def _figures(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_figures(one)}" for key, one in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = parser_of(__doc__)
    parser.add_argument("--labels", type=Path, help="their labels, YOLO txt: read by the command, as a run would")
    parser.add_argument("--baseline", default="white")
    parser.add_argument("--conf", type=float, default=0.25)
    parser.add_argument("--quick", action="store_true", help="small counts")
    parser.add_argument("--only", nargs="+", metavar="PART", help="of the parts only these")
    parser.add_argument("--markdown", type=Path, metavar="OUT")
    parser.add_argument("--json", type=Path, metavar="OUT")
    options = parser.parse_args(argv)
    keep_freed_memory()  # as the command does
    report: dict[str, Any] = {}
    for name, work in Report(options).parts():
        if options.only and name not in options.only:
            continue
        start = time.perf_counter()
        report[name] = tried(work)
        report[name]["seconds"] = round(time.perf_counter() - start, 1)
        print(markdown({name: report[name]}), flush=True)
        if options.json is not None:
            options.json.write_text(json.dumps(report, indent=1), encoding="utf-8")
        if options.markdown is not None:
            options.markdown.write_text(markdown(report), encoding="utf-8")
    if any("failed" in part for part in report.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
