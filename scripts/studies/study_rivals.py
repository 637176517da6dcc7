"""Does a verdict beat the trade's own means of doubting a report, at the same number of forwards?

    python scripts/studies/study_rivals.py --images DIR --labels DIR --model FILE [--tree DIR] [--json OUT]
    python scripts/studies/study_rivals.py --images DIR --labels DIR --model FILE --no-maps      (forwards alone)

Every report is explained by `detxai explain --evidence basic` (kept in `--tree`, and continued there), held against the
labels, and then doubted by others:

- *score*: the model's own, which isotonic or Platt calibration leaves in the same order;
- *suppressed*: the boxes of the class that NMS dropped in its favour, no forward more (MetaDetect, arXiv 2010.01695);
- *flips*: the same picture mirrored two ways; *augmented*: also smaller, shifted and slightly blurred. Does a box of
  the class stay there, with which score and IoU;
- *energy*: log-sum-exp of the class logits at the box;
- *gradient norms*: of the report's own loss in the last weights of the head (arXiv 2107.04517), no forward more, and a
  backward pass through two layers;
- *distance*: of what the class branch reads at the cell from what it reads at right reports of the class (cosine, and
  Mahalanobis: arXiv 1807.03888), learned on the pictures that the regression learns from;
- *evidence*: the numbers of the record; *verdict*: its word alone; *of one gradient*: the same of a map by
  `--method inputxgrad`, in a tree beside the first.

Each group is a ridge logistic regression cross-validated by picture, on the same detections. The cost curve says which
share of the wrong boxes is caught while 5, 10, 15 and 30 % of the right ones are bothered. Intervals are 95 %,
bootstrapped by picture.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import rival_measures as rivals
import study_evidence as study
import study_tools as tools
import torch
from numpy.typing import NDArray
from rival_measures import Feature, Measured, Numbers

from detxai.evidence.verdict import verdict
from detxai.inputs import decode, labels
from detxai.inputs.letterbox import boxes_to_letterbox, letterboxed
from detxai.inputs.sources import find
from detxai.models import checkpoints, detectors
from detxai.vocabulary import VERDICTS

#: Shares of the right boxes that may be bothered, at which the caught share of the wrong ones is read.
BOTHERED = (0.05, 0.10, 0.15, 0.30)
#: The map of one gradient.
ONE_GRADIENT = "inputxgrad"
RULE = "score + suppressed + flips"
#: What each competitor costs beside the detection: forwards (of these 3 an image for evidence), and passes back.
PRICES = {
    "score": "0",
    "score + energy": "0",
    "score + suppressed": "0",
    "score + gradient norms": "0, and back through two layers",
    "score + distance": "0",
    "score + suppressed + gradient norms + distance": "0, and back through two layers",
    "score + flips": "2",
    RULE: "2",
    f"{RULE} + gradient norms + distance": "2, and back through two layers",
    "score + suppressed + augmented": "5",
    "evidence of one gradient": "8 and 1 gradient",
    "score + evidence of one gradient": "8 and 1 gradient",
    "evidence": "8 and a map",
    "score + evidence": "8 and a map",
    f"{RULE} + evidence": "10 and a map",
    "verdict of one gradient alone": "8 and 1 gradient",
    "verdict alone": "8 and a map",
    "score alone, not fitted": "0",
}
#: Columns (n, k), or what gives them from the training rows and a seed.
Columns = Numbers | Callable[[NDArray[Any], int], Numbers]


@dataclass(frozen=True, eq=False)
class Doubted:
    """What rivals say of one report, by rival; its feature; and its evidence and verdict of one gradient."""

    measures: Mapping[str, Measured]
    feature: Feature
    evidence: Mapping[str, float] = field(default_factory=dict)
    verdict: str = "unknown"


class Doubter:
    """A detector that its own reports are doubted with. `size`: of its square, pixels."""

    def __init__(self, model: str | None, size: int | None) -> None:
        self.detector: Any = detectors.build(checkpoints.load(model))
        self.size = size or self.detector.info.imgsz
        self.ends = rivals.ends(self.detector)

    def __call__(self, file: Any, reports: Sequence[study.Seen], boxes: Sequence[Any]) -> Iterator[Doubted]:
        """Of each report on a picture: one forward on it, kept for the gradients, and one on each alteration."""
        square, frame = letterboxed(decode.load(file).pixels, (self.size, self.size), self.detector.info.fit)
        altered, x = rivals.alterations(square), rivals.tensor(square)[None]
        with torch.no_grad():
            others = self.detector.predict(torch.stack([a.x for a in altered]))
            maps = rivals.class_maps(self.detector, x)
        with self.ends.differentiated():
            (first,) = self.detector.predict(x)
            for report, box in zip(reports, boxes, strict=True):
                placed = torch.from_numpy(boxes_to_letterbox([box], frame)[0]).float()
                norms = rivals.gradient_norms(first, placed, report.class_id, self.ends)
                with torch.no_grad():
                    at = int((rivals.overlaps(first.boxes, placed) * first.scores[:, report.class_id]).argmax())
                    kept = [rivals.stays(c, a, placed, report.class_id) for a, c in zip(altered, others, strict=True)]
                    measures = {
                        "suppressed": rivals.suppressed(first, placed, report.class_id),
                        "flips": kept[0] | kept[1],
                        "augmented": {k: v for one in kept for k, v in one.items()},
                        "energy": {"energy": float(torch.logsumexp(first.logits[at], 0))},
                        "gradient norms": norms,
                    }
                yield Doubted(measures, rivals.feature_at(maps, first, at))


# -- the study ------------------------------------------------------------------------------------


def caught(right: NDArray[np.bool_], trust: Numbers, weights: Numbers, bothered: float) -> Numbers:
    """(resamples,): share of the wrong below the threshold that `bothered` of the right ones are below, too.

    Equal trust is taken in any order: between two thresholds the share is interpolated.
    """
    order = np.argsort(trust, kind="stable")
    starts = np.flatnonzero(np.diff(trust[order], prepend=-np.inf))
    drawn = weights[:, order]
    good, bad = (np.add.reduceat(drawn * kind, starts, 1).cumsum(1) for kind in (right[order], ~right[order]))
    with np.errstate(invalid="ignore"):
        shares = zip(good / good[:, -1:], bad / bad[:, -1:], strict=True)
        return np.array([np.interp(bothered, [0.0, *g], [0.0, *b]) for g, b in shares])


def curve(y: NDArray[np.bool_], trust: Numbers, photos: Sequence[str]) -> list[tools.Interval]:
    """The caught share at each of BOTHERED."""
    return [tools.estimate(y, trust, photos, lambda r, s, w, b=b: caught(r, s, w, b)) for b in BOTHERED]


def competitors(*, maps: bool) -> list[str]:
    """Those that need no map, or all."""
    return [name for name in PRICES if maps or not ("evidence" in name or "verdict" in name)]


def groups(reports: Sequence[study.Seen], doubted: Sequence[Doubted], names: Sequence[str]) -> dict[str, Columns]:
    """The columns of each of `names` that is fitted, class indicators among them."""
    kinds = study.one_hot([r.class_id for r in reports])
    score = np.array([[r.forwards["score"], r.forwards["logit"]] for r in reports])
    columns = {name: study.matrix([d.measures[name] for d in doubted])[1] for name in doubted[0].measures}
    columns |= {"score": score, "evidence": study.matrix([r.evidence for r in reports])[1]}
    columns["evidence of one gradient"] = study.matrix([d.evidence for d in doubted])[1]
    distance = rivals.Distance(
        [d.feature for d in doubted],
        [r.class_id for r in reports],
        [r.right for r in reports],
        [r.photo for r in reports],
    )

    def together(name: str) -> Columns:
        parts = name.split(" + ")
        fixed = np.column_stack([*(columns[part] for part in parts if part != "distance"), kinds])
        if "distance" not in parts:
            return fixed
        return lambda train, _: np.column_stack([fixed, distance(train)])

    return {name: together(name) for name in names if "alone" not in name}


def compare(
    reports: Sequence[study.Seen], doubted: Sequence[Doubted], names: Sequence[str], repeats: int
) -> list[dict[str, Any]]:
    """AUROC, its differences from RULE and from the score, and the cost curve of each of `names`."""
    y, photos = np.array([r.right for r in reports]), [r.photo for r in reports]
    trusts = {
        name: tools.cross_validated(columns, y, photos, repeats)
        for name, columns in groups(reports, doubted, names).items()
    }
    severity = {word: -float(rank) for rank, word in enumerate(("supported", "unknown", "weak", "unsupported"))}
    trusts["verdict of one gradient alone"] = np.array([severity[d.verdict] for d in doubted])
    trusts["verdict alone"] = np.array([severity[r.verdict] for r in reports])
    trusts["score alone, not fitted"] = np.array([r.forwards["score"] for r in reports])
    return [
        {
            "what": name,
            "price": PRICES[name],
            "auroc": tools.estimate(y, trust, photos),
            "over the rule": tools.difference(y, trust, trusts[RULE], photos),
            "over the score": tools.difference(y, trust, trusts["score"], photos),
            "caught": curve(y, trust, photos),
        }
        for name, trust in trusts.items()
        if name in names
    ]


def reported(args: argparse.Namespace) -> tuple[list[study.Seen], list[Doubted]]:
    """Every report, and what its rivals say of it, without a map."""
    doubter, files = Doubter(args.model, args.imgsz), {ref.path: ref for ref in find([str(args.images)]).refs}
    drawn = labels.Folder(args.labels, doubter.detector.info.names)
    reports: list[study.Seen] = []
    doubted: list[Doubted] = []
    for path, rows in groupby(study.reports(args, drawn), lambda row: row[0]["file_name"]):
        own, boxes = [], []
        for entry, m in rows if drawn.read(files[path]) is not None else ():
            (x, y, width, height), score = entry["bbox"], entry["score"]
            says = {"score": score, "logit": float(np.log(score) - np.log1p(-score))}
            right = m.status == "true"
            own.append(
                study.Seen(path, path, "picture", right, entry["category_id"], says, {}, np.zeros(64), "unknown")
            )
            boxes.append((x, y, x + width, y + height))
        reports += own
        doubted += doubter(files[path], own, boxes)
    return reports, doubted


def collected(args: argparse.Namespace, tree: Path) -> tuple[list[study.Seen], list[Doubted]]:
    """Every report that counts, and what its rivals say of it."""
    doubter, files = Doubter(args.model, args.imgsz), {ref.path: ref for ref in find([str(args.images)]).refs}
    one = argparse.Namespace(**{**vars(args), "method": ONE_GRADIENT})
    beside = {
        record["image"]["path"]: list(zip(record["detections"], own, strict=True))
        for record, own in study.with_records(one, tree.with_name(f"{tree.name}-{ONE_GRADIENT}"))
    }
    reports: list[study.Seen] = []
    doubted: list[Doubted] = []
    for record, own in study.with_records(args, tree):
        path = record["image"]["path"]
        says = doubter(files[path], own, [d["box"] for d in record["detections"]])
        for d, report, said, (same, cheap) in zip(record["detections"], own, says, beside[path], strict=True):
            assert same["box"] == d["box"], f"{path}: the two trees hold other boxes"
            word = verdict(same["evidence"], True)[0]
            reports.append(report)
            doubted.append(Doubted(said.measures, said.feature, cheap.evidence, word))
    return reports, doubted


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=tools.REPEATS, help="splits of the cross-validation")
    parser.add_argument("--json", type=Path, help="write all figures here")
    parser.add_argument("--no-maps", action="store_true", help="explain nothing: the score and its rivals alone")
    args = study.every_report(parser, argv)
    with tempfile.TemporaryDirectory() as spare:
        tree = args.tree or Path(spare) / "tree"
        reports, doubted = reported(args) if args.no_maps else collected(args, tree)
    right = sum(r.right for r in reports)
    print(f"{right} right and {len(reports) - right} wrong boxes on {len({r.photo for r in reports})} pictures\n")
    if not args.no_maps:
        words = [
            [word, *(sum(r.verdict == word and r.right == wanted for r in reports) for wanted in (True, False))]
            for word in VERDICTS
        ]
        print(tools.table(words, ("verdict", "right", "wrong")) + "\n")
    figures = compare(reports, doubted, competitors(maps=not args.no_maps), args.repeats)
    keys = ("what", "price", "auroc", "over the rule", "over the score")
    rows = [[*(f[key] for key in keys), *f["caught"]] for f in figures]
    head = ("what", "forwards more", "AUROC", f"over {RULE}", "over the score")
    print(tools.table(rows, (*head, *(f"caught at {b:.0%} bothered" for b in BOTHERED))))
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1, default=vars))


if __name__ == "__main__":
    main()
