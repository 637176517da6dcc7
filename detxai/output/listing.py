"""Findings as lines for people and for pipes: the same at the end of a run and in `detxai list`."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from typing import Any

from rich.cells import cell_len
from rich.text import Text

from detxai.output.ranking import Finding
from detxai.text import printable

#: Places of columns.
VERDICT, REASON, OVERLAY = 4, 5, 6
INDENTED: Any = {"initial_indent": "    ", "subsequent_indent": "    ", "break_long_words": False,
                 "break_on_hyphens": False}  # fmt: skip
STYLES = {"unsupported": "bold red", "weak": "yellow", "unknown": "magenta", "supported": "green", "none": "dim"}


def lines(findings: Sequence[Finding], width: int | None = None) -> list[Text]:
    """One line each, in columns: path, id, class, score, verdict, deciding reason, overlay.

    Where one of them is wider than a terminal of `width` columns, reason and overlay stand below the rest, indented.
    """
    rows = [
        (f.path, f"#{f.id}", f.class_name if f.kind == "detection" else f"{f.class_name} ({f.kind})",
         f"{f.score:.2f}", f.verdict if f.trust is None else f"{f.verdict} (trust {f.trust:.2f})",
         f.reason or "no evidence was asked for", f.overlay or "–")
        for f in findings
    ]  # fmt: skip
    cells = [tuple(map(printable, row)) for row in rows]
    widths = [max(map(cell_len, column)) for column in zip(*cells, strict=True)]
    narrow = width is not None and sum(widths) + 2 * len(widths) - 2 > width
    shown = []
    for f, row in zip(findings, cells, strict=True):
        line, last = Text(no_wrap=True), REASON - 1 if narrow else OVERLAY
        for i, cell in enumerate(row[: last + 1]):
            line.append(cell, STYLES[f.verdict] if i == VERDICT else "dim" if i == OVERLAY else "")
            line.append(" " * (widths[i] - cell_len(cell) + 2) if i < last else "")
        if narrow:
            line.append("\n" + textwrap.fill(row[REASON], width or 0, **INDENTED))
            line.append(f"\n    {row[OVERLAY]}", "dim")
        shown.append(line)
    return shown


def json_line(f: Finding) -> str:
    """One line of JSON."""
    return json.dumps(f.plain(), ensure_ascii=False, separators=(",", ":"))
