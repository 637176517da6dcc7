"""Each file becomes upright RGB or an ImageError; letterbox as Ultralytics; maps keep sums."""

from __future__ import annotations

import hashlib
import io
import os
import struct
import subprocess
import sys
import time
import tracemalloc
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as pil

from detxai.errors import ImageError, UsageError
from detxai.inputs import decode
from detxai.inputs.budget import Budget
from detxai.inputs.decode import load
from detxai.inputs.letterbox import boxes_to_letterbox, boxes_to_source, letterboxed, map_to_source
from detxai.inputs.window import parse_window
from detxai.output.recording import failed_record
from detxai.values import Image, ImageRef, Letterbox, Window

ODD = Path(__file__).parents[2] / "shared/data/odd-dev"
ODD_FILES: dict[str, str | tuple[int, int]] = {  # an error code, or width and height
    "dicom_CT_small.dcm": (128, 128),
    "dicom_examples_palette.dcm": (800, 350),
    "exif_Portrait_8.jpg": (1200, 1800),
    "gdxray_Bolso4_RGBA.png": (448, 448),
    "one_pixel.png": (1, 1),
    "pil_16bit.cropped.tif": (64, 64),
    "pil_decompression_bomb.gif": "too_large",
    "pil_exif.avif": (512, 512),
    "pil_frozenpond.mpo": (640, 480),
    "pil_hopper_bad_exif.jpg": (500, 500),
    "pil_hopper_orientation_6.jpg": (128, 128),
    "pil_iss634.gif": (245, 245),
    "pil_l_trns.png": (64, 64),
    "pil_mode_palette_1bit_alpha.png": (128, 64),
    "pil_oom-225817ca0f8c663be7ab4b9e717b02c661e66834.tif": "unsupported",
    "pil_tiff_16bit_RGB.tiff": (100, 40),
    "pil_transparent.png": (200, 150),
    "pil_truncated_jpeg.jpg": "truncated",
    "pil_zero_width.gif": "not_an_image",
    "sk_palette_color.png": (10, 10),
    "sk_truncated.jpg": "truncated",
    "xray_16bit_full.png": (896, 736),
    "xray_cmyk.jpg": (500, 593),
    "xray_empty.jpg": "empty_file",
    "xray_exif6.jpg": (500, 593),
    "xray_palette_transparent.png": (500, 593),
    "xray_truncated60pct.jpg": "truncated",
}
RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (6, 9, 3), dtype=np.uint8)
GRAY16 = np.linspace(0, 65535, 54).astype(np.uint16).reshape(6, 9)
RGB16 = RGB.astype(np.uint16) * 257


def decoded(data: bytes, folder: Path, **options: Any) -> Image:
    file = folder / "image"
    file.write_bytes(data)
    return load(ImageRef("image", file), **options)


def code(data: bytes, folder: Path, **options: Any) -> str:
    with pytest.raises(ImageError) as caught:
        decoded(data, folder, **options)
    return caught.value.code


def encode(image: pil.Image, kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def by_cv2(values: np.ndarray[Any, Any], suffix: str) -> bytes:
    return bytes(cv2.imencode(suffix, values[..., ::-1] if values.ndim == 3 else values)[1])


def png(values: np.ndarray[Any, Any], colour: int, extra: bytes = b"") -> bytes:
    """A PNG of uint8 or uint16 `values`, of colour type `colour`, with chunks `extra`."""
    bits, rows = values.dtype.itemsize * 8, values.astype(values.dtype.newbyteorder(">"))
    raw = b"".join(b"\0" + row.tobytes() for row in rows)
    size = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], bits, colour, 0, 0, 0)
    body = chunk(b"IHDR", size) + extra + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def tiff(values: np.ndarray[Any, Any], photometric: int, form: int = 1, turned: int = 1) -> bytes:
    """An uncompressed little-endian TIFF with the tags that Pillow cannot be made to write."""
    height, width, count = (*values.shape, 1)[:3]
    tags = [
        *((256, 4, [width]), (257, 4, [height]), (258, 3, [values.dtype.itemsize * 8] * count)),
        *((259, 3, [1]), (262, 3, [photometric]), (273, 4, [0]), (274, 3, [turned])),
        *(
            (277, 3, [count]),
            (278, 4, [height]),
            (279, 4, [values.nbytes]),
            (339, 3, [form] * count),
        ),
    ]
    packed = [struct.pack(f"<{len(v)}{'H' if kind == 3 else 'I'}", *v) for _, kind, v in tags]
    start = 14 + 12 * len(tags)
    strip = start + sum(len(part) for part in packed if len(part) > 4)
    entries, extra = b"", b""
    for (tag, kind, value), part in zip(tags, packed, strict=True):
        if tag == 273:
            part = struct.pack("<I", strip)
        if len(part) > 4:
            extra, part = extra + part, struct.pack("<I", start + len(extra))
        entries += struct.pack("<HHI", tag, kind, len(value)) + part.ljust(4, b"\0")
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + entries + b"\0" * 4 + extra + values.tobytes()


