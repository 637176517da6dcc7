"""Quadrature rules that detxai does not use: for comparisons and tests."""

from __future__ import annotations

import numpy as np

from detxai.attribution.quadrature import UNIFORM, Curve, Rule


def newton_cotes(n: int, *, curve: Curve = UNIFORM, panels: int = 1) -> Rule:
    """Trapezoid (n = 2), Simpson (3) or Boole (5): equidistant nodes, all shared when a panel is halved."""
    weights = {2: (1, 1), 3: (1, 4, 1), 5: (7, 32, 12, 32, 7)}[n]
    total = sum(weights)
    return Rule(f"newton-cotes-{n}", tuple(np.linspace(0, 1, n)), tuple(w / total for w in weights), curve, panels)


def gauss_legendre(n: int, *, curve: Curve = UNIFORM, panels: int = 1) -> Rule:
    """The n-point Gauss–Legendre rule: exact for polynomials of degree 2n − 1."""
    x, w = np.polynomial.legendre.leggauss(n)
    return Rule(f"gauss-legendre-{n}", tuple((x + 1) / 2), tuple(w / 2), curve, panels)


def clenshaw_curtis(n: int, *, curve: Curve = UNIFORM, panels: int = 1) -> Rule:
    """The (n + 1)-point Clenshaw–Curtis rule (n even), which includes both ends."""
    theta = np.pi * np.arange(n + 1) / n
    j = np.arange(1, n // 2 + 1)
    b = np.where(2 * j == n, 1.0, 2.0)
    sums = (b / (4 * j**2 - 1) * np.cos(2 * np.outer(theta, j))).sum(1)
    c = np.where((np.arange(n + 1) == 0) | (np.arange(n + 1) == n), 1.0, 2.0)
    return Rule(
        f"clenshaw-curtis-{n + 1}",
        tuple((1 - np.cos(theta)) / 2),
        tuple(c / n * (1 - sums) / 2),
        curve,
        panels,
    )
