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


def describe(behaviour: Behaviour) -> list[Text]:
    """The lines of one class."""
    head = Text(printable(behaviour.class_name), "bold")
    head.append(f"  {len(behaviour.findings)} boxes, {_shares(behaviour.verdicts)}", "not bold")
    lines = [
        head,
        Text(f"  its evidence, mean over these boxes: {where(behaviour.mean)}; red with - speaks against it"),
    ]
    lines += [Text("  ").append_text(row) for row in blocks(behaviour.mean)]
    lines.append(
        Text(f"  {behaviour.outside:.0%} of what speaks for {printable(behaviour.class_name)} lies outside the boxes")
    )
    if len(behaviour.groups) > 1:
        lines.append(Text(f"  {len(behaviour.groups)} groups of evidence (silhouette {behaviour.silhouette:.2f}):"))
        lines += [Text(f"    {_group(behaviour, group)}") for group in behaviour.groups]
    elif len(behaviour.findings) > 1:
        lines.append(Text("  no groups: the evidence of these boxes does not fall into kinds"))
    for word, chosen in (("most typical", behaviour.typical), ("oddest", behaviour.odd)):
        if chosen:
            lines.append(Text(f"  {word}: {', '.join(_name(behaviour.findings[i]) for i in chosen)}"))
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


def _group(behaviour: Behaviour, group: Group) -> str:
    share = len(group.boxes) / len(behaviour.findings)
    typical = ", ".join(_name(behaviour.findings[i]) for i in group.boxes[:2])
    return (
        f"{share:.0%} ({len(group.boxes)}): {where(group.mean)}, {group.outside:.0%} outside, mean score"
        f" {group.score:.2f}, {_shares(group.verdicts)}; such as {typical}"
    )


def _name(f: Finding) -> str:
    return printable(f"{f.path} #{f.id}")
