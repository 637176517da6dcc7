"""Small pictures of every format, whole and damaged: for `fault_inputs.py`."""

from __future__ import annotations

import io
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import PIL.features
import PIL.Image

#: Suffixes, and how Pillow writes a small picture of each.
FORMATS: dict[str, dict[str, Any]] = {
    "png": {},
    "gif": {},
    "bmp": {},
    "ppm": {},
    "jpg": {"format": "JPEG"},
    "webp": {"lossless": True},
    "jp2": {"format": "JPEG2000"},
    "tif": {"compression": "tiff_lzw"},
    "avif": {},
    "mpo": {"save_all": True},
    "heic": {},
}


def whole() -> Iterator[tuple[str, bytes]]:
    """(suffix, bytes) of good pictures of 32 to 64 pixels a side: every format, gray, deep, transparent, of pages."""
    values = np.random.default_rng(1).integers(0, 255, (48, 40, 3), np.uint8)
    values[8:40, 8:32] = (40, 90, 200)
    picture = PIL.Image.fromarray(values)
    deep = PIL.Image.fromarray(values[..., 0].astype(np.uint16) * 257)
    for suffix, how in FORMATS.items():
        if suffix == "heic":
            try:
                import pillow_heif
            except ImportError:
                continue
            pillow_heif.register_heif_opener()
        if suffix != "avif" or PIL.features.check("avif"):
            yield suffix, _saved(picture, suffix, how)
    for suffix in ("png", "tif"):
        yield suffix, _saved(deep, suffix, {})
        yield suffix, _saved(picture.convert("RGBA"), suffix, {})
    for suffix in ("tif", "gif", "webp"):
        yield suffix, _saved(picture, suffix, {"save_all": True, "append_images": [picture.rotate(90)] * 3})
    yield "jpg", _saved(picture, "jpg", {"format": "JPEG", "progressive": True})
    yield "jpg", _saved(picture.convert("CMYK"), "jpg", {"format": "JPEG"})
    yield from _scans(np.asarray(deep))


def _saved(picture: PIL.Image.Image, suffix: str, how: dict[str, Any]) -> bytes:
    file = io.BytesIO()
    picture.save(file, **{"format": {"tif": "TIFF", "heic": "HEIF"}.get(suffix, suffix.upper()), **how})
    return file.getvalue()


def _scans(values: np.ndarray[Any, Any]) -> Iterator[tuple[str, bytes]]:
    """A DICOM file of `values`, where pydicom is installed."""
    try:
        from pydicom.dataset import Dataset, FileMetaDataset
        from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage
    except ImportError:
        return
    scan, meta = Dataset(), FileMetaDataset()
    meta.TransferSyntaxUID, meta.MediaStorageSOPClassUID = ExplicitVRLittleEndian, SecondaryCaptureImageStorage
    meta.MediaStorageSOPInstanceUID = scan.SOPInstanceUID = "1.2.3"
    scan.file_meta, scan.SOPClassUID = meta, SecondaryCaptureImageStorage
    scan.Rows, scan.Columns = values.shape
    scan.SamplesPerPixel, scan.PhotometricInterpretation, scan.PixelRepresentation = 1, "MONOCHROME2", 0
    scan.BitsAllocated = scan.BitsStored = 16
    scan.HighBit, scan.PixelData = 15, values.tobytes()
    file = io.BytesIO()
    scan.save_as(file, enforce_file_format=True)
    yield "dcm", file.getvalue()


def damaged(dice: random.Random, count: int) -> Iterator[tuple[str, bytes]]:
    """`count` files made of whole ones: (name, bytes)."""
    good = list(whole())
    for number in range(count):
        suffix, data = good[number % len(good)]
        yield f"{number:05d}.{suffix}", _damaged(dice, data, dice.randrange(6))


def _damaged(dice: random.Random, data: bytes, way: int) -> bytes:
    a, b = sorted(dice.randrange(len(data)) for _ in range(2))
    if way == 0:
        return data[: b + 1]
    if way == 1:
        return data[:a] + data[b:]
    if way == 2:
        return data[:a] + bytes(b - a) + data[b:]
    if way == 3:
        return data[:b] + data[a:]
    early = 64 if way == 4 else len(data)  # most of what steers a decoder stands in front
    changed = bytearray(data)
    for _ in range(dice.choice((1, 2, 8, 32))):
        changed[dice.randrange(min(early, len(data)))] = dice.choice((0, 1, 127, 128, 255, dice.randrange(256)))
    return bytes(changed)
