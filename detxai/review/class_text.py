"""How each class behaves, in the terminal: counts, where its evidence lies as 8 x 8 blocks, groups, typical and odd."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.text import Text

from detxai.evidence.groups import where
from detxai.output.ranking import VERDICTS, Finding
from detxai.review.behaviour import Behaviour, Group
from detxai.text import printable

#: From none to all of the greatest absolute cell.
SHADES = " ░▒▓█"


def describe(found: Behaviour) -> list[Text]:
    """The lines of one class."""
    head = Text(printable(found.class_name), "bold")
    head.append(f"  {len(found.found)} boxes, {_shares(found.verdicts)}", "not bold")
    lines = [head, Text(f"  its evidence, mean over these boxes: {where(found.mean)}; red with - speaks against it")]
    lines += [Text("  ").append_text(row) for row in blocks(found.mean)]
    lines.append(Text(f"  {found.outside:.0%} of what speaks for {printable(found.class_name)} lies outside the boxes"))
    if len(found.groups) > 1:
        lines.append(Text(f"  {len(found.groups)} groups of evidence (silhouette {found.silhouette:.2f}):"))
        lines += [Text(f"    {_group(found, group)}") for group in found.groups]
    elif len(found.found) > 1:
        lines.append(Text("  no groups: the evidence of these boxes does not fall into kinds"))
    for word, chosen in (("most typical", found.typical), ("oddest", found.odd)):
        if chosen:
            lines.append(Text(f"  {word}: {', '.join(_name(found.found[i]) for i in chosen)}"))
    return [*lines, Text()]


def blocks(grid: NDArray[Any]) -> Iterator[Text]:
    """Eight rows, two characters a cell, shaded by |value| on the grid's own scale; red and `-`: against the class."""
    greatest = float(np.abs(grid).max(initial=0)) or 1.0
    for row in grid:
        line = Text("│")
        for value in row:
            shade = SHADES[min(int(abs(value) / greatest * len(SHADES)), len(SHADES) - 1)]
            line.append(shade + ("-" if value < 0 and shade != " " else shade), "red" if value < 0 else "cyan")
        yield line.append("│")


def _shares(verdicts: Counter[str]) -> str:
    total = verdicts.total()
    return ", ".join(f"{verdicts[word] / total:.0%} {word}" for word in VERDICTS if verdicts[word])


def _group(found: Behaviour, group: Group) -> str:
    share = len(group.boxes) / len(found.found)
    typical = ", ".join(_name(found.found[i]) for i in group.boxes[:2])
    return (
        f"{share:.0%} ({len(group.boxes)}): {where(group.mean)}, {group.outside:.0%} outside, mean score"
        f" {group.score:.2f}, {_shares(group.verdicts)}; such as {typical}"
    )


def _name(f: Finding) -> str:
    return printable(f"{f.path} #{f.id}")
