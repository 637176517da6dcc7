"""`detxai evaluate`, thin: options to settings, a run to an exit code."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from detxai.cli.options import INPUT, JUDGING, OUTPUT, Limit, Null, Sources, configured, images_of, option
from detxai.errors import DetxaiError
from detxai.evaluation.options import MAX_DET, ORDERS, SANITY_IMAGES, SMOOTH, STEPS, Options

if TYPE_CHECKING:
    from detxai.config.settings import RunConfig


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
    *("detection.labels", "attribution.method", "attribution.gradient", "attribution.baseline", "attribution.layer"),
    *("attribution.tolerance", "attribution.map_tolerance", "attribution.max_evaluations", "attribution.calibration"),
    *("parchgrad.*", "images.*"),
    *("run.device", "run.precision", "run.batch", "run.force", "talk.*"),
    max_det=MAX_DET,
)
def evaluate(
    settings: "RunConfig",
    sources: Sources,
    null: Null = False,
    masks: Annotated[
        Path | None, option("--masks", panel=INPUT, help="part masks of labelled items: STEM.LINE.png", metavar="DIR")
    ] = None,
    limit: Limit = None,
    steps: Annotated[int, option("--steps", panel=JUDGING, help="steps of a curve, squares of equal ones")] = STEPS,
    smooth: Annotated[
        float, option("--smooth", panel=JUDGING, help="blur of a map before its pixels are ranked, in box sides")
    ] = SMOOTH,
    order: Annotated[
        str, option("--order", panel=JUDGING, help="signed: what speaks for the class goes first; or absolute")
    ] = ORDERS[0],
    seed: Annotated[int, option("--seed", panel=JUDGING, help="of the random map, noise and resampling")] = 0,
    baselines: Annotated[
        bool,
        option("--baselines/--no-baselines", panel=JUDGING, help="random map, box prior, gradient, Ultralytics' map"),
    ] = True,
    stability: Annotated[
        int, option("--stability", panel=JUDGING, help="maps under small noise, on the first images", metavar="N")
    ] = 0,
    sanity: Annotated[
        bool, option("--sanity", panel=JUDGING, help="shuffled weights and another class, on the first 8 images")
    ] = False,
    score_precision: Annotated[
        str, option("--score-precision", panel=JUDGING, help="scores of altered pictures: fp32 or bf16")
    ] = "fp32",
    output: Annotated[
        Path, option("-o", "--output", panel=OUTPUT, help="folder of figures, tables and pictures")
    ] = Path("runs/evaluate"),
) -> int:
    """Judge attribution methods on your own images: faithfulness, localisation, cost, with intervals."""
    from detxai.run.console import Console

    console = Console.of(settings.talk)
    try:
        checked = SANITY_IMAGES if sanity else 0
        options = Options(
            output, steps, smooth, order, seed, limit, stability, checked, masks, baselines, score_precision,
            settings.run.force,
        )  # fmt: skip
        images = images_of(sources, null=null, exclude=output, pair=settings.images.paired)
        from detxai.evaluation.run import evaluate as judge

        return int(judge(settings, options, console, images))
    except DetxaiError as error:
        console.error(error)
        return int(error.exit_code)
