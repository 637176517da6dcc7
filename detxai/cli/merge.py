"""`detxai merge`, thin."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from detxai.cli.options import OUTPUT, option
from detxai.text import printable


def merge(
    trees: Annotated[list[Path], typer.Argument(metavar="OUT", help="Output trees of shards or workers.")],
    output: Annotated[Path, option("-o", "--output", panel=OUTPUT, help="the tree of all of them", metavar="DIR")],
) -> int:
    """Several output trees as one; leaves with 3 where some of their images had failed."""
    from detxai.run.merge import merge as merged

    code, summary = merged(trees, output)
    done = summary.images
    print(
        f"{done.ok} explained, {done.failed} failed, from {len(trees)} trees: {printable(str(output))}", file=sys.stderr
    )
    return int(code)
