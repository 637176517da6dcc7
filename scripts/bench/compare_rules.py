"""Compare quadrature rules on real detections: what a wanted error costs, and how good the map is then.

    python scripts/bench/compare_rules.py --images DIR --model FILE --baseline white --count 6 --out rules.json

The rules run in detxai's own engine, each on every detection at 5 % and at 1 %. A point of the path is
evaluated once a detection, whatever rules ask for it, and kept (`--cache DIR`: also for the next run). Maps
are kept as CountSketch projections: distances between maps are right to about 2 % of themselves.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from detxai.attribution import baselines
from detxai.attribution.engine import Engine
from detxai.attribution.integral import integrated_gradients
from detxai.attribution.memory import Room
from detxai.attribution.points import Point, Reply, Segment, TargetMap
from detxai.attribution.quadrature import CROWDED, SQUARE, UNIFORM, Curve, Mesh, Rule, cubic
from detxai.attribution.rules import clenshaw_curtis, gauss_legendre, newton_cotes
from detxai.errors import ImageError
from detxai.inputs import decode, sources
from detxai.inputs.letterbox import letterboxed
from detxai.models import checkpoints, detectors
from detxai.models.detector import Candidates, Detector, Pin
from detxai.models.predictions import predictions_on, reported
from detxai.values import Target
from detxai.vocabulary import BASELINES

Rows = list[dict[str, Any]]

CURVES = {"v": UNIFORM, "v² (3 − v) / 2": CROWDED, "v²": SQUARE}
TOLERANCES = (0.05, 0.01)
MAX_EVALUATIONS = 256
BINS = 4096
#: Points a pack: few, since the points that are not known yet are few.
ROWS = 4

# Half of the 15 nodes and weights of the Gauss–Kronrod pair (7, 15) on [−1, 1], as in QUADPACK.
_KRONROD = {
    0.991455371120812639206854697526329: 0.022935322010529224963732008058970,
    0.949107912342758524526189684047851: 0.063092092629978553290700663189204,
    0.864864423359769072789712788640926: 0.104790010322250183839876322541518,
    0.741531185599394439863864773280788: 0.140653259715525918745189590510238,
    0.586087235467691130294144691838259: 0.169004726639267902826583426598550,
    0.405845151377397166906606412076961: 0.190350578064785409913256402421014,
    0.207784955007898467600689403773245: 0.204432940075298892414161999234649,
    0.0: 0.209482141084727828012999174891714,
}


# -- detections ---------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Case:
    """One image: its path from the baseline, the targets pinned on it, a key for what is known of them."""

    name: str
    line: Segment
    targets: tuple[Target, ...]
    key: str = ""


def detector_of(file: str, device: torch.device) -> Detector:
    """The detector in the model file `file`, on `device`."""
    detector = detectors.build(checkpoints.load(file))
    detector.module.to(device)
    return detector


def filled(candidates: Candidates, pairs: list[tuple[int, int]], count: int) -> list[tuple[int, int]]:
    """(anchor, class) `pairs`, filled up to `count` with the next best anchors."""
    best, classes = candidates.logits.max(1)
    taken = {anchor for anchor, _ in pairs}
    more = (anchor for anchor in best.argsort(descending=True).tolist() if anchor not in taken)
    return pairs + [(anchor, int(classes[anchor])) for anchor in islice(more, max(count - len(pairs), 0))]


def lines(
    folder: Path, baseline: str, size: int, fit: str = "letterbox", device: torch.device | None = None
) -> Iterator[tuple[str, str, Segment]]:
    """Name, key and path of the images in `folder`, in an order spread over the folder."""
    refs = [ref for ref in sources.find([str(folder)]).refs if ref.problem is None]
    for ref in (ref for start in range(7) for ref in refs[start::7]):
        try:
            image = decode.load(ref)
        except ImageError:
            continue
        square, box = letterboxed(image.pixels, (size, size), fit)
        name, x = baselines.resolved(baseline, square, box), baselines.picture(square, device)
        key = f"{image.sha256[:16]}-{name.replace(':', '_')}-{size}"
        yield ref.path, key, Segment(x, baselines.baseline(name, x, box))


@torch.no_grad()
def predicted(detector: Detector, line: Segment) -> Candidates:
    """All predictions on the image at the end of `line`."""
    return predictions_on(detector, line.x)


def cases(
    detector: Detector,
    folder: Path,
    *,
    baseline: str,
    size: int,
    conf: float,
    at_least: int = 0,
    device: torch.device | None = None,
) -> Iterator[Case]:
    """The images in `folder` that have detections above `conf`, filled up to `at_least` targets each."""
    for name, key, line in lines(folder, baseline, size, detector.info.fit, device):
        candidates = predicted(detector, line)
        pairs = reported(candidates, conf=conf, iou=0.45, max_det=300)
        if pairs:
            targets = (
                Target(anchor, int(candidates.levels[anchor]), "class", class_id, context=candidates.context)
                for anchor, class_id in filled(candidates, pairs, at_least)
            )
            yield Case(name, line, tuple(targets), f"{key}-{detector.info.sha256[:16]}")


# -- rules --------------------------------------------------------------------------------------


def kronrod(*, curve: Curve = UNIFORM, panels: int = 1) -> Rule:
    """The 15 nodes of the Gauss–Kronrod pair (7, 15): exact for polynomials of degree 22."""
    half = np.array(list(_KRONROD.items()))
    x, w = np.concatenate([half * (-1, 1), half[-2::-1]]).T
    return Rule("gauss-kronrod-15", tuple((x + 1) / 2), tuple(w / w.sum()), curve, panels)


def midpoints(n: int) -> Rule:
    """n uniform steps, the gradient in the middle of each: what most tools do."""
    return Rule(f"uniform-{n}", tuple((np.arange(n) + 0.5) / n), (1 / n,) * n)


def adaptive_rules() -> list[Rule]:
    """The rules that are refined, each with every curve; all but the last begin with 8 or 9 gradients."""
    makers: list[Callable[..., Rule]] = [
        lambda curve: cubic(curve=curve, panels=4),
        lambda curve: newton_cotes(2, curve=curve, panels=8),
        lambda curve: newton_cotes(3, curve=curve, panels=4),
        lambda curve: newton_cotes(5, curve=curve, panels=2),
        lambda curve: clenshaw_curtis(4, curve=curve, panels=2),
        lambda curve: clenshaw_curtis(8, curve=curve, panels=1),
        lambda curve: gauss_legendre(2, curve=curve, panels=4),
        lambda curve: gauss_legendre(4, curve=curve, panels=2),
        kronrod,
    ]
    return [make(curve=curve) for make in makers for curve in CURVES.values()]


def fixed_rules() -> list[Rule]:
    """What is used today: a number of nodes chosen beforehand."""
    return [gauss_legendre(50), midpoints(50)]


def dense(
    line: Segment, targets: Sequence[Target], nodes: int, chunk: int = 8
) -> Generator[list[Point], list[Reply], tuple[Tensor, list[float]]]:
    """Coroutine of the reference: maps (targets, …) from `nodes` cubic nodes in v², and their error bounds.

    Only the sum is kept, so that thousands of nodes fit in memory.
    """
    rule = cubic(curve=SQUARE, panels=max(nodes // 2, 1))
    meshes = [Mesh(rule) for _ in targets]
    wanted, weight = list(meshes[0].missing().items()), meshes[0].weights()
    total: Any = 0.0
    places = {kind: [v for v, gradient in wanted if gradient == kind] for kind in (True, False)}
    for kind, start in ((kind, start) for kind, pins in places.items() for start in range(0, len(pins), chunk)):
        part = places[kind][start : start + chunk]
        replies = yield [Point(line, rule.alpha(v), tuple(targets), kind) for v in part]
        for v, reply in zip(part, replies, strict=True):
            for k, mesh in enumerate(meshes):
                mesh.value[v] = reply.values[k]
                if kind:
                    mesh.slope[v] = reply.slopes[k]
            if kind:
                total = total + weight[v] * _products(reply).double()
    return total, [mesh.bound() for mesh in meshes]


# -- points that are evaluated once -------------------------------------------------------------


class Sketch:
    """CountSketch: a linear map to `BINS` numbers that keeps distances; one more makes the sum right."""

    def __init__(self, size: int) -> None:
        generator = torch.Generator().manual_seed(size)
        self.bins = torch.randint(BINS, (size * size,), generator=generator)
        self.signs = torch.randint(2, (size * size,), generator=generator) * 2.0 - 1.0

    def __call__(self, maps: Tensor) -> Tensor:
        """(n, BINS + 1) of maps (n, size, size)."""
        flat = maps.flatten(1)
        bins = flat.new_zeros(len(flat), BINS).index_add_(1, self.bins, flat * self.signs)
        rest = flat.sum(1, dtype=torch.float64) - bins.sum(1, dtype=torch.float64)
        return torch.cat([bins, rest[:, None].float()], 1)


def distance(maps: Tensor, reference: Tensor) -> float:
    """Relative L2 distance of two sketches."""
    return float((maps - reference)[:-1].norm() / reference[:-1].norm())


@dataclass(eq=False)
class Memo:
    """Answers the questions about one case; evaluates a point once a target, whatever rules ask for it."""

    case: Case
    engine: Engine
    sketch: Sketch
    values: dict[tuple[float, int], float] = field(default_factory=dict)
    products: dict[tuple[float, int], Tensor] = field(default_factory=dict)

    def solve(self, ask: Generator[list[Point], list[Reply], Any]) -> Any:
        """What the coroutine `ask` returns."""
        try:
            points = next(ask)
            while True:
                self._evaluate(points)
                points = ask.send([self._reply(point) for point in points])
        except StopIteration as stop:
            return stop.value

    def _row(self, target: Target) -> int:
        return self.case.targets.index(target)

    def _known(self, point: Point, target: Target) -> bool:
        return (point.alpha, self._row(target)) in (self.products if point.gradient else self.values)

    def _evaluate(self, points: list[Point]) -> None:
        missing = [replace(p, targets=tuple(t for t in p.targets if not self._known(p, t))) for p in points]
        missing = [p for p in missing if p.targets]
        for start in range(0, len(missing), ROWS):
            chunk = missing[start : start + ROWS]
            ((_, replies),) = self.engine.run([(None, _once(chunk))], 1)
            for point, reply in zip(chunk, replies, strict=True):
                rows = self.sketch(_products(reply)) if point.gradient else None
                for i, target in enumerate(point.targets):
                    key = (point.alpha, self._row(target))
                    self.values[key] = reply.values[i]
                    if rows is not None:
                        self.products[key] = rows[i].clone()

    def _reply(self, point: Point) -> Reply:
        keys = [(point.alpha, self._row(t)) for t in point.targets]
        values, products = [self.values[key] for key in keys], [self.products[key] for key in keys if point.gradient]
        slopes = [float(product.sum(dtype=torch.float64)) for product in products]
        return Reply(values, slopes, [Room().hold(product, needed=True) for product in products])

    def save(self, file: Path) -> None:
        """Write all that is known to `file`."""
        file.parent.mkdir(parents=True, exist_ok=True)
        rows = [*self.products.values()]
        np.savez(
            file,
            points=np.array([(*key, value) for key, value in self.values.items()]),
            keys=np.array(list(self.products)),
            products=torch.stack(rows).numpy(),
        )

    def load(self, file: Path) -> None:
        """Read what an earlier run has found, if it has."""
        if not file.exists():
            return
        with np.load(file) as kept:
            self.values = {(float(alpha), int(row)): float(value) for alpha, row, value in kept["points"]}
            rows = torch.from_numpy(kept["products"])
            self.products = {(float(alpha), int(row)): rows[i] for i, (alpha, row) in enumerate(kept["keys"])}


def _products(reply: Reply) -> Tensor:
    """(targets, …) what a point's reply holds of its gradients."""
    return torch.stack([reply.product(k) for k in range(len(reply.values))])