@pytest.mark.skipif(not ODD.is_dir(), reason="the awkward files are not here")
@pytest.mark.parametrize("name", ODD_FILES)
def test_awkward_files(name: str) -> None:
    expected = ODD_FILES[name]
    try:
        image = load(ImageRef(name, ODD / name))
    except ImageError as error:
        assert error.code == expected, error
        assert len(str(error)) > 10
    else:
        assert (image.width, image.height) == expected
        assert image.pixels.dtype == np.uint8 and image.pixels.shape[2] == 3


@pytest.mark.skipif(not ODD.is_dir(), reason="the awkward files are not here")
def test_awkward_files_show_what_they_should() -> None:
    bags = [load(ImageRef("", ODD / f"xray_{n}")) for n in ("exif6.jpg", "cmyk.jpg")]
    bags += [load(ImageRef("", ODD / "xray_palette_transparent.png"))]
    for bag in bags[1:]:
        difference = np.abs(bag.pixels.astype(int) - bags[0].pixels)
        assert difference.mean() < 6, "the same bag, turned, in CMYK, in a palette"
    assert not {f.name for f in ODD.iterdir()} - set(ODD_FILES), "a file without an expectation"


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "WEBP", "PPM", "JPEG2000"])
def test_lossless_formats_keep_their_values(kind: str, tmp_path: Path) -> None:
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encode(pil.fromarray(RGB), kind, **options)
    image = decoded(data, tmp_path)
    assert np.array_equal(image.pixels, RGB)
    assert image.sha256 == hashlib.sha256(data).hexdigest()
    assert image.window is None and image.notes == ()
    assert image.pixels.flags.writeable and image.pixels.flags.c_contiguous


@pytest.mark.parametrize("kind", ["JPEG", "AVIF", "MPO", "GIF"])
def test_lossy_formats_come_close(kind: str, tmp_path: Path) -> None:
    smooth = cv2.resize(RGB[:2, :2], (64, 48), interpolation=cv2.INTER_LINEAR)
    more = [pil.fromarray(255 - smooth)] if kind in ("MPO", "GIF") else []
    options: dict[str, Any] = {"save_all": True, "append_images": more} if more else {}
    image = decoded(encode(pil.fromarray(smooth), kind, **options), tmp_path)
    assert np.abs(image.pixels.astype(int) - smooth).mean() < 8


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PNG16", "TIFF16"])
def test_orientation(orientation: int, kind: str, tmp_path: Path) -> None:
    exif = pil.Exif()
    exif[0x0112] = orientation
    if kind == "TIFF16":
        data = tiff(RGB16, 2, turned=orientation)
    elif kind == "PNG16":
        data = png(RGB16, 2, chunk(b"eXIf", exif.tobytes()[6:]))
    else:
        data = encode(pil.fromarray(RGB), kind, exif=exif)
    turned = pil.fromarray(RGB)
    if orientation > 1:
        how = "FLIP_LEFT_RIGHT ROTATE_180 FLIP_TOP_BOTTOM TRANSPOSE ROTATE_270 TRANSVERSE ROTATE_90"
        turned = turned.transpose(pil.Transpose[how.split()[orientation - 2]])
    assert np.array_equal(decoded(data, tmp_path, window="full").pixels, np.asarray(turned))


def test_bad_exif_is_a_note(tmp_path: Path) -> None:
    exif = pil.Exif()
    exif[0x0112] = 77
    image = decoded(encode(pil.fromarray(RGB), "PNG", exif=exif), tmp_path)
    assert np.array_equal(image.pixels, RGB) and "77" in image.notes[0]
    broken = encode(pil.fromarray(RGB), "PNG", exif=b"Exif\0\0XX*\0\0\0\0\0")
    assert np.array_equal(decoded(broken, tmp_path).pixels, RGB)


