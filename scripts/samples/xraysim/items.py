"""The five prohibited classes as parametric shapes with named telling parts.

Each builder draws an ``Item`` in the local frame (long side about 1). Openings (the hole of a
trigger guard, of a finger ring, of a wrench's jaw) count as part of the part around them.
"""

from __future__ import annotations

import numpy as np

from .geometry import Item, Shape, box, ellipse, ribbon, rounded, smooth, turn


def _pistol(rng: np.random.Generator) -> Item:
    u = rng.uniform
    tall, top = u(0.13, 0.18), -0.26
    mid = top + tall
    back, front = u(0.40, 0.46), -0.5
    steel = u(0.55, 1.1)
    polymer = rng.uniform() < 0.45
    frame = ("organic", u(1.6, 2.6)) if polymer else ("metal", steel * u(0.5, 0.8))
    lean = u(0.08, 0.2)
    wide, down = u(0.2, 0.27), u(0.3, 0.42)
    g0, g1 = back - wide - 0.02, back - 0.01
    grip = smooth(
        [
            (g0, mid),
            (g1, mid - 0.02),
            (g1 + lean * 0.4, mid + down * 0.5),
            (g1 + lean, mid + down),
            (g1 + lean - wide * 0.95, mid + down + 0.04),
            (g0 + lean * 0.45, mid + down * 0.5),
        ],
        36,
        closed=True,
    )
    gx, gy, gw, gh = g0 - 0.1, mid + 0.06, u(0.11, 0.14), u(0.08, 0.11)
    guard = rounded(gx - gw, mid - 0.02, gx + gw, gy + gh, 0.07)
    hole = rounded(gx - gw + 0.035, mid + 0.02, gx + gw - 0.03, gy + gh - 0.032, 0.045)
    trigger = ribbon(smooth([(gx + 0.03, mid), (gx + 0.0, gy), (gx - 0.03, gy + 0.06)], 8), 0.03)
    body = [
        Shape(rounded(front + u(0.02, 0.12), mid - 0.02, back - 0.02, mid + 0.06, 0.02), *frame, part="frame"),
        Shape(grip, *frame, profile="bevel", part="grip"),
        Shape(guard, *frame, part="trigger-guard"),
        Shape(hole, cut=True, part="trigger-guard"),
        Shape(trigger, "metal", 0.4, part="trigger-guard"),
    ]
    slide = [
        Shape(rounded(front, top, back, mid, 0.025), "metal", steel * 0.6, part="barrel"),
        Shape(
            box(front - 0.0, top + tall * 0.25, front + 0.55, top + tall * 0.62), "metal", steel * 1.1, part="barrel"
        ),
        Shape(box(back - 0.07, top - 0.03, back - 0.03, top + 0.01), "metal", 0.4, part="barrel"),
        Shape(box(front + 0.03, top - 0.025, front + 0.06, top + 0.01), "metal", 0.4, part="barrel"),
    ]
    for k in range(int(rng.integers(0, 6))):
        x = back - 0.05 - 0.025 * k
        slide.append(Shape(box(x, top + 0.02, x + 0.01, mid - 0.02), "metal", steel * 0.9, part="barrel"))
    magazine = turn(box(g0 + 0.05, mid, g1 - 0.05, mid + down), -np.arctan2(lean, down) * 0.9, ((g0 + g1) / 2, mid))
    pieces = [body, slide, [Shape(magazine, "metal", u(0.1, 0.5), "shell")]]
    if rng.uniform() < 0.6:
        pieces.append(
            [
                Shape(
                    turn(
                        ellipse((g0 + g1) / 2, mid + 0.06 + k * 0.05, wide * 0.3, 0.02),
                        -np.arctan2(lean, down),
                        ((g0 + g1) / 2, mid),
                    ),
                    "metal",
                    0.5,
                    "round",
                )
                for k in range(int(down / 0.055))
            ]
        )
    return Item(pieces)


