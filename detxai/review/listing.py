"""Which findings `detxai list` shows, and in which order."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from detxai.config.parse import names
from detxai.errors import UsageError
from detxai.evidence.model import Evidence
from detxai.output import ranking
from detxai.output.mixture import Mixture
from detxai.output.ranking import Finding
from detxai.output.records import PromiseRecord, Record
from detxai.output.summary import Failure
from detxai.output.tree import Tree

#: Sort keys besides the measures of `evidence`.
PLAIN_KEYS: dict[str, Callable[[Finding], Any]] = {
    "severity": ranking.severity,
    "score": lambda f: f.score,
    "verdict": lambda f: ranking.VERDICTS.index(f.verdict),
    "trust": lambda f: f.trust,
    "path": lambda f: (f.path, f.id),
    "class": lambda f: (f.class_name, ranking.severity(f)),
}
MEASURES = tuple(
    name for name, field in Evidence.model_fields.items() if "float" in str(field.annotation) and name != "trust"
)


@dataclass(frozen=True)
class Choice:
    """Which findings are wanted. `classes` are ids or names; none: all. `promised`: those that a promise lists."""

    verdicts: tuple[str, ...] = ranking.LOOK
    classes: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ("detection",)
    promised: bool = False

    @classmethod
    def of(cls, verdicts: Any, classes: Any, kinds: Any) -> Choice:
        """From repeated options with commas in them; None: the default. Raises UsageError for an unknown word."""
        return cls(
            _words("--verdict", verdicts, ranking.VERDICTS) or cls.verdicts,
            tuple(names(classes) or ()),
            _words("--kind", kinds, ranking.KINDS) or cls.kinds,
        )

    def takes(self, f: Finding) -> bool:
        """Whether `f` is wanted."""
        if self.promised:
            return bool(f.detection.listed)
        named = not self.classes or f.class_name in self.classes or str(f.class_id) in self.classes
        return named and f.kind in self.kinds and f.verdict in self.verdicts

    def require_classes(self, seen: Iterable[tuple[int, str]]) -> None:
        """Raise UsageError for a class that is not among those `seen` (id, name) in the tree."""
        known = {word for class_id, name in seen for word in (str(class_id), name)}
        for word in self.classes:
            if word not in known:
                raise _unknown("--class", word, [word for word in sorted(known) if not word.isdecimal()])


#: Everything on the list that a calibration with --recall promises, whatever its verdict.
PROMISED = Choice(promised=True)


def _words(option: str, given: Any, known: tuple[str, ...]) -> tuple[str, ...]:
    words = tuple(names(given) or ())
    for word in words:
        require_known(option, word, (*known, "all"))
    return known if "all" in words else words


def require_known(option: str, word: str, known: Sequence[str]) -> None:
    """Raise UsageError for a `word` of `option` that is not among those `known`."""
    if word not in known:
        raise _unknown(option, word, known)


def _unknown(option: str, word: str, known: Sequence[str]) -> UsageError:
    close = difflib.get_close_matches(word, known, 1)
    hint = f"Did you mean {close[0]}?" if close else f"Choose from: {', '.join(known)}."
    return UsageError(f"{option} does not know {word!r}.", hint)


def ordered(findings: Iterable[Finding], key: str = "severity") -> list[Finding]:
    """`findings` by `key`, lowest first (severity: worst first); `-key` highest first; what lacks the value comes last.

    Keys: severity, score, verdict, trust, path, class, or a measure of `evidence`. Raises UsageError for others.
    """
    name = key.removeprefix("-")
    worst_first = sorted(findings, key=ranking.severity)
    if name in PLAIN_KEYS:
        value = PLAIN_KEYS[name]
    elif name in MEASURES:

        def value(f: Finding) -> Any:
            return getattr(f.detection.evidence, name, None)
    else:
        raise _unknown("--sort", name, [*PLAIN_KEYS, *MEASURES])
    known = [f for f in worst_first if value(f) is not None]
    known.sort(key=value, reverse=key.startswith("-"))
    return known + [f for f in worst_first if value(f) is None]


def together(findings: Iterable[Finding]) -> list[Finding]:
    """`findings` with both views of a bag where the first of them is; boxes of no bag stay where they are."""
    bags: dict[object, list[Finding]] = {}
    for f in findings:
        bags.setdefault(f.bag or (f.path, f.id), []).append(f)
    return [f for views in bags.values() for f in views]


def unique_paths(findings: Iterable[Finding]) -> list[str]:
    """The images of `findings`, each once, as they come."""
    return list(dict.fromkeys(f.path for f in findings))


@dataclass(frozen=True)
class Selection:
    """What was chosen of a tree: `found` in order, of `total` boxes; `warnings` about it; its failed images."""

    findings: list[Finding]
    total: int
    warnings: list[str]
    failures: list[Failure]


def select(tree: Tree, choice: Choice, key: str = "severity") -> Selection:
    """The findings of `tree` that `choice` takes, by `key`. Raises UsageError and NoInputError."""
    ordered((), key)  # a wrong key is told before the tree is read
    mixture, promises, total = Mixture(), Promises(), 0
    seen: set[tuple[int, str]] = set()
    findings, failures = [], []
    for record in tree.read():
        mixture.add(record)
        if record.error:
            failures.append(Failure(path=record.image.path, code=record.error.code, message=record.error.message))
        if choice.promised:
            promises.add(record)
        for f in ranking.findings(record):
            seen.add((f.class_id, f.class_name))
            total += 1
            if choice.takes(f):
                findings.append(f)
    choice.require_classes(seen)
    warnings = tree.warnings() + mixture.warnings() + promises.warnings()
    return Selection(together(ordered(findings, key)), total, warnings, failures)


@dataclass
class Promises:
    """What the records of one tree promise of their listed boxes: all of them the same."""

    made: PromiseRecord | None = None
    failed: int = 0

    def add(self, record: Record) -> None:
        """Learn what `record` promises. Raises UsageError where that is nothing, or not what those before it do."""
        if record.status == "failed":
            self.failed += 1
            return
        self.made = self.made or record.promise
        if record.promise is None or record.promise != self.made:
            what = "with another promise than others" if record.promise else "without a promise"
            raise UsageError(
                f"{record.image.path} was explained {what}: no list of this tree holds a known share of the items.",
                "Explain with the file of `detxai calibrate evidence --recall 0.95`, and the --candidates it names.",
            )

    def warnings(self) -> list[str]:
        """What the list holds, and what it does not."""
        said = []
        if self.made is not None:
            said = [f"expected to hold {self.made.recall:.4g} of the items: all boxes above {self.made.threshold:.4g}"]
        return said + [f"{self.failed} images failed: their items are on no list"] * (self.failed > 0)
