"""The innocent contents of a bag: clothes, food, toiletries, small metal things.

Every function adds one object to a scene: ``(rng, stack, centre, cm)`` with the centre in image
pixels and ``cm`` the pixels per centimetre of this bag. Thickness is in centimetres.
"""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np

from .geometry import (
    Item,
    Pose,
    Shape,
    Stack,
    box,
    coverage,
    draw,
    ellipse,
    noise,
    pose,
    ribbon,
    rounded,
    smooth,
    wire,
)

Centre = tuple[float, float]
Clutter = Callable[[np.random.Generator, Stack, Centre, float], None]


def anywhere(rng: np.random.Generator, centre: Centre, size: float) -> Pose:
    """A random turn and tilt at a centre, long side ``size`` px."""
    squeeze = (1.0, float(rng.uniform(0.7, 1.0)))
    return pose(centre, size, float(rng.uniform(0, 2 * np.pi)), squeeze)


def put(rng: np.random.Generator, stack: Stack, centre: Centre, size: float, *pieces: list[Shape]) -> Pose:
    """Draw pieces at a centre, randomly turned, long side ``size`` px; return their pose."""
    at = anywhere(rng, centre, size)
    draw(stack, Item(list(pieces)), at)
    return at


def blob(rng: np.random.Generator, centre: Centre, rx: float, ry: float, rough: float = 0.2) -> np.ndarray:
    """Closed irregular outline (64, 2) in image pixels around a centre, radii in px."""
    n = int(rng.integers(7, 12))
    t = np.arange(n) * (2 * np.pi / n) + rng.uniform(0, 6)
    r = 1 + rough * rng.uniform(-1, 1, n)
    points = np.stack([np.cos(t) * rx * r, np.sin(t) * ry * r], 1) + centre
    return smooth(points, 64, closed=True)


def cloth(rng: np.random.Generator, stack: Stack, centre: Centre, cm: float) -> None:
    """A folded garment: a soft-edged organic heap with folds, weave and seam lines."""
    rx, ry = rng.uniform(5, 15, 2) * cm
    outline = blob(rng, centre, rx, ry, 0.25)
    h, w = stack.height, stack.width
    x0, y0 = np.clip(np.floor(outline.min(0)).astype(int), 0, (w, h))
    x1, y1 = np.clip(np.ceil(outline.max(0)).astype(int) + 1, 0, (w, h))
    if x1 - x0 < 8 or y1 - y0 < 8:
        return
    shape = (y1 - y0, x1 - x0)
    mask = coverage(outline - (x0, y0), *shape)
    mask = mask * cv2.GaussianBlur(mask, (0, 0), rng.uniform(1, 9))
    folds = sum(
        np.clip(1 - np.abs(noise(rng, *shape, cells)) * 3.5, 0, 1) ** 2
        for cells in (rng.uniform(3, 6), rng.uniform(7, 14))
    )
    weave = noise(rng, *shape, max(shape) / 2.5)
    heap = 0.7 + 0.4 * noise(rng, *shape, 4) + 0.22 * folds + 0.07 * weave
    stuff = "mixed" if rng.uniform() < 0.1 else "organic"
    thick = rng.uniform(0.3, 2.0) * (0.3 if stuff == "mixed" else 1)
    stack.maps[stuff][y0:y1, x0:x1] += mask * np.clip(heap, 0.15, None) * np.float32(thick)
    for _ in range(int(rng.integers(2, 6))):
        keep = outline + (np.array(centre) - outline) * rng.uniform(0.0, 0.6)
        start = int(rng.integers(0, 50))
        wire(
            stack,
            keep[start : start + int(rng.integers(8, 50))],
            "organic",
            rng.uniform(0.2, 0.6),
            rng.uniform(0.6, 1.5),
        )


