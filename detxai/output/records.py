"""The versioned record of an image and the summary of a run: what is written, and what it means."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from detxai.errors import ImageError
from detxai.evidence.maps import GRID, MapSums
from detxai.evidence.model import Evidence, Rival
from detxai.evidence.promise import Promise
from detxai.schema import Number, Score, Text, require_written
from detxai.schema import Part as _Part
from detxai.values import Attribution, Detection, Image, ImageRef, Label
from detxai.vocabulary import RECORD_SCHEMA as RECORD_SCHEMA
from detxai.vocabulary import SUMMARY_SCHEMA as SUMMARY_SCHEMA

TOP_CLASSES = 5
ValueGrid = tuple[tuple[Number, ...], ...]


def _ordered(box: tuple[float, float, float, float]) -> tuple[float, float, float, float]:
    left, top, right, bottom = box
    if left > right or top > bottom:
        raise ValueError(f"no box: left {left}, top {top}, right {right}, bottom {bottom}")
    return box


#: left <= right and top <= bottom: more than JSON Schema can say.
Corners = Annotated[tuple[Number, Number, Number, Number], AfterValidator(_ordered)]


def _require_by_status(schema: dict[str, Any], model: type[_Part]) -> None:
    require_written(schema, model)
    schema["if"] = {"properties": {"status": {"const": "ok"}}}
    schema["then"] = {"required": ["fingerprint", "model", "detections"]}
    schema["else"] = {"required": ["error"]}


class WindowInfo(_Part):
    """How more than 8 bits became 8."""

    method: Text = Field(description="how the bounds were chosen")
    low: Number = Field(description="source value that became 0")
    high: Number = Field(description="source value that became 255")


class PairInfo(_Part):
    """The high-energy half of the picture."""

    path: Text = Field(description="as image.path")
    sha256: str = Field(description="of that file's bytes")
    colors: str = Field(description="how both halves became colours: materials or channels")


class ViewInfo(_Part):
    """Which view of which bag."""

    bag: Text = Field(description="path of the image without the name of its view: both views of a bag have the same")
    name: Text = Field(description="name of the view in that path")


class ImageInfo(_Part):
    """The picture."""

    left_out = frozenset({"window", "pair", "view", "notes"})

    path: Text = Field(description="POSIX path in the output tree")
    sha256: str | None = Field(default=None, description="of the file's bytes; null if unreadable")
    width: int | None = Field(default=None, description="pixels, after EXIF rotation")
    height: int | None = Field(default=None, description="pixels, after EXIF rotation")
    window: WindowInfo | None = Field(default=None, description="16-bit and float images only")
    pair: PairInfo | None = Field(default=None, description="dual energy only: the other half of the picture")
    view: ViewInfo | None = Field(default=None, description="only with --views: which view of which bag it is")
    notes: tuple[Text, ...] | None = Field(default=None, description="what is special in this file")


class ModelInfo(_Part):
    """The detector."""

    left_out = frozenset({"letterbox"})

    name: Text = Field(description="file name of the model")
    sha256: str = Field(description="of the model's bytes")
    family: Text = Field(description="kind of detector, such as yolov8")
    head: Text = Field(description="the head that is explained, such as one2many")
    imgsz: int = Field(description="side of the network's input in pixels")
    letterbox: Text | None = Field(
        default=None,
        description="how the picture became that square: stretch (all of it), darknet (likewise, by Darknet's own"
        " filter); absent: letterbox, in its proportions on gray",
    )


class ClassScoreRecord(_Part):
    """One class at a prediction."""

    class_id: int = Field(description="id of the class in the model")
    class_name: Text = Field(description="name of the class in the model")
    score: Score = Field(description="score in [0, 1]")
    logit: Number = Field(description="log-odds of the score")


class Grid(_Part):
    """Signed attribution inside the box, by cells."""

    rows: int = Field(description="number of rows, from the top")
    cols: int = Field(description="number of columns, from the left")
    values: ValueGrid = Field(description="signed attribution of each cell; they sum to net_inside")


class AttributionRecord(_Part):
    """How one target of one detection is explained by one method."""

    left_out = frozenset({"against", "near_edge", "notes"})

    method: str = Field(description="attribution method")
    gradient: str = Field(default="plain", description="the gradient that the method uses")
    target: str = Field(description="explained output: class, contrast, objectness or a box edge")
    class_id: int = Field(description="class that is explained")
    class_name: Text = Field(description="name of that class")
    as_class: bool = Field(default=False, description="asked for, not the predicted class")
    against: Rival | None = Field(default=None, description="contrast only: the other class, whose logit is taken away")
    baseline: Text = Field(description="the picture that shows nothing")
    precision: str = Field(description="arithmetic of the network")
    path: str = Field(description="how the gradient was computed")
    value_at_input: Number = Field(description="target at the picture: logit, or pixels for an edge")
    value_at_baseline: Number | None = Field(description="target at the baseline")
    sum: Number = Field(description="sum of the whole map, padding included")
    completeness_error: Number | None = Field(
        description="|sum - D| / max(|D|, 1), D = value_at_input - value_at_baseline;"
        " null: the method makes no such promise"
    )
    error_bound: Number | None = Field(description="sum of the errors of all intervals / max(|D|, 1); null as above")
    map_error: Number | None = Field(
        default=None,
        description="how far the map may be off (L2, relative), by what every other node says; null as above",
    )
    converged: bool | None = Field(description="error_bound <= tolerance; null as above")
    evaluations: int = Field(description="gradient evaluations spent")
    net_inside: Number = Field(description="signed attribution summed over the box")
    inside_share: Number | None = Field(
        description="positive attribution inside the box / all of it; null where there is none"
    )
    peak: tuple[Number, Number] | None = Field(
        description="x, y in source pixels: centre of the pixel with the most positive attribution"
        " after smoothing over 1/128 of the longer side; null where there is none"
    )
    near_edge: Number | None = Field(
        default=None,
        description="edges only: share of |attribution| in the box that lies in its third nearest to that edge,"
        " summed over 9 x 9 cells, in [0, 1]",
    )
    grid: Grid = Field(description="8 x 8 cells of the box clipped to the image, area-weighted")
    overlay: Text | None = Field(default=None, description="name of the picture beside the record")
    map: Text | None = Field(default=None, description="name of the raw map beside the record")
    notes: tuple[Text, ...] | None = Field(default=None, description="what is special in this map")
    evidence: Evidence | None = Field(default=None, description="of a class asked for; else null")


class MatchRecord(_Part):
    """How a box meets the labels of its image."""

    status: Literal["true", "duplicate", "wrong-class", "badly-placed", "background", "missed"] = Field(
        description="true: on a free label of its class (IoU >= 0.5, best score first); duplicate: on a taken one;"
        " wrong-class: on one of another class; badly-placed: IoU >= 0.1 with one of its class; background: none of"
        " these; missed: a label that no detection is on"
    )
    label: int | None = Field(description="number of the label it meets, in labels; null: background")
    iou: Score = Field(description="IoU with that label; background: the best with any; missed: that of nearest")


class NearestRecord(_Part):
    """Where a box is explained that is not the model's own: at the prediction of its class with the best IoU.

    Of those within 0.1 of the best IoU, the best score: neighbouring anchors give all but the same box.
    """

    box: Corners = Field(description="of that prediction, in source pixels")
    iou: Score = Field(description="IoU of that box with this one")
    score: Score = Field(description="the model's score of the class there")


class DetectionRecord(_Part):
    """One box."""

    left_out = frozenset({"obb", "match", "nearest", "listed"})

    id: int = Field(description="number in this image: detections by falling score, then candidates, then misses")
    kind: Literal["detection", "candidate", "missed"] = Field(
        description="detection: reported (or given); candidate: score not above the threshold; missed: a label's box"
    )
    class_id: int = Field(description="predicted class")
    class_name: Text = Field(description="its name")
    score: Score = Field(description="score of the predicted class in [0, 1]; of a given box as given")
    logit: Number = Field(description="log-odds of the model's score")
    top_classes: tuple[ClassScoreRecord, ...] = Field(description="best classes by falling score")
    box: Corners = Field(description="left, top, right, bottom in source pixels")
    obb: tuple[Number, Number, Number, Number, Number] | None = Field(
        default=None, description="rotated boxes only: cx, cy, w, h, radians; box is its hull"
    )
    match: MatchRecord | None = Field(default=None, description="labelled images only")
    nearest: NearestRecord | None = Field(default=None, description="misses and given boxes only")
    listed: bool | None = Field(
        default=None,
        description="whether it is on the list that holds the promised share of items; not of misses",
    )
    attributions: tuple[AttributionRecord, ...] = Field(description="one for each map")
    evidence: Evidence | None = Field(
        default=None, description="for the predicted class under the first method; null: --evidence none"
    )


class LabelRecord(_Part):
    """What somebody says is in the image."""

    class_id: int | None = Field(description="its class in the model; null: the model has no such class")
    class_name: Text = Field(description="its name")
    box: Corners = Field(description="left, top, right, bottom in source pixels")
    status: Literal["found", "missed", "unknown-class", "not-asked"] = Field(
        description="found: a detection is on it; missed: none is; unknown-class: the model has no such class, so that"
        " nothing can be explained; not-asked: its class was left out of the run"
    )


class ErrorInfo(_Part):
    """Why an image failed."""

    code: str = Field(description="kind of failure, such as truncated")
    message: Text = Field(description="a sentence for people")


class PromiseRecord(_Part):
    """The list with a promise that an image's boxes were held against."""

    recall: Score = Field(description="share of a picture's items that the listed boxes are expected to hold")
    threshold: Score = Field(description="boxes with a higher score are listed")


