"""A verdict with its reasons. No rule looks at the score, a logit of the picture itself, or the sum of the map.

By completeness the sum of a map is F(x) − F(b): it restates the score. The rules look at where attribution lies,
whether parts of the object contradict each other, and what is left when parts of the picture are replaced.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from detxai.evidence.model import Word

#: Below this |attribution| in all, in logits, a map holds only rounding.
DEGENERATE = 1e-3
#: Measures by their names in `Evidence`; None, or left out, where there is none.
Numbers = Mapping[str, float | None]
#: For each measure: weak beyond the first, unsupported beyond the second.
Thresholds = Mapping[str, tuple[float, float]]


@dataclass(frozen=True)
class VerdictRule:
    """How `measure` speaks, in words with its value `v` and the class `other`: `good`, or beyond a threshold `poor`.

    `high`: whether high values are the bad ones. `fitted`: whether labelled images may move its thresholds.
    `supports`: whether a good value speaks for the detection; one that is always good says nothing.
    """

    measure: str
    good: str
    poor: str
    high: bool = False
    fitted: bool = True
    supports: bool = True

    def grade(self, value: float, limits: tuple[float, float]) -> int:
        """0 good, 1 weak, 2 unsupported."""
        side = -1.0 if self.high else 1.0
        return sum(side * value < side * limit for limit in limits)


RULES: tuple[VerdictRule, ...] = (
    VerdictRule(
        "lead_only_box",
        "shown alone, the box is no {other} (lead {v:.1f} logits)",
        "shown alone, the box could as well be {other} (lead {v:.1f} logits)",
    ),
    VerdictRule(
        "lead_softened",
        "slightly blurred, it is still the same class (lead {v:.1f} logits)",
        "slightly blurred, it could as well be another class (lead {v:.1f} logits)",
    ),
    VerdictRule(
        "outside_share",
        "what speaks for it lies in the box ({w:.0%})",
        "much of what speaks for it lies outside the box ({v:.0%})",
        True,
    ),
    VerdictRule(
        "one_sidedness",
        "the parts of the object agree ({v:.2f})",
        "some parts of the object speak against it ({v:.2f})",
    ),
    VerdictRule(
        "sufficiency",
        "the box alone keeps its score ({v:.0%})",
        "the box alone keeps hardly any of its score ({v:.1%})",
    ),
    VerdictRule(
        "necessity",
        "without the box the score goes ({v:.0%})",
        "without the box most of the score stays ({v:.0%} goes)",
    ),
    VerdictRule(
        "coherence",
        "neighbouring pixels agree ({v:.2f})",
        "its evidence flickers from pixel to pixel ({v:.2f})",
    ),
    VerdictRule(
        "typicality",
        "its evidence lies where this class usually has it ({v:.2f})",
        "its evidence does not lie where this class usually has it ({v:.2f})",
    ),
    VerdictRule(
        "lift",
        "attribution is {v:.1f} times denser in the box than spread evenly",
        "attribution is only {v:.1f} times as dense in the box as spread evenly",
        fitted=False,
        supports=False,
    ),
    VerdictRule(
        "ground_share",
        "little of the attribution is on empty ground ({v:.0%})",
        "much of the attribution is on empty ground ({v:.0%})",
        True,
        fitted=False,
    ),
    VerdictRule(
        "padding_share",
        "{v:.0%} of the attribution is on the padding",
        "{v:.0%} of the attribution is on the padding",
        True,
        fitted=False,
        supports=False,
    ),
)
#: Leads: unsupported where another class is ahead by a factor e in odds, by meaning; weak by
#: `scripts/studies/study_alarms.py` on generated X-rays of a harder kind. `outside_share` and `sufficiency` are read
#: off generated X-rays and a detector that cheats (`verdict_thresholds.py`); what those pictures cannot show
#: (necessity, lift, ground, padding) is set by meaning. Coherence, typicality and one-sidedness have none without a
#: calibration: the last objects to nearly as many right boxes of real scans (30 %) as wrong ones (41 %).
DEFAULTS: Thresholds = {
    "lead_only_box": (3.0, -1.0),
    "lead_softened": (0.5, -1.0),
    "outside_share": (0.25, 0.5),
    "sufficiency": (0.02, 0.004),
    "necessity": (0.5, 0.2),
    "lift": (1.0, 0.5),
    "ground_share": (0.25, 0.5),
    "padding_share": (0.05, 0.2),
}
WORDS: tuple[Word, ...] = ("supported", "weak", "unsupported")


def verdict(
    measures: Numbers, converged: bool | None, other: str = "", thresholds: Thresholds = DEFAULTS
) -> tuple[Word, list[str]]:
    """The word and its reasons: the findings that decided, or for `supported` all that speak for it.

    `measures` by their names in `Evidence`; `converged` as in the attribution; `other`: the strongest rival's name.
    """
    if converged is None:
        return "unknown", ["this method makes no promise about the sum of its map: its numbers have no scale"]
    if not converged:
        return "unknown", ["the attribution did not converge"]
    parts = (measures["positive_inside"], measures["positive_outside"], measures["negative_inside"])
    if sum(abs(part or 0.0) for part in parts) < DEGENERATE:
        return "unknown", ["there is no attribution: this class does not depend on the picture"]
    grades: list[tuple[int, str]] = []
    for rule in RULES:
        value, limits = measures.get(rule.measure), thresholds.get(rule.measure)
        if value is not None and limits is not None:
            grade = rule.grade(value, limits)
            text = (rule.poor if grade else rule.good).format(v=value, w=1 - value, other=other or "others")
            if grade:
                text += f", {WORDS[grade]} {'above' if rule.high else 'below'} {limits[grade - 1]:.2g}"
            if grade or rule.supports:
                grades.append((grade, text))
    worst = max((grade for grade, _ in grades), default=0)
    return WORDS[worst], [text for grade, text in grades if grade == worst]
