"""How well `map_error` tells how far a map is from a dense reference.

    python scripts/bench/map_error.py --images DIR --model FILE --baseline white --count 60

The estimate is the L2 distance of a map to the one that every other of its nodes makes, relative to the map: no
gradient more. The true distance is that to the map of `--nodes` cubic nodes. Over all detections: their quantiles, the
quantiles of true / estimate, their rank correlation, and, of the maps that are more than BAD off, how many the estimate
finds among as many as it calls the worst. `--stopping` asks what it is worth as a reason to go on (`--map-tolerance` of
the command): evaluations and true errors with it, without it, and where every map goes on to half the tolerance.
"""

from __future__ import annotations

import argparse
import json
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from compare_rules import Case, cases, dense, detector_of

from detxai.attribution.engine import Engine
from detxai.attribution.integral import integrated_gradients
from detxai.attribution.points import Entered
from detxai.statistics import rank_correlation

#: A map further than this from the reference is a bad one.
BAD = 0.1
#: What `--stopping` compares: half the tolerance for every map, and a `map_tolerance`.
STOPPINGS: dict[str, tuple[float, float | None]] = {
    "the completeness error alone": (1.0, None),
    "map_tolerance 0.2": (1.0, 0.2),
    "map_tolerance 0.1": (1.0, 0.1),
    "half the tolerance": (0.5, None),
}


#: Of a target: gradients, estimated and true relative L2 error of its map.
Row = tuple[int, float, float]


def measured(engine: Engine, detector: Any, case: Case, options: argparse.Namespace) -> list[list[Row]]:
    """The rows of all targets at each tolerance that is asked for."""
    stem = detector.trunk.stem
    line = case.line if stem is None else Entered(case.line, stem)
    ((_, (reference, _)),) = engine.run([(0, dense(case.line, case.targets, options.nodes))], 1)
    columns = []
    for share, map_tolerance in list(STOPPINGS.values())[: None if options.stopping else 1]:
        ask = integrated_gradients(
            line,
            case.targets,
            tolerance=options.tolerance * share,
            max_evaluations=options.max_evaluations,
            map_tolerance=map_tolerance,
        )
        ((_, maps),) = engine.run([(0, ask)], 1)
        true = [float((one.map - exact).norm() / exact.norm()) for one, exact in zip(maps, reference, strict=True)]
        columns.append([(one.evaluations, one.map_error or 0.0, far) for one, far in zip(maps, true, strict=True)])
    return columns


def stopping(columns: list[list[Row]]) -> dict[str, dict[str, float]]:
    """Mean evaluations and true errors of rules when to stop, by name."""
    made = {}
    for name, rows in zip(STOPPINGS, columns, strict=True):
        evaluations, _, true = np.array(rows).T
        made[name] = {"evaluations": float(evaluations.mean()), "bad": float((true > BAD).sum())}
        made[name] |= {f"p{q}": float(np.quantile(true, q / 100)) for q in (50, 90, 100)}
    return made


def figures(errors: list[tuple[float, float]]) -> dict[str, Any]:
    """What the estimates are worth."""
    estimated, true = np.array(errors).T
    order = np.argsort(-estimated)
    bad = true > BAD
    quantiles = {"median": 0.5, "p90": 0.9, "most": 1.0}
    return {
        "detections": len(true),
        "estimated": {name: float(np.quantile(estimated, q)) for name, q in quantiles.items()},
        "true": {name: float(np.quantile(true, q)) for name, q in quantiles.items()},
        "true / estimated": {f"p{q}": float(np.quantile(true / estimated, q / 100)) for q in (5, 25, 50, 75, 95)},
        "rank correlation": rank_correlation(estimated, true),
        "bad": int(bad.sum()),
        "found among the worst": int(bad[order[: int(bad.sum())]].sum()),
        "true above the estimate": float((true > estimated).mean()),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--baseline", default="auto")
    parser.add_argument("--conf", type=float, default=0.25)
    parser.add_argument("--imgsz", type=int, help="default: the model's own")
    parser.add_argument("--count", type=int, default=60, help="images with detections")
    parser.add_argument("--most", type=int, default=8, help="detections an image")
    parser.add_argument("--nodes", type=int, default=300, help="of the reference")
    parser.add_argument("--tolerance", type=float, default=0.05)
    parser.add_argument("--max-evaluations", type=int, default=256)
    parser.add_argument("--stopping", action="store_true", help="compare rules when to stop")
    options = parser.parse_args()
    device = torch.device("cpu")
    detector: Any = detector_of(options.model, device)
    engine = Engine(detector.values, device, entered=detector.entered)
    common: dict[str, Any] = {"baseline": options.baseline, "conf": options.conf, "device": device}
    work = cases(detector, options.images, size=options.imgsz or detector.info.imgsz, **common)
    columns: list[list[Row]] = [[] for _ in (STOPPINGS if options.stopping else [0])]
    for case in islice(work, options.count):
        few = Case(case.name, case.line, case.targets[: options.most], case.key)
        for column, rows in zip(columns, measured(engine, detector, few, options), strict=True):
            column += rows
        print(json.dumps(figures([row[1:] for row in columns[0] if row[1]])), flush=True)
    if options.stopping:
        print(json.dumps(stopping(columns), indent=1))


if __name__ == "__main__":
    main()
