"""Electronics in a bag: boards, laptops, phones, cables, chargers, cells, watches.

Same interface as ``clutter``: ``(rng, stack, centre, cm)``.
"""

from __future__ import annotations

import numpy as np

from .clutter import Centre, loops, put
from .geometry import Shape, Stack, box, ellipse, ribbon, rounded, smooth, wire


def board(rng: np.random.Generator, width: float, height: float) -> list[list[Shape]]:
    """A circuit board in a local frame, (width, height) in local units, centre at the origin."""
    x, y = width / 2, height / 2
    pieces = [[Shape(box(-x, -y, x, y), "mixed", 0.16)]]
    chips = []
    for _ in range(int(rng.integers(8, 24))):
        w, h = np.exp(rng.uniform(np.log(0.015), np.log(0.12), 2))
        cx, cy = rng.uniform(-1, 1, 2) * (x - w / 2, max(y - h / 2, 0.01))
        metal = rng.uniform() < 0.35
        chips.append(
            Shape(
                box(cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2),
                "metal" if metal else "mixed",
                rng.uniform(0.03, 0.2) if metal else rng.uniform(0.2, 0.9),
            )
        )
    pieces.append(chips)
    pieces.append(
        [
            Shape(ribbon([(-x, v), (x * rng.uniform(-0.5, 1), v)], 0.008), "metal", 0.05)
            for v in rng.uniform(-y, y, int(rng.integers(2, 7)))
        ]
    )
    return pieces


def laptop(rng: np.random.Generator, stack: Stack, centre: Centre, cm: float) -> None:
    """A laptop or tablet: aluminium shell, board, battery cells, hinges."""
    long, ratio = rng.uniform(20, 32), rng.uniform(0.62, 0.72)
    h = ratio / 2
    case = rounded(-0.5, -h, 0.5, h, 0.03)
    pieces = [[Shape(case, "mixed", rng.uniform(0.15, 0.4))], [Shape(case, "mixed", 0.5, "shell")]]
    for piece in board(rng, 0.9, ratio * 0.4):
        pieces.append([Shape(s.outline - (0, h * 0.45), s.material, s.thickness) for s in piece])
    cells = int(rng.integers(3, 7))
    span = 0.8 / cells
    pieces.append(
        [
            Shape(
                rounded(-0.4 + k * span, h * 0.2, -0.4 + (k + 0.92) * span, h * 0.85, 0.01),
                "mixed",
                rng.uniform(0.6, 1.2),
            )
            for k in range(cells)
        ]
    )
    pieces.append([Shape(box(v - 0.05, -h * 0.99, v + 0.05, -h * 0.94), "metal", 0.25) for v in (-0.33, 0.33)])
    put(rng, stack, centre, long * cm, *pieces)


def phone(rng: np.random.Generator, stack: Stack, centre: Centre, cm: float) -> None:
    """A phone, radio or camera: small case, board, battery, maybe a lens."""
    long, h = rng.uniform(9, 16), rng.uniform(0.2, 0.34)
    case = rounded(-0.5, -h, 0.5, h, 0.06)
    pieces = [
        [Shape(case, "organic", 0.8)],
        [Shape(case, "mixed", 0.7, "shell")],
        *board(rng, 0.9, h * 1.6),
        [Shape(rounded(-0.1, -h * 0.7, 0.4, h * 0.7, 0.02), "mixed", rng.uniform(0.4, 1.4))],
    ]
    if rng.uniform() < 0.35:
        r = h * 0.7
        pieces.append([Shape(ellipse(-0.25, 0, r), "metal", 0.25), Shape(ellipse(-0.25, 0, r * 0.75), cut=True)])
        pieces.append([Shape(ellipse(-0.25, 0, r * 0.72), "mixed", 1.2, "round")])
    put(rng, stack, centre, long * cm, *pieces)


def cable(rng: np.random.Generator, stack: Stack, centre: Centre, cm: float) -> None:
    """A wound cable: copper core, plastic sheath, a plug at its end."""
    line = loops(rng, centre, rng.uniform(2.5, 7) * cm, rng.uniform(1, 4))
    wire(stack, line, "organic", 0.5, rng.uniform(2, 4))
    wire(stack, line, "metal", rng.uniform(0.05, 0.16), rng.uniform(0.7, 2.0))
    x, y = line[-1]
    put(
        rng,
        stack,
        (x, y),
        rng.uniform(2, 3.4) * cm,
        [Shape(rounded(-0.5, -0.2, 0.5, 0.2, 0.05), "organic", 1.0)],
        [Shape(box(0.2, -0.12, 0.8, 0.12), "metal", rng.uniform(0.1, 0.35))],
    )


def charger(rng: np.random.Generator, stack: Stack, centre: Centre, cm: float) -> None:
    """A power supply: plastic case, board, a dark transformer, prongs and a cable."""
    long, h = rng.uniform(5, 10), rng.uniform(0.25, 0.42)
    case = rounded(-0.5, -h, 0.5, h, 0.06)
    x, s = rng.uniform(-0.25, 0.1), rng.uniform(0.15, 0.24)
    put(
        rng,
        stack,
        centre,
        long * cm,
        [Shape(case, "organic", 1.2)],
        [Shape(case, "organic", 0.8, "shell")],
        *board(rng, 0.85, h * 1.5),
        [Shape(box(x, -s, x + 2 * s, s), "metal", rng.uniform(0.4, 0.9))],
        [
            Shape(box(-0.68, -h * 0.5, -0.5, -h * 0.35), "metal", 0.3),
            Shape(box(-0.68, h * 0.35, -0.5, h * 0.5), "metal", 0.3),
        ],
    )
    if rng.uniform() < 0.7:
        cable(rng, stack, centre, cm)


def batteries(rng: np.random.Generator, stack: Stack, centre: Centre, cm: float) -> None:
    """A row of round cells."""
    n = int(rng.integers(1, 5))
    cells = [
        Shape(
            rounded(-0.5, (k - n / 2) * 0.3, 0.5, (k - n / 2) * 0.3 + 0.28, 0.02),
            "metal",
            rng.uniform(0.35, 0.7),
            "round",
        )
        for k in range(n)
    ]
    put(rng, stack, centre, 5 * cm, cells)


def watch(rng: np.random.Generator, stack: Stack, centre: Centre, cm: float) -> None:
    """A wrist watch: a dense round case on a thin band."""
    at = put(
        rng,
        stack,
        centre,
        2.0 * cm,
        [Shape(ellipse(0, 0, 1), "metal", 0.4), Shape(ellipse(0, 0, 0.7), cut=True)],
        [Shape(ellipse(0, 0, 0.72), "metal", 0.18)],
    )
    band = smooth([(0.9, 0), (2.4, 0.8), (2.6, 2.4), (0, 3.2), (-2.6, 2.4), (-2.4, 0.8), (-0.9, 0)], 40)
    wire(stack, at.apply(band), str(rng.choice(["organic", "mixed"])), 0.6, 1.2 * cm)
