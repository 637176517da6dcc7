"""Recompute every number of the evidence in a record from the record, the image and the model alone.

    detxai explain samples/images -o runs/explain
    python scripts/checks/recompute.py runs/explain/bag-01.jpg.json --images samples/images

Nothing of detxai's evidence, engine or sparse heads is used: the integral is a plain loop over the whole network, the
measures are written out once more. Prints the largest difference of each number and leaves with 1 where one is larger
than rounding; the verdict must follow from the recomputed numbers. Evidence made by `ig` with its default tolerance.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from detxai.attribution import baselines
from detxai.attribution.engine import solve
from detxai.attribution.integral import integrated_gradients
from detxai.attribution.points import Segment
from detxai.evidence.verdict import verdict
from detxai.inputs import decode
from detxai.inputs.letterbox import boxes_to_letterbox, boxes_to_source, letterboxed, map_to_source
from detxai.models import checkpoints, detectors
from detxai.models.detector import Candidates
from detxai.models.predictions import predictions_on
from detxai.values import ImageRef, Target

#: Records keep 6 digits; convolutions in another order cost as much again, and sums of noise some more.
ROUNDING = 1e-3
TOP, SMOOTHING, PIXELS, NEAR = 0.2, 0.04, 0.05, 16
WAY = {"quarter of the way": 0.25, "half of the way": 0.5}
Numbers = dict[str, Any]


class Again:
    """One image with its model, and what the record needs to be compared with."""

    def __init__(self, record: Numbers, folder: Path, model: str | None, settings: dict[str, Any]) -> None:
        self.detector = detectors.build(checkpoints.load(model))
        info = self.detector.info
        assert info.sha256 == record["model"]["sha256"], "another model than the record's"
        path = record["image"]["path"]
        image = decode.load(ImageRef(path, folder / path))
        assert image.sha256 == record["image"]["sha256"], "another image than the record's"
        self.settings = settings
        self.pixels = image.pixels
        rows, columns = record["model"].get("shape") or [record["model"]["imgsz"]] * 2
        fit = record["model"].get("letterbox", "letterbox")
        self.canvas, self.frame = letterboxed(image.pixels, (rows, columns), fit)
        self.x = baselines.picture(self.canvas)
        self.candidates = self._predict(self.x)

    def _predict(self, x: torch.Tensor) -> Candidates:
        with torch.no_grad():
            return predictions_on(self.detector, x)

    def pinned(self, d: Numbers) -> int:
        """The prediction that a detection speaks of: its box, its logit."""
        box = d["nearest"]["box"] if "nearest" in d else d["box"]
        boxes = boxes_to_source(self.candidates.boxes.numpy(), self.frame)
        apart = np.abs(boxes - np.array(box)).max(1)
        for one in d["top_classes"]:
            apart = apart + np.abs(self.candidates.logits[:, one["class_id"]].numpy() - one["logit"])
        return int(apart.argmin())

    def logits(self, x: torch.Tensor, anchor: int) -> np.ndarray:
        """(classes,) of the prediction on another picture, through the whole network."""
        if self.candidates.context is None:
            return self._predict(x).logits[anchor].numpy()
        targets = [self._target(anchor, i) for i in self.detector.info.names]
        with torch.no_grad():
            return self.detector.full_values(x[None], [(0, t) for t in targets]).numpy()

    def _target(self, anchor: int, class_id: int) -> Target:
        return Target(anchor, int(self.candidates.levels[anchor]), "class", class_id, context=self.candidates.context)

    def without(self, d: Numbers, a: Numbers, recorded: Numbers, boxes: list[list[float]], b: torch.Tensor) -> Numbers:
        """What is left of the class without each neighbour that the record names, as far as it lies outside the box."""
        own, rows = self._inside(d["box"]), []
        for n in recorded.get("neighbours", ()):
            hidden = self._inside(boxes[n["detection"]]) & ~own
            z = self.logits(torch.where(torch.from_numpy(hidden), b, self.x), self.pinned(d))[a["class_id"]]
            score, before = (1 / (1 + math.exp(-v)) for v in (z, a["value_at_input"]))
            rows.append({"logit": z, "score": score, "kept": score / before})
        return {"neighbours": rows} if rows else {}

    def _inside(self, box: list[float]) -> np.ndarray:
        """The pixels of the square that a box in source pixels touches."""
        corners = boxes_to_letterbox([box], self.frame)[0]
        sides = [np.arange(count) for count in (self.x.shape[-1], self.x.shape[-2])]
        across, down = (
            (at >= int(max(corners[i], 0))) & (at < math.ceil(corners[i + 2])) for i, at in enumerate(sides)
        )
        return down[:, None] & across

    def evidence(self, d: Numbers, a: Numbers, recorded: Numbers, boxes: list[list[float]]) -> Numbers:
        """The numbers of the evidence for the class that attribution `a` of detection `d` explains; `boxes`: all."""
        anchor, class_id = self.pinned(d), a["class_id"]
        b = self._baseline(a["baseline"])
        target = self._target(anchor, class_id)
        path = integrated_gradients(Segment(self.x, b), [target], **self.settings)
        square = solve(self.detector.full_values, path)[0].map
        numbers = self._of_map(square.numpy(), d["box"], bool(recorded["ground_share"] is not None))
        at_input = self.logits(self.x, anchor)
        order = sorted((i for i in range(len(at_input)) if i != class_id), key=lambda i: -at_input[i])
        if order:
            numbers["margin"] = at_input[class_id] - at_input[order[0]]
        numbers |= self._of_trials(anchor, class_id, order[:4], d["box"], square, b, a, at_input[class_id], recorded)
        return numbers | self.without(d, a, recorded, boxes, b)

    def _baseline(self, name: str) -> torch.Tensor:
        """Of `auto` the name alone counts: its colour is sought anew."""
        again = baselines.resolved(name.partition(":")[0], self.canvas, self.frame)
        return baselines.baseline(again, self.x, self.frame)

    def _of_map(self, square: np.ndarray, box: list[float], grounded: bool) -> Numbers:
        f, m = self.frame, map_to_source(square, self.frame).astype(float)
        height, width = m.shape
        x0, x1 = np.clip(box[::2], 0, width)
        y0, y1 = np.clip(box[1::2], 0, height)
        cells = np.array([
            [_part(m, x0 + j * (x1 - x0) / 8, y0 + i * (y1 - y0) / 8, x0 + (j + 1) * (x1 - x0) / 8,
                   y0 + (i + 1) * (y1 - y0) / 8) for j in range(8)] for i in range(8)
        ])  # fmt: skip
        positive = np.maximum(m, 0)
        inside, net = _part(positive, x0, y0, x1, y1), cells.sum()
        outside, net_outside = positive.sum() - inside, m.sum() - net
        inner = np.abs(square[f.top : f.top + f.inner_height, f.left : f.left + f.inner_width]).sum()
        padding = max(np.abs(square).sum() - inner, 0.0)
        crop = np.sort(positive[math.floor(y0) : math.ceil(y1), math.floor(x0) : math.ceil(x1)].ravel())[::-1]
        share = (x1 - x0) * (y1 - y0) / m.size
        numbers = {
            "net_inside": net, "positive_inside": inside, "negative_inside": net - inside,
            "net_outside": net_outside, "positive_outside": outside, "negative_outside": net_outside - outside,
            "one_sidedness": net / np.abs(cells).sum(), "coherence": np.abs(cells).sum() / (2 * inside - net),
            "outside_share": max(net_outside, 0) / (max(net_outside, 0) + max(net, 0)) if max(net, net_outside) > 0
            else None,
            "area_share": share, "lift": inside / positive.sum() / share,
            "concentration": crop[: max(1, round(PIXELS * crop.size))].sum() / crop.sum(),
            "padding_share": padding / (padding + np.abs(m).sum()),
        }  # fmt: skip
        if grounded:
            colour = baselines.ground(self.canvas[f.top : f.top + f.inner_height, f.left : f.left + f.inner_width])
            empty = (np.abs(self.pixels.astype(int) - colour) <= NEAR).all(-1)
            numbers["ground_share"] = np.abs(m[empty]).sum() / np.abs(m).sum()
        return numbers

    def _of_trials(
        self, anchor: int, class_id: int, others: list[int], box: list[float], square: torch.Tensor, b: torch.Tensor,
        a: Numbers, logit: float, recorded: Numbers,
    ) -> Numbers:  # fmt: skip
        inside = self._inside(box)
        fills = {name: self._baseline(name)
                 for name in dict.fromkeys(t["fill"] for t in recorded["trials"]) if name != "gaussian"}  # fmt: skip
        kept, leads, rows, way = defaultdict(list), defaultdict(list), [], []
        for t in recorded["trials"]:
            hidden = {"without box": inside, "only box": ~inside, "without top": _top(square, inside)}.get(t["what"])
            if t["what"] == "softened":
                picture = baselines.softened(self.x, self.frame)
            elif t["what"] in WAY:
                picture = fills[t["fill"]] + WAY[t["what"]] * (self.x - fills[t["fill"]])
            else:
                picture = torch.where(torch.from_numpy(hidden), fills[t["fill"]], self.x)
            z = self.logits(picture, anchor)
            lead = z[class_id] - max(z[i] for i in others) if others else None
            if t["what"] in WAY and t["fill"] == a["baseline"]:
                way.append((z[class_id] - a["value_at_baseline"]) / (logit - a["value_at_baseline"]))
            rows.append({"logit": z[class_id], "score": 1 / (1 + math.exp(-z[class_id])), "lead": lead})
            kept[t["what"]].append(min((1 + math.exp(-logit)) / (1 + math.exp(-z[class_id])), 1.0))
            leads[t["what"]].append(lead)
        numbers = {
            "necessity": 1 - np.mean(kept["without box"]), "necessity_top": 1 - np.mean(kept["without top"]),
            "sufficiency": np.mean(kept["only box"]), "trials": rows,
            "early_share": way[0], "half_share": way[1],
        }  # fmt: skip
        if others:
            numbers["lead_faded"] = np.mean([leads[what] for what in WAY])
            numbers |= {"lead_only_box": np.mean(leads["only box"]), "lead_softened": np.mean(leads["softened"])}
        return numbers


def _part(m: np.ndarray, x0: float, y0: float, x1: float, y1: float) -> float:
    """The sum of `m` over a rectangle, border pixels by the share of their area that lies in it."""
    across = np.clip(np.minimum(np.arange(m.shape[1]) + 1, x1) - np.maximum(np.arange(m.shape[1]), x0), 0, 1)
    down = np.clip(np.minimum(np.arange(m.shape[0]) + 1, y1) - np.maximum(np.arange(m.shape[0]), y0), 0, 1)
    return float(down @ m @ across)


def _top(square: torch.Tensor, inside: np.ndarray) -> np.ndarray:
    """The fifth of the box with the most attribution, smoothed by two running means."""
    reach = max(1, round(SMOOTHING * math.sqrt(inside.sum())))
    smooth = square.numpy().astype(np.float32)
    for _ in range(2):
        padded = np.pad(smooth, reach).astype(float)
        sums = np.pad(padded, ((1, 0), (1, 0))).cumsum(0).cumsum(1)
        k = 2 * reach + 1
        smooth = (sums[k:, k:] - sums[:-k, k:] - sums[k:, :-k] + sums[:-k, :-k]) / k**2
    smooth = np.where(inside, smooth, -np.inf)
    best = np.argsort(smooth, axis=None)[::-1][: max(1, round(TOP * inside.sum()))]
    mask = np.zeros(inside.size, bool)
    mask[best] = True
    return mask.reshape(inside.shape)


def differences(recorded: Numbers, again: Numbers) -> dict[str, float]:
    """|recorded − recomputed| by field, in units of the larger of 1 and the value; sums of noise of their gross."""
    gross = 1 + again["positive_inside"] - again["negative_inside"]
    apart = {}
    for name, value in again.items():
        if name in ("trials", "neighbours"):
            pairs = [(old[k], new[k]) for old, new in zip(recorded[name], value, strict=True) for k in new]
        else:
            pairs = [(recorded[name], value)]
        scale = gross if name.startswith(("net_", "positive_", "negative_")) else 1.0
        apart[name] = max((abs(old - new) / max(scale, abs(new)) for old, new in pairs if new is not None), default=0.0)
    return apart


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("records", type=Path, nargs="+")
    parser.add_argument("--images", type=Path, required=True, help="the folder that was explained")
    parser.add_argument("--model", help="default: the bundled detector")
    parser.add_argument("--tolerance", type=float, default=0.05, help="of the run")
    parser.add_argument("--map-tolerance", type=float, help="of the run")
    parser.add_argument("--max-evaluations", type=int, default=256, help="of the run")
    args = parser.parse_args(argv)
    settings = {key: getattr(args, key) for key in ("tolerance", "map_tolerance", "max_evaluations")}
    worst: dict[str, float] = defaultdict(float)
    verdicts = 0
    for file in args.records:
        record = json.loads(file.read_bytes())
        again = Again(record, args.images, args.model, settings)
        for d in record["detections"]:
            own = next(a for a in d["attributions"] if a["target"] == "class" and not a["as_class"])
            asked = [(a, a["evidence"]) for a in d["attributions"] if a["as_class"]]
            for a, recorded in [(own, d["evidence"]), *asked]:
                numbers = again.evidence(d, a, recorded, [other["box"] for other in record["detections"]])
                for name, apart in differences(recorded, numbers).items():
                    worst[name] = max(worst[name], apart)
                if not recorded["calibrated"]:
                    assert verdict(recorded | numbers, a["converged"])[0] == recorded["verdict"], (file, d["id"])
                verdicts += 1
    for name, apart in sorted(worst.items(), key=lambda item: -item[1]):
        print(f"{name:20} {apart:.1e}")
    print(f"{verdicts} verdicts follow from what was recomputed")
    return int(max(worst.values(), default=0.0) > ROUNDING)


if __name__ == "__main__":
    raise SystemExit(main())
