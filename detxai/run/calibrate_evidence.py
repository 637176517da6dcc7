"""One run of `detxai calibrate evidence`: labelled images in, one file that says how far to trust the evidence."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path

from detxai.config.settings import RunConfig
from detxai.errors import ExitCode, UsageError
from detxai.evidence.calibration import EvidenceCalibration
from detxai.evidence.fitting import LabelledDetection, fit
from detxai.evidence.promise import Promise, require_possible
from detxai.inputs.sources import ImageSource
from detxai.output import ranking, reliability
from detxai.output.records import ErrorInfo, Record
from detxai.run.calibrate import calibrate
from detxai.run.calibration_lookup import evidence_beside, gives_verdicts
from detxai.run.console import Console
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
    source.require_some()
    work = EvidencePass(config, note, recall, plot)
    return calibrate(work, source, limit, output or evidence_beside(config.model.path), console)


class EvidencePass:
    """The explained detections of labelled images, and what they say of the model; `note` is kept in the file.

    Raises UsageError for maps that no verdict is made for, ModelError.
    """

    def __init__(self, config: RunConfig, note: str = "", recall: float | None = None, plot: Path | None = None):
        # What an earlier calibration says must not count, and one map a detection is enough.
        settings = config.attribution.model_copy(update={"calibration": (), "evidence": "basic", "as_class": ()})
        self.explainer = Explainer(config.model_copy(update={"attribution": settings}))
        self.plan = self.explainer.plan
        if not gives_verdicts(self.plan.config.attribution):
            raise UsageError("Evidence is calibrated on integrals.", "Leave out --method, --gradient and --target.")
        self.note, self.recall, self.plot = note, recall, plot
        self.promise: Promise | None = None
        self.rows: list[LabelledDetection] = []
        self.images = 0

    @property
    def boxes(self) -> int:
        """Detections so far."""
        return len(self.rows)

    def gather(self, refs: Iterable[ImageRef]) -> Iterator[tuple[ImageRef, ErrorInfo | None]]:
        """Take in images one by one: each of them, with the reason where it failed."""
        if self.recall is not None:
            refs = list(refs)
            self.promise = promised(self.plan, refs, self.recall)
        for result in self.explainer.explain(refs):
            if result.record.error is None:
                self.images += 1
                self.rows += labelled_detections(result.record)
            yield result.ref, result.record.error

    @cached_property
    def calibration(self) -> EvidenceCalibration:
        """What all images say."""
        a = self.plan.config.attribution
        return EvidenceCalibration(
            model=self.plan.info.name,
            model_sha256=self.plan.info.sha256,
            imgsz=self.plan.imgsz,
            rect=self.plan.rect or None,
            method=a.method[0],
            baseline=a.baseline,
            note=self.note,
            promise=self.promise,
            **vars(fit(self.rows, self.images)),
        )

    def files(self, output: Path) -> dict[Path, bytes]:
        """The calibration, to be written to `output`, and how reliable trust is, drawn, if that was asked for."""
        made = self.calibration
        files = {output: made.packed()}
        if self.plot is not None:
            title, kind = f"{made.model}: trust, cross-validated", self.plot.suffix[1:].lower()
            files[self.plot] = reliability.draw(made.quality.reliability or (), title, kind)
        return files

    def report(self, console: Console, output: Path) -> None:
        """Say what the calibration holds, and whether it does better than the score alone."""
        made = self.calibration
        q, p = made.quality, made.promise
        rows: list[tuple[str, ...]] = [
            ("trust", f"{q.auroc:.3f}", f"{q.calibration_error:.3f}"),
            ("score alone", f"{q.auroc_score:.3f}", f"{q.calibration_error_score:.3f}"),
        ]
        title = f"{q.right} right and {q.wrong} wrong detections on {q.images} images, cross-validated by image"
        console.table(title, ("", "AUROC", "calibration error"), rows)
        bins = [(f"{b.trust:.2f}", f"{b.right:.2f}", str(b.detections)) for b in q.reliability or ()]
        console.table("how often trust keeps its word", ("mean trust", "share right", "detections"), bins)
        if q.gain is not None:
            shown = f"{q.gain.value:+.3f} nats a detection ({q.gain.low:+.3f} to {q.gain.high:+.3f})"
            words = "a better probability" if q.gain.low > 0 else "not shown to be a better probability"
            console.say(f"trust is {words} than the score: its log loss is lower by {shown}")
        if q.auroc <= q.auroc_score:
            console.say("it does not rank them better than the score: detxai list OUT --sort score does as well")
        if p is not None:
            console.say(
                f"list: every box above {p.threshold:g}, {p.boxes:.1f} a picture. It is expected to hold {p.recall:.4g}"
                f" of the items of a picture like these; here it holds {p.listed} of {p.items}, on {p.pictures}"
                f" pictures. Explain with --candidates {p.threshold:g}, then detxai list OUT --promise"
            )
        console.say(f"trust, thresholds and the usual grids of {len(made.classes)} classes: {output}")


def labelled_detections(record: Record) -> Iterator[LabelledDetection]:
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
