"""DICOM and DICOS-like files to samples, by pydicom (the extra `dicom`), which is imported only where one is met.

Nothing but pixels and how to show them leaves this room: no element that names a person, and no text of pydicom's
errors, which may quote one.
"""

from __future__ import annotations

import logging
import os
import re
import warnings
from dataclasses import dataclass
from io import BufferedReader, BytesIO
from typing import Any

import numpy as np

from detxai.errors import ImageError
from detxai.inputs.samples import Samples
from detxai.values import Window

SUFFIXES = frozenset({".dcm", ".dicom", ".dcs", ".dicos"})
_DEFLATED = b"1.2.840.10008.1.2.1.99\0"
_QUIET = ("ignore", None, Warning, re.compile(r"pydicom\."), 0)
_UNCOMPRESSED = {"1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2"}


@dataclass(frozen=True)
class Header:
    """What a file announces: pixels of each of its `pictures`, and `sample` bytes a pixel as stored."""

    width: int
    height: int
    pictures: int
    sample: int


def recognised(head: bytes, suffix: str) -> bool:
    """Whether a file with these first bytes and this suffix is DICOM."""
    return head[128:132] == b"DICM" or suffix.lower() in SUFFIXES


def header(stream: BufferedReader | BytesIO) -> Header:
    """What the file announces, its pixels unread. Raises ImageError."""
    size = stream.seek(0, os.SEEK_END)
    stream.seek(0)
    if _DEFLATED in stream.read(2048):
        raise ImageError("unsupported", "deflated DICOM is not read, for it may unpack to any size; use dcmconv +te")
    dataset = _dataset(stream, pixels=False)
    try:
        width, height = int(dataset.Columns), int(dataset.Rows)
        pictures = int(dataset.get("NumberOfFrames") or 1)
        sample = int(dataset.get("SamplesPerPixel", 1)) * (int(dataset.BitsAllocated) + 7) // 8
    except _errors() as error:  # elements are read only here, and any of them may be damaged
        raise ImageError("unsupported", "this DICOM file holds no picture") from error
    # A frame takes a byte at least: a file cannot hold more of them than bytes.
    return Header(width, height, max(1, min(pictures, size)), sample)


def samples(data: bytes, index: int) -> Samples:
    """The picture `index`, from 0, of the file `data`, after the modality transform, with the VOI as its window.

    Raises ImageError.
    """
    from pydicom import pixels

    dataset = _dataset(BytesIO(data), pixels=True)
    try:
        _require_honest_frame(dataset, index)
        values = pixels.pixel_array(dataset, index=index)
        for group in _functional_groups(dataset, index):
            dataset.update(group)
        kind = str(dataset.get("PhotometricInterpretation", "MONOCHROME2"))
        notes = ("the file says that text is burned into its picture",) if _is_marked(dataset) else ()
        if kind == "PALETTE COLOR":
            values = pixels.apply_color_lut(values, dataset)
        if values.ndim == 3:
            top = float(np.iinfo(values.dtype).max) if np.issubdtype(values.dtype, np.integer) else 1.0
            return Samples(values[..., :3], (0.0, top), shown=_full(values, top), notes=notes)
        bits = int(dataset.get("BitsStored", dataset.BitsAllocated))
        low = -(2.0 ** (bits - 1)) if dataset.get("PixelRepresentation") else 0.0
        ends = np.array([low, low + 2.0**bits - 1])
        if _has_modality(dataset):
            values, ends = (pixels.apply_modality_lut(part, dataset) for part in (values, ends.astype(values.dtype)))
        nominal = (float(ends.min()), float(ends.max()))
        shown = _linear(dataset)
        if shown is None and ("VOILUTSequence" in dataset or "WindowCenter" in dataset):
            values = pixels.apply_voi_lut(values, dataset)
            nominal = (float(values.min()), float(values.max()))
            shown = Window("voi", *nominal)
        return Samples(values, nominal, shown=shown, inverted=kind == "MONOCHROME1", notes=notes)
    except ImageError:
        raise
    except MemoryError as error:
        raise ImageError("too_large", "no room for the pixels of this DICOM file") from error
    except _errors() as error:
        raise ImageError("truncated", "the pixels of this DICOM file are damaged or cut short") from error


