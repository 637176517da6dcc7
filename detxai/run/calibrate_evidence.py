"""One run of `detxai calibrate evidence`: labelled images in, one file that says how far to trust the evidence."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from detxai.config.settings import RunConfig
from detxai.errors import ExitCode, NoInputError, UsageError
from detxai.evidence.calibration import EvidenceCalibration
from detxai.evidence.fitting import LabelledDetection, fit
from detxai.evidence.promise import Promise, require_possible
from detxai.inputs.sources import ImageSource
from detxai.output import atomic, ranking, records, reliability
from detxai.run import checks
from detxai.run.calibrated import evidence_beside, gives_verdicts
from detxai.run.console import Console, Signals, Stopped
from detxai.run.pipeline import Explainer
from detxai.run.promise import promised
from detxai.values import ImageRef


def evidence(
    config: RunConfig,
    source: ImageSource,
    console: Console,
    output: Path | None,
    limit: int | None,
    note: str,
    recall: float | None = None,
    plot: Path | None = None,
) -> ExitCode:
    """Fit on the detections of `source` (its first `limit` images) and write to `output`, else beside the model.

    `recall`: also promise a list that holds this share of the items; `plot`: where the reliability of trust is drawn.
    Raises UsageError (no labels, too few of them), ModelError, OutputError, NoInputError.
    """
    if config.detection.labels is None:
        raise UsageError("Evidence is calibrated on labelled images.", "Give their folder with --labels DIR.")
    if recall is not None:
        require_possible(recall)
    if plot is not None:
        reliability.require_drawable(plot)
    refs = list(islice(checks.some_images(source), limit))
    file = output or evidence_beside(config.model.path)
    # What an earlier calibration says must not count, and one map a detection is enough.
    settings = config.attribution.model_copy(update={"calibration": (), "evidence": "basic", "as_class": ()})
    explainer = Explainer(config.model_copy(update={"attribution": settings}))
    if not gives_verdicts(explainer.plan.config.attribution):
        raise UsageError("Evidence is calibrated on integrals.", "Leave out --method, --gradient and --target.")
    atomic.require_writable(file.parent)
    try:
        with Signals():
            promise = None if recall is None else promised(explainer.plan, refs, recall)
            seen = _gathered(explainer, refs, console)
    except Stopped as stop:
        console.say(f"{stop}; nothing was written", level=-1, kind="error")
        return ExitCode(stop.code)
    if not seen.images:
        raise NoInputError(
            f"No image could be used: {seen.failed} failed, {seen.unlabelled} have no label file.",
            "Check SOURCE and --labels.",
        )
    made = _calibration(explainer, seen, promise, note)
    atomic.write_file(file, made.packed())
    if plot is not None:
        title = f"{made.model}: trust, cross-validated"
        atomic.write_file(plot, reliability.draw(made.quality.reliability or (), title, plot.suffix[1:].lower()))
    _report(console, made, file)
    if seen.unlabelled:
        console.say(f"{seen.unlabelled} images without a label file were passed over")
    return ExitCode.SOME_FAILED if seen.failed else ExitCode.OK


def _calibration(explainer: Explainer, seen: _Seen, promise: Promise | None, note: str) -> EvidenceCalibration:
    """What `seen` says of the model of `explainer`."""
    plan, fitted = explainer.plan, fit(seen.rows, seen.images)
    return EvidenceCalibration(
        model=plan.info.name,
        model_sha256=plan.info.sha256,
        imgsz=plan.size,
        method=plan.config.attribution.method[0],
        baseline=plan.config.attribution.baseline,
        note=note,
        promise=promise,
        **vars(fitted),
    )


@dataclass
class _Seen:
    """The judged detections of labelled images, and how many images there were of each kind."""

    rows: list[LabelledDetection] = field(default_factory=list)
    images: int = 0
    failed: int = 0
    unlabelled: int = 0


def _gathered(explainer: Explainer, refs: list[ImageRef], console: Console) -> _Seen:
    """What the explained images say; failures are told as they come."""
    seen = _Seen()
    with console.progress(len(refs)):
        for result in explainer.explain(refs):
            record = result.record
            if record.error is not None:
                seen.failed += 1
                console.say(f"{result.ref.path}: {record.error.message} ({record.error.code})", kind="warning")
            elif record.labels is None:
                seen.unlabelled += 1
            else:
                seen.images += 1
                seen.rows += labelled_detections(record)
            console.advance(seen.images, f"{len(seen.rows)} detections")
    return seen


def labelled_detections(record: records.Record) -> Iterator[LabelledDetection]:
    """What a record of a labelled image says of each detection whose map converged."""
    for d in record.detections or ():
        own = ranking.judged_map(d)
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
    q, p = made.quality, made.promise
    rows: list[tuple[str, ...]] = [
        ("trust", f"{q.auroc:.3f}", f"{q.calibration_error:.3f}"),
        ("score alone", f"{q.auroc_score:.3f}", f"{q.calibration_error_score:.3f}"),
    ]
    title = f"{q.right} right and {q.wrong} wrong detections on {q.images} images, cross-validated by image"
    console.table(title, ("", "AUROC", "calibration error"), rows)
    bins: list[tuple[str, ...]] = [(f"{b.trust:.2f}", f"{b.right:.2f}", str(b.detections)) for b in q.reliability or ()]
    console.table("how often trust keeps its word", ("mean trust", "share right", "detections"), bins)
    if q.gain is not None:
        shown = f"{q.gain.value:+.3f} nats a detection ({q.gain.low:+.3f} to {q.gain.high:+.3f})"
        words = "a better probability" if q.gain.low > 0 else "not shown to be a better probability"
        console.say(f"trust is {words} than the score: its log loss is lower by {shown}")
    if q.auroc <= q.auroc_score:
        console.say("it does not rank them better than the score: detxai list OUT --sort score does as well")
    if p is not None:
        console.say(
            f"list: every box above {p.threshold:g}, {p.boxes:.1f} a picture. It is expected to hold {p.recall:.4g} of"
            f" the items of a picture like these; here it holds {p.listed} of {p.items}, on {p.pictures} pictures."
            f" Explain with --candidates {p.threshold:g}, then detxai list OUT --promise"
        )
    console.say(f"trust, thresholds and the usual grids of {len(made.classes)} classes: {file}")