def _once(points: list[Point]) -> Generator[list[Point], list[Reply], list[Reply]]:
    return (yield points)


# -- the comparison -----------------------------------------------------------------------------


def label(rule: Rule) -> str:
    """Name, first division and curve of a rule."""
    curve = next(name for name, curve in CURVES.items() if curve == rule.curve)
    return f"{rule.name} ×{rule.panels}, α = {curve}"


def measure(memo: Memo, rule: Rule, tolerance: float, reference: Tensor, limit: int) -> Rows:
    """One row a target: what `rule` needs to reach `tolerance`, and how far its map is from `reference`."""
    line, targets = memo.case.line, memo.case.targets
    ask = integrated_gradients(line, targets, tolerance=tolerance, max_evaluations=limit, rule=rule)
    maps: list[TargetMap] = memo.solve(ask)
    return [
        {
            "image": memo.case.name,
            "target": k,
            "rule": label(rule),
            "tolerance": tolerance,
            "evaluations": integral.evaluations,
            "bound": integral.error_bound,
            "error": integral.completeness_error,
            "converged": integral.converged,
            "distance": distance(integral.map, reference[k]),
        }
        for k, integral in enumerate(maps)
    ]


def compare(case: Case, engine: Engine, nodes: int, cache: Path | None) -> tuple[Rows, list[float]]:
    """All rules on one case: rows as of `measure`, and the error bounds of the reference itself."""
    memo = Memo(case, engine, Sketch(case.line.x.shape[-1]))
    file = None if cache is None else cache / f"{case.key}-{len(case.targets)}.npz"
    if file is not None:
        memo.load(file)
    reference, bounds = memo.solve(dense(case.line, case.targets, nodes))
    rows = [
        row
        for rule in adaptive_rules()
        for tolerance in TOLERANCES
        for row in measure(memo, rule, tolerance, reference, MAX_EVALUATIONS)
    ]
    for rule in fixed_rules():
        rows += measure(memo, rule, TOLERANCES[0], reference, len(rule.nodes))
    if file is not None:
        memo.save(file)
    return rows, bounds


