"""Bytes to upright 8-bit RGB, and the letterbox to the network's square and back.

Files of 8 bits keep their values. Deeper ones pass through a recorded *window*, a linear ramp to
8 bits, so that a 12-bit X-ray in a 16-bit file comes out neither black nor clipped.
"""

from __future__ import annotations

import hashlib
import logging
import re
import stat
import struct
import sys
import warnings
import zlib
from io import BytesIO
from typing import Any, NamedTuple

import cv2
import numpy as np
import PIL.Image
from numpy.typing import NDArray

from detxai.errors import ImageError, UsageError
from detxai.values import Image, ImageRef, Pixels, Window

#: What Pillow may try (MPO comes through JPEG). Its other readers start programs or guess.
FORMATS = ("AVIF", "BMP", "DIB", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
MAX_PIXELS = 178_956_970  # where Pillow itself refuses
AUTO_PERCENTILES = (0.5, 99.5)
#: `auto` keeps the nominal range of data that spread over at least this share of it.
FILLS_RANGE = 0.5

# Signatures: what people hand in and detxai does not read; whose header is damaged if Pillow fails.
_FOREIGN = re.compile(rb".{128}DICM|.{4}ftyp(hei|mif1|isom)|%PDF|8BPS", re.DOTALL)
_CUT = re.compile(rb"\xff\xd8\xff|\x89PNG|GIF8..(?!\0\0|..\0\0)|.{4}ftypavi|RIFF.{4}WEBP", re.DOTALL)
# All that Pillow's readers raise over damaged bytes.
_DAMAGE = (
    *(OSError, SyntaxError, ValueError, EOFError, LookupError, ArithmeticError, TypeError),
    *(AttributeError, AssertionError, RuntimeError, SystemError, struct.error, zlib.error),
)
# Ultralytics puts an opener that may run pip in place of Pillow's: keep the original.
_open = getattr(sys.modules.get("ultralytics.utils.patches"), "_image_open", PIL.Image.open)
# What Pillow warns of is reported here. Unlike `catch_warnings`, a filter is safe among threads.
_QUIET = ("ignore", None, Warning, re.compile(r"PIL\."), 0)
logging.getLogger("PIL").addHandler(logging.NullHandler())
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)


class Samples(NamedTuple):
    """Decoded `values` (h, w[, 3]) of any dtype, their `nominal` range, `alpha` (h, w)."""

    values: NDArray[Any]
    nominal: tuple[float, float] = (0.0, 255.0)
    alpha: NDArray[np.uint8] | None = None


def load(ref: ImageRef, window: str = "auto", max_pixels: int = MAX_PIXELS) -> Image:
    """The first picture of the file: (height, width, 3) uint8 RGB, upright, alpha put on white.

    `window`: `auto` (the nominal range where the data fill at least half of it, else their
    percentiles 0.5 to 99.5), `full` (the nominal range), `LOW,HIGH` or `percentile P,Q`.
    Raises ImageError only (see its codes), but UsageError for a `window` that is none. Thread-safe.
    """
    method = parse_window(window)
    if _QUIET not in warnings.filters:
        warnings.filterwarnings("ignore", module=r"PIL\.")
    data = _bytes(ref, max_pixels)
    image = _header(ref, data, max_pixels)
    try:
        image.load()
        pixels, used, notes = _rgb(image, data, method)
    except (MemoryError, PIL.Image.DecompressionBombError) as error:
        raise ImageError("too_large", f"no room for {image.width} x {image.height} pixels") from error
    except _DAMAGE as error:
        raise ImageError("truncated", f"the data are damaged or cut short: {error}") from error
    return Image(ref, pixels, hashlib.sha256(data).hexdigest(), used, notes)


def parse_window(text: str) -> tuple[str, float, float]:
    """(`auto` | `full` | `fixed` | `percentile`, low, high) of a `--window`, or UsageError."""
    words = text.strip().lower()
    if words in ("auto", "full"):
        return words, 0.0, 0.0
    if match := re.fullmatch(r"(percentile\s+)?([-+.\w]+)\s*,\s*([-+.\w]+)", words):
        kind, least, most = ("percentile", 0.0, 100.0) if match[1] else ("fixed", -1e300, 1e300)
        try:
            low, high = float(match[2]), float(match[3])
        except ValueError:
            low = high = np.nan
        if least <= low < high <= most:
            return kind, low, high
    raise UsageError(
        f"--window {text!r} is not a window.",
        "Write auto, full, LOW,HIGH (as 0,4095) or 'percentile P,Q' (as 'percentile 1,99').",
    )


