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
import contextlib
import ctypes
import json
import math
import os
import platform
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from captum.attr import IntegratedGradients
from compare_rules import Case, cases, dense, lines, predicted
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from detxai.attribution import baselines
from detxai.attribution.engine import Engine, rows_for
from detxai.attribution.integral import DEFAULT_RULE, integrated_gradients
from detxai.attribution.methods import METHODS
from detxai.attribution.points import Ask, Entered, Segment, TargetMap
from detxai.attribution.quadrature import Mesh, Rule
from detxai.attribution.rules import gauss_legendre
from detxai.config.settings import RunConfig
from detxai.models import checkpoints, detectors
from detxai.models.detector import Detector
from detxai.models.heads.anchor_based import AnchorBased, score_logit
from detxai.models.heads.anchor_free import AnchorFree
from detxai.run.console import keep_freed_memory
from detxai.run.plan import Plan, device_of
from detxai.values import Checkpoint, Target

NODES = (8, 12, 16, 24, 32, 50, 100, 200, 400, 800)
TOLERANCES = (0.2, 0.15, 0.1, 0.07, 0.05, 0.03, 0.02, 0.01, 0.005, 0.002)
SHARE, ERROR, DISTANCE = 0.95, 0.05, 0.10
#: Steps a batch that the rivals try, and how many detections Captum takes at once.
BATCHES = {"cpu": (1, 2, 4, 8, 16), "cuda": (8, 16, 32, 64, 128)}
AT_ONCE = {"cpu": (1,), "cuda": (1, 4, 16)}


Found = list[list[TargetMap]]
Pins = Sequence[tuple[Case, Target]]
Quality = tuple[float, float | None]


def say(text: str) -> None:
    """Progress, on stderr."""
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


# -- contenders ---------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Bench:
    """One model on one device, and how long things may take."""

    plan: Plan
    options: argparse.Namespace

    @property
    def detector(self) -> Detector:
        """The model that all contenders run."""
        return self.plan.detector

    @property
    def device(self) -> torch.device:
        """Where they run it."""
        return self.plan.device

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """The precision that all contenders run in."""
        if self.plan.settings.dtype is torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.plan.settings.dtype)

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    # detxai

    def engine(self) -> Engine:
        """The engine as `detxai explain` makes it."""
        f, entered = self.detector.values, self.detector.entered
        return Engine(f, self.device, rows_for(self.device, self.plan.size), entered=entered)

    def detxai(self, work: Sequence[Case], tolerance: float = ERROR, rule: Rule | None = None) -> Found:
        """detxai's maps of the targets of each case; with a `rule`, that and no refinement."""

        def ask(case: Case, part: tuple[Target, ...]) -> Ask:
            settings = replace(self.plan.settings, tolerance=tolerance)
            if rule is None:
                return METHODS["ig"]([case.line], part, settings)
            fixed: dict[str, Any] = {"tolerance": math.inf, "max_evaluations": gradients(rule)}
            line = case.line if settings.stem is None else Entered(case.line, settings.stem)
            return integrated_gradients(line, part, rule=rule, dtype=settings.dtype, **fixed)

        def job(case: Case) -> Ask:
            step, found = self.plan.targets_at_once, []
            for start in range(0, len(case.targets), step):
                found += yield from ask(case, case.targets[start : start + step])
            return found

        jobs = ((i, job(case)) for i, case in enumerate(work))
        done = dict(self.engine().run(jobs, self.plan.in_flight))
        self.synchronize()
        return [done[i] for i in range(len(work))]

    # the whole network

    def forward(self, x: Tensor, anchors: Tensor, classes: Tensor) -> Tensor:
        """(n,) logits of the pinned anchors and classes, one a row of x, all layers and heads."""
        rows = torch.arange(len(x), device=x.device)
        with self.autocast():
            outputs = self._outputs(x)
        if isinstance(self.detector, AnchorBased):
            return score_logit(outputs[rows, 4, anchors], outputs[rows, 5 + classes, anchors])
        return outputs[rows, classes, anchors]

    def _outputs(self, x: Tensor) -> Tensor:
        """(n, channels, anchors) raw outputs of the whole network that the logits come from."""
        d = self.detector
        if isinstance(d, AnchorBased):
            maps = d._maps(x, range(len(d.heads)))
            raw = [d.heads[i].conv(f).unflatten(1, (len(d.heads[i].anchors), -1)) for i, f in maps.items()]
            return torch.cat([r.transpose(1, 2).flatten(2) for r in raw], 2).float()
        if not isinstance(d, AnchorFree):
            raise SystemExit(f"{d.info.name}: no forward of its whole network is known here.")
        features = d._features(x, range(len(d.feeds)))
        logits = [d.class_heads[i](f).flatten(2) for i, f in features.items()]
        for head, f in zip([*d.box_heads, *(d.angle_heads or [])], [*features.values()] * 2, strict=False):
            head(f)
        return torch.cat(logits, 2).float()

    def captum(self, pins: Pins, nodes: int, batch: int, at_once: int) -> list[Tensor]:
        """Captum's maps (size, size) of the pinned targets, `at_once` of them in a call."""
        method = IntegratedGradients(self.forward)
        maps: list[Tensor] = []
        for start in range(0, len(pins), at_once):
            part = pins[start : start + at_once]
            x, b = (_batch([getattr(case.line, end) for case, _ in part]) for end in ("x", "b"))
            anchors, classes = (
                torch.tensor([getattr(target, name) for _, target in part], device=self.device)
                for name in ("anchor", "class_id")
            )
            found = method.attribute(
                x, b, additional_forward_args=(anchors, classes), n_steps=nodes, internal_batch_size=batch
            )
            maps += found.detach().sum(1).unbind()
        self.synchronize()
        return maps

    def plain(self, pins: Pins, nodes: int, batch: int) -> list[Tensor]:
        """The same with a loop as one writes it: Gauss–Legendre nodes, a gradient each, `batch` at a time."""
        rule = gauss_legendre(nodes)
        maps = []
        for case, target in pins:
            total = torch.zeros_like(case.line.x)
            for start in range(0, nodes, batch):
                alphas, weight = (part[start : start + batch] for part in (rule.nodes, rule.weights))
                x = _batch([case.line.at(alpha) for alpha in alphas]).requires_grad_()
                pin = (torch.full((len(x),), n, device=x.device) for n in (target.anchor, target.class_id))
                (gradient,) = torch.autograd.grad(self.forward(x, *pin).sum(), x)
                w = torch.tensor(weight, device=x.device, dtype=x.dtype)
                total += (w[:, None, None, None] * gradient).sum(0)
            maps.append(case.line.product(total))
        self.synchronize()
        return maps


