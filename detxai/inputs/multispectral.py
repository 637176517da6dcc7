"""Pictures of other channels than gray and colour, as ultralytics reads them; and arrays of NumPy.

Pages of one size that lie in one TIFF are the bands of one picture; so are the samples of its first page where that has
several. 16 bits keep their upper 8 unless a window is asked for. Colours come as OpenCV has them (blue first): that is
the order in which a network of other than 3 channels was trained.
"""

from __future__ import annotations

import math
from dataclasses import replace
from io import BufferedReader, BytesIO
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from detxai.errors import ImageError
from detxai.inputs.window import Method, ramp, window_of
from detxai.values import Image, Pixels, Window

_NPY, _TIFF = b"\x93NUMPY", (b"II", b"MM")
#: Pages of a TIFF that are looked at, at most.
MOST_PAGES = 512
#: Tags of a TIFF: width, height, bits and number of the samples of a pixel; where strips and tiles are, and how long.
_WIDTH, _HEIGHT, _BITS, _SAMPLES = 256, 257, 258, 277
_PARTS = ((273, 279), (324, 325))
#: How `auto` makes 8 of 16 bits.
HIGH_BYTE = Window("high byte", 0.0, 65535.0)


class Announced(NamedTuple):
    """What a header says: `size` (width, height), the bytes of all numbers, and how many pages there are (`parts`)."""

    size: tuple[int, int]
    bytes: int
    parts: int = 1


def is_array(stream: BufferedReader) -> bool:
    """Whether a file is one of NumPy's arrays."""
    head = stream.read(len(_NPY))
    stream.seek(0)
    return head == _NPY


def announced(stream: BufferedReader, channels: int, length: int) -> Announced | None:
    """What the header of an array or a TIFF of `length` bytes says; None for other files.

    Raises ImageError for a header that cannot be, or promises more than is there.
    """
    head = stream.read(16)
    stream.seek(0)
    try:
        if head.startswith(_NPY):
            shape, dtype = _array_header(stream)
            if length - stream.tell() != math.prod(shape) * dtype.itemsize:
                raise ImageError("truncated", "the array's header does not fit the length of the file")
            height, width, _ = _laid(shape, channels)
            return Announced((width, height), math.prod(shape) * dtype.itemsize)
        return _tiff(stream, head, length) if head[:2] in _TIFF else None
    except (ValueError, SyntaxError, TypeError, KeyError, LookupError, EOFError, OverflowError) as error:
        raise ImageError("truncated", f"the header is damaged or cut short: {error!s:.200}") from error
    finally:
        stream.seek(0)


def _array_header(stream: BufferedReader | BytesIO) -> tuple[tuple[int, ...], np.dtype[Any]]:
    version = npy.read_magic(stream)
    read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    shape, _, dtype = read(stream)
    if dtype.kind not in "uif" or dtype.itemsize > 8:
        raise ImageError("unsupported", f"an array of {dtype} is no picture; save it as uint8, uint16 or float32")
    return shape, dtype


def _laid(shape: tuple[int, ...], channels: int) -> tuple[int, int, bool]:
    """(height, width, whether channels come first) of an array. Raises ImageError where it has others, or both may."""
    if channels == 3 and len(shape) == 2:
        return shape[0], shape[1], False
    ends = [shape[axis] for axis in (0, -1)] if len(shape) == 3 else []
    if channels == 3 and ends and ends[1] == 1:
        return shape[0], shape[1], False
    if ends.count(channels) == 2:
        raise ImageError(
            "channels", f"an array of {shape} has {channels} channels first or last: save it (H, W, {channels})"
        )
    if channels not in ends:
        raise ImageError("channels", f"an array of {shape} is no picture of {channels} channels, (H, W, {channels})")
    return (shape[1], shape[2], True) if ends[0] == channels else (shape[0], shape[1], False)


