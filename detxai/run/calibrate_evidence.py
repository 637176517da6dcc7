"""One run of `detxai calibrate evidence`: labelled images in, one file that says how far to trust the evidence."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from detxai.config.settings import RunConfig
from detxai.errors import ExitCode, NoInputError, UsageError
from detxai.evidence.calibration import EvidenceCalibration
from detxai.evidence.fitting import LabelledDetection, fit
from detxai.inputs.sources import Found
from detxai.output import records, store
from detxai.run import checks
from detxai.run.console import Console, Signals, Stopped
from detxai.run.pipeline import Explainer
from detxai.run.plan import evidence_beside, gives_verdicts


def evidence(
    config: RunConfig, found: Found, console: Console, output: Path | None, limit: int | None, note: str
) -> ExitCode:
    """Fit on the detections of `found` (its first `limit` images) and write to `output`, else beside the model.

    Raises UsageError (no labels, too few of them, no scikit-learn), ModelError, OutputError, NoInputError.
    """
    if config.detection.labels is None:
        raise UsageError("Evidence is calibrated on labelled images.", "Give their folder with --labels DIR.")
    refs = checks.some_images(found)
    file = output or evidence_beside(config.model.path)
    # What an earlier calibration says must not count, and one map a detection is enough.
    settings = config.attribution.model_copy(update={"calibration": (), "evidence": "basic", "as_class": ()})
    explainer = Explainer(config.model_copy(update={"attribution": settings}))
    if not gives_verdicts(explainer.plan.config.attribution):
        raise UsageError("Evidence is calibrated on integrals.", "Leave out --method, --gradient and --target.")
    store.require_writable(file)
    rows: list[LabelledDetection] = []
    images = failed = unlabelled = 0
    try:
        with Signals(), console.progress(found.count if limit is None else None):
            for result in explainer.explain(islice(refs, limit)):
                record = result.record
                if record.error is not None:
                    failed += 1
                    console.say(f"{result.ref.path}: {record.error.message} ({record.error.code})", kind="warning")
                elif record.labels is None:
                    unlabelled += 1
                else:
                    images += 1
                    rows += labelled_detections(record)
                console.advance(images, f"{len(rows)} detections")
    except Stopped as stop:
        console.say(f"{stop}; nothing was written", level=-1, kind="error")
        return ExitCode(stop.code)
    if not images:
        raise NoInputError(
            f"No image could be used: {failed} failed, {unlabelled} have no label file.", "Check SOURCE and --labels."
        )
    fitted = fit(rows, images)
    info = explainer.plan.info
    made = EvidenceCalibration(
        model=info.name,
        model_sha256=info.sha256,
        imgsz=explainer.plan.size,
        method=settings.method[0],
        baseline=settings.baseline,
        note=note,
        **vars(fitted),
    )
    store.write_file(file, made.packed())
    _report(console, made, file)
    if unlabelled:
        console.say(f"{unlabelled} images without a label file were passed over")
    return ExitCode.SOME_FAILED if failed else ExitCode.OK


def labelled_detections(record: records.Record) -> Iterator[LabelledDetection]:
    """What a record of a labelled image says of each detection whose map converged."""
    for d in record.detections or ():
        own = next((a for a in d.attributions if a.target == "class" and not a.as_class), None)
        if d.kind == "detection" and d.match and d.evidence and own and d.evidence.verdict != "unknown":
            yield LabelledDetection(
                record.image.path,
                d.class_id,
                d.class_name,
                own.value_at_input,
                d.evidence.model_dump(exclude={"trials", "reasons", "trust", "typicality"}),
                own.grid.values,
                d.match.status == "true",
            )


def _report(console: Console, made: EvidenceCalibration, file: Path) -> None:
    q = made.quality
    rows: list[tuple[str, ...]] = [
        ("trust", f"{q.auroc:.3f}", f"{q.calibration_error:.3f}"),
        ("score alone", f"{q.auroc_score:.3f}", f"{q.calibration_error_score:.3f}"),
    ]
    title = f"{q.right} right and {q.wrong} wrong detections on {q.images} images, cross-validated by image"
    console.table(title, ("", "AUROC", "calibration error"), rows)
    console.say(f"trust, thresholds and the usual grids of {len(made.classes)} classes: {file}")
