"""Both energies in one file, low first: two bands of a TIFF or its two pages, by tifffile (the extra `tiff`); a gray
picture with alpha, whose second channel is then no alpha; two frames of a DICOM file.
"""

from __future__ import annotations

import logging
import struct
import zlib
from io import BufferedReader, BytesIO
from typing import Any, NamedTuple

import cv2
import numpy as np
import PIL.Image
from numpy.typing import NDArray

from detxai.errors import ImageError
from detxai.inputs import dicom
from detxai.inputs.samples import Samples

_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_ONE = "it holds one energy, not two (--pair bands)"
# What tifffile raises over damaged bytes, beside an error of its own.
_DAMAGE = (
    *(OSError, ValueError, LookupError, ArithmeticError, TypeError, AttributeError, RuntimeError, AssertionError),
    *(struct.error, zlib.error),
)
_WHITE_IS_ZERO, _BLACK_IS_ZERO = 0, 1


class Header(NamedTuple):
    """What a TIFF announces: pixels of each band, and `sample` bytes a pixel of both."""

    width: int
    height: int
    sample: int


def is_tiff(stream: BufferedReader | BytesIO) -> bool:
    """Whether the bytes begin as those of a TIFF."""
    stream.seek(0)
    head = stream.read(4)
    stream.seek(0)
    return head in _MAGIC


def header(stream: BufferedReader | BytesIO) -> Header:
    """What a TIFF announces, its pixels unread. Raises ImageError where it does not hold two energies."""
    with _opened(stream) as file:
        page = _pages(file)[0]
        return Header(page.imagewidth, page.imagelength, 2 * page.dtype.itemsize)


def of_tiff(data: bytes) -> tuple[Samples, Samples]:
    """Low and high energy of a TIFF. Raises ImageError."""
    with _opened(BytesIO(data)) as file:
        pages = _pages(file)
        for page in pages:
            _require_whole(page, len(data))
        try:
            values = [page.asarray() for page in pages]
        except _DAMAGE as error:
            raise ImageError("truncated", f"the data are damaged or cut short: {error!s:.200}") from error
        if len(values) == 1:
            axis = 0 if pages[0].planarconfig == 2 else 2
            values = list(np.moveaxis(values[0], axis, 0))
        common = {"nominal": _range(values), "inverted": pages[0].photometric == _WHITE_IS_ZERO}
        return Samples(values[0], **common), Samples(values[1], **common)


def of_alpha(image: PIL.Image.Image, data: bytes) -> tuple[Samples, Samples]:
    """Low and high energy of a gray picture with alpha, of 8 or 16 bits. Raises ImageError where it is none."""
    if image.mode == "LA":
        both = np.array(image)
        return Samples(both[..., 0]), Samples(both[..., 1])
    if image.format != "PNG" or data[24:26] != b"\x10\x04":
        raise ImageError("unpaired", _ONE)
    values: Any = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if values is None or values.dtype != np.uint16 or values.shape != (image.height, image.width, 4):
        raise ImageError("truncated", "the data are damaged")
    return Samples(values[..., 0], (0.0, 65535.0)), Samples(values[..., 3], (0.0, 65535.0))


def of_frames(data: bytes, count: int) -> tuple[Samples, Samples]:
    """Low and high energy of a DICOM file of `count` frames. Raises ImageError where it has not two."""
    if count != 2:
        raise ImageError("unpaired", _ONE)
    return dicom.samples(data, 0), dicom.samples(data, 1)


def _opened(stream: BufferedReader | BytesIO) -> Any:
    """The TIFF in `stream`. Raises ImageError."""
    try:
        import tifffile
    except ModuleNotFoundError as error:
        raise ImageError("unsupported", "a TIFF of two bands needs tifffile: pip install tifffile") from error
    logging.getLogger("tifffile").addHandler(logging.NullHandler())
    logging.getLogger("tifffile").propagate = False
    stream.seek(0)
    try:
        return tifffile.TiffFile(stream)
    except (*_DAMAGE, tifffile.TiffFileError) as error:
        raise ImageError("truncated", f"the header is damaged or cut short: {error!s:.200}") from error


def _pages(file: Any) -> list[Any]:
    """The page of two bands, or both pages of one. Raises ImageError where the TIFF is neither."""
    try:
        count = len(file.pages)
        pages = [file.pages[number] for number in range(min(count, 2))]
        layouts = {(page.imagewidth, page.imagelength, page.samplesperpixel, page.dtype) for page in pages}
        gray = all(page.photometric in (_WHITE_IS_ZERO, _BLACK_IS_ZERO) for page in pages)
    except _DAMAGE as error:
        raise ImageError("truncated", f"the header is damaged or cut short: {error!s:.200}") from error
    ((width, height, bands, kind),) = layouts if len(layouts) == 1 else ((0, 0, 0, None),)
    if not (gray and kind is not None and (count, bands) in ((1, 2), (2, 1))):
        raise ImageError("unpaired", _ONE)
    if not (isinstance(width, int) and isinstance(height, int)):
        raise ImageError("truncated", "the header is damaged: it gives no size")
    return pages


def _require_whole(page: Any, size: int) -> None:
    """Raise ImageError where a part of the page lies beyond the file, or is not there: tifffile would make it black."""
    try:
        ends = [start + count for start, count in zip(page.dataoffsets, page.databytecounts, strict=True)]
        whole = ends and min(page.databytecounts) > 0 and max(ends) <= size
        whole = whole and (page.compression != 1 or sum(page.databytecounts) >= page.nbytes)
    except _DAMAGE:
        whole = False
    if not whole:
        raise ImageError("truncated", "the data end before the last row: a part of the picture is missing")


def _range(values: list[NDArray[Any]]) -> tuple[float, float]:
    """The ends of the format; of floats, the least power of two less one that holds them, at least one."""
    if np.issubdtype(values[0].dtype, np.integer):
        ends = np.iinfo(values[0].dtype)
        return float(ends.min), float(ends.max)
    finite = [part[np.isfinite(part)] for part in values]
    most = max((float(part.max()) for part in finite if part.size), default=1.0)
    return 0.0, next(top for top in (1.0, 255.0, 65535.0, max(most, 1.0)) if most <= top)
