"""What the page knows of a tree: one compact object of columns, worst box first; no pixels."""

from __future__ import annotations

import base64
import gzip
import json
import os
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from detxai.evidence.groups import where
from detxai.evidence.model import Evidence
from detxai.output import ranking, records
from detxai.output.mixture import Mixture
from detxai.output.ranking import Finding
from detxai.output.tree import Tree
from detxai.review.behaviour import Behaviour, behaviours
from detxai.review.listing import MEASURES, together
from detxai.vocabulary import METHODS

FORMAT: Final = "detxai.index/1"
#: Targets whose 8 x 8 grids are carried along: logits of classes. Edges are in pixels and shown by their overlays.
WITH_GRID = ("class", "contrast")
#: int8 holds a grid on its own scale.
STEPS = 127

_NUMBER = re.compile(r"-?\d+(\.\d+)?")
_DECIDED = re.compile(r", (weak|unsupported) (above|below) [\d.e-]+$")


class _Numbered:
    """Values as numbers, in order of appearance."""

    def __init__(self) -> None:
        self.known: dict[Any, int] = {}

    def __call__(self, value: Any) -> int:
        return self.known.setdefault(value, len(self.known))


def build(tree: Tree, page: Path) -> dict[str, Any]:
    """The index of `tree` for a page that will lie at `page`. Raises NoInputError."""
    mixture = Mixture()
    findings: list[Finding] = []
    failed: list[list[str]] = []
    images: dict[str, list[Any]] = {name: [] for name in ("path", "width", "height", "key", "overview", "bag")}
    number: dict[str, int] = {}
    for record in tree.read():
        mixture.add(record)
        if record.error is not None:
            failed.append([record.image.path, record.error.code, record.error.message])
            continue
        path = record.image.path
        number[path] = len(number)
        overview = (record.overview or "").removeprefix(f"{path.rpartition('/')[2]}.")
        key, bag = (record.fingerprint or "")[:12], record.image.view.bag if record.image.view else None
        row = (path, record.image.width, record.image.height, key, overview, bag)
        for column, value in zip(images.values(), row, strict=True):
            column.append(value)
        findings += ranking.findings(record)
    findings = together(sorted(findings, key=ranking.severity))
    place = {id(f): i for i, f in enumerate(findings)}
    return {
        "format": FORMAT,
        "name": tree.folder.resolve().name,
        "base": relative(tree.folder, page.parent),
        "models": list(mixture.models.values()),
        "warnings": tree.warnings() + mixture.warnings(),
        "methods": {name: method.about for name, method in METHODS.items()},
        "verdicts": ranking.VERDICTS,
        "kinds": ranking.KINDS,
        "images": images,
        "failed": failed,
        "behaviours": [_behaviour(b, place) for b in behaviours(findings)],
        **_boxes(findings, number),
    }