def _revolver(rng: np.random.Generator) -> Item:
    u = rng.uniform
    steel = u(0.6, 1.1)
    long = u(0.25, 0.5)
    bore, y = u(0.055, 0.085), -0.2
    wood = rng.uniform() < 0.6
    grip_stuff = ("organic", u(1.8, 3.0)) if wood else ("metal", steel * 0.7)
    start = 0.0 - long
    drum = u(0.085, 0.115)
    grip = smooth(
        [(0.22, -0.14), (0.36, -0.17), (0.42, -0.02), (0.5, u(0.2, 0.26)), (0.46, 0.31), (0.33, 0.29), (0.27, 0.08)],
        36,
        closed=True,
    )
    guard = ellipse(0.12, 0.0, u(0.11, 0.13), u(0.1, 0.12))
    body = [
        Shape(
            smooth([(0.0, -0.27), (0.3, -0.27), (0.37, -0.15), (0.28, -0.02), (0.02, -0.04)], 30, closed=True),
            "metal",
            steel * 0.6,
            part="frame",
        ),
        Shape(guard, "metal", steel * 0.6, part="trigger-guard"),
        Shape(ellipse(0.12, 0.005, 0.085, 0.075), cut=True, part="trigger-guard"),
        Shape(ribbon(smooth([(0.15, -0.08), (0.12, 0.0), (0.14, 0.05)], 8), 0.03), "metal", 0.5, part="trigger-guard"),
        Shape(box(0.0, -0.08, 0.25, -0.03), "metal", steel * 0.6, part="frame"),
        Shape(grip, *grip_stuff, profile="bevel", part="grip"),
        Shape(ribbon(smooth([(0.3, -0.2), (0.39, -0.27), (0.43, -0.24)], 8), 0.04), "metal", 0.5, part="frame"),
    ]
    barrel = [
        Shape(box(start, y - bore, 0.05, y + bore * 0.4), "metal", steel * 0.8, part="barrel"),
        Shape(box(start + u(0, 0.1), y + bore * 0.4, 0.05, y + bore * 1.1), "metal", steel * 0.4, part="barrel"),
        Shape(
            np.array([(start + 0.02, y - bore), (start + 0.04, y - bore - 0.04), (start + 0.09, y - bore)]),
            "metal",
            0.3,
            part="barrel",
        ),
    ]
    cylinder = [
        Shape(rounded(0.04, y + 0.05 - drum, 0.22, y + 0.05 + drum, 0.02), "metal", steel * 1.1, "round", part="frame")
    ]
    tang = [Shape(ribbon(smooth([(0.3, -0.12), (0.36, 0.05), (0.42, 0.25)], 10), 0.05), "metal", 0.4)]
    return Item([body, barrel, cylinder, tang])


def gun(rng: np.random.Generator) -> Item:
    """A pistol or a revolver, muzzle to the left."""
    return _pistol(rng) if rng.uniform() < 0.6 else _revolver(rng)


def _blade(rng: np.random.Generator, root: float) -> np.ndarray:
    """Outline of a blade from its root (x) to its tip at x = -0.5, edge downwards."""
    u = rng.uniform
    wide, tip = u(0.065, 0.15), -0.5
    style = int(rng.integers(5))
    span = root - tip
    if style == 0:  # chef: straight spine, rounded belly
        curve = smooth(
            [(root, wide * 0.55), (tip + span * 0.45, wide * 0.5), (tip + span * 0.15, wide * 0.1), (tip, -wide * 0.4)],
            16,
        )
        return np.concatenate([[(root, -wide * 0.5)], curve[:0], [(tip + span * 0.1, -wide * 0.5)], curve[::-1]])
    if style == 1:  # dagger: symmetric
        w = wide * 0.5
        return np.array([(root, -w), (tip + span * 0.3, -w * 0.9), (tip, 0), (tip + span * 0.3, w * 0.9), (root, w)])
    if style == 2:  # clip point
        return np.concatenate(
            [
                [(root, -wide * 0.5), (tip + span * 0.38, -wide * 0.5), (tip, wide * 0.12)],
                smooth([(tip + span * 0.12, wide * 0.42), (tip + span * 0.4, wide * 0.5), (root, wide * 0.45)], 10),
            ]
        )
    if style == 3:  # curved, upswept
        line = smooth([(root, 0), (tip + span * 0.5, 0.015), (tip, -u(0.05, 0.14))], 18)
        return ribbon(line, (wide * 0.7, wide * 1.2, wide, 0.0))
    edge = smooth([(root, wide * 0.5), (tip + span * 0.3, wide * 0.5), (tip, wide * 0.3)], 12)
    return np.concatenate([[(root, -wide * 0.5)], [(tip + span * 0.08, -wide * 0.5)], edge[::-1]])


