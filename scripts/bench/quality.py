"""Criteria A (completeness error) and B (distance to a dense map): what it costs each contender to meet them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from compare_rules import Case, dense
from contenders import ERROR, Bench, pins_of
from machine import say
from timing import interleaved
from torch import Tensor

from detxai.attribution.points import TargetMap
from detxai.attribution.rules import gauss_legendre

#: Numbers of nodes among which a rival's is chosen, and tolerances among which detxai's for criterion B is.
NODES = (8, 12, 16, 24, 32, 50, 100, 200, 400, 800)
TOLERANCES = (0.2, 0.15, 0.1, 0.07, 0.05, 0.03, 0.02, 0.01, 0.005, 0.002)
#: Share of the detections that must meet a criterion, and the L2 distance of criterion B.
SHARE, DISTANCE = 0.95, 0.10

Quality = tuple[float, float | None]


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
            ((_, (maps, bounds)),) = self.bench.engine.run([(i, dense(case.line, case.targets, nodes))], 1)
            self.reference[i] = maps
            self.reference_bound = max(self.reference_bound, *bounds)
            done += len(bounds)
            say(f"reference: {done} of {detections} detections")

    def _rows(self, i: int, target_maps: list[TargetMap]) -> list[Quality]:
        maps = self.reference.get(i)
        return [
            (
                math.inf if r.completeness_error is None else r.completeness_error,
                None if maps is None else float((r.map - maps[k]).norm() / maps[k].norm()),
            )
            for k, r in enumerate(target_maps)
        ]

    def fixed(self, i: int, nodes: int) -> list[Quality]:
        """(error, distance) of case `i` with `nodes` Gauss–Legendre nodes, as Captum's map has them."""
        if (i, nodes) not in self.known:
            maps = self.bench.detxai([self.work[i]], rule=gauss_legendre(nodes))
            self.known[i, nodes] = self._rows(i, maps[0])
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
        maps = self.bench.detxai(self.work, tolerance)
        rows = [row for i, part in enumerate(maps) for row in self._rows(i, part)]
        return [r for part in maps for r in part], [d for _, d in rows if d is not None]

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
    spent = interleaved(runs, o.repeats)
    seconds = {
        "detxai": spent["detxai"] / len(integrals),
        "captum": spent["captum"] / len(pins) * most / timed,
        "plain": spent["plain"] / len(pins) * most / timed,
    }
    for name, part in groups.items():
        seconds[f"detxai_{name}"] = spent[name] / sum(len(case.targets) for case in part)
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
