"""Quadrature rules that detxai does not use: for comparisons and tests."""

from __future__ import annotations

import numpy as np

from detxai.attribution.quadrature import Rule


def gauss_legendre(n: int, *, power: float = 1.0, panels: int = 1) -> Rule:
    """The n-point Gauss–Legendre rule: exact for polynomials of degree 2n − 1."""
    x, w = np.polynomial.legendre.leggauss(n)
    return Rule(f"gauss-legendre-{n}", tuple((x + 1) / 2), tuple(w / 2), power, panels)


def clenshaw_curtis(n: int, *, power: float = 1.0, panels: int = 1) -> Rule:
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
        power,
        panels,
    )
