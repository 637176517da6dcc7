"""The commands below `detxai calibrate`, thin."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from detxai.cli.options import JUDGING, OUTPUT, Limit, Note, Null, Sources, configured, images_of, option

if TYPE_CHECKING:
    from detxai.config.settings import RunConfig

calibrate = typer.Typer(no_args_is_help=True)


@calibrate.callback()
def _calibrate() -> None:
    """Gather the statistics that a method needs, in one pass over a folder, into one file."""


@calibrate.command()
@configured(
    *(
        "model.*",
        "detection.conf",
        "detection.iou",
        "detection.imgsz",
        "detection.rect",
        "detection.max_det",
        "detection.classes",
    ),
    *("detection.labels", "parchgrad.alpha", "parchgrad.quantile", "parchgrad.normality"),
    *("images.*", "run.device", "talk.*"),
)
def parchgrad(
    settings: "RunConfig",
    sources: Sources,
    null: Null = False,
    limit: Limit = None,
    output: Annotated[
        Path | None,
        option("-o", "--output", panel=OUTPUT, help="default: MODEL.parchgrad.safetensors", metavar="FILE"),
    ] = None,
    note: Note = "",
) -> int:
    """Channel statistics for --gradient parchgrad-cls and parchgrad-ins, beside the model; of boxes in --labels, else
    of what the model reports."""
    from detxai.run.console import Console

    images = images_of(sources, null=null, pair=settings.images.paired)
    from detxai.run.calibrate_parchgrad import parchgrad as gathered

    return int(gathered(settings, images, Console.of(settings.talk), output, limit, note))


@calibrate.command()
@configured(
    *(
        "model.*",
        "detection.conf",
        "detection.iou",
        "detection.imgsz",
        "detection.rect",
        "detection.max_det",
        "detection.classes",
    ),
    *("detection.labels", "attribution.method", "attribution.baseline", "attribution.tolerance"),
    *("attribution.map_tolerance", "attribution.max_evaluations", "images.*"),
    *("run.device", "run.precision", "run.batch", "talk.*"),
    conf=0.05,  # low, so that some of the detections are wrong
)
def evidence(
    settings: "RunConfig",
    sources: Sources,
    null: Null = False,
    limit: Limit = None,
    recall: Annotated[
        float | None,
        option(
            "--recall",
            panel=JUDGING,
            help="promise a list that holds this share of the items, as 0.95: see detxai list --promise",
            metavar="SHARE",
        ),
    ] = None,
    output: Annotated[
        Path | None, option("-o", "--output", panel=OUTPUT, help="default: MODEL.evidence.json", metavar="FILE")
    ] = None,
    plot: Annotated[
        Path | None,
        option("--plot", panel=OUTPUT, help="draw how often trust is right: .svg, .png, .pdf", metavar="FILE"),
    ] = None,
    note: Note = "",
) -> int:
    """Trust, and thresholds of the verdict, from labelled images, beside the model. Detections count from a --conf of
    0.05 on, so that some are wrong. It asks to look again; it clears nothing."""
    from detxai.run.console import Console

    images = images_of(sources, null=null, pair=settings.images.paired)
    from detxai.run.calibrate_evidence import evidence as fitted

    return int(fitted(settings, images, Console.of(settings.talk), output, limit, note, recall, plot))
