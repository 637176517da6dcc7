"""Two runs compared box by box: what is gone, new or moved, what changed its class, verdict or evidence."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from detxai.errors import NoInputError
from detxai.output import ranking, records
from detxai.output.mixture import Mixture
from detxai.output.ranking import Finding, judged_map
from detxai.output.tree import Tree
from detxai.values import iou

DIFF_SCHEMA: Final = "detxai.diff/1"
#: Boxes with less IoU are two boxes; with less than the second, one that moved.
SAME, STILL = 0.5, 0.9
#: Grids with less correlation have their evidence elsewhere.
ALIKE = 0.7
#: What can happen to a box or an image, the gravest first.
WHAT = ("absent", "failed", "gone", "class", "verdict", "new", "evidence", "moved", "mended")
#: From bad to good; without evidence (`none`) a verdict neither falls nor rises.
_GRADES = {"unsupported": 0, "weak": 1, "unknown": 1, "supported": 2}


@dataclass(frozen=True)
class Change:
    """One box in both runs, or in one of them, or an image that fails in one; `what` happened, and whether for worse.

    `iou` of its two boxes; `correlation` of its two grids (Pearson, 64 cells); None where one of them is absent.
    """

    path: str
    before: Finding | None
    after: Finding | None
    what: tuple[str, ...]
    worse: bool
    iou: float | None = None
    correlation: float | None = None

    @property
    def class_name(self) -> str:
        """The class it had before, or has now where it is new."""
        finding = self.before or self.after
        return finding.class_name if finding else ""

    def plain(self) -> dict[str, Any]:
        """What JSON says of it."""
        numbers = {"iou": self.iou, "correlation": self.correlation}
        return {
            "path": self.path, "what": list(self.what), "worse": self.worse,
            **{name: None if value is None else float(f"{value:.6g}") for name, value in numbers.items()},
            "a": self.before and self.before.plain(), "b": self.after and self.after.plain(),
        }  # fmt: skip


@dataclass
class Side:
    """One run: how it was made and what it holds."""

    name: str
    images: int = 0
    failed: int = 0
    boxes: int = 0
    mixture: Mixture = field(default_factory=Mixture)

    def add(self, record: records.Record) -> None:
        """Count an image."""
        self.images += 1
        self.failed += record.status == "failed"
        self.boxes += sum(d.kind == "detection" for d in record.detections or ())
        self.mixture.add(record)

    def plain(self) -> dict[str, Any]:
        """What JSON says of it."""
        ways = {"models": list(self.mixture.models.values()), "ways": list(self.mixture.ways)}
        return {"name": self.name, "images": self.images, "failed": self.failed, "boxes": self.boxes, **ways}


@dataclass
class Diff:
    """Two runs: boxes of images in both, worst change first; `same` boxes are those with nothing in `what`."""

    a: Side
    b: Side
    boxes: list[Change]
    common: int
    only_a: list[str]
    only_b: list[str]
    warnings: list[str]

    @property
    def changes(self) -> list[Change]:
        """Everything that happened, for worse first, then the gravest."""
        return [c for c in self.boxes if c.what]

    @property
    def worse(self) -> list[Change]:
        """What got worse."""
        return [c for c in self.boxes if c.worse]

    def by_class(self) -> list[dict[str, Any]]:
        """Of each class before: boxes in both runs, how many of them what happened to, and the mean correlation."""
        classes: dict[str, list[Change]] = {}
        for change in self.boxes:
            classes.setdefault(change.class_name, []).append(change)
        classes.pop("", None)  # images, not boxes
        return [_counts(name, changes) for name, changes in sorted(classes.items())]

    def plain(self) -> dict[str, Any]:
        """The comparison as JSON; changes image by image."""
        images: dict[str, list[dict[str, Any]]] = {}
        for change in self.changes:
            images.setdefault(change.path, []).append(change.plain())
        return {
            "schema": DIFF_SCHEMA, "a": self.a.plain(), "b": self.b.plain(), "common": self.common,
            "only_a": self.only_a, "only_b": self.only_b, "warnings": self.warnings,
            "changed": len(self.changes), "worse": len(self.worse), "classes": self.by_class(),
            "images": [{"path": path, "changes": changes} for path, changes in images.items()],
        }  # fmt: skip


def compare(first: Tree, second: Tree) -> Diff:
    """The runs `first` and `second`, image by image; an image that `second` lacks counts as worse.

    Images meet by path; where no path is in both, by the bytes of the image. Raises NoInputError where none meet.
    """
    a, b = Side(str(first.folder)), Side(str(second.folder))
    before = {record.image.path: record for record in _counted(first, a)}
    after = {record.image.path: record for record in _counted(second, b)}
    warnings = [f"{side}: {text}" for side, t in ((a, first), (b, second)) for text in t.warnings()]
    for side in (a, b):
        warnings += [f"{side.name}: {text}" for text in side.mixture.warnings()]
    if not before.keys() & after.keys():
        by_bytes = {record.image.sha256: path for path, record in before.items() if record.image.sha256}
        after = {by_bytes.get(record.image.sha256 or "", path): record for path, record in after.items()}
    common = sorted(before.keys() & after.keys())
    if not common:
        raise NoInputError(f"No image is in both {a.name} and {b.name}.", "Compare two runs over the same images.")
    other = sum(before[path].image.sha256 != after[path].image.sha256 for path in common)
    if other:
        warnings.append(f"{other} of {len(common)} common images have other bytes in {b.name}: are they the same?")
    boxes = [change for path in common for change in _image(before[path], after[path])]
    only_a, only_b = sorted(before.keys() - after), sorted(after.keys() - before)
    boxes += [Change(path, None, None, ("absent",), worse=True) for path in only_a]
    boxes.sort(key=lambda c: (not c.worse, _gravity(c), c.path))
    return Diff(a, b, boxes, len(common), only_a, only_b, warnings)


def _counted(tree: Tree, side: Side) -> Iterator[records.Record]:
    for record in tree.read():
        side.add(record)
        yield record


def _gravity(change: Change) -> int:
    return WHAT.index(change.what[0]) if change.what else len(WHAT)


def _counts(name: str, changes: Sequence[Change]) -> dict[str, Any]:
    known = [c.correlation for c in changes if c.correlation is not None]
    return {
        "class_name": name,
        "a": sum(c.before is not None for c in changes),
        "b": sum(c.after is not None for c in changes),
        **{what: sum(what in c.what for c in changes) for what in WHAT[2:-1]},
        "worse": sum(c.worse for c in changes),
        "mean_correlation": float(f"{np.mean(known):.3g}") if known else None,
    }


def _image(before: records.Record, after: records.Record) -> Iterator[Change]:
    path = before.image.path
    if before.status != after.status:
        failed = after.status == "failed"
        yield Change(path, None, None, ("failed" if failed else "mended",), worse=failed)
    if before.status == "failed" or after.status == "failed":
        return
    old = [f for f in ranking.findings(before) if f.kind == "detection"]
    new = [f for f in ranking.findings(after) if f.kind == "detection"]
    labelled = before.labels is not None and after.labels is not None
    for f, g, overlap in pairs(old, new):
        yield _change(path, f, g, overlap, labelled=labelled)


def pairs(old: Sequence[Finding], new: Sequence[Finding]) -> Iterator[tuple[Finding | None, Finding | None, float]]:
    """Each box with its partner and their IoU (0 without one): best IoU first, those of one class before the others."""
    overlaps = [
        (f.class_id != g.class_id, -iou(f.detection.box, g.detection.box), i, k)
        for i, f in enumerate(old)
        for k, g in enumerate(new)
    ]
    left, right = set(range(len(old))), set(range(len(new)))
    for _, negative, i, k in sorted(overlaps):
        if -negative >= SAME and i in left and k in right:
            left.remove(i)
            right.remove(k)
            yield old[i], new[k], -negative
    yield from ((old[i], None, 0.0) for i in sorted(left))
    yield from ((None, new[k], 0.0) for k in sorted(right))


def correlation(f: Finding, g: Finding) -> float | None:
    """Pearson correlation of two grids, in [-1, 1]; None where there is none or it is constant."""
    one, other = judged_map(f.detection), judged_map(g.detection)
    if one is None or other is None:
        return None
    x, y = (np.asarray(a.grid.values, np.float64).ravel() for a in (one, other))
    if x.std() == 0 or y.std() == 0:
        return None
    return float(np.corrcoef(x, y)[0, 1])


def _change(path: str, f: Finding | None, g: Finding | None, overlap: float, *, labelled: bool) -> Change:
    if f is None or g is None:
        return Change(path, f, g, ("gone",) if g is None else ("new",), worse=_worse(f, g, labelled=labelled))
    alike = correlation(f, g)
    what = [
        word
        for word, holds in (
            ("class", f.class_id != g.class_id or f.class_name != g.class_name),
            ("verdict", f.verdict != g.verdict),
            ("evidence", alike is not None and alike < ALIKE),
            ("moved", overlap < STILL),
        )
        if holds
    ]
    return Change(path, f, g, tuple(what), _worse(f, g, labelled=labelled), overlap, alike)


def _worse(f: Finding | None, g: Finding | None, *, labelled: bool) -> bool:
    """Whether a box got worse: by the labels of both runs, or without them a box that is gone, another class.

    A verdict that falls is worse either way.
    """
    if f and g and _GRADES.get(g.verdict, 2) < _GRADES.get(f.verdict, -1):
        return True
    if labelled:
        right, was = (_right(finding) for finding in (g, f))
        return (was and not right) or (g is not None and f is None and not right)
    return g is None or (f is not None and f.class_name != g.class_name)


def _right(f: Finding | None) -> bool:
    return f is not None and f.detection.match is not None and f.detection.match.status == "true"


def in_words(changes: Iterable[Change]) -> list[tuple[str, ...]]:
    """Each change as cells: image, box, class, what happened."""
    return [(c.path, _numbers(c), _class(c), "; ".join(_said(c, what) for what in c.what)) for c in changes]


def _numbers(c: Change) -> str:
    known = [f"#{f.id}" if f else "–" for f in (c.before, c.after)]
    return "" if not (c.before or c.after) else known[0] if known[0] == known[1] else " → ".join(known)


def _class(c: Change) -> str:
    names = [f.class_name for f in (c.before, c.after) if f]
    return " → ".join(dict.fromkeys(names))


def _said(c: Change, what: str) -> str:
    f, g = c.before, c.after
    if f and g:
        return {
            "class": f"another class, score {f.score:.2f} → {g.score:.2f}",
            "verdict": f"{f.verdict} → {g.verdict}" + (f": {g.reason}" if g.verdict in ranking.LOOK else ""),
            "evidence": f"evidence lies elsewhere (correlation {c.correlation or 0:.2f})",
            "moved": f"box moved (IoU {c.iou or 0:.2f})",
        }[what]
    finding = f or g
    if finding is None:
        return {
            "absent": "the image is not in B",
            "failed": "the image fails now",
            "mended": "the image does not fail any more",
        }[what]
    word = "not reported any more" if what == "gone" else "new"
    return f"{word} (score {finding.score:.2f}, {finding.verdict})"
