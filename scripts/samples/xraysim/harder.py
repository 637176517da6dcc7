"""Makes a bag harder to read than those a detector was trained on: the domain gap of a real scanner hall.

Each kind of hardness is drawn by itself, so that a picture has none, some or all of them: another bag lies on top
(X-rays multiply), the belt turned the bag, the item is cut by the picture's border, the scanner has other colours,
more noise, less sharpness, and stores a coarser JPEG.
"""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np

from .bags import Bag, Placed, make_bag

#: How often each kind of hardness is drawn.
CLUTTER, TILT, CUT, COLOURS, NOISE, BLUR, JPEG = 0.5, 0.5, 0.35, 0.5, 0.6, 0.4, 0.5
#: A cut item keeps at least this share of its area.
KEPT_SHARE = 0.35

Picture = np.ndarray
Warp = Callable[[np.ndarray, int], np.ndarray]


def harder(rng: np.random.Generator, bag: Bag) -> Bag:
    """``bag`` made harder: image uint8 (H, W, 3) RGB, boxes and part masks follow, items cut away are left out."""
    image, items = bag.image, list(bag.items)
    if rng.uniform() < CLUTTER:
        image = _covered(rng, image)
    if rng.uniform() < TILT:
        image, items = _warped(image, items, _turn(rng, image))
    if items and rng.uniform() < CUT:
        image, items = _cut(rng, image, items)
    if rng.uniform() < COLOURS:
        image = _coloured(rng, image)
    if rng.uniform() < BLUR:
        image = cv2.GaussianBlur(image, (0, 0), rng.uniform(0.6, 1.8))
    if rng.uniform() < NOISE:
        grain = rng.standard_normal(image.shape[:2], dtype=np.float32)[..., None] * rng.uniform(3, 14)
        image = np.clip(np.rint(image + grain), 0, 255).astype(np.uint8)
    if rng.uniform() < JPEG:
        quality = [cv2.IMWRITE_JPEG_QUALITY, int(rng.integers(25, 75))]
        image = cv2.imdecode(cv2.imencode(".jpg", image, quality)[1], cv2.IMREAD_COLOR)
    return Bag(image, items, None)


def _covered(rng: np.random.Generator, image: Picture) -> Picture:
    """``image`` with a bag without items lying on part of it: transmissions multiply."""
    height, width = image.shape[:2]
    other = cv2.resize(make_bag(rng, {}).image, (width, height), interpolation=cv2.INTER_AREA)
    shift = np.float32([[1, 0, rng.uniform(-0.5, 0.5) * width], [0, 1, rng.uniform(-0.5, 0.5) * height]])
    white = (255.0, 255.0, 255.0)
    other = cv2.warpAffine(other, shift, (width, height), borderValue=white)
    strength = rng.uniform(0.4, 1.0)
    return np.rint(image * (other / 255.0) ** strength).astype(np.uint8)


def _turn(rng: np.random.Generator, image: Picture) -> Warp:
    height, width = image.shape[:2]
    turn = cv2.getRotationMatrix2D((width / 2, height / 2), rng.uniform(-25, 25), rng.uniform(0.75, 1.0))
    ground = tuple(float(v) for v in image[:4].reshape(-1, 3).mean(0))

    def warp(values: np.ndarray, how: int) -> np.ndarray:
        fill = ground if values.ndim == 3 else 0
        return cv2.warpAffine(values, turn, (width, height), flags=how, borderValue=fill)

    return warp


def _warped(image: Picture, items: list[Placed], warp: Warp) -> tuple[Picture, list[Placed]]:
    moved = [_placed(item.name, warp(item.parts, cv2.INTER_NEAREST)) for item in items]
    return warp(image, cv2.INTER_LINEAR), [item for item in moved if item is not None]


def _placed(name: str, parts: np.ndarray) -> Placed | None:
    xs, ys = np.flatnonzero(parts.any(0)), np.flatnonzero(parts.any(1))
    if not len(xs):
        return None
    return Placed(name, (int(xs[0]), int(ys[0]), int(xs[-1]) + 1, int(ys[-1]) + 1), parts)


def _cut(rng: np.random.Generator, image: Picture, items: list[Placed]) -> tuple[Picture, list[Placed]]:
    """The picture ends within one of the items; those that keep too little are left out."""
    x0, y0, x1, y1 = items[int(rng.integers(len(items)))].box
    height, width = image.shape[:2]
    keep = rng.uniform(0.5, 0.85)
    left, top, right, bottom = 0, 0, width, height
    side = int(rng.integers(4))
    if side == 0:
        left = round(x1 - keep * (x1 - x0))
    elif side == 1:
        top = round(y1 - keep * (y1 - y0))
    elif side == 2:
        right = round(x0 + keep * (x1 - x0))
    else:
        bottom = round(y0 + keep * (y1 - y0))
    if right - left < width // 3 or bottom - top < height // 3:
        return image, items
    kept = []
    for item in items:
        inside = _placed(item.name, item.parts[top:bottom, left:right])
        if inside is not None and np.count_nonzero(inside.parts) >= KEPT_SHARE * np.count_nonzero(item.parts):
            kept.append(inside)
    return np.ascontiguousarray(image[top:bottom, left:right]), kept


def _coloured(rng: np.random.Generator, image: Picture) -> Picture:
    """Another scanner's colours: hue turned, saturation and tone curve changed; the ground stays about as light."""
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV).astype(np.float32)
    hsv[..., 0] = (hsv[..., 0] + rng.uniform(-14, 14)) % 180
    hsv[..., 1] = np.clip(hsv[..., 1] * rng.uniform(0.35, 1.4), 0, 255)
    hsv[..., 2] = 255 * (hsv[..., 2] / 255) ** rng.uniform(0.65, 1.6)
    return cv2.cvtColor(np.rint(hsv).astype(np.uint8), cv2.COLOR_HSV2RGB)