def test_alpha_goes_on_white(tmp_path: Path) -> None:
    def first(data: bytes) -> list[int]:
        return [int(v) for v in decoded(data, tmp_path, window="full").pixels[0, 0]]

    def flat(mode: str, colour: Any) -> pil.Image:
        return pil.new(mode, (2, 2), colour)

    assert first(encode(flat("RGBA", (10, 20, 30, 0)), "PNG")) == [255] * 3
    assert first(encode(flat("RGBA", (10, 20, 30, 255)), "PNG")) == [10, 20, 30]
    assert first(encode(flat("RGBA", (0, 100, 255, 128)), "PNG")) == [127, 177, 255]
    assert first(encode(flat("LA", (0, 0)), "PNG")) == [255] * 3
    assert first(encode(flat("L", 7), "PNG", transparency=7)) == [255] * 3
    assert first(encode(flat("RGB", (1, 2, 3)), "PNG", transparency=(1, 2, 3))) == [255] * 3
    assert first(encode(flat("1", 0), "PNG", transparency=0)) == [255] * 3
    palette = flat("P", 1)
    palette.putpalette([0, 0, 0, 9, 8, 7])
    assert first(encode(palette, "PNG")) == [9, 8, 7]
    assert first(encode(palette, "PNG", transparency=1)) == [255] * 3
    assert first(encode(palette, "PNG", transparency=bytes([255, 0]))) == [255] * 3
    assert first(encode(palette, "GIF", transparency=1)) == [255] * 3
    half = np.full((2, 2, 4), 65535, np.uint16) * np.array([0, 0, 1, 0], np.uint16)
    assert first(png(half, 6)) == [255] * 3
    assert first(png(half[..., [0, 2]], 4)) == [0] * 3
    trns = chunk(b"tRNS", struct.pack(">H", 500))
    assert first(png(np.full((2, 2), 500, np.uint16), 0, trns)) == [255] * 3


def test_cmyk_is_not_inverted(tmp_path: Path) -> None:
    white = pil.new("CMYK", (8, 8), (0, 0, 0, 0))
    for kind in ("JPEG", "TIFF"):
        assert decoded(encode(white, kind), tmp_path).pixels.min() > 250
    red = pil.new("CMYK", (8, 8), (0, 255, 255, 0))
    assert np.abs(decoded(encode(red, "JPEG"), tmp_path).pixels[0, 0] - [254.0, 0, 0]).max() < 6


@pytest.mark.parametrize(
    "data",
    [png(RGB16, 2), by_cv2(RGB16, ".tiff"), tiff(RGB16, 2), by_cv2(RGB16, ".ppm")],
    ids=["png", "tiff-lzw", "tiff", "ppm"],
)
def test_16_bit_colour_keeps_its_low_bits(data: bytes, tmp_path: Path) -> None:
    image = decoded(data, tmp_path)
    assert np.array_equal(image.pixels, RGB), "v * 257 is v again"
    assert image.window == Window("full", 0, 65535)


def test_dark_16_bit_colour_is_not_black(tmp_path: Path) -> None:
    dark = RGB.astype(np.uint16)  # eight bits of content, which `>> 8` makes zero
    for data in (png(dark, 2), by_cv2(dark, ".tiff")):
        assert decoded(data, tmp_path).pixels.std() > 60
        assert np.array_equal(decoded(data, tmp_path, window="0,255").pixels, RGB)


@pytest.mark.parametrize("suffix", [".png", ".tiff", ".pgm", ".jp2"])
def test_12_bits_in_16_fill_the_8(suffix: str, tmp_path: Path) -> None:
    values = cv2.resize(GRAY16, (64, 64)) // 16
    image = decoded(by_cv2(values, suffix), tmp_path)
    assert image.window is not None and image.window.method == "percentile 0.5,99.5"
    assert image.pixels.min() == 0 and image.pixels.max() == 255 and len(np.unique(image.pixels)) > 50


@pytest.mark.parametrize(
    ("window", "expected"),
    [
        ("auto", Window("full", 0, 65535)),
        ("full", Window("full", 0, 65535)),
        ("1000,2000", Window("1000,2000", 1000, 2000)),
        ("percentile 0,50", Window("percentile 0,50", 0, float(np.median(GRAY16)))),
    ],
)
def test_windows(window: str, expected: Window, tmp_path: Path) -> None:
    image = decoded(by_cv2(GRAY16, ".png"), tmp_path, window=window)
    assert image.window == expected
    ramp = np.clip((GRAY16.astype(float) - expected.low) / (expected.high - expected.low), 0, 1) * 255
    assert np.abs(image.pixels[..., 0] - ramp).max() <= 0.5


@pytest.mark.parametrize("window", ["auto", "full", "0,9", "percentile 1,99"])
@pytest.mark.parametrize("value", [0, 30000, 65535])
def test_constant_images(value: int, window: str, tmp_path: Path) -> None:
    flat = np.full((4, 4), value, np.uint16)
    pixels = decoded(by_cv2(flat, ".png"), tmp_path, window=window).pixels
    assert pixels.min() == pixels.max()
    if window in ("auto", "full"):
        assert pixels[0, 0, 0] == round(value / 257)


