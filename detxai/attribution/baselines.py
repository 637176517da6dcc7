"""Baselines: what an image is compared with. All keep the letterbox padding, so that padding gets no attribution."""

from __future__ import annotations

from functools import lru_cache

import cv2
import numpy as np
import torch
from torch import Tensor

from detxai.attribution.devices import sent
from detxai.values import Letterbox, Pixels
from detxai.vocabulary import COLOURS

#: Share of the pixels around the most common colour that makes it a ground: less for the pale ground of scanners
#: (mean level above PALE) than for darker ones. Its channels lie within CHROMA of each other: lawns are no ground.
GROUND_SHARE, GROUND_SHARE_PALE = 0.4, 0.18
PALE, CHROMA = 170, 28
#: Colours are counted in this many steps a channel, of LEVELS levels each.
STEPS, LEVELS = 16, 16
WHITE = 255
#: Standard deviation of the blur, as a share of the longer side.
BLUR_SIGMA = 0.05
#: Lines of a blurred picture made at a time, by device; a GPU makes all at once.
BAND = {"cpu": 64}
#: As little blur as leaves an object what it is, and takes away what only single pixels say.
SOFT_SIGMA = 0.004


def picture(canvas: Pixels, device: torch.device | None = None) -> Tensor:
    """A letterboxed image (rows, columns, c) uint8 as (c, rows, columns) float32 in [0, 1] on `device`."""
    return sent(torch.from_numpy(canvas), device or torch.device("cpu")).permute(2, 0, 1).contiguous().float() / 255


def resolved(name: str, canvas: Pixels, box: Letterbox) -> str:
    """The name of a baseline, `auto` with what it is on this image: `auto:#rrggbb`, its ground, else `auto:black`."""
    if name != "auto":
        return name
    colour = ground(canvas[inner(box)])
    return "auto:black" if colour is None else f"auto:#{bytes(colour).hex()}"


def baseline(name: str, x: Tensor, box: Letterbox, file: Tensor | None = None) -> Tensor:
    """The baseline `name` (see `resolved`) of the letterboxed image `x`, both (c, rows, columns) float32 in [0, 1].

    `file`: a letterboxed picture like `x`, for a baseline image.
    """
    result, at = x.clone(), (slice(None), *inner(box))
    if file is not None:
        result[at] = file[at]
    elif name == "mean":
        levels = (x[at] * 255).round().double()
        result[at] = (levels.mean((1, 2)) / 255).float()[:, None, None]
    elif name == "blur":
        result[at] = _blurred(x[at])
    elif name in COLOURS:
        result[at] = COLOURS[name]
    else:
        colour = torch.tensor(ground_of(name) or (0,) * len(x), dtype=torch.float64) / 255
        result[at] = colour.float()[:, None, None].to(x.device)
    return result


def softened(x: Tensor, box: Letterbox) -> Tensor:
    """The image `x` (channels, rows, columns) under a slight Gaussian; its padding stays."""
    result, at = x.clone(), (slice(None), *inner(box))
    result[at] = _blurred(x[at], SOFT_SIGMA)
    return result


def inner(box: Letterbox) -> tuple[slice, slice]:
    """The rows and columns of the letterbox in which the image lies."""
    return slice(box.top, box.top + box.inner_height), slice(box.left, box.left + box.inner_width)


def ground_of(name: str) -> tuple[int, ...] | None:
    """The colour in a name that `resolved` gave; None for `auto:black`."""
    if name == "auto:black":
        return None
    return tuple(bytes.fromhex(name.removeprefix("auto:#")))


def ground(pixels: Pixels) -> tuple[int, ...] | None:
    """The colour of the empty ground of a picture (height, width, channels), or None where no colour dominates."""
    near = _near_the_mode(pixels) if pixels.shape[2] == 3 else _near_all_modes(pixels)
    colour = np.array([_median(pixels, channel, near) for channel in range(pixels.shape[2])]).round().astype(int)
    pale = colour.mean() > PALE
    if cv2.countNonZero(near) / near.size < (GROUND_SHARE_PALE if pale else GROUND_SHARE):
        return None
    if np.ptp(colour) >= CHROMA:  # the thin stuff of a bag that fills the picture: its ground is the tunnel's
        return (WHITE,) * len(colour) if pale else None
    return tuple(map(int, colour))


def _near_the_mode(pixels: Pixels) -> Pixels:
    """(height, width): not 0 where a colour picture has about its most common colour."""
    count = np.pad(cv2.calcHist([pixels], [0, 1, 2], None, [STEPS] * 3, [0, 256] * 3), 1)
    for axis in range(3):  # a colour counts with its neighbours: grounds are noisy
        count = count + np.roll(count, 1, axis) + np.roll(count, -1, axis)
    mode = np.array(np.unravel_index(count.argmax(), count.shape)) - 1
    return np.asarray(cv2.inRange(pixels, LEVELS * np.maximum(mode - 1.0, 0), LEVELS * (mode + 2.0) - 1), np.uint8)


def _near_all_modes(pixels: Pixels) -> Pixels:
    """The same where every channel of many has about its own most common level: colours of many are not counted."""
    near = np.full(pixels.shape[:2], 255, np.uint8)
    for channel in np.moveaxis(pixels, 2, 0):
        count = np.pad(np.bincount(channel.ravel() // LEVELS, minlength=STEPS), 1)
        mode = int((count[:-2] + count[1:-1] + count[2:]).argmax())
        near[(channel < LEVELS * max(mode - 1, 0)) | (channel > LEVELS * (mode + 2) - 1)] = 0
    return near


def _median(pixels: Pixels, channel: int, mask: Pixels) -> float:
    """The median level of a channel where `mask` (height, width) is not 0."""
    below = cv2.calcHist([pixels], [channel], mask, [256], [0, 256]).ravel().cumsum()
    middle = (below[-1] - 1) // 2, below[-1] // 2
    return float(np.searchsorted(below, middle, side="right").mean())


def _blurred(inside: Tensor, share: float = BLUR_SIGMA) -> Tensor:
    """`inside` (channels, height, width) under a Gaussian, its border pixels repeated beyond it."""
    sigma = share * max(inside.shape[1:])
    rows, columns = (_gaussian(length, sigma, inside.device) for length in inside.shape[1:])
    return _banded(columns, _banded(rows, inside, _reach(sigma)).mT, _reach(sigma)).mT


def _banded(weights: Tensor, lines: Tensor, reach: int) -> Tensor:
    """`weights` @ `lines` (3, length, n), passing over weights that lie more than `reach` off the diagonal: zeros."""
    length = len(weights)
    step = BAND.get(lines.device.type, length)
    starts = range(0, length, step)
    near = [slice(max(i - reach, 0), i + step + reach) for i in starts]
    return torch.cat([weights[i : i + step, at] @ lines[:, at] for i, at in zip(starts, near, strict=True)], 1)


def _reach(sigma: float) -> int:
    return int(3 * sigma) + 1


@lru_cache(maxsize=16)
def _gaussian(length: int, sigma: float, device: torch.device) -> Tensor:
    """(length, length) float32: each row weighs the pixels of a line around one; what lies beyond counts at the end."""
    offsets = torch.arange(-_reach(sigma), _reach(sigma) + 1)
    taps = torch.exp(-0.5 * (offsets / max(sigma, 1e-6)) ** 2)
    at = (torch.arange(length)[:, None] + offsets).clamp(0, length - 1)
    return torch.zeros(length, length).scatter_add_(1, at, (taps / taps.sum()).expand(length, -1)).to(device)
