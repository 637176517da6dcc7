"""`detxai export`, thin: an output tree to the files of other tools; it needs no model."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from detxai.cli.options import OUTPUT, option
from detxai.errors import UsageError
from detxai.text import printable

NAMES = ("coco", "yolo", "labelstudio", "cvat", "fiftyone", "csv", "parquet", "heatmaps", "dicom")


def export(
    tree: Annotated[Path, typer.Argument(metavar="OUT", help="Output tree of detxai explain.")],
    to: Annotated[str, option("--to", panel=OUTPUT, help=", ".join(NAMES), metavar="FORMAT")],
    output: Annotated[Path, option("-o", "--output", panel=OUTPUT, help="folder to write to", metavar="DEST")],
    keep_identifiers: Annotated[
        Path | None,
        option(
            "--keep-identifiers",
            panel=OUTPUT,
            help="dicom only: folder of the pictures; patient and study are taken from them",
            metavar="DIR",
        ),
    ] = None,
) -> int:
    """The reported boxes of a finished run as files that other tools read."""
    if to not in NAMES:
        raise UsageError(f"--to {to!r} is not a format.", f"Give one of {', '.join(NAMES)}.")
    if keep_identifiers is not None and to != "dicom":
        raise UsageError(f"--keep-identifiers is for --to dicom: {to} holds no patient.", "Leave it out.")
    from detxai.exports import FORMATS
    from detxai.exports.content import Content
    from detxai.output.atomic import write_file
    from detxai.output.tree import Tree

    source, failed, written = Tree(tree), 0, 0
    explained = []
    for record in source.read():
        failed += record.status == "failed"
        explained += [record] if record.status == "ok" else []
    for name, content in FORMATS[to](Content(explained, tree, keep_identifiers)):
        write_file(output / name, content)
        written += 1
    warnings = source.warnings() + [f"{failed} failed images are not in the export"] * bool(failed)
    for warning in warnings:
        print(f"warning: {printable(str(warning))}", file=sys.stderr)
    print(f"{len(explained)} images, {written} files: {printable(str(output))}", file=sys.stderr)
    return 0