def _batch(images: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(images)).contiguous(memory_format=torch.channels_last)


def pins_of(work: Iterable[Case], limit: int) -> list[tuple[Case, Target]]:
    """At most `limit` (case, target), those of different images first."""
    rows = [(k, i, case, target) for i, case in enumerate(work) for k, target in enumerate(case.targets)]
    return [(case, target) for *_, case, target in sorted(rows, key=lambda row: row[:2])[:limit]]


# -- measuring ----------------------------------------------------------------------------------


def interleaved(contenders: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median seconds of each, run in turn: A B C, A B C, …"""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(repeats):
        for name, run in contenders.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def tuned(bench: Bench, work: Sequence[Case]) -> tuple[int, int]:
    """(steps a batch, detections at once) that are fastest for Captum on this machine; also its warm-up."""
    device, nodes = bench.device.type, max(bench.options.batches)
    pins = pins_of(work, max(AT_ONCE.get(device, (1,))))
    runs = {
        (batch, k): partial(bench.captum, pins[:k], nodes, batch, k)
        for batch in bench.options.batches
        for k in AT_ONCE.get(device, (1,))
        if k <= min(batch, len(pins))
    }
    next(iter(runs.values()))()
    found = interleaved({str(key): run for key, run in runs.items()}, 2)
    best = min(runs, key=lambda key: found[str(key)] / key[1])
    say(f"Captum is fastest with {best[0]} steps a batch, {best[1]} detections at once")
    return best


def peak(run: Callable[[], Any], device: torch.device) -> float | None:
    """MiB that `run` needs at most beyond what is held before it; None where it cannot be measured."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmRSS")
        run()
        return (_status("VmHWM") - before) / 2**10
    except (OSError, AttributeError):
        return None


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key))


