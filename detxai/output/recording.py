"""The values of a run as parts of a record."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from detxai.errors import ImageError
from detxai.evidence.maps import GRID, MapSums
from detxai.evidence.model import Evidence, Rival
from detxai.evidence.promise import Promise
from detxai.output.records import (
    AttributionRecord,
    ClassScoreRecord,
    DetectionRecord,
    ErrorInfo,
    Grid,
    ImageInfo,
    LabelRecord,
    MatchRecord,
    NearestRecord,
    PairInfo,
    PromiseRecord,
    Record,
    ViewInfo,
    WindowInfo,
)
from detxai.values import Attribution, Detection, Image, ImageRef, Label

TOP_CLASSES = 5


def image_info(image: Image) -> ImageInfo:
    """What is known of a decoded image."""
    window, pair = image.window, image.ref.pair
    return ImageInfo(
        path=image.ref.path,
        sha256=image.sha256,
        width=image.width,
        height=image.height,
        window=WindowInfo(method=window.method, low=window.low, high=window.high) if window else None,
        pair=PairInfo(path=pair.path, sha256=str(image.pair_sha256), colors=pair.colors) if pair else None,
        view=ViewInfo(**vars(image.ref.view)) if image.ref.view else None,
        bands=image.shown or None,
        notes=image.notes or None,
    )


def failed_record(ref: ImageRef, error: ImageError, image: ImageInfo | None = None, fingerprint: str = "") -> Record:
    """The record of an image that cannot be used; places on this machine are left out of it."""
    message = str(error)
    for place in (str(ref.file.absolute()), str(ref.file)):
        message = message.replace(place, ref.path)
    width, height = error.size
    view = ViewInfo(**vars(ref.view)) if ref.view else None
    known = ImageInfo(path=ref.path, sha256=error.sha256, width=width, height=height, view=view)
    return Record(
        status="failed",
        fingerprint=fingerprint or None,
        image=image or known,
        error=ErrorInfo(code=error.code, message=message),
    )


def detection_record(
    detection: Detection,
    number: int,
    attributions: Sequence[AttributionRecord],
    evidence: Evidence | None = None,
    listed: bool | None = None,
) -> DetectionRecord:
    """The record of one box with its `attributions`."""
    top = (
        ClassScoreRecord(class_id=c.class_id, class_name=c.class_name, score=c.score, logit=c.logit)
        for c in detection.classes[:TOP_CLASSES]
    )
    return DetectionRecord(
        id=number,
        kind=detection.kind,  # type: ignore[arg-type]  # checked by the model
        class_id=detection.class_id,
        class_name=detection.class_name,
        score=detection.score,
        logit=detection.logit,
        top_classes=tuple(top),
        box=detection.box,
        obb=detection.obb,
        match=MatchRecord(**vars(detection.match)) if detection.match else None,
        nearest=NearestRecord(**vars(detection.nearest)) if detection.nearest else None,
        listed=listed,
        attributions=tuple(attributions),
        evidence=evidence,
    )


def promise_record(promise: Promise | None) -> PromiseRecord | None:
    """What a record says of the promise of its run, if there is one."""
    return None if promise is None else PromiseRecord(recall=promise.recall, threshold=promise.threshold)


def label_records(drawn: Sequence[Label] | None, detections: Sequence[Detection]) -> tuple[LabelRecord, ...] | None:
    """The labels of an image with what became of each; None for an image without labels."""
    if drawn is None:
        return None
    met = [(d.match.label, d) for d in detections if d.match is not None]
    hit = {k for k, d in met if d.kind == "detection" and d.match and d.match.status == "true"}
    missed = {k for k, d in met if d.kind == "missed"}

    def status(k: int, label: Label) -> Any:
        unmet = "unknown-class" if label.class_id is None else "not-asked"
        return "found" if k in hit else "missed" if k in missed else unmet

    return tuple(
        LabelRecord(class_id=label.class_id, class_name=label.class_name, box=label.box, status=status(k, label))
        for k, label in enumerate(drawn)
    )


def attribution_record(
    attribution: Attribution,
    sums: MapSums,
    class_name: str,
    *,
    as_class: bool = False,
    overlay: str | None = None,
    map_name: str | None = None,
    evidence: Evidence | None = None,
    against: Rival | None = None,
) -> AttributionRecord:
    """The record of one map and its `sums` over the box.

    Raises ValueError where a number is not finite: such a map must not look like a result.
    """
    return AttributionRecord(
        method=attribution.method,
        gradient=attribution.gradient,
        target=attribution.target.kind,
        class_id=attribution.target.class_id,
        class_name=class_name,
        as_class=as_class,
        against=against,
        baseline=attribution.baseline,
        precision=attribution.precision,
        path=attribution.path,
        value_at_input=attribution.value_at_input,
        value_at_baseline=attribution.value_at_baseline,
        sum=attribution.total,
        completeness_error=attribution.completeness_error,
        error_bound=attribution.error_bound,
        map_error=attribution.map_error,
        converged=attribution.converged,
        evaluations=attribution.evaluations,
        net_inside=sums.net_inside,
        inside_share=sums.inside_share,
        peak=sums.peak,
        near_edge=sums.near_edge,
        grid=Grid(rows=GRID, cols=GRID, values=tuple(map(tuple, sums.cells.tolist()))),
        overlay=overlay,
        map=map_name,
        notes=attribution.notes or None,
        evidence=evidence,
    )
