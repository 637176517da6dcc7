"""Bytes to upright 8-bit RGB, within limits that the header is held to before anything is decoded.

Files of 8 bits keep their values. Deeper ones pass through a recorded *window*, a linear ramp to
8 bits, so that a 12-bit X-ray in a 16-bit file comes out neither black nor clipped.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
import re
import stat
import struct
import sys
import tempfile
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from importlib.util import find_spec
from io import BufferedReader, BytesIO

import numpy as np
import PIL.Image

from detxai.errors import ImageError
from detxai.inputs import bands, dicom, energies, frames, multispectral, remote
from detxai.inputs.complete import ended_early
from detxai.inputs.samples import Samples, has_bands, samples
from detxai.inputs.window import Method, over_white, parse_window, ramp, window_of
from detxai.values import Image, ImageRef, Pair, Pixels, Window

#: What Pillow may try (MPO comes through JPEG). Its other readers start programs or guess.
FORMATS = ("AVIF", "BMP", "DIB", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
MAX_PIXELS = 178_956_970  # where Pillow itself refuses
#: Bytes a pixel at the height of decoding, beside the file's own: measured with files of every format.
PLAIN, TRANSPARENT, DEEP = 24, 32, 48

Admit = Callable[[int], None]
Bands = tuple[int, ...]
#: What tells the size of a picture before it is decoded.
Announced = PIL.Image.Image | dicom.Header | bands.Header

# Signatures: what people hand in and detxai does not read; whose header is damaged if Pillow fails.
_FOREIGN = re.compile(
    rb"(?P<heic>.{4}ftyp(hei|hev|mif1|msf1))|(?P<jxl>\xff\x0a|\0\0\0\x0cJXL )|(?P<pdf>%PDF)|(?P<psd>8BPS)"
    rb"|(?P<video>.{4}ftyp(?!avi)|RIFF.{4}AVI |\x1aE\xdf\xa3|\0\0\x01\xba|OggS|FLV)",
    re.DOTALL,
)
_FOREIGN_KINDS = {
    "heic": "HEIC needs pillow-heif: pip install pillow-heif",
    "jxl": "JPEG XL is not read; convert it: djxl IN.jxl OUT.png",
    "pdf": "PDF is not read; convert it: pdftoppm -png IN.pdf OUT",
    "psd": "PSD is not read; convert it to PNG",
    "video": "video is not read; take pictures from it: ffmpeg -i IN -vf fps=1 frames/%06d.png",
}
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


def load(
    ref: ImageRef,
    window: str = "auto",
    max_pixels: int = MAX_PIXELS,
    admit: Callable[[int], None] = lambda size: None,
    channels: int = 3,
    band: tuple[int, ...] = (1,),
) -> Image:
    """The picture of the file: (height, width, 3) uint8 RGB, upright, alpha put on white.

    `channels` that the network reads: where they are not 3, the picture has so many `bands`, and shows some: `band`.

    `window`: `auto` (the nominal range where the data fill at least half of it, else their
    percentiles 0.5 to 99.5), `full` (the nominal range), `LOW,HIGH` or `percentile P,Q`.
    `admit` is told how many bytes decoding will take at most, from the header, before anything is decoded or read
    in full, and may wait. Raises ImageError only (see its codes), but UsageError for a `window` that is none.
    Thread-safe.
    """
    method = parse_window(window)
    _prepare_pillow(max_pixels)
    if ref.pair is not None:
        if channels != 3:
            raise ImageError("channels", f"--pair makes colours of two energies: the model reads {channels} channels")
        read = _banded if ref.pair.file == ref.file else _dual
        return read(ref, ref.pair, method, max_pixels, admit)
    with _opened(ref, max_pixels) as stream:
        try:
            if channels != 3 or multispectral.is_array(stream):
                return _multispectral(ref, stream, method, max_pixels, admit, channels, band)
            scan = _scan(ref, stream, max_pixels)
            header = scan or _header(ref, stream, max_pixels)
            size = _upright_size(header)
            admit(_needed(header) + os.fstat(stream.fileno()).st_size)
            data = _content(stream)
        except ImageError as error:
            error.sha256 = error.sha256 or _digest(stream)
            raise
    digest = hashlib.sha256(data).hexdigest()
    try:
        if scan is not None:
            return _scanned(ref, data, digest, method, scan)
        return _decoded(ref, data, digest, method, max_pixels)
    except ImageError as error:
        error.sha256 = digest
        error.size = size if error.size == (None, None) else error.size
        raise


def pictures(ref: ImageRef, max_pixels: int = MAX_PIXELS) -> int:
    """How many pictures the file of `ref` holds. Raises ImageError for a file that is none."""
    _prepare_pillow(max_pixels)
    with _opened(ref, max_pixels) as stream:
        if (scan := _scan(ref, stream, max_pixels)) is not None:
            return scan.pictures
        image = _header(ref, stream, max_pixels)
        try:
            return len(frames.pages(image, os.fstat(stream.fileno()).st_size))
        except _DAMAGE as error:
            raise ImageError("truncated", f"the file is damaged: {error}") from error


def digest(ref: ImageRef, max_pixels: int = MAX_PIXELS) -> str | None:
    """The sha256 of the bytes of `ref`, of both halves joined by +; None where `load` would read no regular file."""
    if ref.pair is not None:
        halves = [digest(half, max_pixels) for half in _halves(ref, ref.pair)]
        return "+".join(map(str, halves)) if all(halves) else None
    try:
        with _opened(ref, max_pixels) as stream:
            return _digest(stream)
    except ImageError:
        return None


def _prepare_pillow(max_pixels: int) -> None:
    """Silence Pillow's warnings, and lift its own limit where more was asked for; never lower it."""
    if _QUIET not in warnings.filters:
        warnings.filterwarnings("ignore", module=r"PIL\.")
    limit = PIL.Image.MAX_IMAGE_PIXELS
    if limit is not None and 2 * limit < max_pixels:
        PIL.Image.MAX_IMAGE_PIXELS = max_pixels


