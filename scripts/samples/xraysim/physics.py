"""From thickness maps to a scanner picture: Beer-Lambert at two energies, then pseudo-colour.

The ratio of the two log-attenuations rises with the effective atomic number, so it sets the hue
(orange organic, green mixed, blue metal); the attenuation itself sets how dark a pixel is.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from .geometry import Stack

MU = {
    "organic": (0.205, 0.170),
    "mixed": (0.720, 0.430),
    "metal": (7.20, 2.70),
}
"""Linear attenuation in 1/cm at the low (about 60 keV) and the high (about 110 keV) energy, for
plastics and cloth, for aluminium, glass and circuit boards, and for steel and copper."""

OPEN = 50_000
"""Value of an open beam in pictures of one energy."""

RATIO_KNOTS = (1.20, 1.31, 1.56, 1.80, 2.30)
HUE_KNOTS = (0.0, 0.26, 1.0, 1.20, 2.0)
"""Ratio of log-attenuations -> hue coordinate: 0 orange, 1 green, 2 blue."""

_VALUES = np.array([0.0, 0.12, 0.30, 0.52, 0.78, 1.0])
_ORANGE = [(18, 12, 4), (92, 42, 2), (176, 88, 10), (234, 146, 52), (252, 214, 158), (255, 255, 255)]
_GREEN = [(4, 14, 8), (4, 58, 26), (22, 116, 48), (92, 178, 92), (188, 230, 174), (255, 255, 255)]
_BLUE = [(2, 4, 16), (8, 22, 92), (22, 58, 170), (62, 118, 208), (156, 196, 234), (255, 255, 255)]


@dataclass(frozen=True)
class Look:
    """How one scanner shows a bag.

    ``ground`` RGB 0..255 of the empty belt, ``photons`` counts per open pixel, ``blur`` px sigma
    of the detector, ``gamma`` of the shown transmission, ``sharpen`` strength of the edge
    enhancement, ``hue_shift`` in hue coordinates, ``vivid`` saturation gain around 1, ``banding``
    relative gain error of image rows.
    """

    ground: tuple[float, float, float] = (255.0, 255.0, 255.0)
    photons: float = 2e4
    blur: float = 0.7
    gamma: float = 0.8
    sharpen: float = 0.4
    hue_shift: float = 0.0
    vivid: float = 1.0
    banding: float = 0.003


def random_look(rng: np.random.Generator) -> Look:
    """Draw a scanner: mostly a white ground, sometimes light grey or slightly tinted."""
    kind = rng.uniform()
    if kind < 0.66:
        ground = np.full(3, 255.0) - rng.uniform(0, 4)
    elif kind < 0.94:
        ground = np.full(3, rng.uniform(218, 240)) + rng.uniform(-4, 4, 3)
    else:
        green = rng.uniform(205, 232)
        ground = np.array([green + rng.uniform(0, 14), green, green + rng.uniform(0, 18)])
    return Look(
        ground=tuple(float(v) for v in ground),
        photons=float(np.exp(rng.uniform(np.log(2e3), np.log(4e4)))),
        blur=float(rng.uniform(0.45, 0.95)),
        gamma=float(rng.uniform(0.62, 1.0)),
        sharpen=float(rng.uniform(0.0, 0.9)),
        hue_shift=float(rng.uniform(-0.12, 0.12)),
        vivid=float(rng.uniform(0.85, 1.35)),
        banding=float(rng.uniform(0.0, 0.008)),
    )


def attenuation(stack: Stack) -> tuple[np.ndarray, np.ndarray]:
    """Line integrals sum(mu * t) of a scene at low and high energy, float32 (H, W), no unit."""
    low, high = (sum(np.float32(MU[m][energy]) * t for m, t in stack.maps.items()) for energy in (0, 1))
    return low, high


def _expose(rng: np.random.Generator, integral: np.ndarray, look: Look) -> np.ndarray:
    """Detected transmission (H, W) in 0..1: exp(-integral), blurred, with photon noise."""
    clean = cv2.GaussianBlur(np.exp(-integral), (0, 0), look.blur)
    grain = rng.standard_normal(clean.shape, dtype=np.float32)
    electronic = 1.5 / look.photons
    noisy = clean + grain * np.sqrt(clean / look.photons + electronic**2)
    # Each image row is one detector line of a moving belt: tiny gain errors from row to row.
    noisy *= 1 + look.banding * rng.standard_normal((clean.shape[0], 1), dtype=np.float32)
    return np.clip(noisy, 3e-4, 1.2)


def hue_of(ratio: np.ndarray) -> np.ndarray:
    """Hue coordinate 0..2 (orange, green, blue) of a ratio low / high of log-attenuations."""
    return np.interp(ratio, RATIO_KNOTS, HUE_KNOTS).astype(np.float32)


def palette(look: Look) -> np.ndarray:
    """Colour table float32 (129 hues, 256 values, 3) RGB 0..255; value 255 is the ground."""
    grid = np.linspace(0, 1, 256)
    rows = np.stack(
        [
            np.stack([np.interp(grid, _VALUES, np.array(ramp, float)[:, c]) for c in range(3)], 1)
            for ramp in (_ORANGE, _GREEN, _BLUE)
        ]
    )
    grey = rows.mean(2, keepdims=True)
    rows = np.clip(grey + (rows - grey) * look.vivid, 0, 255)
    at = np.linspace(0, 2, 129)
    first = np.minimum(at.astype(int), 1)
    part = (at - first)[:, None, None]
    table = rows[first] * (1 - part) + rows[first + 1] * part
    return (table * (np.array(look.ground) / 255)).astype(np.float32)


def render(rng: np.random.Generator, stack: Stack, look: Look) -> tuple[np.ndarray, np.ndarray]:
    """Picture of a scene as a scanner shows it, uint8 (H, W, 3) RGB, and what it measured.

    That is uint16 (2, H, W), low and high energy, `OPEN` where nothing lies in the way.
    """
    low, high = (_expose(rng, integral, look) for integral in attenuation(stack))
    measured = np.round(np.clip(np.stack([low, high]) * OPEN, 0, 65535)).astype(np.uint16)
    log_low, log_high = -np.log(low), -np.log(high)
    # Scanners average the ratio over a few pixels: it is far noisier than the attenuation.
    calm_low = cv2.GaussianBlur(log_low, (0, 0), 0.9)
    calm_high = cv2.GaussianBlur(log_high, (0, 0), 0.9)
    ratio = (np.maximum(calm_low, 0) + 0.0315) / (np.maximum(calm_high, 0) + 0.025)
    hue = np.clip(hue_of(ratio) + look.hue_shift, 0, 2)
    value = np.clip(0.25 * low + 0.75 * high, 0, 1) ** look.gamma
    value += look.sharpen * (value - cv2.GaussianBlur(value, (0, 0), 1.6))
    value = np.clip(value, 0, 1)
    colour = cv2.remap(palette(look), value * 255, hue * 64, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    return np.round(colour).astype(np.uint8), measured
