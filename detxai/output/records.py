"""The versioned record of an image: what is written, and what it means."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Field, model_validator

from detxai.evidence.model import Evidence, Rival
from detxai.schema import Number, Part, Score, Text, require_written
from detxai.values import InputShape
from detxai.vocabulary import RECORD_SCHEMA as RECORD_SCHEMA

ValueGrid = tuple[tuple[Number, ...], ...]
_LETTERBOX = (
    "how the picture became that: stretch (all over it), darknet (likewise, by Darknet's own filter); absent:"
    " letterbox, in its proportions on gray"
)


def _ordered(box: tuple[float, float, float, float]) -> tuple[float, float, float, float]:
    left, top, right, bottom = box
    if left > right or top > bottom:
        raise ValueError(f"no box: left {left}, top {top}, right {right}, bottom {bottom}")
    return box


#: left <= right and top <= bottom: more than JSON Schema can say.
Corners = Annotated[tuple[Number, Number, Number, Number], AfterValidator(_ordered)]


def _require_by_status(schema: dict[str, Any], model: type[Part]) -> None:
    require_written(schema, model)
    schema["if"] = {"properties": {"status": {"const": "ok"}}}
    schema["then"] = {"required": ["fingerprint", "model", "detections"]}
    schema["else"] = {"required": ["error"]}


class WindowInfo(Part):
    """How more than 8 bits became 8."""

    method: Text = Field(description="how the bounds were chosen")
    low: Number = Field(description="source value that became 0")
    high: Number = Field(description="source value that became 255")


class PairInfo(Part):
    """The high-energy half of the picture."""

    path: Text = Field(description="as image.path, and the same where one file holds both")
    sha256: str = Field(description="of that file's bytes")
    colors: str = Field(description="how both halves became colours: materials or channels")


class ViewInfo(Part):
    """Which view of which bag."""

    bag: Text = Field(description="path of the image without the name of its view: both views of a bag have the same")
    name: Text = Field(description="name of the view in that path")


class ImageInfo(Part):
    """The picture."""

    left_out = frozenset({"window", "pair", "view", "notes", "bands"})

    path: Text = Field(description="POSIX path in the output tree")
    sha256: str | None = Field(default=None, description="of the file's bytes; null if unreadable")
    width: int | None = Field(default=None, description="pixels, after EXIF rotation")
    height: int | None = Field(default=None, description="pixels, after EXIF rotation")
    window: WindowInfo | None = Field(default=None, description="16-bit and float images only")
    bands: tuple[int, ...] | None = Field(default=None, description="of a picture of many: those shown, counted from 1")
    pair: PairInfo | None = Field(default=None, description="dual energy only: the other half of the picture")
    view: ViewInfo | None = Field(default=None, description="only with --views: which view of which bag it is")
    notes: tuple[Text, ...] | None = Field(default=None, description="what is special in this file")


class ModelInfo(Part):
    """The detector."""

    left_out = frozenset({"letterbox", "shape", "rect", "channels"})

    name: Text = Field(description="file name of the model")
    sha256: str = Field(description="of the model's bytes")
    family: Text = Field(description="kind of detector, such as yolov8")
    head: Text = Field(description="the head that is explained, such as one2many")
    imgsz: int = Field(description="longer side of the network's input in pixels, as it was asked for")
    channels: int | None = Field(default=None, description="of the pictures that it reads; absent: 3")
    shape: InputShape | None = Field(default=None, description="rows and columns of that input; absent: a square")
    rect: InputShape | None = Field(
        default=None, description="with --rect: rows and columns at most, of which each picture takes what it needs"
    )
    letterbox: Text | None = Field(default=None, description=_LETTERBOX)


class ClassScoreRecord(Part):
    """One class at a prediction."""

    class_id: int = Field(description="id of the class in the model")
    class_name: Text = Field(description="name of the class in the model")
    score: Score = Field(description="score in [0, 1]")
    logit: Number = Field(description="log-odds of the score")


class Grid(Part):
    """Signed attribution inside the box, by cells."""

    rows: int = Field(description="number of rows, from the top")
    cols: int = Field(description="number of columns, from the left")
    values: ValueGrid = Field(description="signed attribution of each cell; they sum to net_inside")


class AttributionRecord(Part):
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


class MatchRecord(Part):
    """How a box meets the labels of its image."""

    status: Literal["true", "duplicate", "wrong-class", "badly-placed", "background", "missed"] = Field(
        description="true: on a free label of its class (IoU >= 0.5, best score first); duplicate: on a taken one;"
        " wrong-class: on one of another class; badly-placed: IoU >= 0.1 with one of its class; background: none of"
        " these; missed: a label that no detection is on"
    )
    label: int | None = Field(description="number of the label it meets, in labels; null: background")
    iou: Score = Field(description="IoU with that label; background: the best with any; missed: that of nearest")


class NearestRecord(Part):
    """Where a box is explained that is not the model's own: at the prediction of its class with the best IoU.

    Of those within 0.1 of the best IoU, the best score: neighbouring anchors give all but the same box.
    """

    box: Corners = Field(description="of that prediction, in source pixels")
    iou: Score = Field(description="IoU of that box with this one")
    score: Score = Field(description="the model's score of the class there")


class DetectionRecord(Part):
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


class LabelRecord(Part):
    """What somebody says is in the image."""

    class_id: int | None = Field(description="its class in the model; null: the model has no such class")
    class_name: Text = Field(description="its name")
    box: Corners = Field(description="left, top, right, bottom in source pixels")
    status: Literal["found", "missed", "unknown-class", "not-asked"] = Field(
        description="found: a detection is on it; missed: none is; unknown-class: the model has no such class, so that"
        " nothing can be explained; not-asked: its class was left out of the run"
    )


class ErrorInfo(Part):
    """Why an image failed."""

    code: str = Field(description="kind of failure, such as truncated")
    message: Text = Field(description="a sentence for people")


class PromiseRecord(Part):
    """The list with a promise that an image's boxes were held against."""

    recall: Score = Field(description="share of a picture's items that the listed boxes are expected to hold")
    threshold: Score = Field(description="boxes with a higher score are listed")


class Record(Part):
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


def dump(record: Part) -> bytes:
    """A record or summary as one line of UTF-8 JSON with a newline: a record's file is its line in `records.jsonl`.

    The same record gives the same bytes; numbers carry 6 significant digits, NaN is refused.
    """
    plain = record.model_dump(mode="json", by_alias=True)
    text = json.dumps(plain, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.encode("utf-8") + b"\n"


def load(raw: bytes) -> Record:
    """The record in `raw`; raises ValueError where it is none of this schema."""
    return Record.model_validate_json(raw)