class Record(_Part):
    """One image: what was detected and why, or why it failed."""

    left_out = frozenset({"fingerprint", "model", "error", "labels", "promise", "overview", "detections"})

    schema_: Literal["detxai.record/1"] = Field(
        default=RECORD_SCHEMA, alias="schema", description="name and number of this format"
    )
    status: Literal["ok", "failed"] = Field(description="whether the image could be explained")
    fingerprint: str | None = Field(default=None, description="of image, model, schema and settings")
    image: ImageInfo = Field(description="the picture, as far as it is known")
    model: ModelInfo | None = Field(default=None, description="the detector; not in failed records")
    error: ErrorInfo | None = Field(default=None, description="failed records only")
    labels: tuple[LabelRecord, ...] | None = Field(default=None, description="labelled images only")
    promise: PromiseRecord | None = Field(
        default=None, description="only with a calibration made with --recall, in a run that can keep it"
    )
    overview: Text | None = Field(default=None, description="name of the picture of all boxes, beside the record")
    detections: tuple[DetectionRecord, ...] | None = Field(
        default=None, description="detections, candidates, misses, each by falling score; not in failed records"
    )

    model_config = ConfigDict(json_schema_extra=_require_by_status)

    @model_validator(mode="after")
    def _whole(self) -> Record:
        whole = self.fingerprint and self.model and self.detections is not None and not self.error
        if not (whole if self.status == "ok" else self.error):
            raise ValueError("ok needs fingerprint, model and detections; failed needs an error")
        return self

    def files(self) -> Iterator[str]:
        """Names of the pictures and maps that belong to this record."""
        if self.overview is not None:
            yield self.overview
        for detection in self.detections or ():
            for attribution in detection.attributions:
                yield from filter(None, (attribution.overlay, attribution.map))


