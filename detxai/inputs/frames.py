"""Files that hold several pictures: pages of a TIFF, frames of an animation or of a DICOM file."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import PIL.Image

from detxai.errors import ImageError
from detxai.values import ImageRef

#: Bits of a TIFF page's NewSubfileType: a smaller copy of another page, or a mask.
_NO_PICTURE = 0b101
_NUMBERED = re.compile(r"#\d+$")


def pages(image: PIL.Image.Image, size: int) -> list[int]:
    """Indices of the pictures in a file of `size` bytes, the first of them first; never empty."""
    count = int(getattr(image, "n_frames", 1))
    # A header may promise billions; a frame takes a chunk of its own.
    count = min(count, size // 16 + 1)
    if count == 1 or image.format != "TIFF":
        return list(range(count))
    numbers = []
    for index in range(count):
        image.seek(index)
        kind: Any = getattr(image, "tag_v2", {}).get(254, 0)
        if index == 0 or not (isinstance(kind, int) and kind & _NO_PICTURE):
            numbers.append(index)
    image.seek(0)
    return numbers


def seek(image: PIL.Image.Image, index: int, check: Callable[[PIL.Image.Image], None]) -> None:
    """Go to the picture `index`, with `check` at every step that decodes: animations build on what came before."""
    for step in range(1, index + 1) if image.format in ("GIF", "PNG") else [index]:
        image.seek(step)
        check(image)


def note(frame: int | None, count: int) -> tuple[str, ...]:
    """What a record says about the pictures beside this one."""
    if count < 2:
        return ()
    if frame is None:
        return (f"the first of {count} pictures in this file; --frames all explains each",)
    return (f"picture {frame} of {count} in this file",)


def expanded(refs: Iterable[ImageRef], count: Callable[[ImageRef], int]) -> Iterator[ImageRef]:
    """`refs` with each file of several pictures as one ref a picture, named `x.tif#2`.

    A file that cannot be counted stays as it is: its own reading says why. One whose name ends like a number of a
    picture is refused, since two inputs would want one record.
    """
    for ref in refs:
        if ref.problem is None and _NUMBERED.search(ref.path):
            yield replace(ref, problem="with --frames all, names in # and a number are those of frames")
            continue
        try:
            number = 1 if ref.problem else count(ref)
        except ImageError:
            number = 1
        if number < 2:
            yield ref
        else:
            yield from (replace(ref, path=f"{ref.path}#{n}", frame=n) for n in range(1, number + 1))