def bottle(rng: np.random.Generator, stack: Stack, centre: Centre, cm: float) -> None:
    """A bottle of liquid: a solid of revolution, thickest along its axis."""
    long, r = rng.uniform(12, 24), rng.uniform(2.2, 4.2)
    w = r / long
    profile = [(-0.5, w * 0.95), (-0.45, w), (0.0, w), (0.2, w), (0.32, w * 0.6), (0.38, w * 0.38), (0.5, w * 0.36)]
    body = np.array(profile + [(x, -y) for x, y in profile[::-1]])
    glass = rng.uniform() < 0.2
    pieces = [[Shape(body, "organic", r * rng.uniform(1.2, 2.0), "round")]]
    pieces.append([Shape(body, "mixed" if glass else "organic", 1.0 if glass else 0.6, "shell")])
    if rng.uniform() < 0.4:
        pieces.append([Shape(box(0.42, -w * 0.4, 0.5, w * 0.4), "mixed", 0.6)])
    put(rng, stack, centre, long * cm, *pieces)


def can(rng: np.random.Generator, stack: Stack, centre: Centre, cm: float) -> None:
    """A drink or spray can: aluminium wall, liquid inside, rims at its ends."""
    long, r = rng.uniform(9, 16), rng.uniform(2.0, 3.3)
    w = r / long
    body = rounded(-0.5, -w, 0.5, w, w * 0.3)
    put(
        rng,
        stack,
        centre,
        long * cm,
        [Shape(body, "organic", r * 1.6, "round")],
        [Shape(body, "mixed", 0.9, "shell")],
        [
            Shape(box(-0.5, -w * 0.9, -0.47, w * 0.9), "mixed", 1.0),
            Shape(box(0.47, -w * 0.9, 0.5, w * 0.9), "mixed", 1.0),
        ],
    )


def fruit(rng: np.random.Generator, stack: Stack, centre: Centre, cm: float) -> None:
    """One to four round foods."""
    for _ in range(int(rng.integers(1, 5))):
        r = rng.uniform(2.5, 4.0)
        spot = np.array(centre) + rng.uniform(-8, 8, 2) * cm
        put(
            rng,
            stack,
            (spot[0], spot[1]),
            r * cm,
            [Shape(ellipse(0, 0, 1, rng.uniform(0.8, 1)), "organic", r * 1.6, "round")],
        )


def book(rng: np.random.Generator, stack: Stack, centre: Centre, cm: float) -> None:
    """A book or a stack of paper: an even plate with a denser spine."""
    long, ratio = rng.uniform(15, 26), rng.uniform(0.6, 0.78)
    thick, h = rng.uniform(1.0, 3.2), ratio / 2
    put(
        rng,
        stack,
        centre,
        long * cm,
        [Shape(box(-0.5, -h, 0.5, h), "organic", thick)],
        [Shape(box(-0.5, -h, 0.5, -h + 0.02), "organic", 1.0)],
        [Shape(rounded(-0.51, -h - 0.01, 0.51, h + 0.015, 0.01), "organic", 0.25)],
    )


def soap(rng: np.random.Generator, stack: Stack, centre: Centre, cm: float) -> None:
    """A box, a bar or a jar: a thick organic lump with round corners."""
    long, ratio = rng.uniform(5, 12), rng.uniform(0.5, 0.9)
    h = ratio / 2
    outline = rounded(-0.5, -h, 0.5, h, rng.uniform(0.02, 0.2))
    put(
        rng,
        stack,
        centre,
        long * cm,
        [Shape(outline, "organic", rng.uniform(1.5, 5), rng.choice(["flat", "round"]))],
        [Shape(outline, "organic", 0.8, "shell")],
    )


def coins(rng: np.random.Generator, stack: Stack, centre: Centre, cm: float) -> None:
    """A handful of coins, washers or buttons."""
    for _ in range(int(rng.integers(2, 9))):
        x, y = np.array(centre) + rng.normal(0, 2.2, 2) * cm
        put(rng, stack, (x, y), rng.uniform(0.9, 1.5) * cm, [Shape(ellipse(0, 0, 1), "metal", rng.uniform(0.15, 0.3))])


def keys(rng: np.random.Generator, stack: Stack, centre: Centre, cm: float) -> None:
    """A key ring with small keys."""
    ring = ellipse(centre[0], centre[1], 1.4 * cm)
    wire(stack, ring, "metal", 0.25, 0.2 * cm, closed=True)
    for _ in range(int(rng.integers(2, 6))):
        angle = rng.uniform(0, 2 * np.pi)
        long = rng.uniform(4.5, 6.5)
        way = np.array([np.cos(angle), np.sin(angle)])
        at = pose(tuple(np.array(centre) + way * (1.2 + long * 0.4) * cm), long * cm, angle)
        teeth = [(x, 0.05 + rng.uniform(0, 0.035)) for x in np.linspace(0.0, 0.48, 9)]
        blade = np.array([(-0.2, -0.05), (0.5, -0.05), *teeth[::-1], (-0.2, 0.06)])
        draw(
            stack,
            Item(
                [
                    [
                        Shape(ellipse(-0.32, 0, 0.18, 0.2), "metal", 0.22),
                        Shape(blade, "metal", 0.22),
                        Shape(ellipse(-0.42, 0, 0.05), cut=True),
                    ]
                ]
            ),
            at,
        )