def test_auto_keeps_a_small_object_on_an_empty_ground(tmp_path: Path) -> None:
    values = np.full((100, 100), 4000, np.uint16)
    values[:3, :3] = 1000
    pixels = decoded(by_cv2(values, ".png"), tmp_path).pixels
    assert pixels[0, 0, 0] == 0 and pixels[50, 50, 0] == 255


def test_eight_bits_are_never_windowed(tmp_path: Path) -> None:
    image = decoded(by_cv2(RGB, ".png"), tmp_path, window="0,10")
    assert np.array_equal(image.pixels, RGB) and image.window is None


def test_deep_gray_tiffs(tmp_path: Path) -> None:
    ramp = np.arange(12.0).reshape(3, 4)

    def full(values: np.ndarray[Any, Any], photometric: int = 1, form: int = 1) -> tuple[float, float]:
        window = decoded(tiff(values, photometric, form), tmp_path, window="full").window
        assert window is not None
        return window.low, window.high

    assert full((ramp / 11).astype("f4"), form=3) == (0, 1)
    assert full((ramp * 20).astype("f4"), form=3) == (0, 255)
    assert full((ramp - 5).astype("f4"), form=3) == (-5, 6)
    assert full(ramp.astype("i2"), form=2) == (-32768, 32767)
    assert full(ramp.astype("i4"), form=2) == (-(2**31), 2**31 - 1)
    assert full((ramp * 3e8).astype("u4")) == (0, 2**32 - 1)
    huge = decoded(tiff((ramp * 3e8).astype("u4"), 1), tmp_path).pixels[..., 0]
    assert (np.diff(huge.ravel().astype(int)) > 0).all(), "above 2^31 nothing turns negative"
    plain, inverse = (decoded(tiff(GRAY16, n), tmp_path).pixels for n in (1, 0))
    assert np.abs(255 - inverse.astype(int) - plain).max() <= 1, "0 is white"


def test_floats_that_are_no_numbers(tmp_path: Path) -> None:
    values = np.linspace(0, 1, 400, dtype=np.float32).reshape(20, 20)
    values[0, :3] = np.nan, np.inf, -np.inf
    image = decoded(tiff(values, 1, 3), tmp_path)
    assert list(image.pixels[0, :3, 0]) == [0, 255, 0] and len(image.notes) == 1
    nothing = decoded(tiff(np.full((2, 2), np.nan, np.float32), 1, 3), tmp_path)
    assert nothing.pixels.max() == 0 and nothing.notes


@pytest.mark.parametrize("text", ["", "none", "1", "2,1", "1,1", "nan,1", "0,inf", "percentile 1,101"])
def test_bad_windows(text: str) -> None:
    with pytest.raises(UsageError, match="window"):
        parse_window(text)


def test_good_windows() -> None:
    assert parse_window(" Auto ")[0] == "auto" and parse_window("full")[0] == "full"
    assert parse_window("-1e3, 2.5") == ("fixed", -1000, 2.5)
    assert parse_window("percentile 0.5,99.5") == ("percentile", 0.5, 99.5)


def test_files_that_are_not_there(tmp_path: Path) -> None:
    def failure(file: Path, problem: str | None = None) -> str:
        with pytest.raises(ImageError) as caught:
            load(ImageRef("a", file, problem))
        return caught.value.code

    assert failure(tmp_path / "gone.jpg") == "not_found"
    (tmp_path / "file").write_bytes(b"x")
    assert failure(tmp_path / "file" / "below.jpg") == "not_found"
    assert failure(tmp_path) == "unreadable"
    assert failure(Path("/dev/null")) == "unreadable"
    assert failure(tmp_path / ("n" * 300)) == "unreadable"
    assert failure(Path("nul\0.jpg")) == "bad_path"
    assert failure(tmp_path / "file", "because") == "bad_path"


@pytest.mark.parametrize(("error", "code"), [(OSError(5, "I/O"), "unreadable"), (MemoryError(), "too_large")])
def test_a_file_that_cannot_be_read_to_its_end(tmp_path: Path, error: Exception, code: str) -> None:
    """The disk, or the memory, gives out behind the header."""

    class Failing(io.BufferedReader):
        def read(self, *_: Any) -> bytes:
            raise error

    (tmp_path / "a").write_bytes(b"bytes")
    with Failing(io.FileIO(tmp_path / "a")) as stream, pytest.raises(ImageError) as caught:
        decode._content(stream)
    assert caught.value.code == code


