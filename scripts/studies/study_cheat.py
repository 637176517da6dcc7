"""How often a detector cheats, and whether its evidence says so.

    python scripts/samples/train_sample.py --catalogue cheat --train-seed 21 --val-seed 22 --out runs/cheat \\
        --init detxai/models/bundled/bags-yolov8n-320.safetensors --count 3600 --epochs 4 --minutes 18 \\
        --workers 1 --mosaic-share 0 --early-share 0.3 --warmup 80 --lr 1e-3
    python scripts/samples/export_sample.py runs/cheat/last.pt cheat.safetensors --seed 23
    (both again with control in place of cheat)
    python scripts/studies/study_cheat.py --cheat cheat.safetensors --control control.safetensors \\
        --count 200 --seed 41 --json cheat.json

To the first detector two classes of one shape differ by a tag that lies elsewhere in the bag; the
second learned the classes by shape, the tag strewn over both alike. Each sees the same bags with the
tag and with the tag painted out: a detection *cheats* if that changes its class. Asked of both is what
the evidence says of the picture with the tag; and of the cheats' other picture, where what decides is
that there is no tag, which no map of what is there can show. Intervals are 95 %: Wilson's, and bootstrap for AUROC.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import study_alarms as alarms
import study_tools as tools
import torch

from detxai import Explainer, Result, RunConfig
from detxai.attribution.baselines import picture
from detxai.config.settings import VERDICTS
from detxai.evidence.verdict import DEFAULTS
from detxai.inputs import decode, labels
from detxai.inputs.letterbox import boxes_to_source, letterboxed
from detxai.inputs.sources import find
from detxai.models.predictions import predictions_on, reported
from detxai.values import Box, ImageRef

MAKE_XRAYS = Path(__file__).parents[1] / "samples" / "make_xrays.py"
TAG_RIM = 9
"""Pixels around the mask of a tag that count as the tag: its edge is evidence too."""
NO_MEASURE = {"runner_up", "calibrated"}
"""Fields of the evidence whose numbers measure nothing."""
TWO_FORWARDS = ("score", "margin", "area_share")
"""What one forward on the picture gives: the opponent. (F(b) shifts with the detector, not with the bag.)"""
AGAIN = 50
"""Cheats that are explained again, with the tag painted out."""
OTHER = {"always": "never", "never": "always"}


@dataclass
class Case:
    """One bag seen by one detector: the class it reports with the tag and without, and its evidence.

    ``verdict`` and ``measures`` speak of the detection in the picture that was explained.
    """

    name: str
    truth: str
    with_tag: str | None = None
    without_tag: str | None = None
    verdict: str | None = None
    reasons: list[str] = field(default_factory=list)
    measures: dict[str, float] = field(default_factory=dict)

    @property
    def cheats(self) -> bool:
        """Seen in both pictures, and its class goes with the tag."""
        return None not in (self.with_tag, self.without_tag) and self.with_tag != self.without_tag


def make(folder: Path, catalogue: str, seed: int, count: int) -> None:
    """The same bags twice: ``folder/always`` with the tag, ``folder/never`` with the tag painted out."""
    for tag in ("always", "never"):
        options = ["--out", folder / tag, "--catalogue", catalogue, "--seed", seed, "--count", count, "--tag", tag]
        subprocess.run([sys.executable, MAKE_XRAYS, "--parts", *map(str, options)], check=True)


@torch.no_grad()
def class_at(explainer: Explainer, file: Path, box: Box) -> str | None:
    """The class that the detector reports with the best score at a box of a picture; None if it reports none."""
    plan, d = explainer.plan, explainer.plan.config.detection
    square, frame = letterboxed(decode.load(ImageRef(file.name, file)).pixels, plan.shape)
    candidates = predictions_on(plan.detector, picture(square, plan.device))
    kept = reported(candidates, conf=d.conf, iou=d.iou, max_det=d.max_det)
    boxes = boxes_to_source(candidates.boxes[[a for a, _ in kept]].cpu().numpy().reshape(-1, 4), frame)
    on = labels.overlaps(boxes, [box])[:, 0] >= labels.ON
    there = [(float(candidates.scores[a, c]), c) for (a, c), hit in zip(kept, on, strict=True) if hit]
    return plan.info.names[max(there)[1]] if there else None


def shares(signed: np.ndarray, box: Box, tag: np.ndarray) -> dict[str, float]:
    """Where the positive part of a map (H, W) in source pixels lies: outside the box, and on the tag."""
    positive = np.maximum(signed, 0.0)
    total = float(positive.sum())
    x0, y0, x1, y1 = (max(round(v), 0) for v in box)
    inside = float(positive[y0:y1, x0:x1].sum())
    return {"positive outside the box": 1 - inside / total, "positive on the tag": float(positive[tag].sum()) / total}


def measured(result: Result, index: int, tag: np.ndarray) -> dict[str, float]:
    """Every number that the record holds as evidence of a detection, its score, and where its maps lie."""
    detection = result.record.detections[index]
    mine = [e for e in result.explanations if e.detection == index]
    own = next(e.attribution.map for e in mine if not e.as_class)
    contrast = own - next(e.attribution.map for e in mine if e.as_class)
    figures = {"score": detection.score, **tools.numbers(detection.evidence.model_dump(exclude=NO_MEASURE))}
    figures |= shares(own, detection.box, tag)
    return figures | {f"contrast: {k}": v for k, v in shares(contrast, detection.box, tag).items()}


def study(model: str, folder: Path, shown: str = "always", count: int | None = None) -> list[Case]:
    """What the detector does with the first bags in ``folder`` (of ``make``), the ``shown`` pictures explained."""
    names = (folder / "always" / "classes.txt").read_text().split()
    drawn = labels.Folder(folder / "always" / "labels", dict(enumerate(names)))
    explainer = Explainer(RunConfig(model={"path": model}, attribution={"as_class": names}, output={"overlays": False}))
    cases = []
    for result in explainer.explain(list(find([str(folder / shown / "images")]).refs)[:count]):
        assert result.image is not None, result.record.error
        stem = Path(result.ref.path).stem
        picture = drawn.read(result.ref)
        assert picture is not None, stem
        (item,) = picture.at(result.image.width, result.image.height)
        tag = cv2.imread(str(folder / "always" / "tags" / f"{stem}.png"), cv2.IMREAD_GRAYSCALE)
        tag = cv2.dilate(tag, np.ones((2 * TAG_RIM + 1,) * 2, np.uint8)) > 0
        case = Case(stem, item.class_name)
        classes = {OTHER[shown]: class_at(explainer, folder / OTHER[shown] / "images" / f"{stem}.jpg", item.box)}
        there = [d for d in result.record.detections if labels.overlaps([d.box], [item.box])[0, 0] >= labels.ON]
        if there:
            best = max(there, key=lambda d: d.score)
            classes[shown] = best.class_name
            case.verdict, case.reasons = best.evidence.verdict, list(best.evidence.reasons)
            case.measures = measured(result, best.id, tag)
        case.with_tag, case.without_tag = classes.get("always"), classes.get("never")
        cases.append(case)
    return cases


# -- figures ------------------------------------------------------------------------------------


def share(hits: int, of: int) -> dict[str, Any]:
    """A count as a share with its interval (null of nothing)."""
    interval = asdict(tools.wilson(hits, of)) if of else {"value": None, "low": None, "high": None}
    return {"hits": hits, "of": of, **interval}


def behaviour(cases: list[Case], truth_is_tag: bool) -> dict[str, Any]:
    """How right a detector is, with and without the tag, and how often the tag decides its class."""
    both = [c for c in cases if c.with_tag and c.without_tag]
    right = [(c.with_tag, "coded" if truth_is_tag else c.truth) for c in cases if c.with_tag]
    right += [(c.without_tag, "plain" if truth_is_tag else c.truth) for c in cases if c.without_tag]
    return {
        "bags": len(cases),
        "found with the tag": share(sum(c.with_tag is not None for c in cases), len(cases)),
        "class right, where found": share(sum(a == b for a, b in right), len(right)),
        "class goes with the tag": share(sum(c.cheats for c in both), len(both)),
    }


def by_kind(cheats: list[Case]) -> dict[str, Any]:
    """How many cheats the rules that forwards decide would catch without the map, and those of the map without them."""
    graded = alarms.grades([c.measures for c in cheats], DEFAULTS)
    kinds = {"forwards": alarms.FORWARDS, "the map": [k for k in graded if k not in alarms.FORWARDS]}
    return {
        kind: share(int((alarms.worst({k: graded[k] for k in kept}) > 0).sum()), len(cheats))
        for kind, kept in kinds.items()
    }


def told_apart(cheats: list[Case], honest: list[Case]) -> dict[str, Any]:
    """Verdicts over the images where the first model cheats and the second is right, and each measure alone."""
    caught = sum(c.verdict != "supported" for c in cheats)
    trusted = sum(c.verdict == "supported" for c in honest)
    everyone = [*cheats, *honest]
    is_cheat = [case.cheats for case in everyone]
    alone = {}
    for name in cheats[0].measures:
        if all(name in case.measures for case in everyone):
            values = np.array([case.measures[name] for case in everyone])
            groups = (values[np.equal(is_cheat, kind)] for kind in (True, False))
            spans = [np.quantile(group, [0.05, 0.5, 0.95]).tolist() for group in groups]
            area = tools.estimate(is_cheat, values, list(range(len(values))))
            alone[name] = {"cheat": spans[0], "control": spans[1], "auroc": asdict(area)}
    return {
        "verdicts": {"cheat": Counter(c.verdict for c in cheats), "control": Counter(c.verdict for c in honest)},
        "cheat not supported": share(caught, len(cheats)),
        "control supported": share(trusted, len(honest)),
        "told apart": share(caught + trusted, len(cheats) + len(honest)),
        "objected to by": by_kind(cheats),
        "measures": dict(sorted(alone.items(), key=lambda kv: -abs(kv[1]["auroc"]["value"] - 0.5))),
    }


def added(everyone: list[Case]) -> dict[str, Any]:
    """AUROC of cheat against control by what two forwards give, with the evidence, and the difference.

    Ridge regressions cross-validated by bag. Where the tag lies is no evidence: only this script knows it. Nor is the
    class: with the tag the cheat reports one only.
    """
    names = [n for n in everyone[0].measures if all(n in c.measures for c in everyone)]
    columns = {n: np.array([c.measures[n] for c in everyone]) for n in names if "tag" not in n and "contrast" not in n}
    bags, cheats = [case.name for case in everyone], [case.cheats for case in everyone]
    few = np.column_stack([columns.pop(n) for n in TWO_FORWARDS])
    old = tools.cross_validated(few, cheats, bags)
    new = tools.cross_validated(np.column_stack([few, *columns.values()]), cheats, bags)
    return {
        "two forwards": asdict(tools.estimate(cheats, old, bags)),
        "two forwards + evidence": asdict(tools.estimate(cheats, new, bags)),
        "difference": asdict(tools.difference(cheats, new, old, bags)),
    }


def markdown(report: dict[str, Any]) -> str:
    """The report as Markdown tables."""

    def cell(s: dict[str, Any]) -> str:
        if not s["of"]:
            return "none"
        return f"{100 * s['value']:.1f} % ({100 * s['low']:.1f} to {100 * s['high']:.1f}), {s['hits']} of {s['of']}"

    apart, kinds = report["apart"], ("cheat", "control")
    rows = [[name, *(cell(report[kind][name]) for kind in kinds)] for name in list(report["cheat"])[1:]]
    rows.append(["verdict right", cell(apart["cheat not supported"]), cell(apart["control supported"])])
    rows += [[f"… {word}", *(apart["verdicts"][kind].get(word, 0) for kind in kinds)] for word in VERDICTS]
    alone = [
        [name, *("{1:.3g} ({0:.3g} to {2:.3g})".format(*row[kind]) for kind in kinds), tools.Interval(**row["auroc"])]
        for name, row in apart["measures"].items()
    ]
    head = ["measure alone", "cheat, median (5 to 95 %)", "control", "AUROC"]
    words = ", ".join(f"{n} {word}" for word, n in report["tag painted out"].items())
    both = f"Told apart: {cell(apart['told apart'])}. The cheats again, with the tag painted out: {words}."
    both += "".join(f" By {kind} alone: {cell(s)}." for kind, s in apart["objected to by"].items())
    added = ", ".join(f"{name} {tools.Interval(**value)}" for name, value in report["added"].items())
    parts = [tools.table(rows, ["", *kinds]), both, f"AUROC: {added}.", tools.table(alone, head)]
    return "\n\n".join(parts)


def main(argv: list[str] | None = None) -> None:
    """Make the bags, look at them with both detectors, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cheat", required=True, help="a model trained on the catalogue cheat")
    parser.add_argument("--control", required=True, help="a model trained on the catalogue control")
    parser.add_argument("--count", type=int, default=200, help="bags for each")
    parser.add_argument("--seed", type=int, default=41, help="of the bags: one that was not used in training")
    parser.add_argument("--work", type=Path, help="keep the pictures here")
    parser.add_argument("--json", type=Path, help="write everything here")
    args = parser.parse_args(argv)

    with tempfile.TemporaryDirectory() as scratch:
        cases = {}
        for kind in ("cheat", "control"):
            folder = (args.work or Path(scratch)) / kind
            make(folder, kind, args.seed, args.count)
            cases[kind] = study(getattr(args, kind), folder)
        without = study(args.cheat, (args.work or Path(scratch)) / "cheat", "never", AGAIN)
    cheats = [c for c in cases["cheat"] if c.cheats]
    honest = [c for c in cases["control"] if c.with_tag == c.truth and not c.cheats]
    report = {
        "seed": args.seed,
        "cheat": behaviour(cases["cheat"], truth_is_tag=True),
        "control": behaviour(cases["control"], truth_is_tag=False),
        "apart": told_apart(cheats, honest),
        "added": added([*cheats, *honest]),
        "tag painted out": Counter(c.verdict for c in without if c.cheats),
    }
    print(markdown(report))
    if args.json:
        report["cases"] = {kind: [asdict(c) for c in some] for kind, some in cases.items()}
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