def _dataset(stream: BufferedReader | BytesIO, *, pixels: bool) -> Any:
    """The file's elements, those above the pixels only if not `pixels`."""
    try:
        import pydicom
    except ImportError as error:
        raise ImageError("unsupported", "DICOM needs pydicom: pip install pydicom") from error
    if _QUIET not in warnings.filters:
        warnings.filterwarnings("ignore", module=r"pydicom\.")
        pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE
        logging.getLogger("pydicom").addHandler(logging.NullHandler())
        logging.getLogger("pydicom").propagate = False
    try:
        stream.seek(0)
        dataset = pydicom.dcmread(stream, stop_before_pixels=not pixels, force=True)
        if "TransferSyntaxUID" not in dataset.file_meta:
            dataset.file_meta.TransferSyntaxUID = pydicom.uid.ImplicitVRLittleEndian
        return dataset
    except _errors() as error:
        raise ImageError("truncated", "this DICOM file is damaged or cut short") from error


def _errors() -> tuple[type[Exception], ...]:
    """All that pydicom and its decoders raise over damaged bytes."""
    from pydicom.errors import BytesLengthException, InvalidDicomError

    return (
        *(OSError, ValueError, EOFError, LookupError, ArithmeticError, TypeError, AttributeError, RuntimeError),
        *(AssertionError, InvalidDicomError, BytesLengthException),
    )


def _require_honest_frame(dataset: Any, index: int) -> None:
    """Raise ImageError for a syntax without a decoder, and for compressed pixels of another size than announced."""
    from pydicom import encaps, uid
    from pydicom.pixels import get_decoder

    syntax = dataset.file_meta.TransferSyntaxUID
    if syntax in _UNCOMPRESSED:
        return
    if syntax not in uid.UID_dictionary or not get_decoder(syntax).is_available:
        raise ImageError(
            "unsupported",
            f"no decoder for DICOM of syntax {syntax}: pip install pylibjpeg pylibjpeg-libjpeg pylibjpeg-openjpeg",
        )
    frames = int(dataset.get("NumberOfFrames") or 1)
    size = _announced(encaps.get_frame(dataset.PixelData, index, number_of_frames=frames))
    if size is not None and size != (dataset.Columns, dataset.Rows):
        raise ImageError("truncated", f"the compressed picture is {size[0]} x {size[1]}, unlike what its file says")


def _announced(frame: bytes) -> tuple[int, int] | None:
    """(width, height) in the header of a JPEG, JPEG-LS or JPEG 2000 code stream; None for other kinds."""
    start = frame.find(b"\xff\x4f\xff\x51", 0, 4096)
    if start >= 0:
        right, bottom, left, top = (int.from_bytes(frame[start + n : start + n + 4]) for n in (8, 12, 16, 20))
        return right - left, bottom - top
    at = 2
    while frame[:2] == b"\xff\xd8" and at + 9 < len(frame) and frame[at] == 0xFF:
        if frame[at + 1] == 0xF7 or (frame[at + 1] & 0xF0 == 0xC0 and frame[at + 1] not in (0xC4, 0xC8, 0xCC)):
            return int.from_bytes(frame[at + 7 : at + 9]), int.from_bytes(frame[at + 5 : at + 7])
        at += 2 + int.from_bytes(frame[at + 2 : at + 4])
    return None


def _functional_groups(dataset: Any, index: int) -> list[Any]:
    """What an enhanced multi-frame file says of values and window for all frames, then for this one."""
    groups = [*dataset.get("SharedFunctionalGroupsSequence", ())[:1]]
    groups += dataset.get("PerFrameFunctionalGroupsSequence", ())[index : index + 1]
    names = ("PixelValueTransformationSequence", "FrameVOILUTSequence")
    return [group[name].value[0] for group in groups for name in names if name in group]


def _has_modality(dataset: Any) -> bool:
    plain = (dataset.get("RescaleSlope", 1), dataset.get("RescaleIntercept", 0)) == (1, 0)
    return "ModalityLUTSequence" in dataset or not plain


def _is_marked(dataset: Any) -> bool:
    return str(dataset.get("BurnedInAnnotation", "")).upper() == "YES"


def _full(values: Any, top: float) -> Window | None:
    """Colour is shown as it is stored."""
    return None if values.dtype == np.uint8 else Window("full", 0.0, top)


def _linear(dataset: Any) -> Window | None:
    """The first window that the file asks for, where it is a straight line (PS3.3 C.11.2.1.2)."""
    if "VOILUTSequence" in dataset or dataset.get("VOILUTFunction", "LINEAR") not in ("LINEAR", "LINEAR_EXACT"):
        return None
    try:
        centre, width = (float(np.atleast_1d(dataset[n].value)[0]) for n in ("WindowCenter", "WindowWidth"))
    except (KeyError, TypeError, ValueError, IndexError):
        return None
    if dataset.get("VOILUTFunction", "LINEAR") == "LINEAR":
        centre, width = centre - 0.5, width - 1
    return Window("voi", centre - width / 2, centre + width / 2) if width >= 1 else None