def test_a_picture_for_which_there_is_no_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise MemoryError

    pil.new("RGB", (9, 7)).save(tmp_path / "a.png")
    monkeypatch.setattr(decode, "samples", full)
    with pytest.raises(ImageError, match="no room for 9 x 7 pixels") as caught:
        load(ImageRef("a.png", tmp_path / "a.png"))
    assert (caught.value.code, caught.value.size) == ("too_large", (9, 7))
    assert caught.value.sha256


def test_a_file_far_larger_than_its_pixels_may_be_is_not_read(tmp_path: Path) -> None:
    pil.new("RGB", (9, 7)).save(tmp_path / "a.png")
    os.truncate(tmp_path / "a.png", 2**25)
    with pytest.raises(ImageError, match="--max-pixels 100 allows less"):
        load(ImageRef("a.png", tmp_path / "a.png"), max_pixels=100)


def test_a_page_that_is_not_there_and_what_is_no_file(tmp_path: Path) -> None:
    page = pil.new("RGB", (9, 7))
    page.save(tmp_path / "a.tif", save_all=True, append_images=[page])
    assert decode.pictures(ImageRef("a.tif", tmp_path / "a.tif")) == 2
    with pytest.raises(ImageError, match="the file holds 2 pictures, not 9"):
        load(ImageRef("a.tif", tmp_path / "a.tif", frame=9))
    assert decode.digest(ImageRef("a", tmp_path)) is None
    assert decode.digest(ImageRef("a", tmp_path / "a.tif")) == load(ImageRef("a", tmp_path / "a.tif")).sha256


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP", "AVIF", "BMP", "GIF", "JPEG2000"])
def test_cut_files(kind: str, tmp_path: Path) -> None:
    noise = RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8)
    data = encode(pil.fromarray(noise), kind)
    for share in (0.1, 0.5, 0.9):
        assert code(data[: int(len(data) * share)], tmp_path) == "truncated"
    assert code(data[:3], tmp_path) in ("truncated", "not_an_image")
    for seed in range(30):  # whatever is damaged, only an ImageError comes out
        damaged = np.frombuffer(data, np.uint8).copy()
        spots = np.random.default_rng(seed).integers(0, min(len(data), 400), 4)
        damaged[spots] = RNG.integers(0, 256, 4)
        try:
            decoded(damaged.tobytes(), tmp_path)
        except ImageError as error:
            assert error.code != "internal"


