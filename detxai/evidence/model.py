"""What is written of the evidence for one class at one box; `scripts/checks/recompute.py` has every number again."""

from __future__ import annotations

from enum import StrEnum
from typing import Literal

from pydantic import Field

from detxai.schema import Number, Part, Text

Word = Literal["supported", "weak", "unsupported", "unknown"]


class EvidenceLevel(StrEnum):
    """How much evidence a run computes."""

    NONE = "none"
    BASIC = "basic"
    FULL = "full"


class Rival(Part):
    """Another class than the one in question."""

    class_id: int = Field(description="id of the other class")
    class_name: Text = Field(description="its name")


class Trial(Part):
    """One forward on a changed picture."""

    what: Literal["without box", "only box", "without top", "softened", "quarter of the way", "half of the way"] = (
        Field(
            description="what was replaced: the box, all but the box, or the fifth of the box with the most"
            " attribution; or the whole picture softened (sigma 0.4 % of its longer side), or on its way from the fill"
        )
    )
    fill: Text = Field(description="by what: the baseline, the blurred picture, a slight gaussian")
    score: Number = Field(description="score that was left, in [0, 1]")
    logit: Number = Field(description="log-odds of that score")
    lead: Number | None = Field(
        description="logit less that of the best of the next four classes, in logits; null: one class"
    )
    other: int | None = Field(description="which class that is; null: one class")


class Contrast(Rival):
    """Why this class and not another: the map of the difference of two logits."""

    net_inside: Number = Field(description="signed attribution of the difference inside the box, in logits")
    positive_inside: Number = Field(description="what speaks for this class there, in logits")
    negative_inside: Number = Field(description="what speaks for the other class there, in logits, at most 0")
    net_outside: Number = Field(description="signed attribution of the difference outside the box, in logits")
    converged: bool | None = Field(description="whether the map kept the tolerance")


class Neighbour(Rival):
    """Another box of the image, and what is left of this one without it."""

    detection: int = Field(description="its id in this record")
    score: Number = Field(description="score of the class at this box without the other, in [0, 1]")
    logit: Number = Field(description="log-odds of that score")
    kept: Number = Field(description="that score / the score; above 1: the other one is in its way")


class Evidence(Part):
    """What the map of one class at one box says beyond the score."""

    left_out = frozenset({"contrasts", "baseline_agreement", "second_baseline", "neighbours", "rests_on"})

    verdict: Word = Field(
        description="supported, weak, unsupported; unknown: unconverged, degenerate or not an integral."
        " Look again where it is not supported; it never clears a box that is"
    )
    reasons: tuple[Text, ...] = Field(description="why, in words with the numbers that decided")
    calibrated: bool = Field(description="whether the thresholds were fitted on labelled images for this model")
    trust: Number | None = Field(
        default=None,
        description="probability that a detection like this is right, in [0, 1], from score and evidence;"
        " null without a calibration",
    )
    net_inside: Number = Field(description="signed attribution inside the box, in the map's unit (logits)")
    positive_inside: Number = Field(description="positive attribution inside the box, in logits, at least 0")
    negative_inside: Number = Field(description="negative attribution inside the box, in logits, at most 0")
    net_outside: Number = Field(description="signed attribution in the picture outside the box, in logits")
    positive_outside: Number = Field(description="positive attribution outside the box, in logits, at least 0")
    negative_outside: Number = Field(description="negative attribution outside the box, in logits, at most 0")
    one_sidedness: Number | None = Field(
        description="net_inside / sum of |cell| over the grid, in [-1, 1]: whether the parts of the object agree;"
        " null where there is none"
    )
    outside_share: Number | None = Field(
        description="share of the net evidence that lies outside the box, in [0, 1]: net_outside / (net_inside +"
        " net_outside), each at least 0; null where neither speaks for the class"
    )
    coherence: Number | None = Field(
        description="sum of |cell| over the grid / sum of |attribution| in the box, in [0, 1]: low where neighbouring"
        " pixels cancel; null where there is none"
    )
    area_share: Number = Field(description="area of the box in the picture / area of the picture, in [0, 1]")
    lift: Number | None = Field(
        description="inside_share / area_share: how much denser positive attribution is in the box than if it were"
        " spread evenly (1); null where there is none"
    )
    concentration: Number | None = Field(
        description="share of positive_inside in the 5 % of the box's pixels that have most of it, in [0.05, 1]"
    )
    ground_share: Number | None = Field(
        description="share of all |attribution| on pixels of the picture's empty ground, in [0, 1];"
        " null: no colour dominates this picture"
    )
    padding_share: Number = Field(description="share of all |attribution| on the letterbox padding, in [0, 1]")
    completeness_error: Number | None = Field(description="as in the attribution; null: no such promise")
    runner_up: Rival | None = Field(description="the strongest other class here; null: the model has one class")
    margin: Number | None = Field(
        description="logit less that of the runner-up, in logits; below 0: not the best class here"
    )
    necessity: Number | None = Field(
        description="1 - score without the box / score, mean of both fills, in [0, 1]; null: a black box"
    )
    necessity_top: Number | None = Field(
        description="1 - score without the fifth of the box with the most attribution / score, likewise; the baseline"
        " as the only fill but with --evidence full"
    )
    sufficiency: Number | None = Field(description="score with only the box / score, mean of both fills, in [0, 1]")
    lead_only_box: Number | None = Field(
        description="mean lead over the next four classes with only the box kept, in logits; below 0: what the box"
        " shows looks more like another class"
    )
    lead_softened: Number | None = Field(
        description="lead over the next four classes when the whole picture is slightly softened, in logits; below 0:"
        " the class hangs on single pixels"
    )
    lead_faded: Number | None = Field(
        description="mean lead at a quarter and half of the way from the baseline to the picture, in logits; with"
        " --evidence full from both fills"
    )
    early_share: Number | None = Field(
        description="share of the way from value_at_baseline to value_at_input that the class has come at a quarter of"
        " the path (1: all of it); null: no baseline"
    )
    half_share: Number | None = Field(description="the same at half of the path; null as above")
    typicality: Number | None = Field(
        default=None,
        description="likeness of the 8 x 8 grid to those of right detections of this class, in [-1, 1];"
        " null without a calibration",
    )
    trials: tuple[Trial, ...] = Field(description="what was changed, and what came of it")
    contrasts: tuple[Contrast, ...] | None = Field(
        default=None, description="with --evidence full: against the runner-up and each --as-class"
    )
    neighbours: tuple[Neighbour, ...] | None = Field(
        default=None,
        description="with --evidence full: up to four boxes that overlap this one or lie near, each replaced by the"
        " baseline in turn as far as it lies outside this box; what leaves least first",
    )
    rests_on: Text | None = Field(
        default=None, description="in words, the neighbour without which less than half of the score stays"
    )
    second_baseline: Text | None = Field(default=None, description="with --evidence full: another picture of nothing")
    baseline_agreement: Number | None = Field(
        default=None, description="rank correlation of the grids under both baselines, in [-1, 1]"
    )
