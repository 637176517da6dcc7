"""How many detections of a folder reach the wanted error, and what it takes.

python scripts/bench/convergence.py --images DIR --model FILE --baseline white --tolerance 0.05
"""

from __future__ import annotations

import argparse
import json
import platform
import time

import numpy as np
from arguments import parser_of

from detxai import Explainer, RunConfig
from detxai.inputs.sources import find


def measure(options: argparse.Namespace) -> dict[str, float | int | str]:
    """Figures over all detections of `--images`: share converged, evaluations, padding, device share."""
    explainer = Explainer(
        RunConfig(
            model={"path": options.model},
            detection={"conf": options.conf, "imgsz": options.imgsz},
            attribution={
                "baseline": options.baseline,
                "tolerance": options.tolerance,
                "max_evaluations": options.max_evaluations,
            },
            output={"overlays": False},
            run={"precision": options.precision, "device": options.device},
        )
    )
    start = time.perf_counter()
    images, evaluations, bounds, errors, share = 0, [], [], [], []
    refs = list(find([str(options.images)]).refs)
    for result in explainer.explain(refs[: options.count]):
        images += 1
        for item in result.explanations:
            a = item.attribution
            evaluations.append(a.evaluations)
            bounds.append(a.error_bound)
            errors.append(a.completeness_error)
            share.append(abs(a.padding_sum) / max(abs(a.total), 1e-9))
    seconds = time.perf_counter() - start
    t = explainer.timings
    bound = np.array(bounds, float)
    return {
        "images": images,
        "detections": len(bounds),
        "baseline": options.baseline,
        "tolerance": options.tolerance,
        "converged_share": float((bound <= options.tolerance).mean()),
        "evaluations_median": float(np.median(evaluations)),
        "evaluations_p90": float(np.quantile(evaluations, 0.9)),
        "evaluations_max": int(max(evaluations)),
        "completeness_error_median": float(np.median(errors)),
        "completeness_error_p95": float(np.quantile(errors, 0.95)),
        "attribution_on_padding_max": float(max(share)),
        "seconds": seconds,
        "device_share": t.device / seconds,
        "padded_points_share": t.padded / max(t.points, 1),
        "machine": f"{platform.processor() or platform.machine()}, {explainer.plan.device}",
    }


def main() -> None:
    """Print the figures as JSON, one run a tolerance."""
    parser = parser_of(__doc__)
    parser.add_argument("--baseline", default="auto")
    parser.add_argument("--tolerance", type=float, nargs="+", default=[0.05])
    parser.add_argument("--max-evaluations", type=int, default=256)
    parser.add_argument("--conf", type=float, default=0.25)
    parser.add_argument("--count", type=int, help="only the first images")
    parser.add_argument("--precision", default="auto")
    options = parser.parse_args()
    for tolerance in options.tolerance:
        options.tolerance = tolerance
        print(json.dumps(measure(options)), flush=True)


if __name__ == "__main__":
    main()