def test_other_files(tmp_path: Path) -> None:
    assert code(b"", tmp_path) == "empty_file"
    assert code(b"hello, world" * 50, tmp_path) == "not_an_image"
    assert code(b"%PDF-1.7 and so on", tmp_path) == "unsupported"
    assert code(b"\0\0\0\x18ftypheic" + b"\0" * 99, tmp_path) in ("unsupported", "truncated")
    assert code(b"\0\0\0\x18ftypisom" + b"\0" * 99, tmp_path) == "unsupported"
    assert code(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", tmp_path) == "not_an_image"
    assert code(tiff(np.ones((2, 2, 3), np.float32), 2, 3), tmp_path) == "unsupported"


def test_bombs_are_refused_from_the_header(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fine = encode(pil.fromarray(RGB), "PNG")
    monkeypatch.setattr(pil.Image, "load", lambda *_: pytest.fail("decoded"))
    size = struct.pack(">IIBBBBB", 60000, 60000, 8, 0, 0, 0, 0)
    big = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", zlib.compress(b"\0" * 99))
    assert code(big, tmp_path) == "too_large"
    frame = b"," + struct.pack("<HHHHB", 0, 0, 65535, 65535, 0) + b"\2\2\x4c\1\0;"
    small = b"GIF89a" + struct.pack("<HHBBB", 32, 32, 0, 0, 0)
    assert code(small + frame, tmp_path) == "too_large"
    wide = tiff(GRAY16, 1).replace(struct.pack("<HHII", 256, 4, 1, 9), struct.pack("<HHII", 256, 4, 1, 2**30))
    assert code(wide, tmp_path) == "too_large"
    assert code(fine, tmp_path, max_pixels=53) == "too_large"


def test_a_refusal_by_size_names_the_option_that_admits_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pil, "MAX_IMAGE_PIXELS", 20)  # Pillow refuses twice as many: fewer than the file has
    (tmp_path / "a.png").write_bytes(encode(pil.fromarray(RGB), "PNG"))
    for limit in (10, 50):
        with pytest.raises(ImageError, match=rf"54.*{limit} \(--max-pixels\)") as caught:
            load(ImageRef("a.png", tmp_path / "a.png"), max_pixels=limit)
        assert caught.value.code == "too_large"
    assert load(ImageRef("a.png", tmp_path / "a.png"), max_pixels=54).width == 9


def test_failed_files_keep_what_is_known_of_them(tmp_path: Path) -> None:
    exif = pil.Exif()
    exif[0x0112] = 6
    cut = encode(pil.fromarray(RNG.integers(0, 256, (64, 80, 3), dtype=np.uint8)), "JPEG", exif=exif)[:-900]
    for data, size, limit in ((cut, (64, 80), 9999), (cut, (64, 80), 10), (b"no image", (None, None), 9999)):
        with pytest.raises(ImageError) as caught:
            decoded(data, tmp_path, max_pixels=limit)
        record = failed_record(ImageRef("a.jpg", tmp_path / "a.jpg"), caught.value)
        assert (record.image.width, record.image.height) == size
        assert record.image.sha256 == hashlib.sha256(data).hexdigest()


def test_files_that_end_early_without_an_error(tmp_path: Path) -> None:
    noise = RNG.integers(1, 256, (64, 64, 3), dtype=np.uint8)
    jpeg = encode(pil.fromarray(noise), "JPEG")
    assert code(jpeg[: len(jpeg) // 2] + b"\xff\xd9", tmp_path) == "truncated"
    tall = struct.pack(">IIBBBBB", 64, 9999, 8, 2, 0, 0, 0)
    rows = zlib.compress(b"".join(b"\0" + row.tobytes() for row in noise[:3]))
    few = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", tall) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    assert code(few, tmp_path) == "truncated"
    gif = encode(pil.fromarray(noise).convert("P"), "GIF")
    start = pil.open(io.BytesIO(gif)).tile[0].offset  # then a block of 255 bytes
    assert code(gif[: start + 257] + b"\0;", tmp_path) == "truncated"
    grey = encode(pil.new("RGB", (64, 64), (128, 128, 128)), "JPEG")
    black = pil.new("RGB", (64, 64))
    whole = [
        grey,
        encode(black, "PNG"),
        encode(black, "GIF"),
        encode(black.convert("RGBA"), "PNG"),
        encode(black, "JPEG"),
    ]
    whole += [
        png(np.zeros((4, 4), np.uint16), 0),
        encode(pil.new("1", (9, 9)), "PNG"),
        encode(pil.new("P", (9, 9)), "PNG"),
    ]
    assert all(decoded(data, tmp_path).width for data in whole), "what is plain is not cut"


def test_a_gray_jpeg_without_an_end_mark_is_whole(tmp_path: Path) -> None:
    """It looks like one that was filled up, and no data are left that could tell: nothing in it is missing."""
    gray = encode(pil.new("L", (64, 64), 128), "JPEG")
    assert gray.endswith(b"\xff\xd9")
    assert (decoded(gray[:-2] + bytes(40), tmp_path).pixels == 128).all()


def test_deep_colour_that_opencv_cannot_decode_is_cut_to_8_bits_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, none = png(RGB16, 2), lambda *_: None
    whole = decoded(data, tmp_path).pixels.astype(int)
    monkeypatch.setattr(cv2, "imdecode", none)
    image = decoded(data, tmp_path)
    assert any("cut to 8" in note for note in image.notes)
    assert np.abs(image.pixels.astype(int) - whole).max() <= 1


def test_needed_bytes_are_known_from_the_header(tmp_path: Path) -> None:
    pixels = 1000 * 1000
    for values, least in ((np.zeros((1000, 1000, 3), np.uint8), 10), (np.zeros((1000, 1000, 4), np.uint16), 40)):
        (tmp_path / "a.png").write_bytes(by_cv2(values, ".png"))
        asked: list[int] = []
        tracemalloc.start()
        load(ImageRef("a.png", tmp_path / "a.png"), admit=asked.append)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert asked[0] >= max(peak, least * pixels)
    (tmp_path / "a.png").write_bytes(b"no image")
    with pytest.raises(ImageError):
        load(ImageRef("a.png", tmp_path / "a.png"), admit=lambda _: pytest.fail("nothing to decode"))


def test_a_budget_bounds_what_many_threads_take_and_nobody_starves() -> None:
    budget, held, most = Budget(100), [], []

    def work(number: int) -> int:
        if number % 5 == 0:  # failed before it knew what it needs
            budget.skip(number)
            return number
        size = 250 if number == 7 else 10 + number
        budget.take(number, size)
        held.append(size)
        most.append(sum(held))
        time.sleep(0.001)
        held.remove(size)
        held.append(3)
        budget.shrink(number, 3)
        return number

    with ThreadPoolExecutor(4) as pool:
        for number, done in enumerate([pool.submit(work, n) for n in range(40)]):
            assert done.result(timeout=20) == number
            if number % 5:
                held.remove(3)
            budget.give_back(number)
    assert max(most) == 250 and sorted(most)[-2] <= 100
    assert not budget._held


def test_a_closed_budget_lets_everybody_go() -> None:
    budget = Budget(1)
    budget.take(0, 1)
    budget.take(0, 1)  # what somebody has is not waited for
    with ThreadPoolExecutor(1) as pool:
        waits = pool.submit(budget.take, 1, 1)
        assert not wait([waits], timeout=0.02).done
        budget.close()
        waits.result(timeout=20)


def test_warnings_of_pillow_do_not_leak(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pil, "MAX_IMAGE_PIXELS", 40)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert decoded(encode(pil.fromarray(RGB), "PNG"), tmp_path).width == 9


def test_threads_agree(tmp_path: Path) -> None:
    files = []
    for n, kind in enumerate(["PNG", "TIFF", "WEBP", "GIF", "AVIF", "JPEG"] * 4):
        files.append(tmp_path / f"{n}.{kind}")
        pil.fromarray(RGB).save(files[-1], kind)
    alone = [load(ImageRef("", file)).pixels for file in files]
    with ThreadPoolExecutor(4) as pool:
        together = [image.pixels for image in pool.map(lambda file: load(ImageRef("", file)), files)]
    assert all(np.array_equal(a, b) for a, b in zip(alone, together, strict=True))


def test_ultralytics_opener_is_not_used() -> None:
    """Its `PIL.Image.open` tries to install a package when a file is no image."""
    program = """if True:
        import sys, types, PIL.Image
        pristine = PIL.Image.open
        patches = types.ModuleType("ultralytics.utils.patches")
        patches._image_open, PIL.Image.open = pristine, None
        sys.modules["ultralytics.utils.patches"] = patches
        from detxai.inputs import decode
        sys.exit(decode._open is not pristine)"""
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
    assert decode._open.__module__ == "PIL.Image"


SHAPES = [
    (1, 1),
    (1, 1000),
    (1000, 1),
    (480, 640),
    (641, 333),
    (64, 64),
    (593, 500),
    (3, 7),
    (99, 101),
]


@pytest.mark.parametrize("size", [64, 320])
def test_letterbox_is_that_of_ultralytics(size: int) -> None:
    augment = pytest.importorskip("ultralytics.data.augment")
    ops = pytest.importorskip("ultralytics.utils.ops")
    reference = augment.LetterBox((size, size), auto=False)
    for height, width in [*SHAPES, *RNG.integers(1, 400, (20, 2)).tolist()]:
        pixels = RNG.integers(0, 256, (height, width, 3), dtype=np.uint8)
        square, lb = letterboxed(pixels, (size, size))
        assert np.array_equal(square, reference(image=pixels)), (height, width)
        boxes = RNG.uniform(-20, size + 20, (5, 4))
        expected = ops.scale_boxes((size, size), boxes.copy(), (height, width))
        assert np.allclose(boxes_to_source(boxes, lb), expected, atol=1e-9)


@pytest.mark.parametrize(("height", "width"), SHAPES)
def test_boxes_come_back(height: int, width: int) -> None:
    _, lb = letterboxed(np.zeros((height, width, 3), np.uint8), (64, 64))
    whole = np.array([[0.0, 0, width, height]])
    inner = [lb.left, lb.top, lb.left + lb.inner_width, lb.top + lb.inner_height]
    assert np.allclose(boxes_to_letterbox(whole, lb), inner)
    assert np.allclose(boxes_to_source(boxes_to_letterbox(whole, lb), lb), whole)
    assert boxes_to_source(np.zeros((0, 4)), lb).shape == (0, 4)


def frame(height: int, width: int, size: int) -> Letterbox:
    return letterboxed(np.zeros((height, width, 3), np.uint8), (size, size))[1]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 150), st.integers(1, 150), st.integers(1, 64), st.integers(0, 2**32 - 1))
def test_maps_keep_their_sum(height: int, width: int, size: int, seed: int) -> None:
    lb = frame(height, width, size)
    values = np.random.default_rng(seed).normal(size=(2, size, size))
    inner = values[:, lb.top : lb.top + lb.inner_height, lb.left : lb.left + lb.inner_width]
    spread = map_to_source(values, lb)
    assert spread.shape == (2, height, width) and spread.dtype == np.float32
    error = spread.sum((1, 2), dtype=np.float64) - inner.sum((1, 2))
    assert (np.abs(error) <= 1e-6 * np.abs(inner).sum((1, 2))).all()
    assert np.array_equal(map_to_source(values[0], lb), spread[0])


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 24))
def test_maps_are_spread_by_overlap(height: int, width: int, size: int) -> None:
    """The definition: source cell i takes the share of letterbox cell j that lies within it."""

    def overlap(count: int, inner: int) -> np.ndarray[Any, Any]:
        i, j = np.arange(count)[:, None] * inner / count, np.arange(inner)[None]
        share: np.ndarray[Any, Any] = np.minimum(i + inner / count, j + 1) - np.maximum(i, j)
        return share.clip(0)

    lb = frame(height, width, size)
    values = np.random.default_rng(size).normal(size=(size, size))
    inner = values[lb.top : lb.top + lb.inner_height, lb.left : lb.left + lb.inner_width]
    expected = overlap(height, lb.inner_height) @ inner @ overlap(width, lb.inner_width).T
    assert np.allclose(map_to_source(values, lb), expected, atol=1e-5)