def summary(rows: Rows) -> dict[str, float]:
    """Median and 90th percentile of what the rows of one rule at one tolerance say."""
    evaluations, distances = ([row[key] for row in rows] for key in ("evaluations", "distance"))
    return {
        "median": float(np.median(evaluations)),
        "p90": float(np.percentile(evaluations, 90)),
        "mean": float(np.mean(evaluations)),
        "converged": float(np.mean([row["converged"] for row in rows])),
        "distance": float(np.median(distances)),
        "distance_p90": float(np.percentile(distances, 90)),
        "error": float(np.median([row["error"] for row in rows])),
    }


def table(rows: Rows) -> str:
    """Markdown: a line a rule, the cheapest at 5 % first."""
    names = dict.fromkeys(row["rule"] for row in rows)
    groups = {name: [summary(chosen) for t in TOLERANCES if (chosen := _of(rows, name, t))] for name in names}
    head = (
        "| rule | 5 %: evaluations (p90) | converged | map L2 (p90) "
        "| 1 %: evaluations (p90) | converged | map L2 |\n|---|---|---|---|---|---|---|\n"
    )
    order = sorted(groups, key=lambda name: (len(groups[name]) == 1, groups[name][0]["mean"]))
    return head + "\n".join(f"| {name} | {' | '.join(_cells(groups[name]))} |" for name in order)


