"""Does a verdict beat the trade's own means of doubting a report, at the same number of forwards?

    python scripts/studies/study_rivals.py --images DIR --labels DIR --model FILE [--tree DIR] [--json OUT]

Every report is explained by `detxai explain --evidence basic` (kept in `--tree`, and continued there), held against the
labels, and then doubted by others:

- *score*: the model's own, which isotonic or Platt calibration leaves in the same order;
- *suppressed*: the boxes of the class that NMS dropped in its favour, no forward more (MetaDetect, arXiv 2010.01695);
- *flips*: the same picture mirrored two ways; *augmented*: also smaller, shifted and slightly blurred. Does a box of
  the class stay there, with which score and IoU;
- *energy*: log-sum-exp of the class logits at the box;
- *evidence*: the numbers of the record; *verdict*: its word alone.

Each group is a ridge logistic regression cross-validated by picture, on the same detections. The cost curve says which
share of the wrong boxes is caught while 5, 10, 15 and 30 % of the right ones are bothered. Intervals are 95 %,
bootstrapped by picture.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import study_evidence as study
import study_tools as tools
import torch
from numpy.typing import NDArray
from torch import Tensor

from detxai.config.settings import VERDICTS
from detxai.inputs import decode
from detxai.inputs.letterbox import boxes_to_letterbox, letterboxed
from detxai.inputs.sources import find
from detxai.models import checkpoints, detectors

#: A box of an altered picture is the same one from this IoU on; NMS drops what overlaps as much.
SAME_BOX = 0.5
#: Suppressed boxes count from this score on.
FAINT = 0.01
#: Shares of the right boxes that may be bothered, at which the caught share of the wrong ones is read.
BOTHERED = (0.05, 0.10, 0.15, 0.30)
SMALLER, SHIFT, BLUR = 0.83, 0.03, 1.0
Numbers = NDArray[np.float64]


def overlaps(boxes: Tensor, box: Tensor) -> Tensor:
    """(n,) IoU of `boxes` (n, 4) with `box` (4,), xyxy."""
    common = (torch.minimum(boxes[:, 2:], box[2:]) - torch.maximum(boxes[:, :2], box[:2])).clamp(min=0).prod(1)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(1) + (box[2:] - box[:2]).prod()
    return common / (areas - common).clamp(min=1e-9)


class Altered:
    """A square picture (3, s, s) seen otherwise: `x` for the network, and its boxes moved back to the square."""

    def __init__(
        self, name: str, x: Tensor, gain: float = 1.0, offset: Sequence[float] = (0, 0), flip: str = ""
    ) -> None:
        self.name, self.x, self.gain, self.flip = name, x, gain, flip
        self.offset = torch.tensor([*offset, *offset], dtype=torch.float32)

    def back(self, boxes: Tensor) -> Tensor:
        """Boxes (n, 4) of the altered picture in the frame of the square."""
        size = self.x.shape[-1]
        if self.flip:
            first = 0 if self.flip == "x" else 1
            boxes = boxes.clone()
            boxes[:, [first, first + 2]] = size - boxes[:, [first + 2, first]]
        return (boxes - self.offset) / self.gain


def alterations(square: NDArray[np.uint8]) -> list[Altered]:
    """The square (s, s, 3), mirrored two ways, smaller, shifted and blurred."""
    size = square.shape[0]
    ground = tuple(float(v) for v in np.median(square.reshape(-1, 3)[:: max(size // 64, 1)], 0))

    def moved(gain: float, by: float) -> NDArray[np.uint8]:
        place = np.array([[gain, 0, by], [0, gain, by]], np.float64)
        return np.asarray(cv2.warpAffine(square, place, (size, size), borderValue=ground), np.uint8)

    border, shift = (1 - SMALLER) * size / 2, SHIFT * size
    return [
        Altered("mirrored", tensor(square[:, ::-1]), flip="x"),
        Altered("upside down", tensor(square[::-1]), flip="y"),
        Altered("smaller", tensor(moved(SMALLER, border)), SMALLER, (border, border)),
        Altered("shifted", tensor(moved(1.0, shift)), 1.0, (shift, shift)),
        Altered("blurred", tensor(np.asarray(cv2.GaussianBlur(square, (0, 0), BLUR), np.uint8))),
    ]


def tensor(square: NDArray[np.uint8]) -> Tensor:
    """(3, s, s) float32 in [0, 1] of (s, s, 3) uint8."""
    return torch.from_numpy(np.ascontiguousarray(square)).permute(2, 0, 1).float() / 255


def suppressed(candidates: Any, box: Tensor, class_id: int) -> dict[str, float]:
    """How many boxes of the class NMS drops in favour of this one, and how they scatter."""
    scores = candidates.scores[:, class_id]
    iou = overlaps(candidates.boxes, box)
    near = (iou >= SAME_BOX) & (scores >= FAINT)
    own, weights = candidates.boxes[near], scores[near]
    if not len(own):
        return {"count": 0.0}
    side = (box[2:] - box[:2]).prod().sqrt()
    return {
        "count": float(len(own)), "mean score": float(weights.mean()), "sum": float(weights.sum()),
        "scatter": float((own - box).abs().mean() / side), "mean IoU": float(iou[near].mean()),
        "rivals": float(candidates.scores[near].sum(1).sub(weights).max()),
    }  # fmt: skip


def stays(candidates: Any, altered: Altered, box: Tensor, class_id: int) -> dict[str, float]:
    """Score and IoU of the best box of the class where this one was."""
    scores = candidates.scores[:, class_id]
    iou = overlaps(altered.back(candidates.boxes), box)
    best = int((scores * iou).argmax())
    return {
        f"{altered.name}: score": float(scores[best] * (iou[best] >= SAME_BOX)),
        f"{altered.name}: IoU": float(iou[best]),
    }


@torch.no_grad()
def doubts(
    detector: Any, file: Any, reports: Sequence[study.Seen], boxes: Sequence[Any]
) -> list[dict[str, dict[str, float]]]:
    """By report, by rival: its numbers. One forward on the picture and one on each alteration."""
    pixels = decode.load(file).pixels
    square, frame = letterboxed(pixels, detector.info.imgsz, detector.info.fit)
    altered = alterations(square)
    first, *others = detector.predict(torch.stack([tensor(square), *(a.x for a in altered)]))
    rows = []
    for report, box in zip(reports, boxes, strict=True):
        placed = torch.from_numpy(boxes_to_letterbox([box], frame)[0]).float()
        kept = [stays(candidates, a, placed, report.class_id) for a, candidates in zip(altered, others, strict=True)]
        at = int((overlaps(first.boxes, placed) * first.scores[:, report.class_id]).argmax())
        rows.append(
            {
                "suppressed": suppressed(first, placed, report.class_id),
                "flips": kept[0] | kept[1],
                "augmented": {k: v for one in kept for k, v in one.items()},
                "energy": {"energy": float(torch.logsumexp(first.logits[at], 0))},
            }
        )
    return rows


# -- the study ------------------------------------------------------------------------------------


def caught(right: NDArray[np.bool_], trust: Numbers, weights: Numbers, bothered: float) -> Numbers:
    """(resamples,): share of the wrong below the threshold that `bothered` of the right ones are below, too."""
    order = np.argsort(trust, kind="stable")
    good, bad = weights[:, order] * right[order], weights[:, order] * ~right[order]
    share = np.cumsum(good, 1) / good.sum(1, keepdims=True)
    return np.asarray((np.cumsum(bad, 1) * (share <= bothered)).max(1) / bad.sum(1))


def curve(y: NDArray[np.bool_], trust: Numbers, photos: Sequence[str]) -> list[tools.Interval]:
    """The caught share at each of BOTHERED."""
    return [tools.estimate(y, trust, photos, lambda r, s, w, b=b: caught(r, s, w, b)) for b in BOTHERED]


def groups(reports: Sequence[study.Seen], doubted: Sequence[Mapping[str, Mapping[str, float]]]) -> dict[str, Numbers]:
    """The columns of each competitor."""
    score = np.array([[r.forwards["score"], r.forwards["logit"]] for r in reports])
    columns = {name: study.matrix([d[name] for d in doubted])[1] for name in doubted[0]}
    evidence = study.matrix([r.evidence for r in reports])[1]
    forwards = np.column_stack([score, columns["suppressed"], columns["flips"]])
    return {
        "score": score,
        "score + energy": np.column_stack([score, columns["energy"]]),
        "score + suppressed": np.column_stack([score, columns["suppressed"]]),
        "score + flips": np.column_stack([score, columns["flips"]]),
        "score + suppressed + flips": forwards,
        "score + suppressed + augmented": np.column_stack([score, columns["suppressed"], columns["augmented"]]),
        "evidence": evidence,
        "score + evidence": np.column_stack([score, evidence]),
        "score + suppressed + flips + evidence": np.column_stack([forwards, evidence]),
    }


def compare(
    reports: Sequence[study.Seen], doubted: Sequence[Mapping[str, Mapping[str, float]]]
) -> list[dict[str, Any]]:
    """AUROC, its difference from *score + suppressed + flips*, and the cost curve of every competitor."""
    y, photos = np.array([r.right for r in reports]), [r.photo for r in reports]
    kinds = study.one_hot([r.class_id for r in reports])
    trusts = {
        name: tools.cross_validated(np.column_stack([columns, kinds]), y, photos)
        for name, columns in groups(reports, doubted).items()
    }
    severity = {word: -float(rank) for rank, word in enumerate(("supported", "unknown", "weak", "unsupported"))}
    trusts["verdict alone"] = np.array([severity[r.verdict] for r in reports])
    trusts["score alone, not fitted"] = np.array([r.forwards["score"] for r in reports])
    rival = trusts["score + suppressed + flips"]
    return [
        {
            "what": name,
            "auroc": tools.estimate(y, trust, photos),
            "difference": tools.difference(y, trust, rival, photos),
            "caught": curve(y, trust, photos),
        }
        for name, trust in trusts.items()
    ]


def collected(args: argparse.Namespace, tree: Path) -> tuple[list[study.Seen], list[dict[str, dict[str, float]]]]:
    """Every report that counts, and what its rivals say of it."""
    detector = detectors.build(checkpoints.load(args.model))
    files = {ref.path: ref for ref in find([str(args.images)]).refs}
    reports: list[study.Seen] = []
    doubted: list[dict[str, dict[str, float]]] = []
    for record, own in study.with_records(args, tree):
        reports += own
        doubted += doubts(detector, files[record["image"]["path"]], own, [d["box"] for d in record["detections"]])
    return reports, doubted


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write all figures here")
    args = study.every_report(parser, argv)
    with tempfile.TemporaryDirectory() as spare:
        reports, doubted = collected(args, args.tree or Path(spare))
    right = sum(r.right for r in reports)
    print(f"{right} right and {len(reports) - right} wrong boxes on {len({r.photo for r in reports})} pictures\n")
    words = [
        [word, *(sum(r.verdict == word and r.right == wanted for r in reports) for wanted in (True, False))]
        for word in VERDICTS
    ]
    print(tools.table(words, ("verdict", "right", "wrong")) + "\n")
    figures = compare(reports, doubted)
    rows = [[f["what"], f["auroc"], f["difference"], *f["caught"]] for f in figures]
    head = ("what", "AUROC", "over score + suppressed + flips", *(f"caught at {b:.0%} bothered" for b in BOTHERED))
    print(tools.table(rows, head))
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1, default=vars))


if __name__ == "__main__":
    main()
