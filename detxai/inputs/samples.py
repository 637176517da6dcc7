"""What a decoded file holds, at its own depth: Pillow's pixels, or OpenCV's where Pillow cuts 16 bits to 8."""

from __future__ import annotations

from typing import Any, NamedTuple

import cv2
import numpy as np
import PIL.Image
from numpy.typing import NDArray

from detxai.errors import ImageError
from detxai.values import Window

cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)


class Samples(NamedTuple):
    """Decoded `values` (h, w[, 3]) of any dtype, their `nominal` range, `alpha` (h, w).

    `shown`: the window that the file itself asks for; `inverted`: low values are the bright ones. `notes` go into
    the record.
    """

    values: NDArray[Any]
    nominal: tuple[float, float] = (0.0, 255.0)
    alpha: NDArray[np.uint8] | None = None
    shown: Window | None = None
    inverted: bool = False
    notes: tuple[str, ...] = ()


def samples(image: PIL.Image.Image, data: bytes) -> Samples:
    """All the values of `image`, decoded by Pillow from the file `data`. Raises ImageError for unknown colours."""
    if image.mode.startswith(("I", "F")):
        return _deep_gray(image)
    shown = "the file holds two bands; the first is shown (--pair bands reads both)"
    notes: tuple[str, ...] = (shown,) if has_bands(image) else ()
    if _may_be_deep(image, data):
        values = _by_opencv(data)
        if values is not None and values.dtype == np.uint16 and values.ndim == 3:
            alpha = (values[..., 3] // 257).astype(np.uint8) if values.shape[2] == 4 else None
            return Samples(values[..., 2::-1], (0.0, 65535.0), alpha)
        if values is None:
            notes += ("16 bits a channel were cut to 8: OpenCV could not decode this file",)
    try:
        if image.has_transparency_data:
            rgba = np.array(image.convert("RGBA"))
            return Samples(rgba[..., :3], alpha=rgba[..., 3], notes=notes)
        return Samples(np.array(image.convert("RGB")), notes=notes)
    except ValueError as error:
        raise ImageError("unsupported", f"{image.format} in colours {image.mode}") from error


def has_bands(image: PIL.Image.Image) -> bool:
    """Whether `image` is a TIFF of two bands, of which Pillow reads the first, or of 16 bits neither."""
    tags: Any = getattr(image, "tag_v2", {})
    return bool(tags.get(277, 1) == 2 and image.mode != "LA")


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


def _may_be_deep(image: PIL.Image.Image, data: bytes) -> bool:
    """Whether the file has colour of more than 8 bits, which Pillow cuts, or of an unknown number."""
    if image.format not in ("PNG", "TIFF", "PPM", "JPEG2000") or image.mode not in ("RGB", "RGBA"):
        return False
    tags: Any = getattr(image, "tag_v2", {})
    return bool((data[24] if image.format == "PNG" else tags.get(258, (16,))[0]) > 8)


def _by_opencv(data: bytes) -> NDArray[Any] | None:
    try:
        return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    except cv2.error:
        return None
