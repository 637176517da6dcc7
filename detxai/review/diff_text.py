"""A comparison in the terminal: how the runs differ as wholes, by class, and the changes, for worse first."""

from __future__ import annotations

from collections.abc import Sequence

from rich.cells import cell_len
from rich.text import Text

from detxai.review.diff import Diff, in_words
from detxai.text import printable


def describe(difference: Diff, most: int) -> list[Text]:
    """The lines of `difference`, of its changes the first `most`."""
    lines = []
    for word, side in (("A", difference.a), ("B", difference.b)):
        made = ", ".join([*side.mixture.models.values(), *side.mixture.ways])
        said = f"{word}  {side.name}: {side.images} images, {side.failed} failed, {side.boxes} boxes ({made})"
        lines.append(Text(printable(said)))
    alone = [
        f"{len(names)} only in {word}" for word, names in (("A", difference.only_a), ("B", difference.only_b)) if names
    ]
    lines += [Text(", ".join([f"{difference.common} images in both", *alone])), Text()]
    classes = difference.by_class()
    if classes:
        head = tuple(name.replace("class_name", "class").replace("_", " ") for name in classes[0])
        rows = [tuple("–" if value is None else f"{value}" for value in row.values()) for row in classes]
        lines += [*_table([head, *rows], numbers=True), Text()]
    changes = difference.changes
    lines.append(
        Text(f"{len(changes)} changes, {len(difference.worse)} for worse" if changes else "nothing changed", "bold")
    )
    shown = changes[:most]
    cells = [(("worse" if c.worse else ""), *row) for c, row in zip(shown, in_words(shown), strict=True)]
    lines += _table(cells)
    if len(changes) > most:
        lines.append(Text(f"and {len(changes) - most} more: --limit {len(changes)}, --json, or --html FILE"))
    return lines


def _table(rows: Sequence[tuple[str, ...]], *, numbers: bool = False) -> list[Text]:
    """Columns as wide as their widest cell; all but the first flush right where they are `numbers`."""
    cells = [tuple(map(printable, row)) for row in rows]
    widths = [max(map(cell_len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for row in cells:
        padded = [
            " " * (width - cell_len(cell)) + cell if numbers and i else cell + " " * (width - cell_len(cell))
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append(Text("  ".join(padded).rstrip(), "bold red" if row[0] == "worse" else ""))
    return lines
