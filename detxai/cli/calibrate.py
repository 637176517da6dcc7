"""The commands below `detxai calibrate`, thin."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from detxai.cli.options import INPUT, MODEL, OUTPUT, RUN, option

calibrate = typer.Typer(no_args_is_help=True)


@calibrate.callback()
def _calibrate() -> None:
    """Gather the statistics that a method needs, in one pass over a folder, into one file."""


@calibrate.command()
def parchgrad(
    sources: Annotated[
        list[str],
        typer.Argument(metavar="SOURCE...", help="File, folder (recursive), 'glob', or - for paths on stdin."),
    ],
    config: Annotated[Path | None, option("-c", "--config", panel=INPUT, help="YAML run config.")] = None,
    sets: Annotated[
        list[str] | None, option("--set", panel=INPUT, help="Override any config key.", metavar="KEY.PATH=VALUE")
    ] = None,
    labels: Annotated[
        Path | None,
        option("--labels", panel=INPUT, help="YOLO txt labels; default: what the model reports.", metavar="DIR"),
    ] = None,
    limit: Annotated[int | None, option("--limit", panel=INPUT, help="Only the first N images.", min=1)] = None,
    model: Annotated[
        str | None,
        option("-m", "--model", panel=MODEL, help="Checkpoint; default: the bundled one.", metavar="PATH"),
    ] = None,
    trust_pickle: Annotated[
        bool | None,
        option("--trust-pickle", panel=MODEL, help="Unpickle this checkpoint fully, in this run only."),
    ] = None,
    imgsz: Annotated[int | None, option("--imgsz", panel=MODEL, help="Network input; default: as trained.")] = None,
    conf: Annotated[float | None, option("--conf", panel=MODEL, help="Without labels: lowest score. [0.25]")] = None,
    output: Annotated[
        Path | None,
        option("-o", "--output", panel=OUTPUT, help="Default: MODEL.parchgrad.safetensors.", metavar="FILE"),
    ] = None,
    note: Annotated[str, option("--note", panel=OUTPUT, help="Kept in the file: where the images came from.")] = "",
    device: Annotated[str | None, option("--device", panel=RUN, help="auto, cpu, cuda:N, mps. [auto]")] = None,
    quiet: Annotated[bool, option("-q", "--quiet", panel=RUN, help="Errors only.")] = False,
) -> int:
    """Channel statistics for --gradient parchgrad-cls and parchgrad-ins, beside the model."""
    from detxai.config import settings as configuration
    from detxai.inputs import sources as places
    from detxai.run.console import Console

    options = {
        "model": model, "trust_pickle": trust_pickle, "imgsz": imgsz, "conf": conf, "device": device,
        "labels": labels and str(labels), "verbosity": -1 if quiet else None,
    }  # fmt: skip
    settings = configuration.load(config, sets or (), os.environ, options)
    found = places.find(sources, sys.stdin.buffer if "-" in sources else None)
    from detxai.run.calibrate_parchgrad import parchgrad as gathered

    return int(gathered(settings, found, Console(settings.talk.verbosity), output, limit, note))


@calibrate.command()
def evidence(
    sources: Annotated[
        list[str],
        typer.Argument(metavar="SOURCE...", help="File, folder (recursive), 'glob', or - for paths on stdin."),
    ],
    labels: Annotated[Path | None, option("--labels", panel=INPUT, help="YOLO txt labels.", metavar="DIR")] = None,
    config: Annotated[Path | None, option("-c", "--config", panel=INPUT, help="YAML run config.")] = None,
    sets: Annotated[
        list[str] | None, option("--set", panel=INPUT, help="Override any config key.", metavar="KEY.PATH=VALUE")
    ] = None,
    limit: Annotated[int | None, option("--limit", panel=INPUT, help="Only the first N images.", min=1)] = None,
    model: Annotated[
        str | None,
        option("-m", "--model", panel=MODEL, help="Checkpoint; default: the bundled one.", metavar="PATH"),
    ] = None,
    trust_pickle: Annotated[
        bool | None,
        option("--trust-pickle", panel=MODEL, help="Unpickle this checkpoint fully, in this run only."),
    ] = None,
    imgsz: Annotated[int | None, option("--imgsz", panel=MODEL, help="Network input; default: as trained.")] = None,
    conf: Annotated[
        float, option("--conf", panel=MODEL, help="Detections from this score on: low, so that some are wrong.")
    ] = 0.05,
    baseline: Annotated[
        str | None, option("--baseline", panel=MODEL, help="As the runs that are to be judged. [auto]")
    ] = None,
    output: Annotated[
        Path | None, option("-o", "--output", panel=OUTPUT, help="Default: MODEL.evidence.json.", metavar="FILE")
    ] = None,
    note: Annotated[str, option("--note", panel=OUTPUT, help="Kept in the file: where the images came from.")] = "",
    device: Annotated[str | None, option("--device", panel=RUN, help="auto, cpu, cuda:N, mps. [auto]")] = None,
    quiet: Annotated[bool, option("-q", "--quiet", panel=RUN, help="Errors only.")] = False,
) -> int:
    """Trust, and thresholds of the verdict, from labelled images, beside the model. It asks to look again; it clears
    nothing."""
    from detxai.config import settings as configuration
    from detxai.inputs import sources as places
    from detxai.run.console import Console

    options = {
        "model": model, "trust_pickle": trust_pickle, "imgsz": imgsz, "conf": conf, "device": device,
        "baseline": baseline, "labels": labels and str(labels), "verbosity": -1 if quiet else None,
    }  # fmt: skip
    settings = configuration.load(config, sets or (), os.environ, options)
    found = places.find(sources, sys.stdin.buffer if "-" in sources else None)
    from detxai.run.calibrate_evidence import evidence as fitted

    return int(fitted(settings, found, Console(settings.talk.verbosity), output, limit, note))
