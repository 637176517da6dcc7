"""Does the evidence tell right reports from wrong ones, beyond what the score tells?

    python scripts/studies/study_evidence.py --images DIR --labels DIR --model FILE [--conf 0.05] [--tree DIR]
    python scripts/studies/study_evidence.py --images DIR --labels DIR --model FILE --below 0.25    (candidates)
    python scripts/studies/study_evidence.py --images OUT/images --labels OUT/labels --model FILE --conf 0.25 \\
        --imgsz 320 --sources OUT/sources.json --against wrong-class (OUT: of make_confusions.py --imgsz 320)

Every report is explained by `detxai explain` (kept in `--tree`, and continued there) and held against the labels.
Compared on the same detections, each as ridge logistic regressions cross-validated by photo:

- *two forwards*: score, logit, F(b), margin over the runner-up, area of the box, class: the honest opponent;
- that *+ evidence*: every number in the record's `evidence`;
- that *+ typicality*: likeness of the detection's grid to those of right detections of its class (or of any class) on
  the photos that the regression was trained on, never its own.

Intervals are 95 %, bootstrapped by photo.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import study_tools as tools
import torch
from numpy.typing import NDArray

from detxai import RunConfig
from detxai.config.settings import VERDICTS
from detxai.inputs import decode, labels
from detxai.inputs.letterbox import boxes_to_source, letterboxed
from detxai.inputs.sources import find
from detxai.models import checkpoints, detectors
from detxai.models.predictions import reported

#: Numbers of `evidence` that two forwards give, that say nothing, or that come from a calibration.
NOT_EVIDENCE = ("margin", "area_share", "runner_up.class_id", "calibrated", "trust", "typicality")
#: Numbers of the attribution that say where it lies and how well it is known.
OF_ATTRIBUTION = ("inside_share", "error_bound", "evaluations")


@dataclass(frozen=True, eq=False)
class Seen:
    """One detection that counts: was it right, of which photo, its numbers, its grid; `kind` of the picture."""

    picture: str
    photo: str
    kind: str
    right: bool
    class_id: int
    forwards: Mapping[str, float]
    evidence: Mapping[str, float]
    grid: NDArray[np.float64]
    verdict: str


# -- records --------------------------------------------------------------------------------------


def reports(args: argparse.Namespace, drawn: labels.Folder) -> Iterator[tuple[dict[str, Any], labels.Match]]:
    """Every report as a COCO result, and how it meets the labels: where few are wanted, these alone are explained."""
    detector = detectors.build(checkpoints.load(args.model))
    size, info = args.imgsz or detector.info.imgsz, detector.info
    for ref in find([str(args.images)]).refs:
        pixels = decode.load(ref).pixels
        square, frame = letterboxed(pixels, (size, size), info.fit)
        with torch.no_grad():
            candidates = detector.predict(torch.from_numpy(square).permute(2, 0, 1)[None].float() / 255)[0]
        kept = reported(candidates, conf=args.conf, iou=RunConfig().detection.iou, max_det=300)
        boxes = boxes_to_source(candidates.boxes[[a for a, _ in kept]].numpy().reshape(-1, 4), frame).tolist()
        scores, marks = [float(candidates.scores[a, c]) for a, c in kept], drawn.read(ref)
        placed = () if marks is None else marks.at(pixels.shape[1], pixels.shape[0])
        matches = labels.match([tuple(box) for box in boxes], [c for _, c in kept], scores, placed)
        for (_, c), (x0, y0, x1, y1), score, m in zip(kept, boxes, scores, matches, strict=True):
            yield {"file_name": ref.path, "category_id": c, "bbox": [x0, y0, x1 - x0, y1 - y0], "score": score}, m


def counting(args: argparse.Namespace, drawn: labels.Folder) -> list[dict[str, Any]]:
    """The reports that count: where most are of no account, the others need not be explained."""
    return [entry for entry, m in reports(args, drawn) if m.status in ("true", args.against)]


def explained(args: argparse.Namespace, tree: Path) -> list[dict[str, Any]]:
    """The records of all pictures, made or completed by `detxai explain`."""
    given = [("--model", args.model), ("--conf", args.conf), ("--imgsz", args.imgsz)]
    given += [("--classes", name) for name in (args.classes or "").split(",") if name]
    options = [str(word) for name, value in given if value is not None for word in (name, value)]
    if args.against != "all":
        tree.mkdir(parents=True, exist_ok=True)
        drawn = labels.Folder(args.labels, detectors.build(checkpoints.load(args.model)).info.names)
        (tree / ".reports.json").write_text(json.dumps(args.chosen(args, drawn)))
        options += ["--predictions", str(tree / ".reports.json")]
    options += [
        "--method",
        args.method,
        "--baseline",
        args.baseline,
        "--evidence",
        args.evidence,
        "--no-overlays",
        "-o",
        str(tree),
    ]
    subprocess.run([sys.executable, "-m", "detxai", "explain", str(args.images), *options], check=True)
    return [json.loads(line) for line in (tree / "records.jsonl").read_text().splitlines()]


def seen(
    record: Mapping[str, Any], drawn: labels.Drawn | None, against: str, below: float, origin: Mapping[str, Any]
) -> list[Seen]:
    """The detections of one record, scored up to `below`, that are right, or wrong in the way that counts.

    A label that a better scored detection is on can be found no more.
    """
    if record["status"] != "ok" or drawn is None:
        return []
    detections = record["detections"]
    placed = drawn.at(record["image"]["width"], record["image"]["height"])
    matches = labels.match(
        [tuple(d["box"]) for d in detections],
        [d["class_id"] for d in detections],
        [d["score"] for d in detections],
        placed,
    )
    picture = record["image"]["path"]
    return [
        Seen(
            picture, origin.get("photo", picture), origin.get("kind", "picture"), m.status == "true", d["class_id"],
            forwards(d), evidence(d), np.array(d["attributions"][0]["grid"]["values"]).ravel(),
            d["evidence"]["verdict"],
        )
        for d, m in zip(detections, matches, strict=True)
        if d["score"] <= below and (m.status in ("true", against) or against == "all")
    ]  # fmt: skip


def forwards(d: Mapping[str, Any]) -> dict[str, float]:
    """What one forward on the picture and one on the baseline give."""
    numbers = {"score": d["score"], "logit": d["logit"], "F(b)": d["attributions"][0]["value_at_baseline"]}
    numbers["area"] = float(np.log(max(d["evidence"]["area_share"], 1e-6)))
    return numbers | {"margin": d["evidence"]["margin"]} if d["evidence"]["margin"] is not None else numbers


def evidence(d: Mapping[str, Any]) -> dict[str, float]:
    """Every number of the evidence that is not among `forwards`."""
    figures = {k: v for k, v in tools.numbers(d["evidence"]).items() if k not in NOT_EVIDENCE}
    figures |= {k: v for k, v in tools.numbers(d["attributions"][0]).items() if k in OF_ATTRIBUTION}
    for trial in d["evidence"].get("trials", ()):
        fill = "baseline" if trial["fill"] == d["attributions"][0]["baseline"] else "other fill"
        what = trial["what"] if trial["what"] == "softened" else f"{trial['what']}, {fill}"
        figures |= {f"{what}: {k}": v for k, v in tools.numbers(trial).items() if k not in ("score", "other")}
    return figures


# -- features -------------------------------------------------------------------------------------


def matrix(rows: Sequence[Mapping[str, float]]) -> tuple[list[str], NDArray[np.float64]]:
    """The names that occur and their numbers (n, k), NaN where missing."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    return names, np.array([[row.get(name, np.nan) for name in names] for row in rows], float)