class ImageCounts(_Part):
    """How many images ended how."""

    ok: int = Field(default=0, description="explained in this run")
    failed: int = Field(default=0, description="failed in this run")
    skipped: int = Field(default=0, description="done by an earlier run")
    ignored: int = Field(default=0, description="files that are no images")


class GroupRecord(_Part):
    """Boxes of one class whose evidence lies alike."""

    left_out = frozenset({"finding"})

    boxes: int = Field(description="how many")
    share: Score = Field(description="of the boxes of the class")
    where: Text = Field(description="in words, where in the box most of it lies")
    outside: Score = Field(description="share of the net evidence that lies outside the boxes")
    finding: Text | None = Field(default=None, description="what a person should look into, in words")
    typical: tuple[Text, ...] = Field(description="its most typical boxes, path#id")


class ClassStatistics(_Part):
    """What a run saw of one class: its detections, not candidates and misses."""

    left_out = frozenset({"verdicts", "mean_grid", "grid_spread", "labels", "true", "false", "missed", "groups"})

    class_id: int = Field(description="id of the class in the model")
    class_name: Text = Field(description="its name")
    detections: int = Field(description="boxes of this class")
    mean_score: Number | None = Field(default=None, description="mean score of these boxes")
    mean_inside_share: Number | None = Field(default=None, description="mean inside_share of their maps, target class")
    converged_share: Number | None = Field(default=None, description="share of these maps that converged")
    verdicts: dict[str, int] | None = Field(default=None, description="their verdicts, and how many have each")
    mean_grid: ValueGrid | None = Field(default=None, description="mean of their grids, target class: 8 x 8, logits")
    grid_spread: ValueGrid | None = Field(default=None, description="standard deviation of each cell of these grids")
    labels: int | None = Field(default=None, description="labels of this class; runs with labels only, as are the next")
    true: int | None = Field(default=None, description="detections that are on one of these labels")
    false: int | None = Field(default=None, description="other detections of this class on labelled images")
    missed: int | None = Field(default=None, description="of these labels, those that no detection is on")
    groups: tuple[GroupRecord, ...] | None = Field(
        default=None, description="its boxes by where their evidence lies, of at least twelve; one: of one kind"
    )