def cutlery(rng: np.random.Generator, stack: Stack, centre: Centre, cm: float) -> None:
    """A fork or a spoon."""
    thick = rng.uniform(0.14, 0.26)
    handle = Shape(ribbon(smooth([(-0.25, 0), (0.1, 0.01), (0.5, 0)], 12), (0.035, 0.04, 0.1)), "metal", thick)
    if rng.uniform() < 0.5:
        head = [
            Shape(ellipse(-0.37, 0, 0.14, 0.1), "metal", thick, "shell"),
            Shape(ellipse(-0.37, 0, 0.12, 0.08), "metal", thick * 0.6),
        ]
    else:
        head = [Shape(rounded(-0.36, -0.07, -0.22, 0.07, 0.04), "metal", thick)]
        head += [Shape(box(-0.5, v - 0.011, -0.33, v + 0.011), "metal", thick) for v in (-0.058, -0.02, 0.02, 0.058)]
    put(rng, stack, centre, rng.uniform(14, 19) * cm, [handle, *head])


def spring(rng: np.random.Generator, stack: Stack, centre: Centre, cm: float) -> None:
    """A coil spring or a spiral binding."""
    turns, long = int(rng.integers(8, 22)), rng.uniform(5, 20)
    t = np.linspace(0, 1, turns * 8)
    helix = np.stack([t - 0.5, 0.07 * np.sin(2 * np.pi * turns * t) * rng.uniform(0.7, 1.6)], 1)
    at = anywhere(rng, centre, long * cm)
    wire(stack, at.apply(helix), "metal", rng.uniform(0.08, 0.22), rng.uniform(1, 2))


def umbrella(rng: np.random.Generator, stack: Stack, centre: Centre, cm: float) -> None:
    """A folded umbrella: cloth around a steel shaft and thin ribs, a plastic handle."""
    fold = smooth(
        [(-0.42, 0), (-0.2, 0.08), (0.2, 0.1), (0.35, 0.05), (0.35, -0.05), (0.2, -0.1), (-0.2, -0.08)], 40, closed=True
    )
    pieces = [
        [Shape(fold, "organic", rng.uniform(1, 2.5), "round")],
        [Shape(box(-0.5, -0.012, 0.4, 0.012), "metal", 0.12, "flat")],
        [Shape(rounded(0.34, -0.04, 0.5, 0.04, 0.02), "organic", 2.0, "round")],
    ]
    for k in range(6):
        y = (k - 2.5) * 0.03
        pieces.append([Shape(ribbon(smooth([(-0.4, y * 0.3), (0.0, y), (0.33, y * 1.2)], 8), 0.008), "metal", 0.14)])
    put(rng, stack, centre, rng.uniform(22, 34) * cm, *pieces)


def loops(rng: np.random.Generator, centre: Centre, radius: float, turns: float) -> np.ndarray:
    """A loosely wound line (N, 2) in image pixels."""
    n = max(6, int(turns * 7))
    t = np.linspace(0, 2 * np.pi * turns, n)
    r = radius * (0.75 + 0.25 * rng.uniform(-1, 1, n))
    drift = np.cumsum(rng.normal(0, 0.06 * radius, (n, 2)), 0)
    flat = rng.uniform(0.4, 1)
    points = np.stack([np.cos(t + rng.uniform(0, 6)) * r, np.sin(t) * r * flat], 1)
    return smooth(points + drift + centre, n * 8)


