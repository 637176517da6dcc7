"""Whether integrated gradients show what counts better than a random map and the plain gradient, and at which settings.

    python scripts/studies/study_faithfulness.py --images DIR --model FILE --work DIR
    python scripts/studies/study_faithfulness.py --images DIR --labels DIR --model FILE --work DIR --calibrate 60

The images are shuffled by a hash of their names. The first `--calibrate` make ParchGrad's channel statistics (0: none),
the next `--choose` choose between settings of `ig` and of `grad`, the next `--report` are judged by `detxai evaluate`
at the default and at the best settings, with `--methods` and, where there are statistics, ParchGrad's gradients beside
them. Margin: insertion − deletion. Intervals: 95 %, bootstrapped by image. A second run goes on in `--work`.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from study_parchgrad import channel_statistics, refs_of
from study_tools import table

from detxai import RunConfig
from detxai.errors import ExitCode
from detxai.evaluation.files import Files
from detxai.evaluation.options import Options
from detxai.evaluation.run import EvaluationRun
from detxai.evaluation.tables import by_image, interval
from detxai.inputs.sources import ImageSource
from detxai.run.console import Console
from detxai.values import ImageRef

GRADIENTS = ("plain", "parchgrad-cls", "parchgrad-ins")
#: Figures of the reported half, and the figures that are also compared, pair by pair.
REPORTED = ("margin", "margin_black", "margin_blur", "pointing", "energy", "gini", "completeness_error", "evaluations")
COMPARED = ("margin", "margin_black", "margin_blur", "energy")


@dataclass(frozen=True)
class Setting:
    """One way to make and to rank a map."""

    name: str
    method: str = "ig"
    baseline: str = "auto"
    judged: Mapping[str, Any] = field(default_factory=dict, hash=False)


DEFAULT = Setting("default")
WIDE = {"smooth": 0.16}
SMOOTHED = Setting("smoothed four times as much", judged=WIDE)
TRIED = (
    DEFAULT,
    *(Setting(f"baseline {name}", baseline=name) for name in ("black", "gray", "blur")),
    SMOOTHED,
    Setting("absolute", judged={"order": "absolute"}),
    Setting("absolute, smoothed four times as much", judged={"order": "absolute", **WIDE}),
)
#: What the settings are compared with: the gradient as it is judged, and at the settings that flatter it.
PLAIN = Setting("grad", "grad")
FLATTERED = tuple(replace(setting, name=f"grad, {setting.name}", method="grad") for setting in TRIED[-3:])

Figures = list[dict[str, Any]]


class Study:
    """Runs `detxai evaluate` under many settings, each into a folder of its own below `work`."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.console = Console(0 if arguments.verbose else -1)

    def figures(
        self, refs: Sequence[ImageRef], half: str, setting: Setting, baselines: bool = False, **attribution: Any
    ) -> Figures:
        """The figures of the images that show a detection."""
        a = self.arguments
        config = RunConfig.model_validate({
            "model": {"path": a.model},
            "detection": {"imgsz": a.imgsz, "max_det": a.max_det, "labels": a.labels},
            "attribution": {"method": [setting.method], "baseline": setting.baseline, **attribution},
            "run": {"device": a.device, "precision": "fp32"},
        })  # fmt: skip
        folder = a.work / f"{half} {setting.name}".replace(",", "").replace(" ", "-")
        options = Options(folder, a.steps, baselines=baselines, **setting.judged)
        code = EvaluationRun(config, options, self.console).run(ImageSource(refs))
        if code not in (ExitCode.OK, ExitCode.SOME_FAILED):
            raise SystemExit(code)
        documents = (Files(folder).read(ref.path) for ref in refs)
        return [image for image in documents if image is not None and image["detections"]]


def difference(ours: Figures, name: str, theirs: Figures, other: str, metric: str = "margin") -> dict[str, Any] | None:
    """The paired difference of a metric, image by image: mean and interval."""
    pairs = zip(by_image(ours, name, metric), by_image(theirs, other, metric), strict=True)
    return interval([None if a is None or b is None else a - b for a, b in pairs], 0)


def shown(row: Mapping[str, Any] | None) -> str:
    """A figure with its interval."""
    return "–" if row is None else f"{row['mean']:.3f} ({row['low']:.3f} to {row['high']:.3f})"


def margin(own: Figures, name: str) -> dict[str, Any] | None:
    """The mean margin of a method, with its interval."""
    return interval(by_image(own, name, "margin"), 0)