class Failure(_Part):
    """One failed image."""

    path: Text = Field(description="of the image")
    code: str = Field(description="kind of failure")
    message: Text = Field(description="a sentence for people")


class Unfinished(_Part):
    """An image that a run began and left."""

    path: Text = Field(description="of the image")
    detections: int = Field(description="its boxes")
    kept: int = Field(description="boxes whose explanations are kept for the next run of the same command")


class Summary(_Part):
    """One run."""

    left_out = frozenset({"listed", "unfinished"})

    schema_: Literal["detxai.summary/1"] = Field(
        default=SUMMARY_SCHEMA, alias="schema", description="name and number of this format"
    )
    images: ImageCounts = Field(default_factory=lambda: ImageCounts(), description="images by end")
    detections: int = Field(default=0, description="reported or given boxes in this run")
    candidates: int = Field(default=0, description="boxes below the threshold that were explained")
    listed: int | None = Field(
        default=None, description="boxes on the list that holds the promised share of items; runs with a promise only"
    )
    labelled: int | None = Field(default=None, description="images with labels; null: no labels were asked for")
    matches: dict[str, int] | None = Field(
        default=None, description="detections on labelled images by match.status, and labels that were missed"
    )
    attributions: int = Field(default=0, description="maps computed in this run")
    unconverged: int = Field(default=0, description="maps that missed the wanted tolerance")
    evaluations: int = Field(default=0, description="gradient evaluations in this run")
    seconds: Number = Field(default=0.0, description="wall-clock time of the run")
    timings: dict[str, Number] = Field(
        default_factory=dict,
        description="seconds by stage: in the engine (device), and its thread waiting for input and for output",
    )
    exit_code: int = Field(default=0, description="of the process")
    stopped: Text | None = Field(default=None, description="why the run ended early")
    unfinished: tuple[Unfinished, ...] | None = Field(
        default=None, description="images that it had begun then; absent: none"
    )
    device: Text | None = Field(default=None, description="where the network ran")
    model: ModelInfo | None = Field(default=None, description="the detector")
    versions: dict[str, Text] = Field(default_factory=dict, description="of the software")
    config: dict[str, Any] = Field(default_factory=dict, description="the resolved settings")
    classes: tuple[ClassStatistics, ...] = Field(default=(), description="statistics by class")
    failures: tuple[Failure, ...] = Field(default=(), description="the failed images")
    warnings: tuple[Text, ...] = Field(default=(), description="what was said that every reader must know")


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


def dump(record: Record | Summary) -> bytes:
    """One line of UTF-8 JSON with a newline: a record's file is its line in `records.jsonl`.

    The same record gives the same bytes; numbers carry 6 significant digits, NaN is refused.
    """
    plain = record.model_dump(mode="json", by_alias=True)
    text = json.dumps(plain, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.encode("utf-8") + b"\n"


def load(raw: bytes) -> Record:
    """The record in `raw`; raises ValueError where it is none of this schema."""
    return Record.model_validate_json(raw)


def schema(kind: Literal["record", "summary"]) -> dict[str, Any]:
    """JSON Schema of a written record or summary."""
    model: type[_Part] = Record if kind == "record" else Summary
    return model.model_json_schema(by_alias=True, mode="validation")


def field_table(model: type[BaseModel] = Record) -> str:
    """A Markdown table of every field with its meaning, parts in dotted names (`[]`: a list)."""
    rows = (f"| `{name}` | {text} |" for name, text in _fields(model, ""))
    return "\n".join(["| field | meaning |", "|---|---|", *rows]) + "\n"


def _fields(model: type[BaseModel], prefix: str) -> Iterator[tuple[str, str]]:
    for name, field in model.model_fields.items():
        parts = [p for p in _leaves(field.annotation) if isinstance(p, type)]
        inner = [p for p in parts if issubclass(p, BaseModel)]
        label = prefix + (field.alias or name)
        if inner:
            listed = "[]" if "tuple" in str(field.annotation) else ""
            yield from _fields(inner[0], f"{label}{listed}.")
        else:
            yield label, (field.description or "").replace("|", "\\|")


def _leaves(annotation: Any) -> Iterator[Any]:
    """The types in an annotation such as `tuple[Part, ...] | None`."""
    inner = get_args(annotation)
    for part in inner:
        yield from _leaves(part)
    if not inner:
        yield annotation
