"""Quadrature on the unit path, with the error of every panel known from F itself.

Integrated gradients (Sundararajan, Taly & Yan 2017) are the path integral

    IG = (x − b) ⊙ ∫₀¹ ∇F(b + α (x − b)) dα,   Σ IG = F(x) − F(b).

Along the path the slope f(α) = ∇F · (x − b) is the derivative of F, so F(α₂) − F(α₁) is the exact integral of f over
a panel [α₁, α₂], and its difference to the quadrature is the panel's true error: no second rule is needed to guess it.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np


@dataclass(frozen=True)
class Rule:
    """A quadrature rule on [0, 1] and how the path is divided before any refinement.

    `nodes`, `weights` (summing to 1) apply to each panel in the variable v; α = v^`power` crowds the nodes at the
    baseline, where detectors change most. `panels`: how many equal panels in v to begin with.
    """

    name: str
    nodes: tuple[float, ...]
    weights: tuple[float, ...]
    power: float = 1.0
    panels: int = 1

    def alpha(self, v: float) -> float:
        """The position on the path, 0 at the baseline and 1 at the image."""
        return float(v**self.power)

    def density(self, v: float) -> float:
        """dα/dv."""
        return float(self.power * v ** (self.power - 1.0))

    def within(self, evaluations: int) -> Rule:
        """This rule on fewer panels where it would begin with more than `evaluations` gradients."""
        fewer = (replace(self, panels=n) for n in range(self.panels, 1, -1))
        fits = (rule for rule in fewer if sum(Mesh(rule).missing().values()) <= evaluations)
        return next(fits, replace(self, panels=1))


def newton_cotes(n: int, *, power: float = 1.0, panels: int = 1) -> Rule:
    """Trapezoid (n = 2), Simpson (3) or Boole (5): equidistant nodes, all shared when a panel is halved."""
    weights = {2: (1, 1), 3: (1, 4, 1), 5: (7, 32, 12, 32, 7)}[n]
    total = sum(weights)
    return Rule(f"newton-cotes-{n}", tuple(np.linspace(0, 1, n)), tuple(w / total for w in weights), power, panels)


@dataclass
class Mesh:
    """The panels of one target's path, what is known at their nodes, and where it is not good enough yet."""

    rule: Rule
    panels: list[tuple[float, float]] = field(init=False)
    value: dict[float, float] = field(default_factory=dict)
    slope: dict[float, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        cuts = np.linspace(0.0, 1.0, self.rule.panels + 1)
        self.panels = [(float(a), float(b)) for a, b in zip(cuts, cuts[1:], strict=False)]

    def _weighted(self, panel: tuple[float, float]) -> list[tuple[float, float]]:
        a, b = panel
        nodes = ((a + (b - a) * x, w) for x, w in zip(self.rule.nodes, self.rule.weights, strict=True))
        return [(v, w * (b - a) * self.rule.density(v)) for v, w in nodes]

    def missing(self) -> dict[float, bool]:
        """The positions v still to be evaluated; True where the gradient is wanted, False for the value alone."""
        wanted = {end: False for panel in self.panels for end in panel if end not in self.value}
        for panel in self.panels:
            wanted |= {v: True for v, w in self._weighted(panel) if w and v not in self.slope}
        return wanted

    def weights(self) -> dict[float, float]:
        """The weight of every node in the integral over α."""
        total: dict[float, float] = {}
        for panel in self.panels:
            for v, w in self._weighted(panel):
                if w:
                    total[v] = total.get(v, 0.0) + w
        return total

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
            abs(self.value[b] - self.value[a] - sum(w * self.slope[v] for v, w in self._weighted((a, b)) if w))
            for a, b in self.panels
        ]

    def bound(self) -> float:
        """Σ |error of each panel| / max(|Δ|, 1)."""
        return sum(self._errors()) / self.scale

    def refine(self, tolerance: float) -> None:
        """Halve the worst panels, until those left alone would meet half the tolerance."""
        errors = self._errors()
        left, worst = sum(errors), set()
        for i in sorted(range(len(errors)), key=lambda i: -errors[i]):
            if left <= 0.5 * tolerance * self.scale:
                break
            left -= errors[i]
            worst.add(i)
        halves = (
            [(a, (a + b) / 2), ((a + b) / 2, b)] if i in worst else [(a, b)] for i, (a, b) in enumerate(self.panels)
        )
        self.panels = [panel for pair in halves for panel in pair]
