"""Groups of explanations over a run: boxes of a class whose evidence lies alike, told in the summary without labels."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from detxai.evidence.groups import FEWEST, groups, outside_share, vectors, where
from detxai.evidence.verdict import DEFAULTS
from detxai.output.ranking import judged_map
from detxai.output.records import DetectionRecord
from detxai.output.summary import GroupRecord

#: So many boxes of a class are kept for its groups: the first ones.
KEPT = 5000
#: Typical boxes that are named.
NAMED = 5
#: Share of the evidence outside the boxes from which a group is a finding: where a single box is weak.
OUTSIDE = DEFAULTS["outside_share"][0]


@dataclass
class GroupTally:
    """The evidence of the boxes of one class, under the method of the first of them."""

    way: tuple[str, str] | None = None
    names: list[str] = field(default_factory=list)
    grids: list[np.ndarray] = field(default_factory=list)
    outside: list[float] = field(default_factory=list)

    def add(self, path: str, d: DetectionRecord) -> None:
        """Take in one box; passed over without evidence, or when there are enough."""
        own = judged_map(d)
        if own is None or d.evidence is None or len(self.names) >= KEPT:
            return
        self.way = self.way or (own.method, own.gradient)
        if self.way == (own.method, own.gradient):
            self.names.append(f"{path}#{d.id}")
            self.grids.append(np.asarray(own.grid.values, np.float32))
            self.outside.append(d.evidence.net_outside)

    def records(self) -> tuple[GroupRecord, ...] | None:
        """The groups, largest first; None for too few boxes."""
        if len(self.names) < FEWEST:
            return None
        grids, outside = np.asarray(self.grids, np.float64), np.asarray(self.outside)
        return tuple(self._record(m, grids[m], outside[m]) for m in groups(vectors(grids, outside))[0])

    def _record(self, members: np.ndarray, grids: np.ndarray, outside: np.ndarray) -> GroupRecord:
        beside = outside_share(grids, outside)
        return GroupRecord(
            boxes=len(members),
            share=len(members) / len(self.names),
            where=where(grids.mean(0)),
            outside=beside,
            finding="much of what speaks for this class lies outside the boxes: look for what it goes by there"
            if beside > OUTSIDE
            else None,
            typical=tuple(self.names[i] for i in members[:NAMED]),
        )