def knife(rng: np.random.Generator) -> Item:
    """A kitchen, hunting or folding knife, tip to the left."""
    u = rng.uniform
    root = u(-0.02, 0.2)
    blade = _blade(rng, root)
    thick = u(0.16, 0.34)
    grip = u(0.06, 0.1)
    bend = u(-0.04, 0.05)
    line = smooth([(root - 0.01, 0), ((root + 0.5) / 2, bend * 0.4), (0.5, bend)], 18)
    handle = ribbon(line, (grip * 0.8, grip, grip * 0.85, grip * u(0.9, 1.2)))
    metal_grip = rng.uniform() < 0.25
    stuff = ("metal", u(0.3, 0.5)) if metal_grip else ("organic", u(1.4, 2.6))
    body = [
        Shape(handle, *stuff, profile="round", part="handle"),
        Shape(blade, "metal", thick, "bevel", part="blade"),
    ]
    if rng.uniform() < 0.6:
        guard = u(0.6, 1.0) * grip
        body.append(Shape(box(root - 0.02, -guard, root + 0.015, guard), "metal", 0.5, part="handle"))
    tang = [Shape(ribbon(line[1:-2], (grip * 0.6, grip * 0.35)), "metal", thick * 0.9)]
    rivets = [
        Shape(ellipse(x, y, 0.012), "metal", 0.9, part="handle") for x, y in line[[5, 9, 13]][: int(rng.integers(0, 4))]
    ]
    return Item([body, tang] + ([rivets] if rivets else []))


def _half_pliers(rng_shape: dict, side: int) -> list[Shape]:
    """One lever of a pair of pliers, pivot at the origin, jaws to the left."""
    q = rng_shape
    jaw = np.array(
        [(0.05, -0.01), (0.03, 0.06), (-q["jaw"] * 0.5, q["root"]), (-q["jaw"], q["tip"]), (-q["jaw"], 0.0)]
    ) * (1, -side)
    line = smooth([(-0.02, -0.02), (0.06, 0.04), (q["long"] * 0.45, q["bow"]), (q["long"], q["end"])], 20) * (1, side)
    shapes = [
        Shape(ribbon(line, (0.08, 0.065, 0.055, 0.05)), "metal", q["steel"] * 0.7, part="handles"),
        Shape(jaw, "metal", q["steel"], part="jaws"),
    ]
    if q["sleeve"]:
        shapes.append(Shape(ribbon(line[6:], (0.075, 0.085, 0.07)), "organic", 1.6, "round", part="handles"))
    return shapes


def pliers(rng: np.random.Generator) -> Item:
    """Combination, long-nose, cutting or water-pump pliers, jaws to the left."""
    u = rng.uniform
    style = int(rng.integers(4))
    jaw = (u(0.2, 0.26), u(0.32, 0.42), u(0.13, 0.17), u(0.18, 0.24))[style]
    root = (0.075, 0.06, 0.08, 0.07)[style] * u(0.9, 1.15)
    tip = (0.06, 0.012, 0.02, 0.05)[style] * u(0.8, 1.2)
    q = {
        "jaw": jaw,
        "root": root,
        "tip": tip,
        "long": 1 - jaw - 0.02,
        "bow": u(0.1, 0.15),
        "end": u(0.07, 0.14),
        "steel": u(0.45, 0.8),
        "sleeve": rng.uniform() < 0.75,
    }
    angle = u(0.0, 0.22) if rng.uniform() < 0.65 else u(0.22, 0.42)
    shift = np.array([jaw - 0.5, 0.0])
    pieces = []
    for side in (1, -1):
        half = _half_pliers(q, side)
        pieces.append(
            [Shape(turn(s.outline, side * angle) + shift, s.material, s.thickness, s.profile, s.part) for s in half]
        )
    radius = u(0.055, 0.075)
    pieces.append(
        [
            Shape(ellipse(*shift, radius), "metal", q["steel"] * 0.5, part="pivot"),
            Shape(ellipse(*shift, radius * 0.45), "metal", q["steel"], part="pivot"),
        ]
    )
    return Item(pieces)


def scissors(rng: np.random.Generator) -> Item:
    """A pair of scissors, open or closed, tips to the left, finger rings to the right."""
    u = rng.uniform
    blade, shank = u(0.45, 0.6), 0.0
    shank = 1 - blade
    wide = u(0.05, 0.08)
    steel = u(0.18, 0.34)
    plastic = rng.uniform() < 0.65
    stuff = ("organic", u(1.5, 2.6)) if plastic else ("metal", steel * 1.3)
    angle = u(0.0, 0.12) if rng.uniform() < 0.5 else u(0.12, 0.4)
    ring_x, ring_y = u(0.12, 0.17), u(0.075, 0.1)
    bore = u(0.6, 0.74)
    off = ring_y * u(0.95, 1.15)
    shift = np.array([blade - 0.5, 0.0])
    pieces = []
    for side in (1, -1):
        r = ring_x * (1.0 if side > 0 else u(0.85, 1.2))
        centre = (shank - r, off * side)
        line = smooth([(-0.02, 0), (shank * 0.3, 0.02 * side), (shank - 2 * r + 0.03, off * side)], 14)
        edge = np.array(
            [
                (0.05, -wide * 0.5),
                (-blade * 0.5, -wide * 0.55),
                (-blade, -wide * 0.05),
                (-blade * 0.98, wide * 0.1),
                (0.05, wide * 0.5),
            ]
        ) * (1, -side)
        shapes = [
            Shape(ribbon(line, (wide, wide * 0.8)), "metal", steel * 1.2, part="blades"),
            Shape(edge, "metal", steel, part="blades"),
            Shape(ribbon(line[7:], (wide * 0.9, wide * 1.2)), *stuff, profile="bevel", part="finger-rings"),
            Shape(ellipse(*centre, r, ring_y), *stuff, profile="bevel", part="finger-rings"),
            Shape(ellipse(*centre, r * bore, ring_y * bore * 0.95), cut=True, part="finger-rings"),
        ]
        pieces.append(
            [
                Shape(turn(s.outline, side * angle) + shift, s.material, s.thickness, s.profile, s.part, s.cut)
                for s in shapes
            ]
        )
    pieces.append([Shape(ellipse(*shift, wide * 0.4), "metal", 0.4, part="pivot")])
    return Item(pieces)


