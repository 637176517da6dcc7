"""`detxai evaluate`, thin: options to settings, a run to an exit code."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from detxai.cli.options import INPUT, JUDGING, MODEL, OUTPUT, RUN, WHAT, option
from detxai.errors import DetxaiError


def evaluate(
    sources: Annotated[
        list[str],
        typer.Argument(metavar="SOURCE...", help="File, folder (recursive), 'glob', or - for paths on stdin."),
    ],
    config: Annotated[Path | None, option("-c", "--config", panel=INPUT, help="YAML run config.")] = None,
    sets: Annotated[
        list[str] | None,
        option("--set", panel=INPUT, help="Override any config key.", metavar="KEY.PATH=VALUE"),
    ] = None,
    null: Annotated[bool, option("-0", "--null", panel=INPUT, help="Paths on stdin end in NUL.")] = False,
    labels: Annotated[
        Path | None, option("--labels", panel=INPUT, help="YOLO txt labels: also judge by their boxes.", metavar="DIR")
    ] = None,
    masks: Annotated[
        Path | None, option("--masks", panel=INPUT, help="Part masks of labelled items: STEM.LINE.png.", metavar="DIR")
    ] = None,
    limit: Annotated[int | None, option("--limit", panel=INPUT, help="Only the first images.", metavar="N")] = None,
    window: Annotated[str | None, option("--window", panel=INPUT, help="16-bit and float images. [auto]")] = None,
    model: Annotated[
        str | None,
        option("-m", "--model", panel=MODEL, help="Checkpoint; default: the bundled one.", metavar="PATH"),
    ] = None,
    trust_pickle: Annotated[
        bool | None,
        option("--trust-pickle", panel=MODEL, help="Unpickle this checkpoint fully, in this run only."),
    ] = None,
    names: Annotated[
        Path | None,
        option("--names", panel=MODEL, help="Class names, one a line (Darknet, ONNX).", metavar="FILE"),
    ] = None,
    conf: Annotated[float | None, option("--conf", panel=MODEL, help="Lowest score judged. [0.25]")] = None,
    iou: Annotated[float | None, option("--iou", panel=MODEL, help="NMS overlap. [0.7]")] = None,
    imgsz: Annotated[int | None, option("--imgsz", panel=MODEL, help="Network input; default: as trained.")] = None,
    max_det: Annotated[int | None, option("--max-det", panel=MODEL, help="Most boxes an image. [2]")] = None,
    classes: Annotated[
        list[str] | None, option("--classes", panel=MODEL, help="Only these classes (ids or names).")
    ] = None,
    method: Annotated[
        list[str] | None,
        option("--method", panel=WHAT, help="Methods to judge, as in `detxai explain`. [ig]"),
    ] = None,
    gradient: Annotated[
        list[str] | None,
        option("--gradient", panel=WHAT, help="plain, parchgrad-cls, parchgrad-ins: each with every method. [plain]"),
    ] = None,
    baseline: Annotated[
        str | None,
        option("--baseline", panel=WHAT, help="auto, black, white, gray, blur, mean or an image file. [auto]"),
    ] = None,
    tolerance: Annotated[
        float | None, option("--tolerance", panel=WHAT, help="Wanted bound on the completeness error. [0.05]")
    ] = None,
    max_evaluations: Annotated[
        int | None, option("--max-evaluations", panel=WHAT, help="Most gradient evaluations a detection. [256]")
    ] = None,
    calibration: Annotated[
        list[str] | None, option("--calibration", panel=WHAT, help="Files of `detxai calibrate`.")
    ] = None,
    steps: Annotated[int, option("--steps", panel=JUDGING, help="Steps of a curve, squares of equal ones.")] = 16,
    smooth: Annotated[
        float, option("--smooth", panel=JUDGING, help="Blur of a map before its pixels are ranked, in box sides.")
    ] = 0.04,
    order: Annotated[
        str, option("--order", panel=JUDGING, help="signed: what speaks for the class goes first; or absolute.")
    ] = "signed",
    seed: Annotated[int, option("--seed", panel=JUDGING, help="Of the random map, noise and resampling.")] = 0,
    baselines: Annotated[
        bool,
        option("--baselines/--no-baselines", panel=JUDGING, help="Random map, box prior, gradient, Ultralytics' map."),
    ] = True,
    stability: Annotated[
        int, option("--stability", panel=JUDGING, help="Maps under small noise, on the first images.", metavar="N")
    ] = 0,
    sanity: Annotated[
        bool, option("--sanity", panel=JUDGING, help="Shuffled weights and another class, on the first 8 images.")
    ] = False,
    score_precision: Annotated[
        str, option("--score-precision", panel=JUDGING, help="Scores of altered pictures: fp32 or bf16.")
    ] = "fp32",
    output: Annotated[
        Path, option("-o", "--output", panel=OUTPUT, help="Folder of figures, tables and pictures.")
    ] = Path("runs/evaluate"),
    force: Annotated[bool, option("--force", panel=RUN, help="Judge images again that are done.")] = False,
    device: Annotated[str | None, option("--device", panel=RUN, help="auto, cpu, cuda:N, mps. [auto]")] = None,
    precision: Annotated[
        str | None, option("--precision", panel=RUN, help="Of the maps: auto, fp32, bf16, fp16. [auto]")
    ] = None,
    quiet: Annotated[bool, option("-q", "--quiet", panel=RUN, help="Errors only.")] = False,
    verbose: Annotated[int, option("-v", "--verbose", panel=RUN, count=True, help="More; twice: tracebacks.")] = 0,
    color: Annotated[str | None, option("--color", panel=RUN, help="auto, always, never. [auto]")] = None,
    log_format: Annotated[str | None, option("--log-format", panel=RUN, help="text or json. [text]")] = None,
) -> int:
    """Judge attribution methods on your own images: faithfulness, localisation, cost, with intervals."""
    from detxai.config import settings as configuration
    from detxai.inputs import sources as places
    from detxai.run.console import Console

    settings = configuration.load(config, sets or (), os.environ, {
        "model": model, "names": names, "trust_pickle": trust_pickle, "conf": conf, "iou": iou, "imgsz": imgsz,
        "max_det": max_det, "classes": classes, "method": method, "gradient": gradient, "baseline": baseline,
        "tolerance": tolerance, "max_evaluations": max_evaluations, "calibration": calibration, "window": window,
        "labels": labels and str(labels), "device": device, "precision": precision,
        "verbosity": -1 if quiet else min(verbose, 2) or None, "color": color, "log_format": log_format,
    })  # fmt: skip
    console = Console(settings.talk.verbosity, settings.talk.color, settings.talk.log_format)
    try:
        from detxai.evaluation.options import SANITY_IMAGES, Options

        checked = SANITY_IMAGES if sanity else 0
        options = Options(
            output, steps, smooth, order, seed, limit, stability, checked, masks, baselines, score_precision, force
        )
        found = places.find(sources, sys.stdin.buffer if "-" in sources else None, null, exclude=output)
        from detxai.evaluation.run import evaluate as judge

        return int(judge(settings, options, console, found))
    except DetxaiError as error:
        console.error(error)
        return int(error.exit_code)
