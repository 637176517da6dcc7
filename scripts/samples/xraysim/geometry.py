"""Shapes in a local frame, drawn as thickness maps.

Local frame of an object: x right, y down, its long side about 1, origin near its middle.
Image frame: pixels, x right, y down, pixel centres at integers. Thickness is in centimetres
along the beam, which is perpendicular to the image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import cv2
import numpy as np

SUBPIXEL_BITS = 4
MATERIALS = ("organic", "mixed", "metal")

Points = np.ndarray | Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Shape:
    """A polygon of one material.

    ``outline`` (N, 2) in the local frame; ``thickness`` in cm at its thickest; ``profile`` is the
    cross-section: flat plate, round (half-ellipse), bevel (thin towards the rim) or shell (thin
    sheet whose walls are seen edge-on). ``cut`` removes what the piece holds there. ``part`` names
    the telling part that the pixels belong to; a cut with a part keeps its opening in that part.
    """

    outline: np.ndarray
    material: str = "metal"
    thickness: float = 0.3
    profile: str = "flat"
    part: str | None = None
    cut: bool = False


@dataclass(frozen=True)
class Item:
    """Pieces lying on one another: within a piece the thickest shape counts, pieces add up."""

    pieces: list[list[Shape]]


@dataclass(frozen=True)
class Pose:
    """Local to image frame: ``matrix`` (2, 2) in pixels per local unit, ``centre`` (2,) in px."""

    matrix: np.ndarray
    centre: np.ndarray

    def apply(self, points: Points) -> np.ndarray:
        """Map (N, 2) local points to (N, 2) image points in pixels."""
        return np.asarray(points, np.float64) @ self.matrix.T + self.centre


@dataclass
class Stack:
    """Thickness maps of a whole scene: one float32 (H, W) array in cm for each material."""

    height: int
    width: int
    maps: dict[str, np.ndarray] = field(init=False)

    def __post_init__(self) -> None:
        shape = (self.height, self.width)
        self.maps = {material: np.zeros(shape, np.float32) for material in MATERIALS}


def pose(
    centre: tuple[float, float],
    size: float,
    angle: float = 0.0,
    squeeze: tuple[float, float] = (1.0, 1.0),
    mirror: bool = False,
) -> Pose:
    """Place a local frame: ``size`` px long side, ``angle`` in radians, foreshortened first."""
    cos, sin = np.cos(angle), np.sin(angle)
    scale = np.diag([squeeze[0], squeeze[1] * (-1.0 if mirror else 1.0)]) * size
    return Pose(np.array([[cos, -sin], [sin, cos]]) @ scale, np.asarray(centre, np.float64))


def turn(points: Points, angle: float, about: tuple[float, float] = (0.0, 0.0)) -> np.ndarray:
    """Rotate (N, 2) points by ``angle`` radians about a point; same frame and units."""
    cos, sin = np.cos(angle), np.sin(angle)
    return (np.asarray(points, np.float64) - about) @ np.array([[cos, sin], [-sin, cos]]) + about


def box(x0: float, y0: float, x1: float, y1: float) -> np.ndarray:
    """Axis-aligned rectangle as (4, 2) corners."""
    return np.array([(x0, y0), (x1, y0), (x1, y1), (x0, y1)], np.float64)


def rounded(x0: float, y0: float, x1: float, y1: float, radius: float) -> np.ndarray:
    """Rectangle with round corners as (24, 2) points."""
    angles = np.linspace(0, np.pi / 2, 6)
    corners = [(x1 - radius, y1 - radius, 0), (x0 + radius, y1 - radius, 1)]
    corners += [(x0 + radius, y0 + radius, 2), (x1 - radius, y0 + radius, 3)]
    arcs = [
        np.stack([x + radius * np.cos(angles + k * np.pi / 2), y + radius * np.sin(angles + k * np.pi / 2)], 1)
        for x, y, k in corners
    ]
    return np.concatenate(arcs)


def ellipse(x: float, y: float, rx: float, ry: float | None = None, n: int = 28) -> np.ndarray:
    """Ellipse (circle without ``ry``) as (n, 2) points; n=6 gives a hexagon."""
    t = np.arange(n) * (2 * np.pi / n)
    return np.stack([x + rx * np.cos(t), y + (rx if ry is None else ry) * np.sin(t)], 1)


def smooth(points: Points, n: int = 24, closed: bool = False) -> np.ndarray:
    """Catmull-Rom curve through (K, 2) points, n points in all; same frame and units."""
    p = np.asarray(points, np.float64)
    k = len(p)
    t = np.linspace(0, k if closed else k - 1, n, endpoint=not closed)
    i = np.minimum(t.astype(int), k - 1 if closed else k - 2)
    u = (t - i)[:, None]
    pick = (lambda j: p[j % k]) if closed else (lambda j: p[np.clip(j, 0, k - 1)])
    a, b, c, d = pick(i - 1), pick(i), pick(i + 1), pick(i + 2)
    return 0.5 * (2 * b + (c - a) * u + (2 * a - 5 * b + 4 * c - d) * u**2 + (3 * b - a - 3 * c + d) * u**3)


def resample(points: Points, n: int, closed: bool = False) -> np.ndarray:
    """(n, 2) points at even steps along a polyline (K, 2); same frame and units."""
    p = np.asarray(points, np.float64)
    if closed:
        p = np.concatenate([p, p[:1]])
    steps = np.r_[0, np.cumsum(np.linalg.norm(np.diff(p, axis=0), axis=1))]
    at = np.linspace(0, steps[-1], n, endpoint=not closed)
    return np.stack([np.interp(at, steps, p[:, c]) for c in (0, 1)], 1)


def ribbon(points: Points, widths: float | Sequence[float]) -> np.ndarray:
    """Polygon around an open line (K, 2) with a full width at each point (interpolated)."""
    p = np.asarray(points, np.float64)
    w = np.atleast_1d(np.asarray(widths, np.float64))
    w = np.interp(np.linspace(0, 1, len(p)), np.linspace(0, 1, len(w)), w)[:, None] / 2
    along = np.gradient(p, axis=0)
    along /= np.linalg.norm(along, axis=1, keepdims=True) + 1e-9
    side = np.stack([-along[:, 1], along[:, 0]], 1)
    return np.concatenate([p + side * w, (p - side * w)[::-1]])


def _to_fixed(points: np.ndarray) -> np.ndarray:
    return np.round(points * (1 << SUBPIXEL_BITS)).astype(np.int32)


def coverage(outline: np.ndarray, height: int, width: int) -> np.ndarray:
    """Anti-aliased cover of an image-frame polygon (N, 2): float32 (height, width) in 0..1."""
    mask = np.zeros((height, width), np.uint8)
    cv2.fillPoly(mask, [_to_fixed(outline)], 255, cv2.LINE_AA, SUBPIXEL_BITS)
    return mask.astype(np.float32) / 255


def _profile(mask: np.ndarray, kind: str) -> np.ndarray:
    """Relative thickness (H, W) in 0..1 of a covered area, by distance to its rim in pixels."""
    if kind == "flat":
        return mask
    inside = (mask > 0.5).astype(np.uint8)
    depth = cv2.distanceTransform(inside, cv2.DIST_L2, 3)
    top = max(float(depth.max()), 1.0)
    if kind == "round":
        return mask * np.sqrt(np.clip(1 - (1 - depth / top) ** 2, 0.05, 1)).astype(np.float32)
    if kind == "bevel":
        return mask * np.clip(0.4 + 1.2 * depth / top, 0, 1).astype(np.float32)
    if kind == "shell":
        return mask * (0.35 + 0.65 * np.exp(-((depth - 1.5) ** 2) / 4)).astype(np.float32)
    raise ValueError(f"unknown profile {kind!r}")


def _window(points: np.ndarray, stack: Stack) -> tuple[int, int, int, int] | None:
    """Pixel window x0, y0, x1, y1 around image points, cut to the image; None if outside."""
    x0, y0 = np.floor(points.min(0)).astype(int) - 2
    x1, y1 = np.ceil(points.max(0)).astype(int) + 3
    x0, y0, x1, y1 = max(x0, 0), max(y0, 0), min(x1, stack.width), min(y1, stack.height)
    return (x0, y0, x1, y1) if x1 > x0 and y1 > y0 else None


def draw(stack: Stack, item: Item, at: Pose, parts: Sequence[str] = ()) -> np.ndarray | None:
    """Add an item to the scene; return its uint8 (H, W) part map, None without ``parts``.

    The part map holds 1 + the index into ``parts`` at the pixels of each part, else 0.
    """
    window = _window(at.apply(np.concatenate([s.outline for p in item.pieces for s in p])), stack)
    labels = np.zeros((stack.height, stack.width), np.uint8) if parts else None
    if window is None:
        return labels
    x0, y0, x1, y1 = window
    for piece in item.pieces:
        layers: dict[str, np.ndarray] = {}
        for shape in piece:
            mask = coverage(at.apply(shape.outline) - (x0, y0), y1 - y0, x1 - x0)
            held = sum(layers.values()) if shape.cut else mask
            if shape.cut:
                for layer in layers.values():
                    layer *= 1 - mask
            else:
                new = _profile(mask, shape.profile) * np.float32(shape.thickness)
                old = layers.get(shape.material)
                layers[shape.material] = new if old is None else np.maximum(old, new)
            if labels is not None and (shape.part or shape.cut):
                # An opening belongs to its part only where there was something to cut out.
                value = 1 + parts.index(shape.part) if shape.part else 0
                labels[y0:y1, x0:x1][(mask > 0.5) & (held > 0)] = value
        for material, layer in layers.items():
            stack.maps[material][y0:y1, x0:x1] += layer
    return labels


def wire(
    stack: Stack,
    points: np.ndarray,
    material: str,
    thickness: float,
    width: float,
    closed: bool = False,
) -> None:
    """Add a line of image points (N, 2): ``thickness`` cm, ``width`` px (below 1 px: fainter)."""
    window = _window(points, stack)
    if window is None:
        return
    x0, y0, x1, y1 = window
    mask = np.zeros((y1 - y0, x1 - x0), np.uint8)
    cv2.polylines(mask, [_to_fixed(points - (x0, y0))], closed, 255, max(1, round(width)), cv2.LINE_AA, SUBPIXEL_BITS)
    gain = thickness * min(width, 1.0) / 255
    stack.maps[material][y0:y1, x0:x1] += mask.astype(np.float32) * np.float32(gain)


def noise(rng: np.random.Generator, height: int, width: int, cells: float) -> np.ndarray:
    """Smooth noise, float32 (height, width), about -1..1, ``cells`` bumps along the long side."""
    scale = cells / max(height, width)
    grid = rng.uniform(-1, 1, (max(2, int(height * scale) + 1), max(2, int(width * scale) + 1)))
    return cv2.resize(grid.astype(np.float32), (width, height), interpolation=cv2.INTER_CUBIC)
