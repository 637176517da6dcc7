"""Which boxes to look at first: one order for the end of a run, `list`, the page and `diff`."""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from detxai.output.records import AttributionRecord, DetectionRecord, Record

#: Worst first; `none`: run without evidence.
VERDICTS = ("unsupported", "weak", "unknown", "supported", "none")
#: Verdicts that ask for another look.
LOOK = VERDICTS[:3]
KINDS = ("detection", "candidate", "missed")


@dataclass(frozen=True)
class Finding:
    """One box of a tree with what decides whether somebody looks at it."""

    path: str
    id: int
    kind: str
    class_id: int
    class_name: str
    score: float
    verdict: str
    reasons: tuple[str, ...]
    trust: float | None
    overlay: str | None
    detection: DetectionRecord = field(compare=False, repr=False)
    bag: str | None = None

    @property
    def reason(self) -> str:
        """The deciding reason, and how many more there are; empty without evidence."""
        more = f" (+{len(self.reasons) - 1} more)" if len(self.reasons) > 1 else ""
        return self.reasons[0] + more if self.reasons else ""

    def plain(self) -> dict[str, Any]:
        """What `detxai list --json` prints of it."""
        bag = {} if self.bag is None else {"bag": self.bag}
        return {
            "path": self.path, "id": self.id, "kind": self.kind, "class_id": self.class_id,
            "class_name": self.class_name, "score": self.score, "verdict": self.verdict, "trust": self.trust,
            "reasons": list(self.reasons), "box": list(self.detection.box), "overlay": self.overlay,
            "match": self.detection.match and self.detection.match.status, **bag,
        }  # fmt: skip


def class_maps(d: DetectionRecord) -> Iterator[AttributionRecord]:
    """The maps of the class that a box was reported as, one a method; the first is the one that was judged."""
    return (a for a in d.attributions if a.target == "class" and not a.as_class)


def judged_map(d: DetectionRecord) -> AttributionRecord | None:
    """The map that the verdict on a box is about; None where its class was not asked for."""
    return next(class_maps(d), None)


def findings(record: Record) -> Iterator[Finding]:
    """The boxes of `record` as they come; `overlay` is a path in the tree: the map that was judged, else all boxes."""
    folder = record.image.path.rpartition("/")[0]
    for d in record.detections or ():
        first = next((a.overlay for a in class_maps(d) if a.overlay), record.overview)
        evidence = d.evidence
        yield Finding(
            path=record.image.path,
            id=d.id,
            kind=d.kind,
            class_id=d.class_id,
            class_name=d.class_name,
            score=d.score,
            verdict=evidence.verdict if evidence else "none",
            reasons=evidence.reasons if evidence else (),
            trust=evidence.trust if evidence else None,
            overlay=f"{folder}/{first}" if folder and first else first,
            detection=d,
            bag=record.image.view.bag if record.image.view else None,
        )


def severity(f: Finding) -> tuple[int, bool, float, str, int]:
    """Sorts the worst first: what asks for another look before the rest, and the lowest score first in each.

    Which word asks is not in it, nor trust: both bring up fewer wrong boxes (`detxai/review/README.md`).
    Candidates are turned round: the worst is the one that nearly was reported and has evidence.
    """
    kind, content = KINDS.index(f.kind), f.verdict not in LOOK
    if f.kind == "candidate":
        return kind, not content, -f.score, f.path, f.id
    return kind, content, f.score, f.path, f.id


def to_look_at(f: Finding) -> bool:
    """Whether a reported box asks for another look."""
    return f.kind == "detection" and f.verdict in LOOK


@dataclass
class Worst:
    """The `most` worst of the wanted findings of a run and how many there were, without keeping the others."""

    wanted: Callable[[Finding], bool] = to_look_at
    most: int = 20
    count: int = 0
    verdicts: Counter[str] = field(default_factory=Counter)
    kept: list[Finding] = field(default_factory=list)

    def add(self, more: Iterable[Finding]) -> None:
        """Count those of `more` that are wanted."""
        for finding in filter(self.wanted, more):
            self.count += 1
            self.verdicts[finding.verdict] += 1
            bisect.insort(self.kept, finding, key=severity)
            del self.kept[self.most :]