def one_hot(ids: Sequence[int]) -> NDArray[np.float64]:
    """(n, classes) indicators."""
    return (np.array(ids)[:, None] == np.unique(ids)[None]).astype(float)


class Typicality:
    """Likeness of grids to those of right detections on other photos: columns own class, any class, own − best other.

    Grids are scaled to unit sum of |cell|; likeness is the correlation with the mean grid.
    """

    names = ("typicality", "typicality, any class", "typicality over best other class")

    def __init__(self, detections: Sequence[Seen]) -> None:
        self.grids = np.array([d.grid / max(float(np.abs(d.grid).sum()), 1e-12) for d in detections])
        self.right = np.array([d.right for d in detections])
        self.classes = np.array([d.class_id for d in detections])
        self.photos = np.array([d.photo for d in detections])

    def __call__(self, train: NDArray[Any]) -> NDArray[np.float64]:
        """(n, 3) for all rows, learned from the rows `train` without the row's own photo; NaN where none is known."""
        known = np.zeros(len(self.right), bool)
        known[train] = True
        result = np.full((len(self.right), 3), np.nan)
        for photo in np.unique(self.photos):
            rows, teachers = self.photos == photo, known & self.right & (self.photos != photo)
            means = {c: self.grids[teachers & (self.classes == c)] for c in np.unique(self.classes[teachers])}
            like = {c: _correlation(self.grids[rows], m.mean(0)) for c, m in means.items()}
            for at, row in enumerate(np.flatnonzero(rows)):
                own = like.get(self.classes[row])
                others = [values[at] for c, values in like.items() if c != self.classes[row]]
                result[row, 0] = np.nan if own is None else own[at]
                result[row, 2] = np.nan if own is None or not others else own[at] - max(others)
            if teachers.any():
                result[rows, 1] = _correlation(self.grids[rows], self.grids[teachers].mean(0))
        return result


