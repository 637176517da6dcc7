"""Findings as lines for people and for pipes: the same at the end of a run and in `detxai list`."""

from __future__ import annotations

import json
from collections.abc import Sequence

from rich.cells import cell_len
from rich.text import Text

from detxai.output.ranking import Finding
from detxai.text import printable

STYLES = {"unsupported": "bold red", "weak": "yellow", "unknown": "magenta", "supported": "green", "none": "dim"}


def lines(findings: Sequence[Finding]) -> list[Text]:
    """One line each, in columns: path, id, class, score, verdict, deciding reason, overlay."""
    rows = [
        (f.path, f"#{f.id}", f.class_name if f.kind == "detection" else f"{f.class_name} ({f.kind})",
         f"{f.score:.2f}", f.verdict if f.trust is None else f"{f.verdict} (trust {f.trust:.2f})",
         f.reason or "no evidence was asked for", f.overlay or "–")
        for f in findings
    ]  # fmt: skip
    cells = [tuple(map(printable, row)) for row in rows]
    widths = [max(map(cell_len, column)) for column in zip(*cells, strict=True)]
    shown = []
    for f, row in zip(findings, cells, strict=True):
        line = Text(no_wrap=True)
        for i, (cell, width) in enumerate(zip(row, widths, strict=True)):
            style = STYLES[f.verdict] if i == 4 else "dim" if i == 6 else ""
            line.append(cell, style)
            line.append(" " * (width - cell_len(cell) + 2) if i < len(row) - 1 else "")
        shown.append(line)
    return shown


def json_line(f: Finding) -> str:
    """One line of JSON."""
    return json.dumps(f.plain(), ensure_ascii=False, separators=(",", ":"))
