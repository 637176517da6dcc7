"""Whether the records of one tree can be compared: the models and ways of explaining that made them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache

from detxai.output.records import ModelInfo, Record
from detxai.values import geometry

# Records are written in one order and without spaces; quotes within names are escaped.
_MODEL = re.compile(
    rb'"model":\{("name":"(?:[^"\\]|\\.)*","sha256":"[0-9a-f]{64}").*?'
    rb'("imgsz":\d+(?:,"channels":\d+)?(?:,"(?:shape|rect)":\[\d+,\d+\])*)',
    re.DOTALL,
)
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
            self.models.setdefault(*_named(record.model))
        for detection in record.detections or ():
            first = detection.attributions[0] if detection.attributions else None
            if first is not None and detection.kind == "detection":
                self._add_way(first.method, first.gradient, first.baseline.partition(":")[0])
                return

    def add_line(self, line: bytes) -> None:
        """Learn how the record was made that `line` of records.jsonl holds, without reading all of it."""
        if model := _MODEL.search(line):
            self.models.setdefault(*_read(*model.groups()))
        if way := _WAY.search(line):
            self._add_way(*(part.decode() for part in way.groups()))

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

    def unlike(self, model: ModelInfo, ways: Iterable[tuple[str, str]]) -> list[str]:
        """Models other than this, and methods with another gradient than one of `ways`, in words."""
        own = tuple(f"{method} ({gradient}, " for method, gradient in ways)
        models = [name for key, name in self.models.items() if key != _named(model)[0]]
        return models + [name for name in self.ways if not name.startswith(own)]


@lru_cache(maxsize=64)
def _read(name: bytes, size: bytes) -> tuple[str, str]:
    """`_named` of what a line says of its model."""
    return _named(ModelInfo.model_validate_json(b'{%b,"family":"","head":"",%b}' % (name, size)))


def _named(model: ModelInfo) -> tuple[str, str]:
    """What tells a model at a size from others, and both in words."""
    size = geometry(model.rect or model.shape or model.imgsz, rect=model.rect is not None)
    return f"{model.sha256} {size}", f"{model.name} ({model.sha256[:8]}) at {size}"
