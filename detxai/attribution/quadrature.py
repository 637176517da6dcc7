"""Quadrature on the unit path, with the error of every panel known from F itself.

Integrated gradients (Sundararajan, Taly & Yan 2017) are the path integral

    IG = (x − b) ⊙ ∫₀¹ ∇F(b + α (x − b)) dα,   Σ IG = F(x) − F(b).

Along the path the slope f(α) = ∇F · (x − b) is the derivative of F, so F(α₂) − F(α₁) is the exact integral of f over
a panel [α₁, α₂], and its difference to the quadrature is the panel's true error: no second rule is needed to guess it.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache

import numpy as np
from numpy.polynomial.polynomial import polyder, polyval

Curve = tuple[float, ...]
#: α = v; α = v² (3 − v) / 2; α = v².
UNIFORM, CROWDED, SQUARE = (0.0, 1.0), (0.0, 0.0, 1.5, -0.5), (0.0, 0.0, 1.0)
#: Divisions of the path whose weights are remembered: they depend on nothing else, and easy targets share them.
KNOWN = 512
#: From where to where in v.
Panel = tuple[float, float]


@dataclass(frozen=True)
class Rule:
    """A quadrature rule on [0, 1] and how the path is divided before any refinement.

    `nodes`, `weights` (summing to 1) apply to each panel in the variable v. `curve`: α as a polynomial in v, by rising
    powers, from 0 to 1; a flat start crowds the nodes at the baseline, where detectors change most. `panels`: how many
    equal panels in v to begin with.
    """

    name: str
    nodes: tuple[float, ...]
    weights: tuple[float, ...]
    curve: Curve = UNIFORM
    panels: int = 1

    def alpha(self, v: float) -> float:
        """The position on the path, 0 at the baseline and 1 at the image."""
        return float(polyval(v, self.curve))

    def density(self, v: float) -> float:
        """dα/dv."""
        return float(polyval(v, polyder(self.curve)))

    def shares(self, panels: Sequence[Panel]) -> list[dict[float, float]]:
        """The weights of the nodes in the integral over α, panel by panel."""
        return [self._own(*panel) for panel in panels]

    def _own(self, a: float, b: float) -> dict[float, float]:
        nodes = ((a + (b - a) * x, w) for x, w in zip(self.nodes, self.weights, strict=True))
        return {v: w * (b - a) * self.density(v) for v, w in nodes}

    def within(self, evaluations: int) -> Rule:
        """This rule on fewer panels where it would begin with more than `evaluations` gradients."""
        return _within(self, evaluations)


class Cubic(Rule):
    """Between neighbouring nodes the integral of the cubic through the four nearest (Gill & Miller 1972).

    What a node weighs depends on its neighbours, so there are no `weights` a panel. Of the order of Simpson's rule, but
    nodes that lie evenly weigh alike. That helps maps: a map is as many integrals as it has pixels, each rougher than
    their sum, and to those uneven weights at the same nodes only add noise.
    """

    def shares(self, panels: Sequence[Panel]) -> list[dict[float, float]]:
        v = np.array(sorted({a + (b - a) * x for a, b in panels for x in self.nodes}))
        m, half, middle = min(4, len(v)), np.diff(v)[:, None] / 2, (v[:-1, None] + v[1:, None]) / 2
        near = np.clip(np.arange(len(v) - 1) - 1, 0, len(v) - m)[:, None] + np.arange(m)
        powers = np.arange(m)
        moments = (1 - powers % 2) * 2 / (powers + 1)  # ∫ uᵏ du from −1 to 1
        u = (v[near] - middle) / half
        weights = half * np.linalg.solve(u[:, None, :] ** powers[:, None], moments[:, None])[..., 0]
        weights *= polyval(v[near], polyder(self.curve))
        shares = []
        for start, end in np.searchsorted(v, panels):
            total: dict[float, float] = {}
            for node, weight in zip(v[near[start:end]].flat, weights[start:end].flat, strict=True):
                total[float(node)] = total.get(float(node), 0.0) + float(weight)
            shares.append(total)
        return shares


def cubic(*, curve: Curve = CROWDED, panels: int = 4) -> Cubic:
    """Panels with a node at each end and in the middle: every node is used again when a panel is halved."""
    return Cubic("cubic", (0.0, 0.5, 1.0), (), curve, panels)


@lru_cache(maxsize=KNOWN)
def _within(rule: Rule, evaluations: int) -> Rule:
    fewer = (replace(rule, panels=n) for n in range(rule.panels, 1, -1))
    return next((own for own in fewer if sum(Mesh(own).missing().values()) <= evaluations), replace(rule, panels=1))


@lru_cache(maxsize=KNOWN)
def _shares(rule: Rule, panels: tuple[Panel, ...]) -> Sequence[Mapping[float, float]]:
    return rule.shares(panels)


@lru_cache(maxsize=KNOWN)
def _weights(rule: Rule, panels: tuple[Panel, ...]) -> Mapping[float, float]:
    total: dict[float, float] = {}
    for share in _shares(rule, panels):
        for v, w in share.items():
            if w:
                total[v] = total.get(v, 0.0) + w
    return total


@dataclass
class Mesh:
    """The panels of one target's path, what is known at their nodes, and where it is not good enough yet."""

    rule: Rule
    panels: list[Panel] = field(init=False)
    value: dict[float, float] = field(default_factory=dict)
    slope: dict[float, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        cuts = np.linspace(0.0, 1.0, self.rule.panels + 1)
        self.panels = [(float(a), float(b)) for a, b in zip(cuts, cuts[1:], strict=False)]

    def missing(self) -> dict[float, bool]:
        """The positions v still to be evaluated; True where the gradient is wanted, False for the value alone."""
        wanted = {end: False for panel in self.panels for end in panel if end not in self.value}
        return wanted | {v: True for v in self.weights() if v not in self.slope}

    def weights(self) -> Mapping[float, float]:
        """The weight of every node in the integral over α."""
        return _weights(self.rule, tuple(self.panels))

    def coarse(self) -> Mapping[float, float] | None:
        """The weights of every other node alone, those where panels end; None where the rule has no nodes there."""
        if not isinstance(self.rule, Cubic):
            return None
        return _weights(replace(self.rule, nodes=(0.0, 1.0)), tuple(self.panels))

    @property
    def delta(self) -> float:
        """F(x) − F(b)."""
        return self.value[1.0] - self.value[0.0]

    @property
    def scale(self) -> float:
        """What errors are relative to: |Δ|, but at least one unit of the target."""
        return max(abs(self.delta), 1.0)

    def _errors(self) -> list[float]:
        return [
            abs(self.value[b] - self.value[a] - sum(w * self.slope[v] for v, w in share.items() if w))
            for (a, b), share in zip(self.panels, _shares(self.rule, tuple(self.panels)), strict=True)
        ]

    def bound(self) -> float:
        """Σ |error of each panel| / max(|Δ|, 1)."""
        return float(sum(self._errors()) / self.scale)

    def refine(self, tolerance: float) -> None:
        """Halve the worst panels, until those left alone would meet half the tolerance."""
        errors = self._errors()
        left, worst = sum(errors), set()
        for i in sorted(range(len(errors)), key=lambda i: -errors[i]):
            if left <= 0.5 * tolerance * self.scale:
                break
            left -= errors[i]
            worst.add(i)
        self._divide(worst)

    def halve(self) -> None:
        """Halve all panels."""
        self._divide(range(len(self.panels)))

    def _divide(self, which: Container[int]) -> None:
        halves = (
            [(a, (a + b) / 2), ((a + b) / 2, b)] if i in which else [(a, b)] for i, (a, b) in enumerate(self.panels)
        )
        self.panels = [panel for pair in halves for panel in pair]