class Convolutions(TorchDispatchMode):  # type: ignore[no-untyped-call, unused-ignore]
    """Counts the convolutions of a run by shape, and times just them: the machine's own limit."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call, unused-ignore]
        self.calls: Counter[tuple[Any, ...]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Pass every call on, and note the convolutions."""
        if func in (torch.ops.aten.convolution.default, torch.ops.aten.convolution_backward.default):
            self.calls[(func, *(_shape(a) for a in args))] += 1
        return func(*args, **(kwargs or {}))

    @torch.no_grad()
    def seconds(self, device: torch.device, repeats: int) -> float:
        """Seconds of the same calls on tensors of the same shapes, with nothing in between."""
        total = 0.0
        for (func, *shapes), count in self.calls.items():
            args = [_argument(shape, device) for shape in shapes]
            times = []
            for _ in range(repeats + 1):
                start = time.perf_counter()
                func(*args)
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                times.append(time.perf_counter() - start)
            total += count * statistics.median(times[1:])
        return total


@dataclass(frozen=True)
class _Shape:
    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


def _shape(value: Any) -> Any:
    if isinstance(value, Tensor):
        return _Shape(tuple(value.shape), value.stride(), value.dtype)
    return tuple(value) if isinstance(value, list) else value


def _argument(value: Any, device: torch.device) -> Any:
    if not isinstance(value, _Shape):
        return list(value) if isinstance(value, tuple) else value
    stride = torch.empty(value.size).stride() if 0 in value.stride else value.stride
    return torch.empty_strided(value.size, stride, dtype=value.dtype, device=device).normal_()


# -- equal evaluations --------------------------------------------------------------------------


def with_nodes(nodes: int) -> Rule:
    """The default rule with as many panels as make `nodes` gradients, or just more."""
    rules = (replace(DEFAULT_RULE, panels=panels) for panels in range(1, nodes + 1))
    return next((rule for rule in rules if gradients(rule) >= nodes), DEFAULT_RULE)


def gradients(rule: Rule) -> int:
    """How many gradients `rule` takes before any refinement."""
    return sum(Mesh(rule).missing().values())


def equal(bench: Bench, work: Sequence[Case], nodes: int, batch: int, at_once: int) -> dict[str, Any]:
    """Seconds a detection of the three with the same number of nodes, on the same detections."""
    o = bench.options
    rule = with_nodes(nodes)
    nodes = gradients(rule)
    pins = pins_of(work, o.rival_detections)
    count = sum(len(case.targets) for case in work)
    runs: dict[str, Callable[[], Any]] = {
        "detxai": partial(bench.detxai, work, rule=rule),
        "captum": partial(bench.captum, pins, nodes, batch, at_once),
        "plain": partial(bench.plain, pins, nodes, batch),
    }
    seconds = interleaved(runs, o.repeats)
    result = {name: s / (count if name == "detxai" else len(pins)) for name, s in seconds.items()}
    with Convolutions() as limit:
        bench.detxai(work, rule=rule)
    limit_seconds = limit.seconds(bench.device, o.repeats) / count
    return {
        "images": len(work),
        "detections_an_image": count / len(work),
        "nodes": nodes,
        "seconds": result,
        "ratio_captum": result["captum"] / result["detxai"],
        "ratio_plain": result["plain"] / result["detxai"],
        "limit_seconds": limit_seconds,
        "limit_share": limit_seconds / result["detxai"],
    }


def scaling(bench: Bench, work: Sequence[Case], batch: int, at_once: int) -> dict[str, list[dict[str, Any]]]:
    """Seconds a detection against the number of images and of evaluations, one detection an image."""
    o = bench.options
    single = [replace(case, targets=case.targets[:1]) for case in work]
    by_images, by_nodes = [], []
    rule = with_nodes(o.nodes)
    for count in sorted({1, 4, 16, len(single)}):
        if count <= len(single):
            found = interleaved({"detxai": partial(bench.detxai, single[:count], rule=rule)}, o.repeats)
            by_images.append({"images": count, "detxai": found["detxai"] / count})
    for nodes in o.scaling_nodes:
        runs: dict[str, Callable[[], Any]] = {
            "detxai": partial(bench.detxai, single, rule=with_nodes(nodes)),
            "captum": partial(bench.captum, pins_of(single, 1), nodes, batch, at_once),
        }
        found = interleaved(runs, max(o.repeats - 1, 1))
        by_nodes.append({"nodes": nodes, "detxai": found["detxai"] / len(single), "captum": found["captum"]})
    return {"images": by_images, "nodes": by_nodes}


# -- criteria A and B ---------------------------------------------------------------------------