@contextmanager
def _opened(ref: ImageRef, max_pixels: int) -> Iterator[BufferedReader]:
    """The regular file of `ref`, open; ImageError where there is none or it is too large."""
    if ref.problem:
        raise ImageError("bad_path", ref.problem)
    if ref.url is not None:
        ref = replace(ref, data=remote.read(ref.url, _most_bytes(max_pixels)), url=None)
    if ref.data is not None:
        with tempfile.TemporaryFile() as kept, open(kept.fileno(), "rb", closefd=False) as stream:
            kept.write(ref.data)
            kept.flush()
            stream.seek(0)
            yield stream
        return
    try:
        # Without O_NONBLOCK a FIFO that was put in the file's place would keep us waiting for ever.
        stream = open(ref.file, "rb", opener=_at_once)  # noqa: SIM115  (the errors of opening are told apart)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ImageError("not_found", "there is no such file") from error
    except IsADirectoryError as error:
        raise ImageError("unreadable", "this is a folder") from error
    except OSError as error:
        raise ImageError("unreadable", f"the file cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ImageError("bad_path", f"no file can have this name: {error}") from error
    with stream:
        status = os.fstat(stream.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise ImageError("unreadable", "this is not a regular file")
        if not status.st_size:
            raise ImageError("empty_file", "the file has no bytes")
        if status.st_size > _most_bytes(max_pixels):
            raise ImageError("too_large", f"a file of {status.st_size} bytes; --max-pixels {max_pixels} allows less")
        yield stream


def _most_bytes(max_pixels: int) -> int:
    """16 bytes are four channels of 32 bits: nothing within the limit needs more."""
    return 16 * max_pixels + 2**24


def _at_once(name: str, flags: int) -> int:
    return os.open(name, flags | getattr(os, "O_NONBLOCK", 0))


def _content(stream: BufferedReader) -> bytes:
    try:
        size = stream.seek(0, os.SEEK_END)  # this also drops what was buffered of a file that may have changed since
        stream.seek(0)
        return stream.read(size)
    except OSError as error:
        raise ImageError("unreadable", f"the file cannot be read: {error.strerror}") from error
    except MemoryError as error:
        raise ImageError("too_large", "the file does not fit into memory") from error


def _digest(stream: BufferedReader) -> str | None:
    try:
        stream.seek(0)
        return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError:
        return None


def _header(ref: ImageRef, stream: BufferedReader | BytesIO, max_pixels: int) -> PIL.Image.Image:
    """The image as announced by its header, nothing decoded yet and its size within the limit."""
    try:
        image = _picture(stream)
    except PIL.Image.DecompressionBombError as error:
        raise ImageError("too_large", f"{error}; the limit is {max_pixels} (--max-pixels)") from error
    except PIL.UnidentifiedImageError as error:
        raise _unidentified(ref, stream) from error
    except _DAMAGE as error:
        raise ImageError("truncated", f"the header is damaged or cut short: {error}") from error
    _require_size(image, max_pixels)
    return image


def _picture(stream: BufferedReader | BytesIO) -> PIL.Image.Image:
    """The image in `stream` by Pillow, or by pillow-heif where that is installed."""
    try:
        image: PIL.Image.Image = _open(stream, formats=FORMATS)
        return image
    except PIL.UnidentifiedImageError:
        stream.seek(0)
        match = _FOREIGN.match(stream.read(64))
        if match is None or match.lastgroup != "heic" or find_spec("pillow_heif") is None:
            raise
        from pillow_heif import HeifImageFile

        stream.seek(0)
        heif: PIL.Image.Image = HeifImageFile(stream)
        return heif


def _scan(ref: ImageRef, stream: BufferedReader | BytesIO, max_pixels: int) -> dicom.Header | None:
    """The header of a DICOM file; None for other files."""
    head = stream.read(132)
    stream.seek(0)
    if not dicom.recognised(head, ref.file.suffix):
        return None
    header = dicom.header(stream)
    _require_size(header, max_pixels)
    return header


def _require_size(image: Announced, max_pixels: int) -> None:
    """Raise ImageError where `image` has no pixels, or too many."""
    count, problem = image.width * image.height, None
    if count > max_pixels:
        problem = ImageError("too_large", f"{count} pixels; the limit is {max_pixels} (--max-pixels)")
    elif not count:
        problem = ImageError("not_an_image", f"{image.width} x {image.height} pixels")
    if problem is not None:
        problem.size = _upright_size(image)
        raise problem


def _needed(image: Announced) -> int:
    """Bytes that decoding takes at its height beside the file's own, by its header."""
    if not isinstance(image, PIL.Image.Image):
        return image.width * image.height * (DEEP + image.sample)
    deep = (
        image.mode.startswith(("I", "F"))
        or "16" in str(getattr(image, "tile", ""))
        or image.format in ("PPM", "JPEG2000", "TIFF")
    )
    clear = image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info
    return image.width * image.height * (DEEP if deep else TRANSPARENT if clear else PLAIN)


def _unidentified(ref: ImageRef, stream: BufferedReader | BytesIO) -> ImageError:
    """Why Pillow made nothing of this file."""
    stream.seek(0)
    data = stream.read(256)
    if match := _FOREIGN.match(data):
        return ImageError("unsupported", _FOREIGN_KINDS[match.lastgroup or ""])
    is_tiff = data[:4] in (b"II*\0", b"MM\0*")
    directory = int.from_bytes(data[4:8], "little" if data[:1] == b"I" else "big")
    if _CUT.match(data) or (is_tiff and directory >= stream.seek(0, os.SEEK_END)):
        return ImageError("truncated", "the file starts as an image; its header is cut or damaged")
    if is_tiff:
        return ImageError(
            "unsupported", "this kind of TIFF is not read; convert it to PNG (of two energies: --pair bands)"
        )
    return ImageError("not_an_image", f"none of the formats {', '.join(FORMATS)}")


def _decoded(ref: ImageRef, data: bytes, digest: str, method: Method, max_pixels: int) -> Image:
    """The picture in the bytes of the file."""
    image = _header(ref, BytesIO(data), max_pixels)
    try:
        notes = _turned_to(image, ref.frame, len(data), max_pixels)
        stored = _stored(image, ref.frame, data, max_pixels)
        orientation, said = _orientation(image)
        pixels, used, more = _rgb(stored, method)
        pixels = np.require(_upright(pixels, orientation), np.uint8, ["C", "W"])
    except (MemoryError, PIL.Image.DecompressionBombError) as error:
        raise ImageError("too_large", f"no room for {image.width} x {image.height} pixels") from error
    except _DAMAGE as error:
        raise ImageError("truncated", f"the data are damaged or cut short: {error}") from error
    return Image(ref, pixels, digest, used, (*said, *stored.notes, *more, *notes))


def _multispectral(
    ref: ImageRef, stream: BufferedReader, method: Method, max_pixels: int, admit: Admit, channels: int, band: Bands
) -> Image:
    """A picture of bands, or an array."""
    if ref.frame is not None and channels != 3:
        raise ImageError("channels", "--frames all takes pages apart, and the model reads them together: leave it out")
    length = os.fstat(stream.fileno()).st_size
    header, size = multispectral.announced(stream, channels, length), (0, 0)
    if header is None:
        whole = _header(ref, stream, max_pixels)
        size, needed = (whole.width, whole.height), _needed(whole)
    else:
        size, needed = header.size, 4 * header.bytes
    if math.prod(size) > max_pixels or needed > 4 * _most_bytes(max_pixels):
        raise ImageError("too_large", f"{math.prod(size)} pixels; the limit is {max_pixels} (--max-pixels)")
    admit(needed + length)
    data = _content(stream)
    try:
        if header is None:
            _stored(_header(ref, BytesIO(data), max_pixels), None, data, max_pixels)
        values, used = multispectral.decoded(data, channels, method, header)
    except MemoryError as error:
        raise ImageError("too_large", f"no room for {size[0]} x {size[1]} pixels") from error
    except _DAMAGE as error:
        raise ImageError("truncated", f"the data are damaged or cut short: {error}") from error
    return multispectral.image(Image(ref, values, hashlib.sha256(data).hexdigest(), used), band)


def _stored(image: PIL.Image.Image, frame: int | None, data: bytes, max_pixels: int) -> Samples:
    """The values of `image`, read to its last row."""
    if image.mode.startswith(("I", "F")) and has_bands(image):
        raise ImageError("unsupported", "a TIFF of two bands; where they are two energies: --pair bands")
    image.load()
    _require_size(image, max_pixels)
    if frame in (None, 1) and ended_early(image, data, _picture):
        raise ImageError("truncated", "the data end before the last row: a part of the picture is missing")
    return samples(image, data)


def _halves(ref: ImageRef, pair: Pair) -> tuple[ImageRef, ImageRef]:
    return replace(ref, pair=None), ImageRef(pair.path, pair.file)


def _dual(ref: ImageRef, pair: Pair, method: Method, max_pixels: int, admit: Callable[[int], None]) -> Image:
    """Both energies of `ref`, in a file of its own each, as one picture."""
    if not (ref.file.is_file() and pair.file.is_file()):
        raise ImageError("unpaired", f"its other half, {pair.path}, is not there (--pair)")
    with ExitStack() as stack:
        streams = [stack.enter_context(_opened(half, max_pixels)) for half in _halves(ref, pair)]
        announced = [_scan(ref, s, max_pixels) or _header(ref, s, max_pixels) for s in streams]
        admit(sum(_needed(h) + os.fstat(s.fileno()).st_size for h, s in zip(announced, streams, strict=True)))
        data = [_content(stream) for stream in streams]
    sums = [hashlib.sha256(part).hexdigest() for part in data]
    parts = [_energy(half, part, max_pixels) for half, part in zip(_halves(ref, pair), data, strict=True)]
    return _coloured(ref, pair, parts, sums, method)


def _coloured(ref: ImageRef, pair: Pair, parts: Sequence[Samples], sums: Sequence[str], method: Method) -> Image:
    """The picture that the `parts` of low and high energy make; `sums` are those of their files."""
    (low, used), (high, other) = (energies.transmission(part, method) for part in parts)
    if low.shape != high.shape:
        sizes = f"{low.shape[1]} x {low.shape[0]} and {high.shape[1]} x {high.shape[0]}"
        raise ImageError("unpaired", f"it and its other half, {pair.path}, are not of one size: {sizes} (--pair)")
    note = f"open beam of the high-energy picture: {other.high:g}"
    pixels = np.require(energies.COLORS[pair.colors](low, high), np.uint8, ["C", "W"])
    return Image(ref, pixels, sums[0], used, (note, *parts[0].notes), sums[1])


def _banded(ref: ImageRef, pair: Pair, method: Method, max_pixels: int, admit: Callable[[int], None]) -> Image:
    """Both energies of `ref`, in one file, as one picture."""
    with _opened(ref, max_pixels) as stream:
        if bands.is_tiff(stream):
            header: Announced = bands.header(stream)
            _require_size(header, max_pixels)
        else:
            header = _scan(ref, stream, max_pixels) or _header(ref, stream, max_pixels)
        admit(_needed(header) + os.fstat(stream.fileno()).st_size)
        data = _content(stream)
    try:
        if isinstance(header, bands.Header):
            parts = bands.of_tiff(data)
        elif isinstance(header, dicom.Header):
            parts = bands.of_frames(data, header.pictures)
        else:
            _stored(image := _header(ref, BytesIO(data), max_pixels), None, data, max_pixels)
            parts = bands.of_alpha(image, data)
    except MemoryError as error:
        raise ImageError("too_large", f"no room for {header.width} x {header.height} pixels") from error
    except _DAMAGE as error:
        raise ImageError("truncated", f"the data are damaged or cut short: {error}") from error
    return _coloured(ref, pair, parts, [hashlib.sha256(data).hexdigest()] * 2, method)


def _energy(ref: ImageRef, data: bytes, max_pixels: int) -> Samples:
    """The values of one half."""
    stream = BytesIO(data)
    if _scan(ref, stream, max_pixels) is not None:
        return dicom.samples(data, 0)
    image = _header(ref, stream, max_pixels)
    try:
        return _stored(image, None, data, max_pixels)
    except MemoryError as error:
        raise ImageError("too_large", f"no room for {image.width} x {image.height} pixels") from error
    except _DAMAGE as error:
        raise ImageError("truncated", f"the data of {ref.path} are damaged or cut short: {error}") from error


def _scanned(ref: ImageRef, data: bytes, digest: str, method: Method, scan: dicom.Header) -> Image:
    """A picture of a DICOM file."""
    if ref.frame is not None and ref.frame > scan.pictures:
        raise ImageError("truncated", f"the file holds {scan.pictures} pictures, not {ref.frame}")
    try:
        stored = dicom.samples(data, (ref.frame or 1) - 1)
        if stored.values.shape[:2] != (scan.height, scan.width):
            raise ImageError("truncated", "the pixels of this DICOM file are not those it announces")
        pixels, used, notes = _rgb(stored, method)
    except MemoryError as error:
        raise ImageError("too_large", f"no room for {scan.width} x {scan.height} pixels") from error
    pixels = np.require(pixels, np.uint8, ["C", "W"])
    return Image(ref, pixels, digest, used, (*stored.notes, *notes, *frames.note(ref.frame, scan.pictures)))


def _turned_to(image: PIL.Image.Image, frame: int | None, size: int, max_pixels: int) -> tuple[str, ...]:
    """Go to the picture that is asked for; notes on the others."""
    try:
        pages = frames.pages(image, size)
    except _DAMAGE as error:
        if frame is not None:
            raise
        return (f"the file may hold more pictures; the rest of it is damaged: {error}"[:200],)
    if frame is not None and frame > 1:
        if frame > len(pages):
            raise ImageError("truncated", f"the file holds {len(pages)} pictures, not {frame}")
        frames.seek(image, pages[frame - 1], lambda at: _require_size(at, max_pixels))
    return frames.note(frame, len(pages))


def _rgb(stored: Samples, method: Method) -> tuple[Pixels, Window | None, tuple[str, ...]]:
    """RGB of what was decoded, the window used, notes."""
    values, alpha, used = stored.values, stored.alpha, None
    notes: tuple[str, ...] = ()
    shown = stored.shown if method[0] == "auto" else None
    if values.dtype != np.uint8 or shown is not None:
        finite = np.isfinite(values)
        if not finite.all():
            notes += ("not-a-number samples are black, infinite ones are the window's ends",)
        visible = finite if alpha is None else (finite.T & (alpha > 0).T).T
        used = shown or window_of(values[visible], stored.nominal, *method)
        values = ramp(values, used.low, used.high)
    if stored.inverted:
        values = 255 - values
    pixels = values if values.ndim == 3 else np.repeat(values[..., None], 3, axis=2)
    if alpha is not None:
        pixels = over_white(pixels, alpha)
    return pixels, used, notes


def _orientation(image: PIL.Image.Image) -> tuple[int, tuple[str, ...]]:
    """The EXIF orientation 1 to 8 still to be applied, and what was wrong with it."""
    try:
        value = image.getexif().get(0x0112, 1)
    except _DAMAGE:
        return 1, ("unreadable EXIF ignored",)
    if isinstance(value, int) and 1 <= value <= 8:
        return value, ()
    return 1, (f"EXIF orientation {value!r:.40} ignored",)


def _upright_size(image: Announced) -> tuple[int, int]:
    """(width, height) after EXIF rotation, as far as the header says; Pillow would decode a PNG to know more."""
    width, height = image.width, image.height
    if not isinstance(image, PIL.Image.Image) or (image.format == "PNG" and "exif" not in image.info):
        return width, height
    return (height, width) if _orientation(image)[0] >= 5 else (width, height)


def _upright(pixels: Pixels, orientation: int) -> Pixels:
    """`pixels` (height, width, 3) turned and mirrored as EXIF `orientation` asks."""
    turned = np.rot90(pixels, (0, 0, 2, 2, 3, 3, 1, 1)[orientation - 1])
    return turned[:, ::-1] if orientation in (2, 4, 5, 7) else turned
