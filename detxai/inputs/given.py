"""Images as Python has them: paths, Pillow's images, arrays, and lists of these."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageOps

from detxai.errors import NoInputError, UsageError
from detxai.inputs.sources import find
from detxai.values import ImageRef

#: Modes of Pillow that a PNG keeps; TIFF takes the others.
_PNG_MODES = {"1", "L", "LA", "P", "RGB", "RGBA", "I;16"}


def refs(
    images: Any,
    frames: str = "first",
    pair: tuple[str, str, str] | None = None,
    views: tuple[str, str] | None = None,
) -> Iterator[ImageRef]:
    """References to `images`: a path (file, folder, glob), a Pillow image, an array, or an iterable of these.

    `frames`, `pair`, `views`: as `find` has them. Arrays are (height, width, 3) uint8 in RGB (OpenCV has
    BGR: `array[..., ::-1]`), or (height, width, n) for a model of n channels. Raises UsageError for anything else, and
    NoInputError for paths without an image.
    """
    number = 0
    for are_paths, group in groupby(_flat(images), lambda item: isinstance(item, str | Path)):
        if are_paths:
            yield from _of_paths([str(item) for item in group], frames, pair, views)
            continue
        for item in group:
            if isinstance(item, ImageRef):
                yield item
            else:
                name = f"image-{number}"
                number += 1
                yield ImageRef(name, Path(name), data=_encoded(item))


def _flat(images: Any) -> Iterator[Any]:
    """What is one image, or one path, each."""
    if isinstance(images, str | Path | ImageRef | PIL.Image.Image | np.ndarray) or not isinstance(images, Iterable):
        yield images
    else:
        for item in images:
            yield from _flat(item)


def _of_paths(
    places: list[str], frames: str, pair: tuple[str, str, str] | None, views: tuple[str, str] | None
) -> Iterator[ImageRef]:
    """Images of `places` as `find` has them, but one that is named twice is there twice."""
    while places:
        count = next((n for n, place in enumerate(places) if place in places[:n]), len(places))
        sources = find(places[:count], frames=frames, pair=pair, views=views)
        yield from sources.refs
        if not sources.total:
            raise NoInputError(f"No image was found in {', '.join(places[:count])} ({sources.ignored} other files).")
        places = places[count:]


def _encoded(item: Any) -> bytes:
    """An image in memory as a file would hold it, without loss."""
    if isinstance(item, np.ndarray):
        if item.ndim != 3 or item.dtype != np.uint8 or not item.size:
            raise UsageError(
                f"An array is (height, width, 3) uint8 in RGB, and this one is {item.shape} {item.dtype}.",
                "Deeper pictures are read from files: give a path.",
            )
        if item.shape[2] != 3:  # for a model of so many channels
            buffer = io.BytesIO()
            np.save(buffer, item, allow_pickle=False)
            return buffer.getvalue()
        item = PIL.Image.fromarray(np.ascontiguousarray(item))
    if not isinstance(item, PIL.Image.Image):
        raise UsageError(
            f"{type(item).__name__} is no image.", "Give paths, Pillow images, or arrays (height, width, 3) uint8."
        )
    upright = PIL.ImageOps.exif_transpose(item)
    buffer = io.BytesIO()
    upright.save(buffer, "PNG" if upright.mode in _PNG_MODES else "TIFF")
    return buffer.getvalue()
