"""Baselines: what an image is compared with. All keep the letterbox padding, so that padding gets no attribution."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from detxai.values import Letterbox, Pixels
from detxai.vocabulary import COLOURS

#: Share of the pixels around the most common colour that makes it a ground: less for the pale ground of scanners
#: (mean level above PALE) than for darker ones. Its channels lie within CHROMA of each other: lawns are no ground.
GROUND_SHARE, GROUND_SHARE_PALE = 0.4, 0.18
PALE, CHROMA = 170, 28
WHITE = (255, 255, 255)
#: Standard deviation of the blur, as a share of the longer side.
BLUR_SIGMA = 0.05
#: As little blur as leaves an object what it is, and takes away what only single pixels say.
SOFT_SIGMA = 0.004


def baseline(name: str, square: Pixels, box: Letterbox, file: Pixels | None = None) -> tuple[Tensor, str]:
    """The baseline of a letterboxed image (size, size, 3) uint8 as (3, size, size) float32 in [0, 1], and its name.

    `auto` is the image's own ground where it has one (the white tunnel of an X-ray), else black; its name says which
    colour was found. `file`: a letterboxed picture (same size), for a baseline image.
    """
    rows, cols = slice(box.top, box.top + box.inner_height), slice(box.left, box.left + box.inner_width)
    inner = square[rows, cols]
    result = square.astype(np.float32) / 255
    if file is not None:
        result[rows, cols] = file[rows, cols].astype(np.float32) / 255
    elif name in COLOURS:
        result[rows, cols] = COLOURS[name]
    elif name == "mean":
        result[rows, cols] = inner.reshape(-1, 3).mean(0) / 255
    elif name == "blur":
        result[rows, cols] = _blurred(inner)
    else:
        colour = ground(inner)
        result[rows, cols] = 0.0 if colour is None else np.asarray(colour) / 255
        name = "auto:black" if colour is None else "auto:#{:02x}{:02x}{:02x}".format(*colour)
    return torch.from_numpy(result).permute(2, 0, 1).contiguous(), name


def softened(square: Pixels, box: Letterbox) -> Tensor:
    """The image itself under a slight Gaussian, as (3, size, size) float32 in [0, 1]; its padding stays."""
    rows, cols = slice(box.top, box.top + box.inner_height), slice(box.left, box.left + box.inner_width)
    result = square.astype(np.float32) / 255
    result[rows, cols] = _blurred(square[rows, cols], SOFT_SIGMA)
    return torch.from_numpy(result).permute(2, 0, 1).contiguous()


def ground_of(name: str, inner: Pixels) -> tuple[int, int, int] | None:
    """`ground` of a picture whose baseline has the `name` that `baseline` gave it: `auto` has looked already."""
    if name == "auto:black":
        return None
    if name.startswith("auto:#"):
        red, green, blue = bytes.fromhex(name[len("auto:#") :])
        return red, green, blue
    return ground(inner)


def ground(pixels: Pixels) -> tuple[int, int, int] | None:
    """The colour of the empty ground of a picture (height, width, 3), or None where no colour dominates."""
    flat = pixels.reshape(-1, 3)
    bins = flat >> 4
    count = np.zeros((18, 18, 18), np.int64)
    np.add.at(count, tuple(bins.T.astype(np.int64) + 1), 1)
    for axis in range(3):  # a colour counts with its neighbours: grounds are noisy
        count = count + np.roll(count, 1, axis) + np.roll(count, -1, axis)
    mode = np.array(np.unravel_index(count.argmax(), count.shape)) - 1
    near = (np.abs(bins.astype(np.int16) - mode) <= 1).all(1)
    colour = np.median(flat[near], axis=0).round().astype(int)
    pale = colour.mean() > PALE
    if near.mean() < (GROUND_SHARE_PALE if pale else GROUND_SHARE):
        return None
    if np.ptp(colour) >= CHROMA:
        return WHITE if pale else None  # the thin stuff of a bag that fills the picture: its ground is the tunnel's
    red, green, blue = colour
    return int(red), int(green), int(blue)


def _blurred(inner: Pixels, share: float = BLUR_SIGMA) -> NDArray[np.float32]:
    """`inner` (height, width, 3) in [0, 1] under a Gaussian, its border pixels repeated beyond it."""
    image = torch.from_numpy(inner.astype(np.float32) / 255).permute(2, 0, 1)
    sigma = share * max(inner.shape[:2])
    rows, columns = (_gaussian(length, sigma) for length in inner.shape[:2])
    return np.asarray((rows @ image @ columns.T).permute(1, 2, 0))


def _gaussian(length: int, sigma: float) -> Tensor:
    """(length, length) float32: each row weighs the pixels of a line around one; what lies beyond counts at the end."""
    offsets = torch.arange(-int(3 * sigma) - 1, int(3 * sigma) + 2)
    taps = torch.exp(-0.5 * (offsets / max(sigma, 1e-6)) ** 2)
    at = (torch.arange(length)[:, None] + offsets).clamp(0, length - 1)
    return torch.zeros(length, length).scatter_add_(1, at, (taps / taps.sum()).expand(length, -1))
