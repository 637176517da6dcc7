"""Packs a bag: shell, clothes, clutter and prohibited items, then X-rays it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import cv2
import numpy as np

from . import clutter, electronics
from .catalogue import STANDARD, Kind, has_tags
from .clutter import Clutter, blob, cloth, hardware, loops
from .geometry import (
    Item,
    Shape,
    Stack,
    coverage,
    draw,
    ellipse,
    noise,
    pose,
    resample,
    rounded,
    smooth,
    wire,
)
from .physics import random_look, render

EMPTY_SHARE = 0.09
TAG_SIZE = (52.0, 64.0)
"""Span of a tag in px."""
TAG_GAP = (6.0, 90.0)
"""How far in px a tag keeps from the box of its item, at least and at most."""
SMALL: tuple[Clutter, ...] = (
    clutter.soap,
    electronics.phone,
    electronics.cable,
    electronics.cable,
    electronics.charger,
    clutter.coins,
    clutter.keys,
    clutter.cutlery,
    clutter.spring,
    electronics.batteries,
    clutter.pens,
    clutter.glasses,
    electronics.watch,
    hardware,
    hardware,
    clutter.fruit,
    clutter.belt,
)
LARGE: tuple[Clutter, ...] = (
    clutter.bottle,
    clutter.bottle,
    clutter.can,
    clutter.book,
    electronics.laptop,
    clutter.umbrella,
    clutter.shoe,
    clutter.soap,
)
IDENTITY = pose((0.0, 0.0), 1.0)


@dataclass(frozen=True)
class Placed:
    """A prohibited item in the picture.

    ``box`` x0, y0, x1, y1 in pixels, the right and lower ends exclusive; ``parts`` uint8 (H, W):
    0 none, 1.. = index into the class's part names.
    """

    name: str
    box: tuple[int, int, int, int]
    parts: np.ndarray


@dataclass(frozen=True)
class Bag:
    """A finished picture, uint8 (H, W, 3) RGB, and what is in it.

    ``tag`` uint8 (H, W) is 1 on the tag, None where there is none. ``energies`` uint16 (2, H, W): what the scanner
    measured at low and high energy; ``stack`` is the truth behind it. Both None where the picture was changed since.
    """

    image: np.ndarray
    items: list[Placed]
    tag: np.ndarray | None = None
    energies: np.ndarray | None = None
    stack: Stack | None = None


def _frame(rng: np.random.Generator) -> tuple[int, int]:
    """Height and width in pixels: the long side 640."""
    short = int(rng.integers(50, 81)) * 8
    return (short, 640) if rng.uniform() < 0.8 else (640, short)


def _outline(rng: np.random.Generator, area: tuple[float, float, float, float], soft: bool) -> np.ndarray:
    """Closed outline (N, 2) px of a bag in an area x0, y0, x1, y1: box-like or sagging."""
    x0, y0, x1, y1 = area
    radius = rng.uniform(0.05, 0.2) * min(x1 - x0, y1 - y0)
    line = rounded(x0, y0, x1, y1, radius)
    if not soft:
        return resample(line, 120, closed=True)
    knots = resample(line, int(rng.integers(14, 26)), closed=True)
    knots = knots + rng.normal(0, 0.011 * (x1 - x0), knots.shape)
    return smooth(knots, 120, closed=True)


def _sheet(stack: Stack, outline: np.ndarray, material: str, thickness: float, profile: str = "flat") -> None:
    draw(stack, Item([[Shape(outline, material, thickness, profile)]]), IDENTITY)


def _zip(rng: np.random.Generator, stack: Stack, line: np.ndarray, cm: float) -> None:
    """A zipper along a line (N, 2) px: fine metal teeth and one or two pulls."""
    long = np.linalg.norm(np.diff(line, axis=0), axis=1).sum()
    teeth = resample(line, int(long / 2.5) + 3)
    metal = "metal" if rng.uniform() < 0.4 else "mixed"
    for k in range(0, len(teeth) - 1, 2):
        wire(stack, teeth[k : k + 2], metal, 0.06 if metal == "metal" else 0.3, 1.6)
    for _ in range(int(rng.integers(1, 3))):
        x, y = teeth[int(rng.integers(len(teeth)))]
        pull = rounded(-0.5, -0.18, 0.5, 0.18, 0.1)
        draw(
            stack,
            Item([[Shape(pull, "metal", 0.3), Shape(rounded(-0.3, -0.08, 0.1, 0.08, 0.05), cut=True)]]),
            pose((x, y), rng.uniform(1.6, 3) * cm, rng.uniform(0, 6.3)),
        )


def _wrinkles(rng: np.random.Generator, stack: Stack, outline: np.ndarray) -> None:
    """Faint texture of the cloth of a bag over its whole area: lining, folds, seams."""
    h, w = stack.height, stack.width
    ridges = sum(
        np.clip(1 - np.abs(noise(rng, h, w, cells)) * 5, 0, 1) ** 2
        for cells in (rng.uniform(3, 6), rng.uniform(7, 12), rng.uniform(14, 24))
    )
    field = 0.25 + 0.35 * noise(rng, h, w, 3) + 0.5 * ridges + 0.1 * noise(rng, h, w, w / 3)
    inside = Stack(h, w)
    _sheet(inside, outline, "organic", 1.0)
    stack.maps["organic"] += inside.maps["organic"] * np.clip(field, 0, None) * np.float32(rng.uniform(0.08, 0.45))
    middle = outline.mean(0)
    for _ in range(int(rng.integers(3, 10))):
        line = middle + (outline - middle) * rng.uniform(0.6, 1.03, 2) + rng.normal(0, 6, 2)
        start = int(rng.integers(0, 90))
        wire(
            stack,
            line[start : start + int(rng.integers(15, 100))],
            "organic",
            rng.uniform(0.15, 0.6),
            rng.uniform(0.6, 1.6),
        )


def _suitcase(
    rng: np.random.Generator, stack: Stack, outline: np.ndarray, area: tuple[float, float, float, float], cm: float
) -> None:
    """Frame wires, telescopic rods, wheels and corner fittings of a suitcase."""
    x0, y0, x1, y1 = area
    middle = np.array([(x0 + x1) / 2, (y0 + y1) / 2])
    for _ in range(int(rng.integers(1, 4))):
        line = middle + (outline - middle) * rng.uniform(0.9, 1.01) + rng.normal(0, 4, 2)
        metal = rng.uniform() < 0.55
        wire(
            stack,
            line,
            "metal" if metal else "mixed",
            rng.uniform(0.06, 0.2) if metal else rng.uniform(0.4, 1.0),
            rng.uniform(1, 2.6),
            True,
        )
    if rng.uniform() < 0.7:
        _rods(rng, stack, area, cm)
    for x, y in ((x0, y0), (x0, y1)) if rng.uniform() < 0.6 else ():
        r = rng.uniform(1.6, 2.6)
        rim = ellipse(0, 0, 1, rng.uniform(0.6, 1))
        at = pose((x + rng.uniform(-1, 2) * cm, y + rng.normal(0, 1) * cm), r * cm)
        draw(
            stack,
            Item(
                [
                    [Shape(rim, "organic", 2.2)],
                    [Shape(rim * 0.55, "organic", 1.2)],
                    [Shape(ellipse(0, 0, 0.2), "metal", 0.8)],
                    [Shape(rounded(-0.2, -0.1, 1.4, 0.1, 0.08), "metal", 0.2)],
                ]
            ),
            at,
        )


def _rods(rng: np.random.Generator, stack: Stack, area: tuple[float, float, float, float], cm: float) -> None:
    """Two telescopic tubes of aluminium along the bag, with stiffening channels."""
    x0, y0, x1, y1 = area
    gap, mid = rng.uniform(0.14, 0.26) * (y1 - y0), (y0 + y1) / 2 + rng.normal(0, 10)
    wide, tilt = rng.uniform(0.7, 1.6) * cm, rng.normal(0, 0.02)
    wall = rng.uniform(0.25, 0.6)
    for y in (mid - gap, mid + gap):
        for share, t in ((1.0, wall), (rng.uniform(0.4, 0.7), wall * 0.7)):
            ends = (x0 + 4, x0 + 4 + (x1 - x0 - 8) * share)
            rod = np.array([(ends[0], y - wide), (ends[1], y - wide), (ends[1], y + wide), (ends[0], y + wide)])
            rod[:, 1] += (rod[:, 0] - x0) * tilt
            _sheet(stack, rod, "mixed", t)
            _sheet(stack, rod, "mixed", t, "shell")
    if rng.uniform() < 0.6:
        end = rounded(x1 - 2.2 * cm, mid - gap - wide, x1 - 0.4 * cm, mid + gap + wide, 5)
        _sheet(stack, end, "organic", 1.6, "round")


def _backpack(
    rng: np.random.Generator, stack: Stack, outline: np.ndarray, area: tuple[float, float, float, float], cm: float
) -> None:
    """Pockets, straps, buckles and a handle loop of a soft bag."""
    x0, y0, x1, y1 = area
    if rng.uniform() < 0.7:
        px = x0 + (x1 - x0) * rng.uniform(0.1, 0.4)
        pocket = _outline(
            rng, (px, y0 + (y1 - y0) * rng.uniform(0.1, 0.5), px + (x1 - px) * rng.uniform(0.5, 0.9), y1 - 2 * cm), True
        )
        _sheet(stack, pocket, "organic", rng.uniform(0.2, 0.5))
        _sheet(stack, pocket, "organic", 0.5, "shell")
        _zip(rng, stack, pocket[: int(rng.integers(30, 70))], cm)
    for _ in range(int(rng.integers(1, 4))):
        start, stop = (np.array([rng.uniform(x0, x1), rng.uniform(y0, y1)]) for _ in "ab")
        bend = (start + stop) / 2 + rng.normal(0, 3 * cm, 2)
        strap = smooth([start, bend, stop], 30)
        wire(stack, strap, "organic", rng.uniform(0.3, 0.8), rng.uniform(1, 2.5) * cm)
        wire(stack, strap, "organic", 0.3, 1.0)
    loop = loops(rng, ((x0 + x1) / 2, y0), 3 * cm, 1.0)
    wire(stack, loop, "organic", 0.6, 0.8 * cm)


def _shell(rng: np.random.Generator, stack: Stack, cm: float) -> tuple[tuple[float, float, float, float], np.ndarray]:
    """Draw the bag itself; return its inside x0, y0, x1, y1 and its outline (N, 2) in pixels."""
    h, w = stack.height, stack.width
    mx, my = rng.uniform(0.02, 0.09) * w, rng.uniform(0.03, 0.1) * h
    area = (mx, my, w - mx * rng.uniform(0.6, 1.4), h - my * rng.uniform(0.6, 1.4))
    suitcase = rng.uniform() < 0.5
    outline = _outline(rng, area, not suitcase or rng.uniform() < 0.4)
    middle = outline.mean(0)
    for _ in range(int(rng.integers(2, 4))):
        skin = middle + (outline - middle) * rng.uniform(0.93, 1.02, 2) + rng.normal(0, 3, 2)
        _sheet(stack, skin, "organic", rng.uniform(0.04, 0.2))
        wire(stack, skin, "organic", rng.uniform(0.4, 1.4), rng.uniform(1, 4), True)
    if rng.uniform() < 0.4:  # a hard or coated shell looks slightly green
        _sheet(stack, outline, "mixed", rng.uniform(0.03, 0.12))
    _wrinkles(rng, stack, outline)
    _zip(rng, stack, outline[: int(len(outline) * rng.uniform(0.4, 1.0))], cm)
    (_suitcase if suitcase else _backpack)(rng, stack, outline, area, cm)
    for _ in range(int(rng.integers(0, 4))):
        x, y = outline[int(rng.integers(len(outline)))]
        hardware(rng, stack, (x, y), cm)
    return area, outline


def _spot(rng: np.random.Generator, area: tuple[float, float, float, float], margin: float) -> tuple[float, float]:
    """A random centre in an area x0, y0, x1, y1, kept ``margin`` px off its rim if it is wide."""
    x0, y0, x1, y1 = area
    mx, my = min(margin, (x1 - x0) * 0.4), min(margin, (y1 - y0) * 0.4)
    return float(rng.uniform(x0 + mx, x1 - mx)), float(rng.uniform(y0 + my, y1 - my))


def _clothes(
    rng: np.random.Generator,
    stack: Stack,
    outline: np.ndarray,
    area: tuple[float, float, float, float],
    cm: float,
    count: int,
) -> None:
    """Garments, held in by the shell: whatever would hang over its outline is left out."""
    heap = Stack(stack.height, stack.width)
    for _ in range(count):
        cloth(rng, heap, _spot(rng, area, 0), cm)
    inside = coverage(outline, stack.height, stack.width)
    inside = inside * cv2.GaussianBlur(inside, (0, 0), 3)
    for material, layer in heap.maps.items():
        stack.maps[material] += layer * inside


def _fill(
    rng: np.random.Generator, stack: Stack, outline: np.ndarray, area: tuple[float, float, float, float], cm: float
) -> None:
    """Clothes, lumps and clutter; a fuller bag has more of each."""
    full = rng.uniform(0.1, 1.0)
    _clothes(rng, stack, outline, area, cm, int(rng.integers(3, 6 + int(7 * full))))
    if rng.uniform() < 0.3:
        x, y = _spot(rng, area, 10)
        lump = blob(rng, (x, y), *rng.uniform(4, 10, 2) * cm)
        _sheet(stack, lump, "organic", rng.uniform(2, 6), "round")
    for _ in range(int(rng.integers(0, 3 + int(4 * full)))):
        LARGE[int(rng.integers(len(LARGE)))](rng, stack, _spot(rng, area, 70), cm)
    for _ in range(int(rng.integers(2, 6 + int(14 * full)))):
        SMALL[int(rng.integers(len(SMALL)))](rng, stack, _spot(rng, area, 40), cm)


def _extent(parts: np.ndarray) -> tuple[int, int, int, int]:
    """Bounding box x0, y0, x1, y1 (exclusive ends, px) of the non-zero pixels of (H, W)."""
    xs, ys = np.flatnonzero(parts.any(0)), np.flatnonzero(parts.any(1))
    return int(xs[0]), int(ys[0]), int(xs[-1]) + 1, int(ys[-1]) + 1


def _pack_item(
    rng: np.random.Generator,
    stack: Stack,
    area: tuple[float, float, float, float],
    name: str,
    kind: Kind,
    taken: list[tuple[float, float, float]],
) -> Placed | None:
    """Place one item, mostly clear of earlier ones; None if it would lie outside the picture."""
    size = rng.uniform(0.17, 0.45) * max(stack.height, stack.width)
    for attempt in range(12):
        centre = _spot(rng, area, size * 0.36)
        near = (np.hypot(centre[0] - x, centre[1] - y) < 0.42 * (size + s) for x, y, s in taken)
        if not any(near):
            break
        size *= 0.93 if attempt > 4 else 1.0
    taken.append((*centre, size))
    squeeze = (float(rng.uniform(0.82, 1)), float(rng.uniform(0.82, 1)))
    at = pose(centre, size, float(rng.uniform(0, 2 * np.pi)), squeeze, rng.uniform() < 0.5)
    parts = draw(stack, kind.build(rng), at, kind.parts)
    return Placed(name, _extent(parts), parts) if parts is not None and parts.any() else None


def _tag_spot(
    rng: np.random.Generator, area: tuple[float, float, float, float], box: tuple[int, int, int, int], radius: float
) -> tuple[float, float]:
    """A centre in px for a tag near a box but clear of it; the area's farthest corner if none is."""
    x0, y0, x1, y1 = area
    spots = rng.uniform((x0 + radius, y0 + radius), (x1 - radius, y1 - radius), (256, 2))
    corners = np.array([(x, y) for x in (x0 + radius, x1 - radius) for y in (y0 + radius, y1 - radius)])
    spots = np.concatenate([spots, corners])
    gap = np.maximum(np.maximum(box[:2] - spots, spots - box[2:]), 0).max(1) - radius
    near = np.flatnonzero((gap > TAG_GAP[0]) & (gap < TAG_GAP[1]))
    x, y = spots[near[0] if len(near) else int(np.argmax(gap))]
    return float(x), float(y)