@dataclass(eq=False)
class Qualities:
    """How good the maps of one set are: completeness errors, and distances where there is a reference."""

    bench: Bench
    work: list[Case]
    reference: dict[int, Tensor] = field(default_factory=dict)
    reference_bound: float = 0.0
    known: dict[tuple[int, int], list[Quality]] = field(default_factory=dict)

    def make_reference(self, nodes: int, detections: int) -> None:
        """Dense maps for the first `detections`, in fp32."""
        done = 0
        for i, case in enumerate(self.work):
            if done >= detections:
                break
            ((_, (maps, bounds)),) = self.bench.engine().run([(i, dense(case.line, case.targets, nodes))], 1)
            self.reference[i] = maps
            self.reference_bound = max(self.reference_bound, *bounds)
            done += len(bounds)
            say(f"reference: {done} of {detections} detections")

    def _rows(self, i: int, found: list[TargetMap]) -> list[Quality]:
        maps = self.reference.get(i)
        return [
            (
                math.inf if r.completeness_error is None else r.completeness_error,
                None if maps is None else float((r.map - maps[k]).norm() / maps[k].norm()),
            )
            for k, r in enumerate(found)
        ]

    def fixed(self, i: int, nodes: int) -> list[Quality]:
        """(error, distance) of case `i` with `nodes` Gauss–Legendre nodes, as Captum's map has them."""
        if (i, nodes) not in self.known:
            found = self.bench.detxai([self.work[i]], rule=gauss_legendre(nodes))
            self.known[i, nodes] = self._rows(i, found[0])
        return self.known[i, nodes]

    def smallest(self, meets: Callable[[Quality], bool], among: list[int]) -> int | None:
        """The smallest of NODES with which enough detections of the cases `among` meet a criterion."""
        total = sum(len(self.work[i].targets) for i in among)
        order = list(among)
        for nodes in NODES:
            failed = 0
            for i in order:
                failed += sum(not meets(row) for row in self.fixed(i, nodes))
                if failed > (1 - SHARE) * total:  # enough to know: and the hard ones come first from now on
                    order.remove(i)
                    order.insert(0, i)
                    break
            else:
                return nodes
            say(f"{nodes} nodes do not do")
        return None

    def adaptive(self, tolerance: float) -> tuple[list[TargetMap], list[float]]:
        """detxai's integrals of the whole set, and the distances of those that have a reference."""
        found = self.bench.detxai(self.work, tolerance)
        rows = [row for i, part in enumerate(found) for row in self._rows(i, part)]
        return [r for part in found for r in part], [d for _, d in rows if d is not None]

    def tolerance(self) -> float:
        """The loosest of TOLERANCES with which enough of detxai's maps are near the reference."""
        near = {i: self.work[i] for i in self.reference}
        allowed = (1 - SHARE) * sum(len(case.targets) for case in near.values())
        for tolerance in TOLERANCES:
            far = 0
            for i, case in near.items():
                rows = self._rows(i, self.bench.detxai([case], tolerance)[0])
                far += sum(d is None or d > DISTANCE for _, d in rows)
                if far > allowed:
                    say(f"a tolerance of {tolerance:g} does not do")
                    break
            else:
                return tolerance
        return TOLERANCES[-1]


def criteria(bench: Bench, work: list[Case], batch: int, at_once: int) -> dict[str, Any]:
    """What criteria A and B cost each contender on the detections that the model reports."""
    o = bench.options
    quality = Qualities(bench, work)
    quality.make_reference(o.reference_nodes, o.reference_count)
    near = list(quality.reference)
    nodes = {
        "A": quality.smallest(lambda row: row[0] <= ERROR, list(range(len(work)))),
        "B": quality.smallest(lambda row: row[1] is not None and row[1] <= DISTANCE, near),
    }
    tolerances = {"A": ERROR, "B": quality.tolerance()}
    result: dict[str, Any] = {
        "detections": sum(len(case.targets) for case in work),
        "images": len(work),
        "reference": {"nodes": o.reference_nodes, "bound": quality.reference_bound,
                      "detections": sum(len(work[i].targets) for i in near)},
    }  # fmt: skip
    for name in ("A", "B"):
        result[name] = _criterion(bench, quality, tolerances[name], nodes[name], batch, at_once)
        say(f"criterion {name}: {json.dumps(result[name]['seconds'])}")
    return result


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """Median, 90th percentile and largest."""
    return {"median": float(np.median(values)), "p90": float(np.percentile(values, 90)), "most": max(values)}


