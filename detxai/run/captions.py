"""The words on an overlay: what was done, what was found, and what must not be missed."""

from __future__ import annotations

from collections.abc import Sequence

from detxai.evidence.model import Evidence
from detxai.run.results import Explanation
from detxai.values import Attribution, Detection
from detxai.vocabulary import BLACK_BOX_METHODS, LAYER_METHODS

#: More baselines than these are counted, not named, in a caption.
MOST_NAMED = 5


def caption(d: Detection, shown: Sequence[Explanation], other: str | None) -> str:
    """One line about the maps `shown` (several: the edges of a box); `other`: the class that a contrast takes away."""
    first = shown[0].attribution
    parts = [*_question(d, shown, other), *_how(first, alone=len(shown) == 1)]
    evidence = shown[0].evidence
    if evidence is not None and evidence.verdict == "supported":
        parts.insert(0, f"supported: {evidence.reasons[0]}")
    if evidence is not None and evidence.rests_on is not None:
        parts.insert(0, evidence.rests_on)
    text = " · ".join(parts)
    if d.match is not None and d.kind != "missed":
        text += f" · by the labels: {d.match.status}"
    bounds = [e.attribution.error_bound for e in shown if e.attribution.error_bound is not None]
    if bounds:
        text += f" · error ≤ {100 * max(bounds):.1f} %"
    return text + _thirds(shown)


def _question(d: Detection, shown: Sequence[Explanation], other: str | None) -> list[str]:
    """What is asked, where it is not why the predicted class was reported."""
    first = shown[0].attribution
    if shown[0].as_class:
        return [f"as {shown[0].class_name}"]
    if other is not None:
        return [f"{d.class_name}, not {other}"]
    return [first.target.kind] if first.target.kind != "class" and len(shown) == 1 else []


def _how(a: Attribution, *, alone: bool) -> list[str]:
    """The method, what it compared with, and what is special in its map."""
    made = a.method if a.gradient == "plain" else f"{a.method} · {a.gradient}"
    telling = a.method in (*LAYER_METHODS, *BLACK_BOX_METHODS) or a.gradient != "plain"
    return [part for part in (made, _compared(a), *(a.notes if telling and alone else ())) if part]


def _compared(a: Attribution) -> str:
    """What a caption names beside the method: the layer it looked at, or the pictures that show nothing."""
    if a.path.startswith("layer "):
        return a.path
    names = a.baseline.removeprefix("none").removeprefix("auto:").split("+")
    return "+".join(names) if len(names) <= MOST_NAMED else f"{len(names)} pictures"


def _thirds(shown: Sequence[Explanation]) -> str:
    """How much of what moves an edge lies near it, where several edges are shown."""
    if len(shown) == 1:
        return ""
    near = {e.attribution.target.kind: e.sums.near_edge for e in shown}
    thirds = ", ".join(f"{edge} {share:.0%}" for edge, share in near.items() if share is not None)
    return f" · of what moves an edge, its own third of the box has: {thirds}"


def warning(shown: Sequence[Explanation]) -> str | None:
    """What must not be missed: in words that ask for another look, and clear nothing."""
    if any(e.attribution.converged is False for e in shown):
        return "not converged: read with care"
    evidence: Evidence | None = shown[0].evidence
    if evidence is None or evidence.verdict == "supported":
        return None
    return f"{evidence.verdict}, look again: {evidence.reasons[0]}"