def _pack_tag(
    rng: np.random.Generator,
    stack: Stack,
    area: tuple[float, float, float, float],
    box: tuple[int, int, int, int],
    present: bool,
) -> np.ndarray | None:
    """Lay a lead star beside an item's box; drawn or not, it takes the same random numbers."""
    size = rng.uniform(*TAG_SIZE)
    at = pose(_tag_spot(rng, area, box, size / 2), size, float(rng.uniform(0, 2 * np.pi)))
    points = ellipse(0, 0, 0.5, n=10) * np.where(np.arange(10) % 2, 0.45, 1.0)[:, None]
    return draw(stack, Item([[Shape(points, "metal", 3.0, part="tag")]]), at, ("tag",)) if present else None


def _count(rng: np.random.Generator) -> int:
    """How many items a bag of the standard study holds."""
    if rng.uniform() < EMPTY_SHARE:
        return 0
    return int(rng.choice([1, 2, 3, 4], p=[0.38, 0.34, 0.19, 0.09]))


def make_bag(rng: np.random.Generator, kinds: Mapping[str, Kind] = STANDARD, tag: bool | None = None) -> Bag:
    """Pack and X-ray one bag with 0 to 4 items of the given kinds.

    Kinds with a ``tag_share`` make another study: one item a bag, and a tag elsewhere in the bag in
    that share of them. ``tag`` overrules the share; it changes nothing else in the picture.
    """
    height, width = _frame(rng)
    stack = Stack(height, width)
    cm = rng.uniform(8.5, 12.5)
    area, outline = _shell(rng, stack, cm)
    _fill(rng, stack, outline, area, cm)
    names, taken = list(kinds), []
    count = 1 if has_tags(kinds) else _count(rng) if kinds else 0
    chosen = [names[int(rng.integers(len(names)))] for _ in range(count)]
    placed = [_pack_item(rng, stack, area, name, kinds[name], taken) for name in chosen]
    items = [p for p in placed if p is not None]
    mask = None
    if has_tags(kinds) and items:
        drawn = rng.uniform() < (kinds[items[0].name].tag_share or 0.0)
        mask = _pack_tag(rng, stack, area, items[0].box, drawn if tag is None else tag)
    image, energies = render(rng, stack, random_look(rng))
    return Bag(image, items, mask, energies, stack)
