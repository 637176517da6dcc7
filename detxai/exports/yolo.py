"""YOLO txt: `labels/<image>.txt`, a line a box, `class cx cy w h score` in shares of the picture; `classes.txt`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import PurePosixPath

from detxai.errors import UsageError
from detxai.exports.content import Content, reported, size


def files(content: Content) -> Iterator[tuple[str, bytes]]:
    """A file an image, also where nothing was found. Raises UsageError for two images that want one file."""
    names: dict[int, str] = {}
    seen: dict[str, str] = {}
    for record in content.records:
        path = record.image.path
        # The suffix of a frame, `x.tif#2`, tells it from the others.
        name = f"{path}.txt" if "#" in PurePosixPath(path).suffix else str(PurePosixPath(path).with_suffix(".txt"))
        if name in seen:
            raise UsageError(f"{seen[name]} and {path} would both be {name} in YOLO's layout.", "Export as coco.")
        seen[name] = path
        width, height = size(record)
        lines = []
        for d in reported(record):
            names[d.class_id] = d.class_name
            left, top, right, bottom = d.box
            shares = ((left + right) / 2 / width, (top + bottom) / 2 / height, (right - left) / width)
            numbers = (*shares, (bottom - top) / height, d.score)
            lines.append(" ".join([str(d.class_id), *(f"{number:.6g}" for number in numbers)]) + "\n")
        yield f"labels/{name}", "".join(lines).encode()
    last = max(names, default=-1)
    yield "classes.txt", "".join(f"{names.get(n, f'class{n}')}\n" for n in range(last + 1)).encode()