def _open_head(x: float, radius: float, tilt: float, steel: float, way: int) -> list[Shape]:
    """A round head with a slot at (x, 0); ``way`` -1 opens to the left, 1 to the right."""
    slot = radius * 0.48
    cut = turn(box(x - 0.15 * radius, -slot, x + 2 * radius, slot), tilt, (x, 0.0))
    cut = cut if way > 0 else cut * (-1, 1) + (2 * x, 0)
    head = ellipse(x, 0, radius * 1.05, radius)
    return [Shape(head, "metal", steel, part="head"), Shape(cut, cut=True, part="head")]


def _ring_head(x: float, radius: float, steel: float, corners: int) -> list[Shape]:
    return [
        Shape(ellipse(x, 0, radius), "metal", steel, part="head"),
        Shape(ellipse(x, 0, radius * 0.62, n=corners), cut=True, part="head"),
    ]


def wrench(rng: np.random.Generator) -> Item:
    """Open-end, ring, combination or adjustable wrench along x."""
    u = rng.uniform
    steel = u(0.45, 0.85)
    style = int(rng.integers(4))
    r0, r1 = u(0.085, 0.12), u(0.075, 0.1)
    shaft_w = u(0.05, 0.075)
    x0, x1 = -0.5 + r0, 0.5 - r1
    neck = 0.7
    shaft = Shape(
        ribbon([(x0 + r0 * neck, 0), (0, 0), (x1 - r1 * neck, 0)], (shaft_w * 1.2, shaft_w, shaft_w * 1.2)),
        "metal",
        steel * 0.7,
        "bevel",
        part="shaft",
    )
    tilt, corners = u(-0.3, 0.3), int(rng.choice([6, 12]))
    if style == 0:
        return Item([[shaft, *_open_head(x0, r0, tilt, steel, -1), *_open_head(x1, r1, u(-0.3, 0.3), steel, 1)]])
    if style == 1:
        return Item([[shaft, *_open_head(x0, r0, tilt, steel, -1), *_ring_head(x1, r1, steel, corners)]])
    if style == 2:
        return Item([[shaft, *_ring_head(x0, r0, steel, corners), *_ring_head(x1, r1, steel, corners)]])
    return _adjustable(rng, steel)


def _adjustable(rng: np.random.Generator, steel: float) -> Item:
    u = rng.uniform
    gap = u(0.02, 0.1)
    handle = ribbon([(-0.3, 0.02), (0.1, 0.0), (0.5, 0.0)], (0.1, u(0.07, 0.09), u(0.08, 0.11)))
    head = smooth(
        [
            (-0.5, -0.1),
            (-0.38, -0.13),
            (-0.24, -0.08),
            (-0.2, 0.06),
            (-0.3, 0.13),
            (-0.37, 0.1),
            (-0.36, -0.035),
            (-0.49, -0.04),
        ],
        40,
        closed=True,
    )
    jaw = np.array([(-0.49, -0.04 + gap), (-0.33, -0.04 + gap), (-0.33, 0.13), (-0.39, 0.12), (-0.47, 0.02 + gap)])
    body = [
        Shape(handle, "metal", steel * 0.7, "bevel", part="shaft"),
        Shape(ellipse(0.46, 0, 0.022), cut=True, part="shaft"),
        Shape(head, "metal", steel * 0.9, part="head"),
    ]
    slide = [Shape(jaw, "metal", steel * 0.8, part="head")]
    worm = [Shape(box(-0.33, 0.03, -0.24, 0.085), "metal", 0.5, "round", part="head")]
    return Item([body, slide, worm])
