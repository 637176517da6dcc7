"""The words on an overlay: what was done, what was found, and what must not be missed."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from detxai.evidence.model import Evidence
from detxai.output.records import AttributionRecord
from detxai.run.results import Explanation
from detxai.values import Attribution, Detection
from detxai.vocabulary import BLACK_BOX_METHODS, COLOURS, LAYER_METHODS, METHODS

#: More baselines than these are counted, not named, in a caption.
MOST_NAMED = 5
_GRADIENTS = {"parchgrad-cls": "ParchGrad by class", "parchgrad-ins": "ParchGrad by instance"}


def caption(d: Detection, shown: Sequence[Explanation], other: str | None) -> str:
    """One line about the maps `shown` (several: the edges of a box); `other`: the class that a contrast takes away."""
    evidence = shown[0].evidence
    parts = [f"supported: {evidence.reasons[0]}"] if evidence is not None and evidence.verdict == "supported" else []
    parts += [evidence.rests_on] if evidence is not None and evidence.rests_on is not None else []
    parts += _question(d, shown, other)
    a = shown[0].attribution
    telling = a.method in (*LAYER_METHODS, *BLACK_BOX_METHODS) or a.gradient != "plain"
    notes = a.notes if telling and len(shown) == 1 else ()
    parts.append(made(a, [e.attribution.error_bound for e in shown], notes))
    if d.match is not None and d.kind != "missed":
        parts.append(f"by the labels: {d.match.status}")
    return " · ".join(part for part in parts if part) + _thirds(shown)


def made(a: Attribution | AttributionRecord, bounds: Iterable[float | None], notes: Iterable[str] = ()) -> str:
    """How maps like `a` were made, and how exact they are: method, what it compares with, the greatest of `bounds`."""
    parts = [METHODS[a.method].title, _GRADIENTS.get(a.gradient, ""), _compared(a)]
    known = [bound for bound in bounds if bound is not None]
    if known:
        parts.append(f"error at most {100 * max(known):.2g} %")
    return ", ".join(part for part in (*parts, *notes) if part)


def poles(d: Detection, other: str | None) -> tuple[str, str]:
    """What negative and positive attribution speak for, at the two ends of the scale."""
    return ("against", "for") if other is None else (f"for {other}", f"for {d.class_name}")


def _question(d: Detection, shown: Sequence[Explanation], other: str | None) -> list[str]:
    """What is asked, where it is not why the predicted class was reported."""
    first = shown[0].attribution
    if shown[0].as_class:
        return [f"why it could be {shown[0].class_name}"]
    if other is not None:
        return [f"why {d.class_name}, not {other}"]
    if len(shown) > 1:
        return ["what holds the edges of the box"]
    kind = first.target.kind
    return [] if kind == "class" else ["that anything is there"] if kind == "objectness" else [f"the {kind} edge"]


def _compared(a: Attribution | AttributionRecord) -> str:
    """What the caption says of the pictures that show nothing, or the layer that was looked at."""
    if a.path.startswith("layer "):
        return a.path
    names = a.baseline.removeprefix("none").split("+")
    if not any(names):
        return ""
    if len(names) > MOST_NAMED:
        return f"compared with {len(names)} pictures"
    return f"compared with {' and '.join(map(_ground, names))}"


def _ground(name: str) -> str:
    """A baseline in words."""
    if re.fullmatch(r"auto:#([0-9a-f]{2})+", name):
        return f"the empty ground {name.removeprefix('auto:')}"
    plain = name.removeprefix("auto:")
    if plain in COLOURS:
        return f"a {plain} picture"
    return {"blur": "the blurred picture", "mean": "its mean colour"}.get(plain, plain)


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
