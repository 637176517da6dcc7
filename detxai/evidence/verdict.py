"""A verdict with its reasons. No rule looks at the score, a logit of the picture itself, or the sum of the map.

By completeness the sum of a map is F(x) − F(b): it restates the score. The rules look at where attribution lies,
whether it is contradicted there, and what is left of the prediction when parts of the picture are replaced.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from detxai.evidence.model import Word

#: Below this |attribution| in all, in logits, a map holds only rounding.
DEGENERATE = 1e-3


@dataclass(frozen=True)
class Rule:
    """`measure` is good from `weak` on and bad below `bad` (`above`: the other way round); `says` names it in words."""

    measure: str
    weak: float
    bad: float
    says: str
    above: bool = False

    def grade(self, value: float) -> int:
        """0 good, 1 weak, 2 bad."""
        side = -1.0 if self.above else 1.0
        return int(side * value < side * self.weak) + int(side * value < side * self.bad)

    def reason(self, value: float) -> str:
        """The finding with its number and the threshold that it was held against."""
        grade = self.grade(value)
        limit = self.bad if grade == 2 else self.weak
        beyond = "at least" if self.above != (grade == 0) else "at most" if self.above else "below"
        if grade:
            beyond = "above" if self.above else "below"
        return f"{self.says} {value:.2f}, {beyond} {limit:g}"


#: Thresholds of `scripts/verdict_thresholds.py`, from generated X-rays and the bundled detector.
RULES: tuple[Rule, ...] = (
    Rule("lead_only_box", 0.5, 0.0, "lead over other classes with only the box kept"),
    Rule("one_sidedness", 0.3, 0.1, "agreement of the parts of the box"),
    Rule("outside_share", 0.25, 0.5, "share of the net evidence that lies outside the box", above=True),
    Rule("lift", 1.5, 1.0, "lift of the box"),
    Rule("sufficiency", 0.2, 0.05, "share of the score that only the box keeps"),
    Rule("necessity", 0.5, 0.2, "share of the score that goes with the box"),
    Rule("padding_share", 0.05, 0.2, "share of the attribution on the padding", above=True),
    Rule("ground_share", 0.3, 0.5, "share of the attribution on empty ground", above=True),
)


def verdict(
    measures: Mapping[str, Any], converged: bool | None, rules: tuple[Rule, ...] = RULES
) -> tuple[Word, list[str]]:
    """The word and its reasons: the findings that decided, or for `supported` those that speak for it.

    `measures` by their names in `Evidence`; `converged` as in the attribution.
    """
    if converged is None:
        return "unknown", ["this method makes no promise about the sum of its map, so its numbers have no scale"]
    if not converged:
        return "unknown", ["the attribution did not converge"]
    if measures["positive_inside"] - measures["negative_inside"] + measures["positive_outside"] < DEGENERATE:
        return "unknown", ["there is no attribution to judge: the class does not depend on the picture"]
    found = [(rule, measures[rule.measure]) for rule in rules if measures.get(rule.measure) is not None]
    worst = max((rule.grade(value) for rule, value in found), default=0)
    words: tuple[Word, ...] = ("supported", "weak", "unsupported")
    return words[worst], [rule.reason(value) for rule, value in found if rule.grade(value) == worst]