def pack(index: dict[str, Any]) -> str:
    """Base64 of gzipped JSON: safe inside HTML whatever the names in it, and the same for the same index."""
    text = json.dumps(index, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return base64.b64encode(gzip.compress(text.encode(), 9, mtime=0)).decode("ascii")


def unpack(packed: str) -> dict[str, Any]:
    """The index in `packed`."""
    content: dict[str, Any] = json.loads(gzip.decompress(base64.b64decode(packed)))
    return content


def kind_of_reason(text: str, names: Iterable[str]) -> str:
    """A reason without its numbers and class names, so that alike ones can be filtered together."""
    text = _DECIDED.sub("", text)
    for name in names:
        text = text.replace(f"over {name} ", "over … ").replace(f"leads {name} ", "leads … ")
    return _NUMBER.sub("…", text)


def _boxes(findings: Sequence[Finding], image: dict[str, int]) -> dict[str, Any]:
    classes, variants, kinds_of_reason = _Numbered(), _Numbered(), _Numbered()
    names = sorted({f.class_name for f in findings}, key=len, reverse=True)
    grids: list[bytes] = []
    columns: dict[str, Callable[[Finding], Any]] = {
        "image": lambda f: image[f.path],
        "id": lambda f: f.id,
        "kind": lambda f: ranking.KINDS.index(f.kind),
        "class": lambda f: classes((f.class_id, f.class_name)),
        "score": lambda f: _short(f.score),
        "verdict": lambda f: ranking.VERDICTS.index(f.verdict),
        "trust": lambda f: _short(f.trust),
        "match": lambda f: f.detection.match.status if f.detection.match else None,
        "box": lambda f: [round(v, 1) for v in f.detection.box],
        "top": lambda f: [[c.class_name, _short(c.score)] for c in f.detection.top_classes if c.score >= 0.0005],
        "reasons": lambda f: f.reasons,
        "about": lambda f: [kinds_of_reason(kind_of_reason(text, names)) for text in f.reasons],
        "rival": lambda f: _rival(f),
        "contrasts": lambda f: _contrasts(f),
        "maps": lambda f: [_map(f, a, variants, grids) for a in f.detection.attributions],
    }
    boxes = {name: [value(f) for f in findings] for name, value in columns.items()}
    measures = {name: [_short(getattr(f.detection.evidence, name, None)) for f in findings] for name in MEASURES}
    return {
        "classes": list(classes.known),
        "reasons": list(kinds_of_reason.known),
        "variants": list(variants.known),
        "boxes": boxes,
        "measures": {name: values for name, values in measures.items() if any(v is not None for v in values)},
        "meanings": {name: Evidence.model_fields[name].description for name in MEASURES},
        "grids": base64.b64encode(b"".join(grids)).decode("ascii"),
    }


def _map(f: Finding, a: records.AttributionRecord, variants: _Numbered, grids: list[bytes]) -> list[Any]:
    """One map: how it was made (by number), its numbers, and where its grid lies, or null."""
    stem = f"{f.path.rpartition('/')[2]}.d{f.id:02d}."
    ending = a.overlay.removeprefix(stem) if a.overlay and a.overlay.startswith(stem) else a.overlay
    asked = a.class_name if a.as_class else None
    against = a.against.class_name if a.against else None
    made = variants((a.method, a.gradient, a.target, asked, against, a.baseline, ending))
    at = None
    if a.target in WITH_GRID:
        at = len(grids)
        grids.append(_cells(a.grid.values))
    greatest = max((abs(v) for row in a.grid.values for v in row), default=0.0)
    numbers = [a.value_at_input, a.value_at_baseline, a.error_bound, a.net_inside, a.inside_share, a.near_edge]
    numbers.append(a.map_error)
    return [made, at, _short(greatest), a.converged, a.evaluations, *map(_short, numbers)]


def _cells(values: Any) -> bytes:
    grid = np.asarray(values, np.float64)
    greatest = float(np.abs(grid).max(initial=0)) or 1.0
    return np.rint(grid / greatest * STEPS).astype(np.int8).tobytes()


def _rival(f: Finding) -> str | None:
    evidence = f.detection.evidence
    return evidence.runner_up.class_name if evidence and evidence.runner_up else None


def _contrasts(f: Finding) -> list[list[Any]]:
    evidence = f.detection.evidence
    return [
        [c.class_name, *map(_short, (c.net_inside, c.positive_inside, c.negative_inside, c.net_outside)), c.converged]
        for c in (evidence.contrasts or () if evidence else ())
    ]


def _behaviour(b: Behaviour, place: dict[int, int]) -> dict[str, Any]:
    def boxes(numbers: Iterable[int]) -> list[int]:
        return [place[id(b.findings[i])] for i in numbers]

    return {
        "class": [b.class_id, b.class_name],
        "count": len(b.findings),
        "unit": b.unit,
        "verdicts": [b.verdicts[word] for word in ranking.VERDICTS],
        "mean": _rounded(b.mean),
        "where": where(b.mean),
        "spread": _rounded(b.spread),
        "outside": _short(b.outside),
        "typical": boxes(b.typical),
        "odd": boxes(b.odd),
        "silhouette": _short(b.silhouette),
        "groups": [
            {
                "boxes": boxes(g.boxes),
                "mean": _rounded(g.mean),
                "where": where(g.mean),
                "outside": _short(g.outside),
                "score": _short(g.score),
                "verdicts": [g.verdicts[word] for word in ranking.VERDICTS],
            }
            for g in b.groups
        ],
    }


def _rounded(grid: Any) -> list[list[float | None]]:
    return [[_short(float(v)) for v in row] for row in grid]


def _short(value: float | None) -> float | None:
    """To 3 significant digits, which is more than a page shows."""
    return None if value is None else float(f"{value:.3g}")


def relative(folder: Path, start: Path) -> str:
    """The way from a page in `start` to files in `folder`: empty, or with a slash at its end."""
    path = os.path.relpath(folder.resolve(), start.resolve()).replace(os.sep, "/")
    return "" if path == "." else f"{path}/"