def belt(rng: np.random.Generator, stack: Stack, centre: Centre, cm: float) -> None:
    """A rolled or loose belt with a metal buckle."""
    line = loops(rng, centre, rng.uniform(4, 9) * cm, rng.uniform(0.6, 2))
    wire(stack, line, "organic", rng.uniform(0.5, 1.5), rng.uniform(0.25, 0.5) * cm + 2)
    x, y = line[0]
    outer, inner = rounded(-0.5, -0.4, 0.5, 0.4, 0.12), rounded(-0.36, -0.27, 0.36, 0.27, 0.08)
    put(
        rng,
        stack,
        (x, y),
        rng.uniform(4, 6) * cm,
        [Shape(outer, "metal", 0.35), Shape(inner, cut=True), Shape(box(-0.02, -0.35, 0.05, 0.35), "metal", 0.25)],
    )


def pens(rng: np.random.Generator, stack: Stack, centre: Centre, cm: float) -> None:
    """A few pens or cosmetic sticks."""
    for _ in range(int(rng.integers(1, 5))):
        x, y = np.array(centre) + rng.normal(0, 2, 2) * cm
        put(
            rng,
            stack,
            (x, y),
            rng.uniform(11, 15) * cm,
            [Shape(rounded(-0.5, -0.035, 0.5, 0.035, 0.03), "organic", 1.2, "round")],
            [Shape(box(0.42, -0.03, 0.5, 0.03), "metal", 0.12), Shape(box(-0.45, -0.05, -0.2, -0.035), "metal", 0.12)],
        )


def glasses(rng: np.random.Generator, stack: Stack, centre: Centre, cm: float) -> None:
    """A pair of glasses: thin frames and temples."""
    at = anywhere(rng, centre, 13 * cm)
    for side in (-1, 1):
        lens = ellipse(0.25 * side, 0, 0.2, 0.15)
        draw(stack, Item([[Shape(lens, "organic", 0.4)]]), at)
        wire(stack, at.apply(lens), "metal", 0.14, 1.2, closed=True)
        wire(stack, at.apply([(0.45 * side, 0), (0.4 * side, 0.2), (-0.3 * side, 0.24)]), "metal", 0.14, 1.4)
    wire(stack, at.apply([(-0.05, 0), (0.05, 0)]), "metal", 0.14, 1.4)


def shoe(rng: np.random.Generator, stack: Stack, centre: Centre, cm: float) -> None:
    """A shoe seen from above: sole, thicker heel, a steel shank now and then."""
    sole = smooth(
        [
            (-0.5, 0),
            (-0.4, 0.15),
            (-0.15, 0.17),
            (0.15, 0.1),
            (0.4, 0.13),
            (0.5, 0),
            (0.4, -0.12),
            (0.15, -0.13),
            (-0.2, -0.18),
            (-0.42, -0.13),
        ],
        50,
        closed=True,
    )
    pieces = [
        [Shape(sole, "organic", rng.uniform(1, 2.2))],
        [Shape(sole, "organic", 1.4, "shell")],
        [Shape(ellipse(0.36, 0, 0.13, 0.11), "organic", rng.uniform(1, 2))],
    ]
    pieces.append([Shape(ellipse(x, y, 0.012), "metal", 0.3) for x in (-0.2, -0.12, -0.04) for y in (-0.06, 0.06)])
    if rng.uniform() < 0.4:
        pieces.append([Shape(box(-0.05, -0.02, 0.3, 0.02), "metal", 0.12)])
    put(rng, stack, centre, rng.uniform(24, 29) * cm, *pieces)


def hardware(rng: np.random.Generator, stack: Stack, centre: Centre, cm: float) -> None:
    """Small fittings: D-rings, snap hooks, screws and clips."""
    for _ in range(int(rng.integers(1, 4))):
        x, y = np.array(centre) + rng.normal(0, 1.5, 2) * cm
        if rng.uniform() < 0.5:
            ring = ellipse(0, 0, 0.5, rng.uniform(0.3, 0.5))
            at = anywhere(rng, (x, y), rng.uniform(2, 4) * cm)
            wire(stack, at.apply(ring), "metal", 0.3, rng.uniform(1.5, 3), closed=True)
        else:
            put(
                rng,
                stack,
                (x, y),
                rng.uniform(1.5, 3.5) * cm,
                [Shape(rounded(-0.5, -0.1, 0.5, 0.1, 0.05), "metal", 0.35, "round")],
                [Shape(rounded(-0.5, -0.25, -0.2, 0.25, 0.05), "metal", 0.25)],
            )
