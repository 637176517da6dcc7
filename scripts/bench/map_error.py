"""How well `map_error` tells how far a map is from a dense reference.

    python scripts/bench/map_error.py --images DIR --model FILE --baseline white --count 60

The estimate is the L2 distance of a map to the one that every other of its nodes makes, relative to the map: no
gradient more. The true distance is that to the map of `--nodes` cubic nodes. Over all detections: their quantiles, the
quantiles of true / estimate, their rank correlation, and, of the maps that are more than BAD off, how many the estimate
finds among as many as it calls the worst.
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


def pairs(engine: Engine, detector: Any, case: Case, options: argparse.Namespace) -> list[tuple[float, float]]:
    """(estimated, true) relative L2 error of each target's map."""
    stem = detector.trunk.stem
    line = case.line if stem is None else Entered(case.line, stem)
    ask = integrated_gradients(line, case.targets, tolerance=options.tolerance, max_evaluations=options.max_evaluations)
    ((_, maps),) = engine.run([(0, ask)], 1)
    ((_, (reference, _)),) = engine.run([(0, dense(case.line, case.targets, options.nodes))], 1)
    true = [float((one.map - exact).norm() / exact.norm()) for one, exact in zip(maps, reference, strict=True)]
    return [(one.map_error, far) for one, far in zip(maps, true, strict=True) if one.map_error is not None]


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
    options = parser.parse_args()
    device = torch.device("cpu")
    detector: Any = detector_of(options.model, device)
    engine = Engine(detector.values, device, entered=detector.entered)
    common: dict[str, Any] = {"baseline": options.baseline, "conf": options.conf, "device": device}
    work = cases(detector, options.images, size=options.imgsz or detector.info.imgsz, **common)
    measured: list[tuple[float, float]] = []
    for case in islice(work, options.count):
        few = Case(case.name, case.line, case.targets[: options.most], case.key)
        measured += pairs(engine, detector, few, options)
        print(json.dumps(figures(measured)), flush=True)


if __name__ == "__main__":
    main()
