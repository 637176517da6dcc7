"""The picture that the network sees, and the way back: boxes and maps from letterbox to source pixels."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
import PIL.Image
from numpy.typing import ArrayLike, NDArray

from detxai.values import InputShape, Letterbox, Map, Pixels

PADDING = 114
#: How a picture becomes what the network sees. `letterbox`: in its proportions, centred on grey, by OpenCV's bilinear
#: filter (ultralytics; the YOLOv5 and YOLOv3 repositories). `stretch`: all over it, by the same filter (RT-DETR).
#: `darknet`: all over it, as Darknet's `resize_image` does it.
FITS = ("letterbox", "stretch", "darknet")


def letterboxed(
    pixels: Pixels, shape: InputShape, fit: str = "letterbox", stride: int | None = None
) -> tuple[Pixels, Letterbox]:
    """`pixels` (height, width, channels) on grey of `shape` (rows, columns), in one of the ways `FITS`.

    `stride`: of a network that takes any whole number of cells; then there is no more grey than fills the last ones, as
    ultralytics does by default (`rect=True`).
    """
    (height, width), (rows, columns) = pixels.shape[:2], shape
    gain = min(rows / height, columns / width)
    inner_width, inner_height = max(round(width * gain), 1), max(round(height * gain), 1)
    if fit != "letterbox":
        inner_width, inner_height = columns, rows
    elif stride is not None:
        columns -= (columns - inner_width) // stride * stride
        rows -= (rows - inner_height) // stride * stride
    left, top = round((columns - inner_width) / 2 - 0.1), round((rows - inner_height) / 2 - 0.1)
    inner = pixels
    if (inner_height, inner_width) != (height, width):
        inner = (_corner_to_corner if fit == "darknet" else _bilinear)(pixels, inner_width, inner_height)
    canvas = np.full((rows, columns, pixels.shape[2]), PADDING, np.uint8)
    canvas[top : top + inner_height, left : left + inner_width] = inner
    return canvas, Letterbox((rows, columns), width, height, gain, left, top, inner_width, inner_height)


def _bilinear(pixels: Pixels, width: int, height: int) -> Pixels:
    return np.asarray(cv2.resize(pixels, (width, height), interpolation=cv2.INTER_LINEAR), np.uint8)


def _corner_to_corner(pixels: Pixels, width: int, height: int) -> Pixels:
    """As Darknet's `resize_image`: linear between two pixels, never more, and the corner pixels stay what they are."""
    values: NDArray[Any] = pixels
    for axis, count in ((1, width), (0, height)):
        last = pixels.shape[axis] - 1
        at = np.arange(count, dtype=np.float32) * (last / max(count - 1, 1))
        low = np.minimum(at.astype(np.intp), last)
        share = (at - low).reshape((-1, 1) if axis else (-1, 1, 1))
        near, far = (values.take(i, axis).astype(np.float32) for i in (low, np.minimum(low + 1, last)))
        values = near + share * (far - near)
    return np.asarray(np.rint(values), np.uint8)


def fitted(pixels: Pixels, lb: Letterbox) -> Pixels:
    """`pixels` stretched to the picture's place in the letterbox `lb`: a baseline image on the same padding."""
    canvas = np.full((*lb.shape, pixels.shape[2]), PADDING, np.uint8)
    size, bilinear = (lb.inner_width, lb.inner_height), PIL.Image.Resampling.BILINEAR  # it averages when it shrinks
    bands = [PIL.Image.fromarray(band).resize(size, bilinear) for band in np.moveaxis(pixels, 2, 0)]
    inner = np.stack([np.asarray(band) for band in bands], 2)
    canvas[lb.top : lb.top + lb.inner_height, lb.left : lb.left + lb.inner_width] = inner
    return canvas


def _affine(lb: Letterbox) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Gain and offset of xyxy, one gain a side since the inner size is rounded (`scale_boxes`)."""
    gain = np.array([lb.inner_width / lb.width, lb.inner_height / lb.height] * 2)
    return gain, np.array([lb.left, lb.top] * 2, dtype=np.float64)


def boxes_to_source(boxes: ArrayLike, lb: Letterbox) -> NDArray[np.float64]:
    """Boxes (n, 4) xyxy from letterbox to source pixels, clipped to the image."""
    gain, offset = _affine(lb)
    moved = (np.asarray(boxes, np.float64) - offset) / gain
    return np.clip(moved, 0, np.array([lb.width, lb.height] * 2))


def boxes_to_letterbox(boxes: ArrayLike, lb: Letterbox) -> NDArray[np.float64]:
    """Boxes (n, 4) xyxy from source to letterbox pixels, not clipped."""
    gain, offset = _affine(lb)
    return np.asarray(boxes, np.float64) * gain + offset


def map_to_source(values: ArrayLike, lb: Letterbox) -> Map:
    """A map (..., rows, columns) on the letterbox as (..., height, width) float32 on the source.

    The mass of each letterbox pixel is spread evenly over its extent in the source, so that the
    sum over the picture stays; what lies on the padding is left out.
    """
    below, right = lb.top + lb.inner_height, lb.left + lb.inner_width
    inner = np.asarray(values)[..., lb.top : below, lb.left : right]
    columns = _respread(inner.swapaxes(-1, -2), lb.width)
    return _respread(columns.swapaxes(-1, -2), lb.height).astype(np.float32)


def _respread(mass: NDArray[Any], count: int) -> NDArray[Any]:
    """Axis -2 as `count` cells, float64: differences of the running sum, linear between its edges."""
    old = mass.shape[-2]
    if old == count:
        return mass
    mass = np.ascontiguousarray(mass, np.float64)
    edges = np.arange(count + 1) * old / count
    cell = np.minimum(edges.astype(np.intp), old - 1)
    sums = np.take(mass, cell, axis=-2)
    sums *= (edges - cell)[:, None]
    before = mass.copy()
    for i in range(1, old):  # whole rows: np.cumsum goes down every column
        before[..., i, :] += before[..., i - 1, :]
    before -= mass
    sums += np.take(before, cell, axis=-2)
    return np.asarray(sums[..., 1:, :] - sums[..., :-1, :])