def _tiff(stream: BufferedReader, head: bytes, length: int) -> Announced:
    """Pages and their numbers, no more of them than the file can hold."""
    directory: Any = ImageFileDirectory_v2(head if head[2] == 43 else head[:8])
    offsets: list[int] = []
    size, numbers = (0, 0), 0
    while (offset := directory.next) and len(offsets) < MOST_PAGES:
        if offset in offsets or offset >= length:
            raise ImageError("truncated", "the pages of this TIFF lead nowhere: the file is cut or damaged")
        offsets.append(offset)
        stream.seek(offset)
        directory.load(stream)
        width, height = int(directory[_WIDTH]), int(directory[_HEIGHT])
        samples, bits = int(directory.get(_SAMPLES, 1)), max(directory.get(_BITS, (1,)))
        size = size if len(offsets) > 1 else (width, height)
        numbers += width * height * samples * -(-int(bits) // 8)
        for places, lengths in _PARTS:
            ends = zip(directory.get(places, ()), directory.get(lengths, ()), strict=False)
            if any(start + count > length for start, count in ends):
                raise ImageError("truncated", "the data end before the last row: a part of the picture is missing")
    return Announced(size, numbers, len(offsets))


def decoded(data: bytes, channels: int, method: Method, header: Announced | None) -> tuple[Pixels, Window | None]:
    """(height, width, channels) uint8 of the file `data`, and how more than 8 bits became 8.

    `header`: as `announced` has it, None for what is neither an array nor a TIFF. Raises ImageError for a picture of
    other channels, or one that cannot be read.
    """
    if data.startswith(_NPY):
        values = npy.read_array(BytesIO(data), allow_pickle=False)
        *_, first = _laid(values.shape, channels)
        values = np.moveaxis(values, 0, 2) if first else np.atleast_3d(values)
        values = np.repeat(values, 3, 2) if channels == 3 and values.shape[2] == 1 else values
    else:
        values = _by_opencv(data, header)
    if values.shape[2] != channels:
        raise ImageError("channels", f"the picture has {values.shape[2]} channels, and the model reads {channels}")
    return _eight(values, method)


def _by_opencv(data: bytes, header: Announced | None) -> NDArray[Any]:
    """As ultralytics' `imread` with IMREAD_UNCHANGED."""
    content = np.frombuffer(data, np.uint8)
    values = None
    try:
        if header is not None:
            read, pages = cv2.imdecodemulti(content, cv2.IMREAD_UNCHANGED)
            if not read or len(pages) < header.parts:
                raise ImageError("truncated", f"{len(pages)} of {header.parts} pages could be read")
            if pages[0].ndim == 3:
                values = pages[0]
            elif len(pages) > 1 and all(page.shape == pages[0].shape for page in pages):
                values = np.stack(pages, 2)
        if values is None:
            values = cv2.imdecode(content, cv2.IMREAD_UNCHANGED)
    except cv2.error as error:
        raise ImageError("truncated", f"the data are damaged: {str(error).strip():.200}") from error
    if values is None:
        raise ImageError("unsupported", "OpenCV, which reads pictures of many channels, does not read this one")
    return np.atleast_3d(values)


def _eight(values: NDArray[Any], method: Method) -> tuple[Pixels, Window | None]:
    if values.dtype == np.uint8:
        return np.require(values, np.uint8, ["C", "W"]), None
    if values.dtype == np.uint16 and method[0] == "auto":
        return np.require(values >> 8, np.uint8, ["C", "W"]), HIGH_BYTE
    finite = values[np.isfinite(values)]
    used = window_of(finite, _nominal(values.dtype, finite), *method)
    return np.require(ramp(values, used.low, used.high), np.uint8, ["C", "W"]), used


def _nominal(dtype: np.dtype[Any], finite: NDArray[Any]) -> tuple[float, float]:
    """The range that values of a type have. Floats mostly hold 0 to 1, or the values of 8 or 16 bits."""
    if dtype.kind != "f":
        return float(np.iinfo(dtype).min), float(np.iinfo(dtype).max)
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
    return 0.0, next((top for top in (1.0, 255.0, 65535.0) if low >= 0 and high <= top), high)


def image(read: Image, band: tuple[int, ...]) -> Image:
    """`read` for people: of other than 3 channels one `band`, counted from 1, as gray, or three as red, green, blue."""
    if read.pixels.shape[2] == 3:
        return read
    picked = read.pixels[..., [number - 1 for number in band]]
    pixels = np.require(np.repeat(picked, 3, 2) if len(band) == 1 else picked, np.uint8, ["C", "W"])
    return replace(read, pixels=pixels, bands=read.pixels, shown=band)
