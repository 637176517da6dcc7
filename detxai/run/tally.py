"""What a run has seen, counted image by image: the summary's numbers and the exit code."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field

from detxai.errors import ExitCode
from detxai.evidence.maps import GRID
from detxai.output import ranking, records
from detxai.output.summary import ClassStatistics, Failure
from detxai.run.groups import GroupTally
from detxai.statistics import Moments

#: Failures listed in the summary; all of them are in records.jsonl.
KEPT_FAILURES = 1000


@dataclass
class _ClassSums:
    name: str
    count: int = 0
    score: float = 0.0
    inside: float = 0.0
    shares: int = 0
    converged: int = 0
    judged: int = 0
    labels: int = 0
    missed: int = 0
    statuses: Counter[str] = field(default_factory=Counter)
    verdicts: Counter[str] = field(default_factory=Counter)
    grids: Moments = field(default_factory=lambda: Moments((GRID, GRID)))
    groups: GroupTally = field(default_factory=GroupTally)

    def add(self, path: str, detection: records.DetectionRecord) -> None:
        self.count += 1
        self.groups.add(path, detection)
        self.score += detection.score
        if detection.match is not None:
            self.statuses[detection.match.status] += 1
        if detection.evidence is not None:
            self.verdicts[detection.evidence.verdict] += 1
        own = list(ranking.class_maps(detection))
        if own:
            self.grids.add(own[0].grid.values)
        for a in own:
            if a.inside_share is not None:
                self.inside, self.shares = self.inside + a.inside_share, self.shares + 1
            if a.converged is not None:
                self.converged, self.judged = self.converged + a.converged, self.judged + 1


def gate(verdicts: Collection[str]) -> ranking.Worst:
    """Reported boxes with one of the `verdicts` that --fail-on names."""
    return ranking.Worst(lambda f: f.kind == "detection" and f.verdict in verdicts)


@dataclass
class Tally:
    """What a run has seen; `codes` are all the exit codes that hold."""

    ok: int = 0
    failed: int = 0
    skipped: int = 0
    detections: int = 0
    candidates: int = 0
    listed: int | None = None
    labelled: int = 0
    attributions: int = 0
    unconverged: int = 0
    evaluations: int = 0
    look: ranking.Worst = field(default_factory=ranking.Worst)
    gate: ranking.Worst = field(default_factory=lambda: gate(()))
    codes: set[ExitCode] = field(default_factory=set)
    failures: list[Failure] = field(default_factory=list)
    failure_codes: Counter[str] = field(default_factory=Counter)
    _sums: dict[int, _ClassSums] = field(default_factory=dict)

    @property
    def done(self) -> int:
        return self.ok + self.failed + self.skipped

    @property
    def verdicts(self) -> Counter[str]:
        """Verdicts on the reported boxes."""
        return sum((sums.verdicts for sums in self._sums.values()), Counter[str]())

    def add(self, record: records.Record, *, skipped: bool) -> None:
        """Count one image."""
        if record.status == "failed":
            self.failed += 1
            self.codes.add(ExitCode.SOME_FAILED)
            self.failure_codes.update([record.error.code] if record.error else [])
            if record.error is not None and len(self.failures) < KEPT_FAILURES:
                self.failures.append(
                    Failure(path=record.image.path, code=record.error.code, message=record.error.message)
                )
            return
        self.skipped, self.ok = self.skipped + skipped, self.ok + (not skipped)
        self.labelled += record.labels is not None
        for label in record.labels or ():
            if label.class_id is not None and label.status != "not-asked":
                sums = self._of(label.class_id, label.class_name)
                sums.labels, sums.missed = sums.labels + 1, sums.missed + (label.status == "missed")
        for detection in record.detections or ():
            self.candidates += detection.kind == "candidate"
            if detection.listed is not None:
                self.listed = (self.listed or 0) + detection.listed
            if detection.kind == "detection":
                self.detections += 1
                self._of(detection.class_id, detection.class_name).add(record.image.path, detection)
            for attribution in detection.attributions:
                self.attributions += 1
                self.unconverged += attribution.converged is False
                self.evaluations += 0 if skipped else attribution.evaluations
        for worst_of in (self.look, self.gate):
            worst_of.add(ranking.findings(record))
        if self.gate.count:
            self.codes.add(ExitCode.GATE)

    def _of(self, class_id: int, name: str) -> _ClassSums:
        return self._sums.setdefault(class_id, _ClassSums(name))

    def matches(self) -> dict[str, int]:
        """Detections by how they meet the labels, and labels that were missed."""
        total = sum((sums.statuses for sums in self._sums.values()), Counter[str]())
        return dict(sorted(total.items())) | {"missed": sum(sums.missed for sums in self._sums.values())}

    def statistics(self) -> tuple[ClassStatistics, ...]:
        """Per class: how many, how sure, where the evidence lies."""
        return tuple(
            ClassStatistics(
                class_id=class_id,
                class_name=sums.name,
                detections=sums.count,
                mean_score=sums.score / sums.count if sums.count else None,
                mean_inside_share=sums.inside / sums.shares if sums.shares else None,
                converged_share=sums.converged / sums.judged if sums.judged else None,
                verdicts=dict(sorted(sums.verdicts.items())) or None,
                mean_grid=tuple(map(tuple, sums.grids.mean.tolist())) if sums.grids.count else None,
                grid_spread=tuple(map(tuple, sums.grids.std.tolist())) if sums.grids.count else None,
                labels=sums.labels if self.labelled else None,
                true=sums.statuses["true"] if self.labelled else None,
                false=sums.statuses.total() - sums.statuses["true"] if self.labelled else None,
                missed=sums.missed if self.labelled else None,
                groups=sums.groups.records(),
            )
            for class_id, sums in sorted(self._sums.items())
        )