def test_maps_of_the_same_size_are_untouched() -> None:
    values = RNG.normal(size=(32, 32)).astype(np.float32)
    assert np.array_equal(map_to_source(values, frame(32, 32, 32)), values)


def test_a_stretched_picture_fills_the_square_and_comes_back() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (60, 100, 3), dtype=np.uint8)
    square, lb = letterboxed(picture, (64, 64), "stretch")
    assert (lb.inner_width, lb.inner_height, lb.left, lb.top) == (64, 64, 0, 0)
    assert not (square == 114).all(-1)[0].all()
    box = [[10.0, 20.0, 90.0, 50.0]]
    assert np.allclose(boxes_to_source(boxes_to_letterbox(box, lb), lb), box)


@pytest.mark.parametrize(("width", "height"), [(100, 60), (31, 200), (64, 64), (1, 5)])
def test_darknets_square_keeps_the_corner_pixels(width: int, height: int) -> None:
    """`resize_image`: linear between neighbours, without averaging; torch has the same."""
    picture = np.random.default_rng(1).integers(0, 256, (height, width, 3), dtype=np.uint8)
    square, lb = letterboxed(picture, (64, 64), "darknet")
    x = torch.from_numpy(picture).permute(2, 0, 1)[None].float()
    expected = torch.nn.functional.interpolate(x, (64, 64), mode="bilinear", align_corners=True)[0].permute(1, 2, 0)
    assert np.abs(square - expected.numpy()).max() <= 0.51
    assert np.array_equal(square[[0, 0, -1, -1], [0, -1, 0, -1]], picture[[0, 0, -1, -1], [0, -1, 0, -1]])
    assert (lb.inner_width, lb.inner_height, lb.left, lb.top) == (64, 64, 0, 0)


