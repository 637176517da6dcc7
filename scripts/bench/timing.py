"""Seconds and memory of the contenders at equal evaluations, and what bounds them."""

from __future__ import annotations

import ctypes
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from compare_rules import Case
from contenders import Bench, gradients, pins_of, with_nodes
from machine import say
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from detxai.attribution.rules import gauss_legendre

#: How many detections Captum takes at once.
AT_ONCE = {"cpu": (1,), "cuda": (1, 4, 16)}


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
    seconds = interleaved({str(key): run for key, run in runs.items()}, 2)
    best = min(runs, key=lambda key: seconds[str(key)] / key[1])
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
    # What a graph replays is not seen one by one.
    limit_seconds = None if bench.device.type == "cuda" else limit.seconds(bench.device, o.repeats) / count
    return {
        "images": len(work),
        "detections_an_image": count / len(work),
        "nodes": nodes,
        "seconds": result,
        "ratio_captum": result["captum"] / result["detxai"],
        "ratio_plain": result["plain"] / result["detxai"],
        "limit_seconds": limit_seconds,
        "limit_share": None if limit_seconds is None else limit_seconds / result["detxai"],
    }


def scaling(bench: Bench, work: Sequence[Case], batch: int, at_once: int) -> dict[str, list[dict[str, Any]]]:
    """Seconds a detection against the number of images and of evaluations, one detection an image."""
    o = bench.options
    single = [replace(case, targets=case.targets[:1]) for case in work]
    by_images, by_nodes = [], []
    rule = with_nodes(o.nodes)
    for count in sorted({1, 4, 16, len(single)}):
        if count <= len(single):
            seconds = interleaved({"detxai": partial(bench.detxai, single[:count], rule=rule)}, o.repeats)
            by_images.append({"images": count, "detxai": seconds["detxai"] / count})
    for nodes in o.scaling_nodes:
        runs: dict[str, Callable[[], Any]] = {
            "detxai": partial(bench.detxai, single, rule=with_nodes(nodes)),
            "captum": partial(bench.captum, pins_of(single, 1), nodes, batch, at_once),
        }
        seconds = interleaved(runs, max(o.repeats - 1, 1))
        by_nodes.append({"nodes": nodes, "detxai": seconds["detxai"] / len(single), "captum": seconds["captum"]})
    return {"images": by_images, "nodes": by_nodes}


def agreement(bench: Bench, work: Sequence[Case], nodes: int, batch: int, at_once: int) -> float:
    """Largest relative L2 distance of Captum's and the plain loop's map to detxai's at the same nodes."""
    pins = pins_of(work[:1], 1)
    (ours,) = bench.detxai([replace(pins[0][0], targets=(pins[0][1],))], rule=gauss_legendre(nodes))
    rivals = bench.captum(pins, nodes, batch, at_once) + bench.plain(pins, nodes, batch)
    return max(float((m - ours[0].map).norm() / ours[0].map.norm()) for m in rivals)
