"""Work on one image that outlives the run: its finished groups of detections, in the tree until the record comes."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from pydantic import ValidationError

from detxai import __version__
from detxai.evidence.model import Evidence
from detxai.output.overview import Stamp
from detxai.output.records import AttributionRecord
from detxai.output.store import Store
from detxai.run.results import PreparedImage, PublishedGroup
from detxai.run.targets import WantedTarget
from detxai.schema import Part
from detxai.values import Detection


class _StampFile(Part):
    """A stamp of the overview; `values`: its float16 numbers row by row, in hexadecimal."""

    place: tuple[int, int, int, int]
    columns: int
    values: str

    @classmethod
    def of(cls, stamp: Stamp) -> _StampFile:
        return cls(place=stamp.place, columns=stamp.values.shape[1], values=stamp.values.tobytes().hex())

    def stamp(self) -> Stamp:
        return Stamp(self.place, np.frombuffer(bytes.fromhex(self.values), np.float16).reshape(-1, self.columns))


class _GroupFile(Part):
    """A finished group as it lies in the tree; `made_of`: hash of all that decides it beside the fingerprint."""

    made_of: str
    rows: dict[int, tuple[AttributionRecord, ...]]
    evidence: dict[int, Evidence]
    pictures: dict[str, str]
    stamps: dict[int, _StampFile]
    scales: dict[str, float]


@dataclass(eq=False)
class Work:
    """An image on the device: `done` of its `detections` would outlive the run if it ended now.

    They lie in the `tree`, group by group; None: nothing is kept. `where`: device and arithmetic, whose other choice
    gives other bytes.
    """

    prepared: PreparedImage
    detections: tuple[Detection, ...]
    tree: Store | None
    where: str
    done: int = 0

    @property
    def path(self) -> str:
        return self.prepared.ref.path

    @cached_property
    def _seen(self) -> str:
        seen = repr((__version__, self.where, self.prepared.fingerprint, self.detections))
        return hashlib.sha256(seen.encode("utf-8", "surrogatepass")).hexdigest()

    def kept(self, number: int, wanted: Sequence[WantedTarget]) -> PublishedGroup | None:
        """What an earlier run has kept of the group `number`, which has these targets; None where it has to be done."""
        raw = self.prepared.parts.get(number)
        if raw is None or self.tree is None:
            return None
        try:
            kept = _GroupFile.model_validate_json(raw)
        except ValidationError:  # damaged
            return None
        if kept.made_of != self._made_of(wanted) or not self.tree.holds(self.path, kept.pictures):
            return None
        self.done += len(kept.rows)
        rows = {i: list(own) for i, own in kept.rows.items()}
        stamps = {i: own.stamp() for i, own in kept.stamps.items()}
        pictures = frozenset(kept.pictures)
        return PublishedGroup(rows, kept.evidence, stamps=stamps, written=pictures, scales=kept.scales)

    def keep(self, number: int, wanted: Sequence[WantedTarget], made: PublishedGroup) -> PublishedGroup:
        """Write the group `number`, if there is a tree; what has to stay in memory of it.

        Raises OutputError, and ImageError `bad_path`.
        """
        if self.tree is None:
            return made
        digests = {name: hashlib.sha256(content).hexdigest() for name, content in made.files.items()}
        rows = {i: tuple(own) for i, own in made.rows.items()}
        stamps = {i: _StampFile.of(own) for i, own in made.stamps.items()}
        part = _GroupFile(
            made_of=self._made_of(wanted),
            rows=rows,
            evidence=made.evidence,
            pictures=digests,
            stamps=stamps,
            scales=made.scales,
        )
        content = part.model_dump_json(by_alias=True).encode()
        self.tree.write_part(self.path, self.prepared.fingerprint, number, made.files, content)
        self.done += len(rows)
        pictures = frozenset(digests)
        return PublishedGroup(made.rows, made.evidence, stamps=made.stamps, written=pictures, scales=made.scales)

    def _made_of(self, wanted: Sequence[WantedTarget]) -> str:
        targets = [(w.detection, w.as_class, w.target.kind, w.target.class_id, w.target.other) for w in wanted]
        return hashlib.sha256(repr((self._seen, targets)).encode()).hexdigest()