@pytest.mark.parametrize(("width", "height"), [(810, 1080), (1280, 720), (33, 57), (300, 300)])
def test_the_letterbox_is_that_of_the_yolov5_repository(width: int, height: int) -> None:
    """`augmentations.letterbox` with auto=False: OpenCV's bilinear filter, rounding and borders of its own."""
    picture = np.random.default_rng(2).integers(0, 256, (height, width, 3), dtype=np.uint8)
    ratio = min(320 / height, 320 / width)
    new = round(width * ratio), round(height * ratio)
    across, down = (320 - new[0]) / 2, (320 - new[1]) / 2
    resized = cv2.resize(picture, new, interpolation=cv2.INTER_LINEAR)
    edges = round(down - 0.1), round(down + 0.1), round(across - 0.1), round(across + 0.1)
    expected = cv2.copyMakeBorder(resized, *edges, cv2.BORDER_CONSTANT, value=(114, 114, 114))
    assert np.array_equal(letterboxed(picture, (320, 320))[0], expected)


@pytest.mark.parametrize("rect", [False, True])
@pytest.mark.parametrize("shape", [(320, 320), (384, 640), (640, 96)])
def test_the_letterbox_of_a_rectangle_is_that_of_ultralytics(shape: tuple[int, int], rect: bool) -> None:
    """`auto` is what `predict` asks for by default: no more gray than fills the last cells."""
    augment = pytest.importorskip("ultralytics.data.augment")
    ops = pytest.importorskip("ultralytics.utils.ops")
    reference = augment.LetterBox(shape, auto=rect, stride=32)
    for height, width in [*SHAPES, *RNG.integers(1, 700, (20, 2)).tolist()]:
        pixels = RNG.integers(0, 256, (height, width, 3), dtype=np.uint8)
        canvas, lb = letterboxed(pixels, shape, stride=32 if rect else None)
        assert np.array_equal(canvas, reference(image=pixels)), (height, width)
        assert canvas.shape[:2] == lb.shape
        boxes = RNG.uniform(-20, max(shape) + 20, (5, 4))
        expected = ops.scale_boxes(lb.shape, boxes.copy(), (height, width))
        assert np.allclose(boxes_to_source(boxes, lb), expected, atol=1e-9)