def _of(rows: Rows, name: str, tolerance: float) -> Rows:
    return [row for row in rows if row["rule"] == name and row["tolerance"] == tolerance]


def _cells(groups: list[dict[str, float]]) -> Iterator[str]:
    for i, s in enumerate(groups):
        yield f"{s['median']:.0f} ({s['p90']:.0f})"
        yield f"{100 * s['converged']:.0f} %"
        yield f"{100 * s['distance']:.1f} %" + (f" ({100 * s['distance_p90']:.1f} %)" if i == 0 else "")
    yield from ("",) * (3 * (len(TOLERANCES) - len(groups)))


def parsed(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--images", type=Path, required=True, help="folder of images")
    parser.add_argument("--model", required=True, help=".pt or .safetensors")
    parser.add_argument("--baseline", default="auto", choices=BASELINES)
    parser.add_argument("--count", type=int, default=6, help="images with detections (default %(default)s)")
    parser.add_argument("--detections", type=int, default=1, help="best of an image (default %(default)s)")
    parser.add_argument("--conf", type=float, default=0.25)
    parser.add_argument("--imgsz", type=int, help="default: the model's own")
    parser.add_argument("--reference", type=int, default=2000, metavar="NODES", help="default %(default)s")
    parser.add_argument("--cache", type=Path, metavar="DIR", help="keep evaluations for the next run")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="every row, and the summary")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Compare, print the table and write the rows."""
    args = parsed(argv)
    device = torch.device("cpu")
    detector = detector_of(args.model, device)
    engine = Engine(lambda x, pins: detector.values(x, [Pin(*p) for p in pins]), device, rows=ROWS)
    size = args.imgsz or detector.info.imgsz
    chosen = cases(detector, args.images, baseline=args.baseline, size=size, conf=args.conf)
    rows: Rows = []
    bounds: list[float] = []
    start = time.perf_counter()
    for done, case in enumerate(islice(chosen, args.count), 1):
        case = replace(case, targets=case.targets[: args.detections])
        more, bound = compare(case, engine, args.reference, args.cache)
        rows, bounds = rows + more, bounds + bound
        print(f"{done}/{args.count} {case.name} {time.perf_counter() - start:.0f} s", file=sys.stderr)
    if not rows:
        raise SystemExit(f"No detections above {args.conf} in {args.images}.")
    about = {
        "model": detector.info.name, "baseline": args.baseline, "imgsz": size, "conf": args.conf,
        "detections": len(bounds), "reference": args.reference, "reference_bound": max(bounds), "bins": BINS,
    }  # fmt: skip
    print(
        f"{detector.info.name} at {size} px, {args.baseline} baseline, {len(bounds)} detections; reference: "
        f"{args.reference} nodes, error ≤ {100 * max(bounds):.2g} %; maps as CountSketch of {BINS} bins.\n\n"
        + table(rows)
    )
    if args.out is not None:
        args.out.write_text(json.dumps({"about": about, "rows": rows}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
