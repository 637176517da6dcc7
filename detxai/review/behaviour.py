"""How a model uses its evidence for each class, over all boxes of a tree: what makes it say `knife`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from detxai.evidence.groups import groups, likeness, outside_share, vectors
from detxai.output.ranking import Finding, judged_map
from detxai.output.records import AttributionRecord
from detxai.statistics import Moments
from detxai.vocabulary import METHODS, unit

#: How many of the most typical and of the oddest boxes are shown.
SHOWN = 5


@dataclass(frozen=True)
class Group:
    """Boxes of one class whose evidence lies alike; `boxes`: numbers in the behaviour's `found`, most typical first."""

    boxes: tuple[int, ...]
    mean: NDArray[np.float64]
    outside: float
    score: float
    verdicts: Counter[str]


@dataclass(frozen=True)
class Behaviour:
    """One class: its boxes, the mean and spread (8, 8) of their grids in `unit`, and groups of alike ones."""

    class_id: int
    class_name: str
    unit: str
    findings: tuple[Finding, ...]
    verdicts: Counter[str]
    mean: NDArray[np.float64]
    spread: NDArray[np.float64]
    outside: float
    typical: tuple[int, ...]
    odd: tuple[int, ...]
    groups: tuple[Group, ...]
    silhouette: float


def behaviours(findings: Iterable[Finding]) -> list[Behaviour]:
    """Of each class that was reported, by class id; boxes without a map of their class are passed over.

    Only boxes under the method of the first one are taken: maps of two methods have no common unit.
    """
    by_class: dict[int, list[tuple[Finding, AttributionRecord]]] = {}
    way: tuple[str, str] | None = None
    for f in findings:
        a = judged_map(f.detection)
        if f.kind == "detection" and a is not None:
            way = way or (a.method, a.gradient)
            if way == (a.method, a.gradient):
                by_class.setdefault(f.class_id, []).append((f, a))
    return [_behaviour(pairs) for _, pairs in sorted(by_class.items())]


def _behaviour(pairs: Sequence[tuple[Finding, AttributionRecord]]) -> Behaviour:
    findings = tuple(f for f, _ in pairs)
    grids = np.asarray([a.grid.values for _, a in pairs], np.float64)
    outside = np.asarray([_outside(f) for f in findings])
    sums = Moments((8, 8))
    for grid in grids:
        sums.add(grid)
    described = vectors(grids, outside)
    order = np.argsort(-likeness(described), kind="stable").tolist()
    members, clear = groups(described)
    return Behaviour(
        class_id=findings[0].class_id,
        class_name=findings[0].class_name,
        unit=_unit(pairs[0][1]),
        findings=findings,
        verdicts=Counter(f.verdict for f in findings),
        mean=sums.mean,
        spread=sums.std,
        outside=outside_share(grids, outside),
        typical=tuple(order[:SHOWN]),
        odd=tuple(reversed(order[SHOWN:][-SHOWN:])),
        groups=tuple(
            Group(
                tuple(m.tolist()),
                grids[m].mean(0),
                outside_share(grids[m], outside[m]),
                float(np.mean([findings[i].score for i in m])),
                Counter(findings[i].verdict for i in m),
            )
            for m in members
        ),
        silhouette=clear,
    )


def _unit(a: AttributionRecord) -> str:
    return unit(a.method, a.target, a.gradient) if a.method in METHODS else f"units of {a.method}"


def _outside(f: Finding) -> float:
    return f.detection.evidence.net_outside if f.detection.evidence is not None else 0.0
