"""Whether the records of one tree can be compared: the models and ways of explaining that made them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from detxai.output.records import Record

# Records are written in one order and without spaces; quotes within names are escaped.
_MODEL = re.compile(rb'"model":\{"name":("(?:[^"\\]|\\.)*"),"sha256":"([0-9a-f]{64})".*?"imgsz":(\d+)', re.DOTALL)
_WAY = re.compile(
    rb'"kind":"detection",.*?"attributions":\[\{"method":"([^"]+)","gradient":"([^"]+)",.*?"baseline":"([^":]*)',
    re.DOTALL,
)


@dataclass
class Mixture:
    """Models by SHA-256, and ways of explaining, in the order in which they were met."""

    models: dict[str, str] = field(default_factory=dict)
    ways: dict[str, None] = field(default_factory=dict)

    def add(self, record: Record) -> None:
        """Learn how `record` was made."""
        if record.model is not None:
            self._add_model(record.model.sha256, record.model.name, record.model.imgsz)
        for detection in record.detections or ():
            first = detection.attributions[0] if detection.attributions else None
            if first is not None and detection.kind == "detection":
                self._add_way(first.method, first.gradient, first.baseline.partition(":")[0])
                return

    def add_line(self, line: bytes) -> None:
        """Learn how the record was made that `line` of records.jsonl holds, without reading all of it."""
        if model := _MODEL.search(line):
            self._add_model(model[2].decode(), json.loads(model[1]), int(model[3]))
        if way := _WAY.search(line):
            self._add_way(*(part.decode() for part in way.groups()))

    def _add_model(self, sha256: str, name: str, imgsz: int) -> None:
        self.models.setdefault(f"{sha256} {imgsz}", f"{name} ({sha256[:8]}) at {imgsz} px")

    def _add_way(self, method: str, gradient: str, ground: str) -> None:
        """`ground`: the baseline without its colour, since auto names the picture's own."""
        self.ways.setdefault(f"{method} ({gradient}, baseline {ground})")

    def warnings(self) -> list[str]:
        """A sentence for each thing that makes the tree a mixture; none where all is of one kind."""
        return [
            f"this tree holds boxes of {len(names)} {what}: {', '.join(names)}; numbers of one cannot be compared with"
            " those of another"
            for what, names in (("models", list(self.models.values())), ("methods or settings", list(self.ways)))
            if len(names) > 1
        ]

    def unlike(self, sha256: str, imgsz: int, ways: Iterable[tuple[str, str]]) -> list[str]:
        """Models other than this, and methods with another gradient than one of `ways`, in words."""
        own = tuple(f"{method} ({gradient}, " for method, gradient in ways)
        models = [name for key, name in self.models.items() if key != f"{sha256} {imgsz}"]
        return models + [name for name in self.ways if not name.startswith(own)]