def _bytes(ref: ImageRef, max_pixels: int) -> bytes:
    """The content of a regular file; ImageError where there is none."""
    if ref.problem:
        raise ImageError("bad_path", ref.problem)
    try:
        status = ref.file.stat()
        if not stat.S_ISREG(status.st_mode):
            kind = "a folder" if stat.S_ISDIR(status.st_mode) else "not a regular file"
            raise ImageError("unreadable", f"this is {kind}")
        # 16 bytes are four channels of 32 bits: nothing within the limit needs more.
        if status.st_size > 16 * max_pixels + 2**24:
            raise ImageError("too_large", f"a file of {status.st_size} bytes")
        data = ref.file.read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ImageError("not_found", "there is no such file") from error
    except OSError as error:
        raise ImageError("unreadable", f"the file cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ImageError("bad_path", f"no file can have this name: {error}") from error
    except MemoryError as error:
        raise ImageError("too_large", "the file does not fit into memory") from error
    if not data:
        raise ImageError("empty_file", "the file has no bytes")
    return data


def _header(ref: ImageRef, data: bytes, max_pixels: int) -> PIL.Image.Image:
    """The image as announced by its header, nothing decoded yet and its size within the limit."""
    try:
        image: PIL.Image.Image = _open(BytesIO(data), formats=FORMATS)
    except PIL.Image.DecompressionBombError as error:
        raise ImageError("too_large", f"refused before decoding: {error}") from error
    except PIL.UnidentifiedImageError as error:
        raise _unidentified(ref, data) from error
    except _DAMAGE as error:
        raise ImageError("truncated", f"the header is damaged or cut short: {error}") from error
    if (count := image.width * image.height) > max_pixels:
        raise ImageError("too_large", f"{count} pixels; the limit is {max_pixels}")
    if not count:
        raise ImageError("not_an_image", f"{image.width} x {image.height} pixels")
    return image


def _unidentified(ref: ImageRef, data: bytes) -> ImageError:
    """Why Pillow made nothing of these bytes."""
    if _FOREIGN.match(data) or ref.file.suffix.lower() == ".dcm":
        return ImageError("unsupported", "DICOM, HEIC, PDF and video are not read; convert to PNG")
    is_tiff = data[:4] in (b"II*\0", b"MM\0*")
    directory = int.from_bytes(data[4:8], "little" if data[:1] == b"I" else "big")
    if _CUT.match(data) or (is_tiff and directory >= len(data)):
        return ImageError("truncated", "the file starts as an image; its header is cut or damaged")
    if is_tiff:
        return ImageError("unsupported", "this kind of TIFF is not read; convert it to PNG")
    return ImageError("not_an_image", f"none of the formats {', '.join(FORMATS)}")


def _rgb(
    image: PIL.Image.Image, data: bytes, method: tuple[str, float, float]
) -> tuple[Pixels, Window | None, tuple[str, ...]]:
    """Upright RGB of the decoded `image`, the window used, notes."""
    (values, nominal, alpha), used = _samples(image, data), None
    orientation, notes = _orientation(image)
    if values.dtype != np.uint8:
        finite = np.isfinite(values)
        if not finite.all():
            notes += ("not-a-number samples are black, infinite ones are the window's ends",)
        visible = finite if alpha is None else (finite.T & (alpha > 0).T).T
        used = _window(values[visible], nominal, *method)
        values = _ramp(values, used.low, used.high)
    pixels = values if values.ndim == 3 else np.repeat(values[..., None], 3, axis=2)
    if alpha is not None:
        share = alpha[..., None].astype(np.uint16)
        pixels = ((pixels * share + 255 * (255 - share) + 127) // 255).astype(np.uint8)
    return np.require(_upright(pixels, orientation), np.uint8, ["C", "W"]), used, notes


def _orientation(image: PIL.Image.Image) -> tuple[int, tuple[str, ...]]:
    """The EXIF orientation 1 to 8 still to be applied, and what was wrong with it."""
    try:
        value = image.getexif().get(0x0112, 1)
    except _DAMAGE:
        return 1, ("unreadable EXIF ignored",)
    if isinstance(value, int) and 1 <= value <= 8:
        return value, ()
    return 1, (f"EXIF orientation {value!r:.40} ignored",)


def _upright(pixels: Pixels, orientation: int) -> Pixels:
    """`pixels` (height, width, 3) turned and mirrored as EXIF `orientation` asks."""
    turned = np.rot90(pixels, (0, 0, 2, 2, 3, 3, 1, 1)[orientation - 1])
    return turned[:, ::-1] if orientation in (2, 4, 5, 7) else turned


def _samples(image: PIL.Image.Image, data: bytes) -> Samples:
    """All the values that the file holds."""
    if image.mode.startswith(("I", "F")):
        return _deep_gray(image)
    if deep := _deep_colour(image, data):
        return deep
    try:
        if image.has_transparency_data:
            rgba = np.array(image.convert("RGBA"))
            return Samples(rgba[..., :3], alpha=rgba[..., 3])
        return Samples(np.array(image.convert("RGB")))
    except ValueError as error:
        raise ImageError("unsupported", f"{image.format} in colours {image.mode}") from error


def _deep_gray(image: PIL.Image.Image) -> Samples:
    """One channel of 12 to 32 bits or of floats."""
    tags: Any = getattr(image, "tag_v2", {})
    values = np.asarray(image)
    if image.mode == "F":
        finite = values[np.isfinite(values)]
        low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
        # Floats have no nominal range: they mostly hold 0 to 1, or the values of 8 or 16 bits.
        scale = next((top for top in (1.0, 255.0, 65535.0) if low >= 0 and high <= top), None)
        return Samples(values, (0.0, scale) if scale else (low, high))
    bits = tags.get(258, (16,))[0]
    if tags.get(339, (1,))[0] == 2:
        return Samples(values, (-(2.0 ** (bits - 1)), 2.0 ** (bits - 1) - 1))
    values = values.view(np.uint32) if bits == 32 else values.astype(np.uint16)
    clear = image.info.get("transparency")
    alpha = np.where(values == clear, 0, 255).astype(np.uint8) if isinstance(clear, int) else None
    # Pillow turns "white is zero" round for 8 bits only.
    values = 2**bits - 1 - values if tags.get(262) == 0 else values
    return Samples(values, (0.0, 2.0**bits - 1), alpha)


def _deep_colour(image: PIL.Image.Image, data: bytes) -> Samples | None:
    """Colour of 16 bits, which Pillow cuts to 8; None for other files and where OpenCV fails."""
    if image.format not in ("PNG", "TIFF", "PPM", "JPEG2000") or image.mode not in ("RGB", "RGBA"):
        return None
    tags: Any = getattr(image, "tag_v2", {})
    if (data[24] if image.format == "PNG" else tags.get(258, (16,))[0]) <= 8:
        return None
    try:
        values = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    except cv2.error:
        return None
    if values is None or values.dtype != np.uint16 or values.ndim < 3:
        return None
    alpha = (values[..., 3] // 257).astype(np.uint8) if values.shape[2] == 4 else None
    return Samples(values[..., 2::-1], (0.0, 65535.0), alpha)


def _window(seen: NDArray[Any], nominal: tuple[float, float], kind: str, low: float, high: float) -> Window:
    """The window for the finite, visible values `seen`; `method` says what `auto` became."""
    if kind == "fixed":
        return Window(f"{low:g},{high:g}", low, high)
    # Where nearly all values are equal, `auto` stretches over the few others: all there is to see.
    for ends in ((low, high),) if kind == "percentile" else (AUTO_PERCENTILES, (0.0, 100.0)):
        if kind == "full" or not seen.size:
            break
        least, most = map(float, np.percentile(seen, ends))
        if kind == "auto" and most - least >= FILLS_RANGE * (nominal[1] - nominal[0]):
            break
        if least < most:
            return Window(f"percentile {ends[0]:g},{ends[1]:g}", least, most)
    return Window("full", *nominal)


def _ramp(values: NDArray[Any], low: float, high: float) -> Pixels:
    """`values` as uint8: `low` and less 0, `high` and more 255, NaN 0, linear between."""
    if values.dtype == np.uint16:
        table = _ramp(np.arange(2**16, dtype=np.float64), low, high)
        return np.take(table, values)
    with np.errstate(all="ignore"):
        share = (values.astype(np.float64) - low) / ((high - low) or 1.0)
        return np.rint(255 * np.nan_to_num(np.clip(share, 0, 1))).astype(np.uint8)