def best_of(figures: Mapping[Setting, Figures]) -> Setting:
    """The setting with the largest mean margin."""
    return max(figures, key=lambda setting: (margin(figures[setting], setting.method) or {"mean": -1.0})["mean"])


def choose(study: Study, refs: Sequence[ImageRef]) -> tuple[Setting, Setting]:
    """The settings of `ig` and of `grad` with the largest margin, after a table of all of them."""
    plain = study.figures(refs, "choose", PLAIN, baselines=True)
    flattered = {PLAIN: plain} | {setting: study.figures(refs, "choose", setting) for setting in FLATTERED}
    figures = {setting: study.figures(refs, "choose", setting) for setting in TRIED}
    names = list(plain[0]["detections"][0]["methods"])
    rows: list[tuple[str, ...]] = [(f"`{name}`", shown(margin(plain, name)), "", "") for name in names]
    for setting, own in (flattered | figures).items():
        if setting != PLAIN:
            less = [shown(difference(own, setting.method, plain, name)) for name in ("random", "grad")]
            title = setting.name if setting.method == "grad" else f"ig, {setting.name}"
            rows.append((title, shown(margin(own, setting.method)), *less))
    print(f"{len(plain)} images with detections choose\n")
    print(table(rows, ("", "margin", "minus random", "minus grad")), flush=True)
    return best_of(figures), best_of(flattered)


def report(study: Study, refs: Sequence[ImageRef], best: Sequence[Setting], statistics: Path | None) -> None:
    """Print what the default, the best settings and the other methods are worth on images that chose nothing."""
    more: dict[str, Any] = {"method": ["ig", "grad", *study.arguments.methods]}
    if statistics is not None:
        more |= {"gradient": list(GRADIENTS), "calibration": [str(statistics)]}
    judged = study.figures(refs, "report", DEFAULT, baselines=True, **more)
    names = list(judged[0]["detections"][0]["methods"])
    count = sum(len(image["detections"]) for image in judged)
    print(f"\nreported: {len(judged)} images, {count} detections\n")
    figures = [(f"`{name}`", *(shown(interval(by_image(judged, name, m), 0)) for m in REPORTED)) for name in names]
    print(table(figures, ("", *REPORTED)))
    print("\npaired differences\n")
    made = {DEFAULT: (judged, "ig"), PLAIN: (judged, "grad")}
    rows: list[tuple[str, ...]] = []
    for own, other in dict.fromkeys(((DEFAULT, PLAIN), (SMOOTHED, FLATTERED[0]), tuple(best))):
        for setting in (own, other):
            if setting not in made:
                made[setting] = study.figures(refs, "report", setting), setting.method
        title = f"ig, {own.name}"
        rows += [(title, name, *_differences(made[own], (judged, name))) for name in ("random", "grad", "box")]
        rows += [(title, other.name, *_differences(made[own], made[other]))] if other != PLAIN else []
    for name in names:
        plain, _, gradient = name.partition(".")
        if gradient:
            rows.append((name, plain, *_differences((judged, name), (judged, plain))))
    print(table(rows, ("", "minus", *COMPARED)), flush=True)


def _differences(ours: tuple[Figures, str], theirs: tuple[Figures, str]) -> list[str]:
    return [shown(difference(*ours, *theirs, metric)) for metric in COMPARED]


def main() -> None:
    """Choose on some images, report on others."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--labels", help="YOLO txt")
    parser.add_argument("--model", help="default: the bundled one")
    parser.add_argument("--imgsz", type=int)
    parser.add_argument("--max-det", type=int, default=1)
    parser.add_argument("--calibrate", type=int, default=0)
    parser.add_argument("--choose", type=int, default=30, help="0: what X-rays chose")
    parser.add_argument("--report", type=int, default=30)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--methods", nargs="*", default=[], help="also reported, beside ig and grad")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--verbose", action="store_true", help="progress and tables of every run, on stderr")
    parser.add_argument("--work", type=Path, default=Path("runs/study-faithfulness"))
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)

    refs = refs_of(arguments.images)
    statistics = channel_statistics(arguments, refs)
    rest = refs[arguments.calibrate :]
    study = Study(arguments)
    best = choose(study, rest[: arguments.choose]) if arguments.choose else (TRIED[-1], FLATTERED[1])
    print(f"\nbest: ig, {best[0].name}; {best[1].name}")
    report(study, rest[arguments.choose :][: arguments.report], best, statistics)


if __name__ == "__main__":
    main()