def _criterion(
    bench: Bench, quality: Qualities, tolerance: float, nodes: int | None, batch: int, at_once: int
) -> dict[str, Any]:
    o, work = bench.options, quality.work
    integrals, distances = quality.adaptive(tolerance)
    evaluations = [r.evaluations for r in integrals]
    # A rival's time is proportional to its nodes; where they are many, it is measured on fewer.
    most = nodes or NODES[-1]
    timed = min(most, o.rival_nodes)
    pins = pins_of(work, o.rival_detections)
    runs: dict[str, Callable[[], Any]] = {
        "detxai": partial(bench.detxai, work, tolerance),
        "captum": partial(bench.captum, pins, timed, batch, at_once),
        "plain": partial(bench.plain, pins, timed, batch),
    }
    groups = {
        "single": [case for case in work if len(case.targets) == 1],
        "many": [case for case in work if len(case.targets) >= 4],
    }
    groups = {name: part for name, part in groups.items() if part}
    runs |= {name: partial(bench.detxai, part, tolerance) for name, part in groups.items()}
    found = interleaved(runs, o.repeats)
    seconds = {
        "detxai": found["detxai"] / len(integrals),
        "captum": found["captum"] / len(pins) * most / timed,
        "plain": found["plain"] / len(pins) * most / timed,
    }
    for name, part in groups.items():
        seconds[f"detxai_{name}"] = found[name] / sum(len(case.targets) for case in part)
    rival = [d for i in quality.reference for _, d in quality.fixed(i, most) if d is not None]
    return {
        "tolerance": tolerance,
        "evaluations": quantiles(evaluations),
        "converged": float(np.mean([bool(r.converged) for r in integrals])),
        "distance": quantiles(distances),
        "nodes": nodes,
        "rival_distance": quantiles(rival),
        "rival_timed_nodes": timed,
        "images": {name: len(part) for name, part in groups.items()},
        "seconds": seconds,
        "ratio_captum": {
            name: seconds["captum"] / seconds[key]
            for name, key in (("all", "detxai"), ("single", "detxai_single"), ("many", "detxai_many"))
            if key in seconds
        },
        "ratio_plain": seconds["plain"] / seconds["detxai"],
    }


def agreement(bench: Bench, work: Sequence[Case], nodes: int, batch: int, at_once: int) -> float:
    """Largest relative L2 distance of Captum's and the plain loop's map to detxai's at the same nodes."""
    pins = pins_of(work[:1], 1)
    (ours,) = bench.detxai([replace(pins[0][0], targets=(pins[0][1],))], rule=gauss_legendre(nodes))
    rivals = bench.captum(pins, nodes, batch, at_once) + bench.plain(pins, nodes, batch)
    return max(float((m - ours[0].map).norm() / ours[0].map.norm()) for m in rivals)


# -- models and machine -------------------------------------------------------------------------


def seeded(name: str, pictures: Tensor) -> Checkpoint:
    """The network of a yaml, random weights, BatchNorm statistics of `pictures`: for timing alone."""
    from detxai.models import _ultralytics

    torch.manual_seed(0)
    architecture = _ultralytics.ultralytics.nn.tasks.yaml_model_load(name)  # type: ignore[attr-defined]
    names = {i: str(i) for i in range(int(architecture["nc"]))}
    module = checkpoints.build(architecture, names)
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.reset_running_stats()
            part.momentum = None
    with torch.no_grad():
        module.train()(pictures)
    return Checkpoint(name, "0" * 64, "ultralytics", module.eval(), Path(name).stem, names, 640)


