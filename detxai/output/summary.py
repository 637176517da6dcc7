"""The summary of a run: how many images ended how, what was seen of each class, with what it was made."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from detxai.output.records import ModelInfo, ValueGrid
from detxai.schema import Number, Part, Score, Text
from detxai.vocabulary import SUMMARY_SCHEMA


class ImageCounts(Part):
    """How many images ended how."""

    ok: int = Field(default=0, description="explained in this run")
    failed: int = Field(default=0, description="failed in this run")
    skipped: int = Field(default=0, description="done by an earlier run")
    ignored: int = Field(default=0, description="files that are no images")


class GroupRecord(Part):
    """Boxes of one class whose evidence lies alike."""

    left_out = frozenset({"finding"})

    boxes: int = Field(description="how many")
    share: Score = Field(description="of the boxes of the class")
    where: Text = Field(description="in words, where in the box most of it lies")
    outside: Score = Field(description="share of the net evidence that lies outside the boxes")
    finding: Text | None = Field(default=None, description="what a person should look into, in words")
    typical: tuple[Text, ...] = Field(description="its most typical boxes, path#id")


class ClassStatistics(Part):
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


class Failure(Part):
    """One failed image."""

    path: Text = Field(description="of the image")
    code: str = Field(description="kind of failure")
    message: Text = Field(description="a sentence for people")


class Unfinished(Part):
    """An image that a run began and left."""

    path: Text = Field(description="of the image")
    detections: int = Field(description="its boxes")
    kept: int = Field(description="boxes whose explanations are kept for the next run of the same command")


class Summary(Part):
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
        description="seconds by stage: of the device, by its own clock; of its thread waiting for input and output",
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
