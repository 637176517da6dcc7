"""What labelled images say of one model's evidence: trust in [0, 1], thresholds, how each class usually looks.

Read and applied with numpy alone; `detxai calibrate evidence` makes it (see `detxai.evidence.fitting`).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import ArrayLike
from pydantic import Field, ValidationError

from detxai.errors import UsageError
from detxai.evidence.measures import sigmoid
from detxai.evidence.promise import Promise
from detxai.evidence.typicality import typicality
from detxai.evidence.verdict import Numbers
from detxai.schema import Number, Part, Text
from detxai.values import InputShape

FORMAT: Final = "detxai.evidence/1"
SUFFIX = ".evidence.json"
#: What trust is made of, by their names in `Evidence` but for `logit`: score and evidence.
FEATURES = (
    "logit", "margin", "area_share", "lift", "net_inside", "one_sidedness", "outside_share", "coherence",
    "concentration", "necessity", "necessity_top", "sufficiency", "lead_only_box", "lead_softened", "lead_faded",
    "early_share", "half_share", "typicality",
)  # fmt: skip
#: Features that spread over orders of magnitude, and enter as logarithms.
LOGARITHMIC = frozenset({"area_share", "lift"})


class Feature(Part):
    """One feature of the regression: clipped to the range that was seen (the logit hardly), standardised, weighted."""

    name: str = Field(description="of the measure")
    low: Number = Field(description="1 % quantile of what was seen; lower values count as this")
    high: Number = Field(description="99 % quantile of what was seen; higher values count as this")
    mean: Number = Field(description="subtracted after clipping; what a missing value counts as")
    scale: Number = Field(description="divided by")
    weight: Number = Field(description="coefficient of the standardised value, in logits of trust")


class Usual(Part):
    """The evidence grid of right detections of a class, each scaled to length 1."""

    class_id: int = Field(description="id of the class in the model")
    class_name: Text = Field(description="its name")
    count: int = Field(description="right detections that were seen")
    mean: tuple[tuple[Number, ...], ...] = Field(description="mean of the unit grids, 8 x 8")
    spread: tuple[tuple[Number, ...], ...] = Field(description="standard deviation of each cell")


class Gain(Part):
    """A difference and its 95 % interval over images."""

    value: Number = Field(description="the difference")
    low: Number = Field(description="lower end of the interval")
    high: Number = Field(description="its upper end")


class Bin(Part):
    """Detections of about the same trust: the reliability diagram is made of these."""

    detections: int = Field(description="how many")
    trust: Number = Field(description="their mean trust")
    right: Number = Field(description="share of them that is right")


class Quality(Part):
    """How well the trust did on images that it was not fitted on."""

    left_out = frozenset({"gain", "reliability"})

    images: int = Field(description="labelled images")
    right: int = Field(description="detections on a label of their class")
    wrong: int = Field(description="all other detections")
    auroc: Number = Field(description="of trust, cross-validated by image")
    auroc_score: Number = Field(description="of the score alone on the same detections")
    gain: Gain | None = Field(
        default=None,
        description="log loss of the score less that of trust, cross-validated, in nats a detection: above 0 trust is"
        " the better probability",
    )
    calibration_error: Number = Field(description="expected calibration error of trust over 10 bins, cross-validated")
    calibration_error_score: Number = Field(description="of the score taken as a probability")
    reliability: tuple[Bin, ...] | None = Field(default=None, description="of trust, cross-validated, by tenths of it")


class EvidenceCalibration(Part):
    """The file of `detxai calibrate evidence`."""

    left_out = frozenset({"promise", "rect"})

    schema_: Literal["detxai.evidence/1"] = Field(default=FORMAT, alias="schema", description="name of this format")
    model: Text = Field(description="file name of the model")
    model_sha256: str = Field(description="of the model's bytes")
    imgsz: int | InputShape = Field(description="side of the network's input in pixels; rows, columns of no square")
    rect: Literal[True] | None = Field(default=None, description="no larger than each picture needs; absent: no")
    method: str = Field(description="attribution method whose maps were measured")
    baseline: Text = Field(description="as asked for, such as auto")
    intercept: Number = Field(description="of the regression, in logits of trust")
    features: tuple[Feature, ...] = Field(description="what trust is made of")
    thresholds: dict[str, tuple[Number, Number]] = Field(description="of the verdict: weak, unsupported")
    classes: tuple[Usual, ...] = Field(description="how the evidence of each class usually looks")
    quality: Quality = Field(description="on held-out images")
    promise: Promise | None = Field(default=None, description="of a list of boxes, with --recall")
    note: Text = Field(default="", description="where the images came from")

    def typicality(self, class_id: int, grid: ArrayLike) -> float | None:
        """Likeness of an (8, 8) grid to those of right detections of its class; None for a class without any."""
        usual = next((c for c in self.classes if c.class_id == class_id), None)
        return None if usual is None else typicality(grid, usual.mean)

    def trust(self, measures: Numbers, logit: float) -> float:
        """Probability that a detection with these `measures` (by their names in `Evidence`) is right."""
        row = vector({**measures, "logit": logit}, [f.name for f in self.features])
        total = self.intercept
        for value, f in zip(row, self.features, strict=True):
            if not math.isnan(value):
                total += f.weight * (min(max(value, f.low), f.high) - f.mean) / f.scale
        return sigmoid(total)

    def packed(self) -> bytes:
        """The file's content: the same calibration gives the same bytes."""
        return (self.model_dump_json(by_alias=True, indent=1) + "\n").encode()

    @property
    def sha256(self) -> str:
        """Hex SHA-256 of all that it says."""
        return hashlib.sha256(self.packed()).hexdigest()


def vector(measures: Numbers, names: Sequence[str] = FEATURES) -> list[float]:
    """The features by `names`, NaN where one is missing."""
    values = [math.nan if (value := measures.get(name)) is None else float(value) for name in names]
    return [math.log(max(v, 1e-6)) if n in LOGARITHMIC else v for n, v in zip(names, values, strict=True)]


def read(file: Path) -> EvidenceCalibration:
    """The calibration in a file. Raises UsageError for a file that is none."""
    try:
        return EvidenceCalibration.model_validate_json(file.read_bytes())
    except OSError as error:
        raise UsageError(f"Cannot read the calibration {file}: {error.strerror}.") from error
    except ValidationError as error:
        raise UsageError(
            f"{file} is no file of `detxai calibrate evidence`: {error.errors()[0]['msg']}.", "Make a new one with it."
        ) from error


def calibration_error(right: Sequence[bool] | np.ndarray[Any, Any], probability: ArrayLike, bins: int = 10) -> float:
    """Expected calibration error: mean |share that is right − mean probability| over `bins` of equal width."""
    p, y = np.asarray(probability, np.float64), np.asarray(right, np.float64)
    which = np.minimum((p * bins).astype(int), bins - 1)
    gaps = [abs(float(y[which == b].sum() - p[which == b].sum())) for b in range(bins)]
    return sum(gaps) / len(y)
