"""Whether a file that decoded without an error held the whole picture.

JPEG, PNG and GIF decoders fill up what is missing where the data end properly but early. A picture whose end looks
filled up is decoded once more, with another filling: what then differs was never in the file.
"""

from __future__ import annotations

from collections.abc import Callable
from io import BytesIO

import PIL.Image

#: What libjpeg shows for blocks that it has no data for, in every mode.
_GREY = {127, 128}
#: Bytes that no picture needs any more once all of its blocks are there.
_SURPLUS = bytes(range(1, 255)) * 2

Opener = Callable[[BytesIO], PIL.Image.Image]


def ended_early(image: PIL.Image.Image, data: bytes, opened: Opener) -> bool:
    """Whether the decoded `image`, the first of the file `data`, holds rows that the file does not.

    `opened` reads a header, as it did for `image`. Other formats than JPEG, PNG and GIF tell by themselves.
    """
    if image.format == "JPEG":
        return _grey_corner(image) and _differs_with_surplus(image, data, opened)
    if image.format in ("PNG", "GIF"):
        return _differs_on_other_ground(image, data, opened)
    return False


def _grey_corner(image: PIL.Image.Image) -> bool:
    width, height = image.size
    corner = image.crop((max(0, width - 8), max(0, height - 8), width, height))
    return set(corner.tobytes()) <= _GREY


def _differs_with_surplus(image: PIL.Image.Image, data: bytes, opened: Opener) -> bool:
    """Whether a decoder that is given more data before the end mark makes another picture of them."""
    end = data.rfind(b"\xff\xd9")
    if end < 0:
        return False
    more = opened(BytesIO(data[:end] + _SURPLUS + data[end:]))
    more.load()
    return more.tobytes() != image.tobytes()


def _differs_on_other_ground(image: PIL.Image.Image, data: bytes, opened: Opener) -> bool:
    """Whether the last rows are still those of the memory that the picture was decoded into."""
    again = opened(BytesIO(data))
    tiles = getattr(again, "tile", None)
    if not tiles or again.mode != image.mode:
        return False
    left, top, right, bottom = tiles[0][1]
    # Of interlaced pictures the last row that comes is the last or the one before.
    rows = [(left, row, right, row + 1) for row in range(max(top, bottom - 2), bottom)]
    if all(image.crop(row).getbbox(alpha_only=False) for row in rows):
        return False
    ones = (1,) * len(again.getbands())
    again.im = PIL.Image.new(again.mode, again.size, ones if len(ones) > 1 else 1).im
    again.load()
    return any(again.crop(row).tobytes() != image.crop(row).tobytes() for row in rows)