def spread(work: Sequence[tuple[str, str, Segment]], detector: Detector, count: int) -> list[Case]:
    """The images with `count` anchors each, of all levels in turn: with random weights, any is as good."""
    found = []
    for i, (name, key, line) in enumerate(work):
        levels = predicted(detector, line).levels
        of = [(levels == level).nonzero()[:, 0].tolist() for level in range(int(levels.max()) + 1)]
        turns = [((i + k) % len(of), k) for k in range(count)]
        targets = (Target(of[level][len(of[level]) // 2 + k], level) for level, k in turns)
        found.append(Case(name, line, tuple(targets), key))
    return found


def machine(device: torch.device) -> dict[str, Any]:
    """What the figures were measured on."""
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
    }


# -- reports ------------------------------------------------------------------------------------


def markdown(report: dict[str, Any]) -> str:
    """Tables for the README."""
    m = report["machine"]
    where = m["device"] if m["device"] != "cpu" else f"{m['cpu']}, {m['cores']} cores"
    lines = [
        f"Measured on {where}, {m['threads']} threads, torch {m['torch']}, {report['precision']}; "
        f"medians of {report['repeats']} interleaved runs; load before the start {m['load']}."
    ]
    for part in report["sets"]:
        lines += ["", *_table(part), "", " ".join(_notes(part))]
    return "\n".join(lines) + "\n"


def _table(part: dict[str, Any]) -> Iterator[str]:
    batch, at_once = part["captum"]["batch"], part["captum"]["at_once"]
    yield (
        f"**{part['model']}, {part['imgsz']} px, {part['baseline']} baseline** "
        f"(Captum: {batch} steps a batch, {at_once} detection(s) at once)"
    )
    yield ""
    yield "| seconds a detection | detxai | Captum IG | plain loop | Captum ÷ detxai |"
    yield "|---|---|---|---|---|"
    for row in part["equal"]:
        s = row["seconds"]
        yield (
            f"| {row['nodes']} evaluations each, {row['detections_an_image']:.0f} detection(s) an image "
            f"| {s['detxai']:.3f} | {s['captum']:.3f} | {s['plain']:.3f} | **{row['ratio_captum']:.1f}** |"
        )
    for name, text in (("A", "A: completeness error ≤ 5 %"), ("B", "B: map within 10 % of the reference")):
        if "criteria" in part:
            yield _criterion_line(part["criteria"][name], text)


def _criterion_line(c: dict[str, Any], text: str) -> str:
    s, e = c["seconds"], c["evaluations"]
    nodes = f"{c['nodes']} nodes" if c["nodes"] else f"not reached with {NODES[-1]} nodes"
    more = {"single": "alone in the image", "many": "4 or more"}
    split = "; ".join(f"{more[k]}: {v:.1f}" for k, v in c["ratio_captum"].items() if k in more)
    return (
        f"| {text} | {s['detxai']:.3f} ({e['median']:.0f} evaluations, p90 {e['p90']:.0f}) | "
        f"{s['captum']:.3f} ({nodes}) | {s['plain']:.3f} | **{c['ratio_captum']['all']:.1f}**"
        f"{f' ({split})' if split else ''} |"
    )


def _notes(part: dict[str, Any]) -> Iterator[str]:
    shares = (f"{100 * e['limit_share']:.0f} % with {e['detections_an_image']:.0f}" for e in part["equal"])
    yield f"Convolutions alone take {', '.join(shares)} detection(s) an image of detxai's time."
    if "criteria" in part:
        c, a, b = (part["criteria"], part["criteria"]["A"], part["criteria"]["B"])
        yield f"{c['detections']} detections in {c['images']} images."
        yield f"A: {100 * a['converged']:.0f} % of detxai's maps converge, {_distance(a['distance'])}."
        yield f"B (tolerance {b['tolerance']:g}) they are {_distance(b['distance'])},"
        yield f"Captum's {_distance(b['rival_distance'])}."
        yield f"Reference: {c['reference']['nodes']} nodes on {c['reference']['detections']} detections,"
        yield f"error ≤ {100 * c['reference']['bound']:.2g} %."
    yield f"At the same nodes the three maps agree to {part['agreement']:.0e}."
    known = {name: mib for name, mib in part["peak_mib"].items() if mib is not None}
    yield "Peak memory beyond the model: " + ", ".join(f"{k} {v:.0f} MiB" for k, v in known.items()) + "."
    images = (f"{1000 * r['detxai']:.0f} ms with {r['images']}" for r in part["scaling"]["images"])
    yield f"A detection by images: {', '.join(images)}."
    by_nodes = part["scaling"]["nodes"]
    nodes = (f"{r['nodes']}: {1000 * r['detxai']:.0f} and {1000 * r['captum']:.0f} ms" for r in by_nodes)
    yield f"By evaluations, detxai and Captum: {', '.join(nodes)}."


def _distance(d: dict[str, float]) -> str:
    return f"{100 * d['median']:.1f} % from the reference (p90 {100 * d['p90']:.1f} %)"


# -- the run ------------------------------------------------------------------------------------


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
        say(f"{count} an image: {row['ratio_captum']:.2f}× Captum, {row['limit_share']:.0%} convolution")
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
    return Plan(config, None, detector)


def on_model(options: argparse.Namespace) -> dict[str, Any]:
    """The set of `--model`: real detections, filled up with the next best anchors where more are wanted."""
    detector = detectors.build(checkpoints.load(options.model))
    bench = Bench(planned(options, detector, options.imgsz), options)
    size, device = bench.plan.size, bench.device
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
    parser.add_argument("--baseline", required=True, choices=baselines.NAMES)
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