def _correlation(grids: NDArray[np.float64], mean: NDArray[np.float64]) -> NDArray[np.float64]:
    a, b = grids - grids.mean(1, keepdims=True), mean - mean.mean()
    return (a @ b) / np.maximum(np.linalg.norm(a, axis=1) * np.linalg.norm(b), 1e-12)


# -- the study ------------------------------------------------------------------------------------


def study(detections: Sequence[Seen], repeats: int = tools.REPEATS) -> dict[str, Any]:
    """Every figure of the report; `repeats` of the cross-validation."""
    y = np.array([d.right for d in detections])
    photos = [d.photo for d in detections]
    forward_names, two = matrix([d.forwards for d in detections])
    evidence_names, more = matrix([d.evidence for d in detections])
    typical = Typicality(detections)
    opponent = np.column_stack([two, one_hot([d.class_id for d in detections])])
    both = np.column_stack([opponent, more])
    features: dict[str, Any] = {
        "two forwards": opponent,
        "two forwards + evidence": both,
        "two forwards + typicality": lambda train, _: np.column_stack([opponent, typical(train)]),
        "two forwards + evidence + typicality": lambda train, _: np.column_stack([both, typical(train)]),
        "evidence alone": more,
    }
    scores = {name: tools.cross_validated(columns, y, photos, repeats) for name, columns in features.items()}
    alone = dict(zip(forward_names, two.T, strict=True)) | dict(zip(evidence_names, more.T, strict=True))
    alone |= dict(zip(typical.names, typical(np.arange(len(y))).T, strict=True))
    return {
        "right": int(y.sum()),
        "wrong": int((~y).sum()),
        "photos": len(set(photos)),
        "kinds": Counter(f"{d.kind}, {'right' if d.right else 'wrong'}" for d in detections),
        "verdicts": [judged(word, [d.right for d in detections if d.verdict == word]) for word in VERDICTS],
        "alone": sorted((measured(name, y, s, photos) for name, s in alone.items()), key=lambda r: -r["auroc"]),
        "together": [compared(name, y, s, scores["two forwards"], photos) for name, s in scores.items()],
        "by kind": by_kind(detections, y, scores, photos),
    }


def judged(word: str, right: Sequence[bool]) -> dict[str, Any]:
    """How many detections with this verdict are right."""
    share = asdict(tools.wilson(sum(right), len(right))) if right else None
    return {"verdict": word, "detections": len(right), "right": sum(right), "share": share}


def measured(name: str, y: NDArray[np.bool_], values: NDArray[np.float64], photos: Sequence[str]) -> dict[str, Any]:
    """AUROC and average precision of one number alone, in the direction that serves it; missing = its median."""
    filled = np.where(np.isfinite(values), values, np.nanmedian(values) if np.isfinite(values).any() else 0.0)
    sign = 1 if tools.auroc(y, filled) >= 0.5 else -1
    area = tools.estimate(y, sign * filled, photos)
    known = float(np.isfinite(values).mean())
    return {"measure": name, "right is": "higher" if sign > 0 else "lower", "auroc": area.value, "low": area.low,
            "high": area.high, "ap": tools.average_precision(y, sign * filled), "known": known}  # fmt: skip


def compared(
    name: str, y: NDArray[np.bool_], new: NDArray[np.float64], old: NDArray[np.float64], photos: Sequence[str]
) -> dict[str, Any]:
    """AUROC and average precision of a regression, and their differences from the opponent's."""
    figures: dict[str, Any] = {"what": name}
    for key, measure in (("auroc", tools.weighted_auroc), ("ap", tools.weighted_average_precision)):
        figures[key] = asdict(tools.estimate(y, new, photos, measure))
        figures[f"{key} difference"] = asdict(tools.difference(y, new, old, photos, measure))
    return figures


def by_kind(
    detections: Sequence[Seen], y: NDArray[np.bool_], scores: Mapping[str, NDArray[np.float64]], photos: Sequence[str]
) -> list[dict[str, Any]]:
    """The same regressions, judged on the right detections of one kind of picture against all wrong ones."""
    kinds = sorted({d.kind for d in detections if d.right})
    figures = []
    for kind in kinds if len(kinds) > 1 else []:
        part = np.flatnonzero(~y | np.array([d.kind == kind for d in detections]))
        some = [photos[i] for i in part]
        for name, s in scores.items():
            figures.append({"kind": kind} | compared(name, y[part], s[part], scores["two forwards"][part], some))
    return figures


