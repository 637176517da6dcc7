"""Two energies of one bag, and what the network sees of both."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from detxai.errors import ImageError
from detxai.inputs.samples import Samples
from detxai.inputs.window import AUTO_PERCENTILES, Method
from detxai.values import Pixels, Window

#: Ratio of the log-attenuations at low and high energy -> effective atomic number: plastics, aluminium and steel at
#: about 60 and 110 keV.
RATIOS, NUMBERS = (1.206, 1.674, 2.667), (7.0, 13.0, 26.0)
#: Effective atomic number -> colour: orange for organic matter, green for light metals and glass, blue for metal.
HUE_NUMBERS = (8.0, 11.0, 14.0, 19.0)
HUES = ((236, 150, 56), (84, 168, 92), (84, 168, 92), (56, 108, 206))
#: `channels` shows this effective atomic number at its brightest.
BRIGHTEST_NUMBER = 30.0
#: Log-attenuation that counts as one at both energies: empty air is organic, and noise has no colour.
CALM = 0.025
DARKEST = 1e-4


def transmission(shares: Samples, method: Method) -> tuple[NDArray[np.float32], Window]:
    """The share of the beam that passed, (height, width), and the values of no beam and of open beam.

    `LOW,HIGH` of --window are these two; `full`: the ends of the format; else no beam is the format's lower end and
    open beam the upper percentile of the picture. Raises ImageError for colour.
    """
    values: Any = shares.values
    if values.ndim == 3:
        if not (values == values[..., :1]).all():
            raise ImageError("unsupported", "a picture in colour is none of one energy (--pair)")
        values = values[..., 0]
    values = values.astype(np.float32)
    if not np.isfinite(values).all():
        raise ImageError("not_finite", "a picture of one energy holds not-a-number or infinite values")
    bottom, top = shares.nominal
    if shares.inverted:
        values = bottom + top - values
    kind, low, high = method
    if kind == "fixed":
        window = Window(f"{low:g},{high:g}", low, high)
    elif kind == "full":
        window = Window("full", bottom, top)
    else:
        share = high if kind == "percentile" else AUTO_PERCENTILES[1]
        window = Window(f"open beam at percentile {share:g}", bottom, float(np.percentile(values, share)))
    if window.low >= window.high:
        raise ImageError("unsupported", "a picture of one energy shows no beam; give --window DARK,OPEN")
    passed: NDArray[np.float32] = np.clip((values - window.low) / (window.high - window.low), DARKEST, 1)
    return passed, window


def atomic_number(low: NDArray[np.float32], high: NDArray[np.float32]) -> NDArray[np.float32]:
    """The effective atomic number behind each pixel, of transmissions at low and high energy (height, width)."""
    calm_low, calm_high = (cv2.GaussianBlur(-np.log(part), (0, 0), 1.0) for part in (low, high))
    ratio = (calm_low + CALM * RATIOS[0]) / (calm_high + CALM)
    number: NDArray[np.float32] = np.interp(ratio, RATIOS, NUMBERS).astype(np.float32)
    return number


def materials(low: NDArray[np.float32], high: NDArray[np.float32]) -> Pixels:
    """As scanners show it, (height, width, 3): the hue says what it is, the brightness how much passed."""
    number = atomic_number(low, high)
    hue = np.stack([np.interp(number, HUE_NUMBERS, part) for part in zip(*HUES, strict=True)], axis=2)
    passed = ((0.25 * low + 0.75 * high) ** 0.8)[..., None]
    colour = np.where(passed < 0.5, hue * 2 * passed, hue + (255 - hue) * (2 * passed - 1))
    pixels: Pixels = np.rint(colour).astype(np.uint8)
    return pixels


def channels(low: NDArray[np.float32], high: NDArray[np.float32]) -> Pixels:
    """The numbers themselves, (height, width, 3): transmission at low and at high energy, effective atomic number."""
    parts = (low, high, np.minimum(atomic_number(low, high) / BRIGHTEST_NUMBER, 1))
    pixels: Pixels = np.rint(255 * np.stack(parts, axis=2)).astype(np.uint8)
    return pixels


#: What --energy-colors takes.
COLORS = {"materials": materials, "channels": channels}
