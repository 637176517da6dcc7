"""What ParchGrad does to the share of positive attribution inside the box, and which of its settings does most.

    python scripts/studies/study_parchgrad.py --images DIR --labels DIR --model FILE --calibrate 100
    python scripts/studies/study_parchgrad.py --images DIR            (bundled model, statistics that ship with it)

The images are shuffled by a hash of their names: the first `--calibrate` give the channel statistics (0: those found
for the model), half of the others choose the settings, the other half is reported. Compared with the plain gradient on
the same detections; intervals are 95 %, bootstrapped by image. Everything measured is kept in `--work`, and a second
run goes on from there.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from study_tools import resampled

from detxai import Explainer, RunConfig
from detxai.inputs.sources import ImageSource, find
from detxai.models import checkpoints, detectors
from detxai.parchgrad.statistics import SUFFIX
from detxai.run.calibrate_parchgrad import parchgrad
from detxai.run.console import Console
from detxai.values import ImageRef

GRADIENTS = ("parchgrad-cls", "parchgrad-ins")
#: What is compared on the choosing half: the grid, then one change at a time of the default.
GRID = [{"gamma": gamma, "region": region} for region in ("whole", "detection") for gamma in ("1", "2", "inf")]
CHANGES = [
    {"quantile": 0.1}, {"quantile": 0.3}, {"alpha": 0.001}, {"ratio": 0.25}, {"ratio": 1.0}, {"variance": "off"},
    {"variance": "exact"},
]  # fmt: skip
#: What `detxai explain` does unless told otherwise.
DEFAULT = {"gamma": "inf", "region": "detection"}
#: What methods that take many gradients are tried with.
FEW = [
    DEFAULT,
    {"gamma": "inf", "quantile": 0.1},
    {"gamma": "inf", "region": "whole"},
    {"gamma": "2", "region": "detection"},
]  # fmt: skip
#: Detections an image, at most.
MOST = 3

#: (image, detection) -> share inside the box.
Shares = dict[str, float]


def label(setting: Mapping[str, Any]) -> str:
    """A setting in words."""
    return ", ".join(f"{key} {value}" for key, value in setting.items())


def refs_of(folder: Path) -> list[ImageRef]:
    """The images of a folder in an order that a hash of their names decides."""
    return sorted(find([str(folder)]).refs, key=lambda ref: hashlib.sha256(ref.path.encode()).hexdigest())


def channel_statistics(arguments: argparse.Namespace, refs: Sequence[ImageRef]) -> Path | None:
    """The file with the statistics of the first `--calibrate` of `refs`, made once; None where none are asked for."""
    if not arguments.calibrate:
        return None
    file = Path(arguments.work / f"statistics{SUFFIX}")
    if not file.exists():
        detection = {"imgsz": arguments.imgsz, "labels": arguments.labels}
        config = RunConfig.model_validate({"model": {"path": arguments.model}, "detection": detection})
        parchgrad(config, ImageSource(refs), Console(verbosity=-1), file, arguments.calibrate, "")
    return file


class Study:
    """Measures one model under many settings; what is known is read from and kept in `work`."""

    def __init__(self, arguments: argparse.Namespace, calibration: Path | None) -> None:
        self.arguments, self.calibration = arguments, calibration
        checkpoint = checkpoints.load(arguments.model)
        self.detector = detectors.build(checkpoint)
        self.file = arguments.work / "shares.json"
        self.known: dict[str, Shares] = json.loads(self.file.read_text()) if self.file.exists() else {}

    def shares(self, refs: Sequence[ImageRef], method: str, gradient: str, setting: Mapping[str, Any]) -> Shares:
        """The share inside the box of every detection on `refs`, where there is positive attribution at all."""
        key = " | ".join((method, gradient, label(setting)))
        known = self.known.setdefault(key, {})
        left = [ref for ref in refs if f"{ref.path}#" not in known]
        config = RunConfig.model_validate({
            "model": {"path": self.arguments.model},
            "detection": {"imgsz": self.arguments.imgsz, "max_det": MOST, "conf": self.arguments.conf},
            "attribution": {
                "method": [method], "gradient": [gradient], "evidence": "none",
                "calibration": [str(self.calibration)] if self.calibration else [],
            },
            "parchgrad": dict(setting),
            "run": {"device": self.arguments.device, "precision": "fp32"},
        })  # fmt: skip
        if left:
            for result in Explainer(config, detector=self.detector).explain(left):
                known[f"{result.ref.path}#"] = 0.0
                for d in result.record.detections or ():
                    (a,) = d.attributions
                    if a.inside_share is not None:
                        known[f"{result.ref.path}#{d.id}"] = a.inside_share
            self.file.write_text(json.dumps(self.known))
        wanted = {ref.path for ref in refs}
        return {k: v for k, v in known.items() if not k.endswith("#") and k.rpartition("#")[0] in wanted}


def gained(new: Shares, plain: Shares) -> tuple[float, float, float, float]:
    """(mean of `new`, mean difference to `plain` on the same detections, its interval by image)."""
    both = sorted(set(new) & set(plain))
    values = np.array([new[k] for k in both])
    differences = values - np.array([plain[k] for k in both])
    drawn = resampled([k.rpartition("#")[0] for k in both])
    means = (drawn @ differences) / drawn.sum(1)
    low, high = np.quantile(means, (0.025, 0.975))
    return float(values.mean()), float(differences.mean()), float(low), float(high)


def rows(study: Study, refs: Sequence[ImageRef], method: str, settings: Sequence[Any]) -> Iterator[tuple[Any, ...]]:
    """(gradient, setting, mean, difference, low, high) for each setting and both ways to choose channels."""
    plain = study.shares(refs, method, "plain", {})
    for setting in settings:
        for gradient in GRADIENTS:
            yield gradient, setting, *gained(study.shares(refs, method, gradient, setting), plain)


def show(outcomes: Sequence[tuple[Any, ...]], method: str) -> None:
    for gradient, setting, mean, change, low, high in outcomes:
        interval = f"{change:+.3f} ({low:+.3f} to {high:+.3f})"
        print(f"| {method} | {gradient} | {label(setting)} | {mean:.3f} | {interval} |", flush=True)


def main() -> None:
    """Choose on one half, report on the other."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--labels", type=Path, help="YOLO txt, for the calibration")
    parser.add_argument("--model", help="default: the bundled one")
    parser.add_argument("--imgsz", type=int)
    parser.add_argument("--conf", type=float, default=0.25)
    parser.add_argument("--calibrate", type=int, default=0, help="images that make the statistics; 0: those found")
    parser.add_argument("--limit", type=int, help="images to choose and report on, together")
    parser.add_argument("--methods", nargs="+", default=["grad", "ig"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--work", type=Path, default=Path("runs/study-parchgrad"))
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)

    refs = refs_of(arguments.images)
    calibration = channel_statistics(arguments, refs)
    rest = refs[arguments.calibrate :][: arguments.limit]
    choosing, reporting = rest[::2], rest[1::2]
    study = Study(arguments, calibration)
    print(f"{arguments.calibrate} images calibrate, {len(choosing)} choose, {len(reporting)} report\n")
    print("| method | gradient | setting | share inside | change against plain |\n|---|---|---|---|---|")
    for method in arguments.methods:
        settings = FEW if method != "grad" else [*GRID, *({"gamma": "inf", **change} for change in CHANGES)]
        outcomes = []
        for row in rows(study, choosing, method, settings):
            show([row], method)
            outcomes.append(row)
        plain = study.shares(reporting, method, "plain", {})
        print(f"| {method} | plain | reported half | {np.mean(list(plain.values())):.3f} | |")
        for gradient in GRADIENTS:
            best = max((row for row in outcomes if row[0] == gradient), key=lambda row: row[3])
            for setting in (DEFAULT, best[1]):
                reported = gained(study.shares(reporting, method, gradient, setting), plain)
                show([(gradient, {**setting, "on the": "reported half"}, *reported)], method)


if __name__ == "__main__":
    main()