# -- the report -----------------------------------------------------------------------------------


def report(figures: Mapping[str, Any]) -> str:
    """The figures as Markdown."""
    lines = [f"{figures['right']} right and {figures['wrong']} wrong detections on {figures['photos']} photos", ""]
    lines += [f"{name}: {count}" for name, count in figures["kinds"].items()]
    rows = [
        [v["verdict"], v["detections"], v["right"], tools.Interval(**v["share"])]
        for v in figures["verdicts"]
        if v["share"]
    ]
    lines += ["", tools.table(rows, ("verdict", "detections", "right", "share"))]
    head = ("together", "AUROC", "difference", "average precision", "difference")
    keys = ("auroc", "auroc difference", "ap", "ap difference")
    rows = [[r["what"], *(tools.Interval(**r[k]) for k in keys)] for r in figures["together"]]
    lines += ["", tools.table(rows, head)]
    rows = [[f"{r['kind']}: {r['what']}", *(tools.Interval(**r[k]) for k in keys)] for r in figures["by kind"]]
    if rows:
        lines += ["", tools.table(rows, ("right detections of one kind only", *head[1:]))]
    rows = [
        [r["measure"], r["right is"], tools.Interval(r["auroc"], r["low"], r["high"]), f"{r['ap']:.3f}"]
        for r in figures["alone"]
    ]
    return "\n".join([*lines, "", tools.table(rows, ("alone", "right is", "AUROC", "average precision"))])


def with_records(args: argparse.Namespace, tree: Path) -> Iterator[tuple[dict[str, Any], list[Seen]]]:
    """Every labelled record with its detections that count."""
    drawn = labels.Folder(args.labels, detectors.build(checkpoints.load(args.model)).info.names)
    origins = {} if args.sources is None else {m["picture"]: m for m in json.loads(args.sources.read_text())}
    files = {ref.path: ref for ref in find([str(args.images)]).refs}
    for record in explained(args, tree):
        if (path := record["image"]["path"]) in files:
            own = seen(record, drawn.read(files[path]), args.against, args.below, origins.get(path, {}))
            if own:
                yield record, own


def collected(args: argparse.Namespace, tree: Path) -> list[Seen]:
    """All detections that count."""
    return [one for _, own in with_records(args, tree) for one in own]


def every_report(
    parser: argparse.ArgumentParser,
    argv: list[str] | None = None,
    against: str = "all",
    conf: float = 0.25,
    chosen: Callable[[argparse.Namespace, labels.Folder], list[dict[str, Any]]] = counting,
) -> argparse.Namespace:
    """The arguments of a study of the reports of a model, with those of this one at their defaults.

    Where not `against` all, those are explained that are `chosen`.
    """
    parser.add_argument("--images", type=Path, required=True, help="folder of pictures")
    parser.add_argument("--labels", type=Path, required=True, help="folder of YOLO labels")
    parser.add_argument("--model", help="a model file; default: the bundled one")
    parser.add_argument("--conf", type=float, default=conf, help="boxes from this score")
    parser.add_argument("--tree", type=Path, help="output tree of `detxai explain` to keep or to continue")
    parser.add_argument("--imgsz", type=int, help="default: the model's")
    parser.set_defaults(classes=None, sources=None, below=1.0)
    parser.set_defaults(against=against, chosen=chosen, method="ig", baseline="auto", evidence="basic")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=Path, required=True, help="folder of pictures")
    parser.add_argument("--labels", type=Path, required=True, help="folder of YOLO labels")
    parser.add_argument("--model", help="a model file; default: the bundled one")
    parser.add_argument("--conf", type=float, default=0.05, help="detections from this score")
    parser.add_argument("--below", type=float, default=1.0, help="count only detections up to this score")
    parser.add_argument("--imgsz", type=int, help="default: the model's")
    parser.add_argument("--classes", help="only these classes, names with commas")
    parser.add_argument("--baseline", default="auto")
    parser.add_argument("--evidence", choices=("basic", "full"), default="basic")
    parser.add_argument("--against", default="all", help="which wrong ones count: all, or a status as wrong-class")
    parser.add_argument("--sources", type=Path, help="JSON: picture, photo it was made of, kind")
    parser.add_argument("--tree", type=Path, help="output tree of `detxai explain` to keep or to continue")
    parser.add_argument("--json", type=Path, help="write all figures here")
    parser.set_defaults(method="ig", chosen=counting)
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as spare:
        detections = collected(args, args.tree or Path(spare))
    figures = study(detections)
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1))
    print(report(figures))


if __name__ == "__main__":
    main()
