"""Integrated gradients of many targets of one image, to a wanted error.

Written as a coroutine: it yields the path points it needs and is sent their values and gradients, so that the engine
can pack the points of many images together. The symbols are those of Sundararajan, Taly & Yan (2017):
x the image, b the baseline, α the position on the path, F a target, f(α) = ∇F · (x − b) its slope.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from detxai.attribution.quadrature import Mesh, Rule, newton_cotes
from detxai.data import Target

#: Simpson on four panels in √α: every node is used again when a panel is halved, and nodes crowd at the baseline.
DEFAULT_RULE = newton_cotes(3, power=2.0, panels=4)


@dataclass(frozen=True, eq=False)
class Path:
    """The straight path from baseline b to image x, both (3, size, size) float32 in [0, 1]."""

    x: Tensor
    b: Tensor

    def at(self, alpha: float) -> Tensor:
        """The point b + α (x − b); exactly b and x at the ends."""
        return torch.lerp(self.b, self.x, alpha)

    def product(self, gradient: Tensor) -> Tensor:
        """(x − b) ⊙ ∇F summed over colour: (size, size)."""
        return ((self.x - self.b) * gradient).sum(0)


@dataclass(frozen=True, eq=False)
class Point:
    """One row of a batch: the place `alpha` on `path`, the targets wanted there, and whether their gradients are.

    `picture` (3, size, size) takes the place of the path's point; where `hidden` (size, size) holds, the baseline
    shows; `combine` makes a (size, size) map of a gradient (default: the path's product). `field`: which scalar of a
    target, its pinned `value` or its `similarity` to what is detected. `dtype` is the arithmetic of the network below
    the head. `channels`: for each target those that ParchGrad keeps, (total channels,) bool; None for the plain
    gradient. At a `layer` the gradient is that at its output, and `combine` gets it, the output, both (c, h, w), and
    the target.
    """

    path: Path
    alpha: float
    targets: tuple[Target, ...]
    gradient: bool = True
    dtype: torch.dtype = torch.float32
    picture: Tensor | None = None
    combine: Callable[..., Tensor] | None = None
    field: str = "value"
    layer: int | None = None
    hidden: Tensor | None = None
    channels: tuple[Tensor, ...] | None = None

    def place(self) -> Tensor:
        """The picture at this point, (3, size, size)."""
        shown = self.path.at(self.alpha) if self.picture is None else self.picture
        return shown if self.hidden is None else torch.where(self.hidden, self.path.b, shown)

    def map_of(self, gradient: Tensor, *more: Any) -> Tensor:
        """(size, size) of a gradient (3, size, size), or of one at a layer with `more` of what is there."""
        return (self.combine or self.path.product)(gradient, *more)


@dataclass(frozen=True, eq=False)
class Reply:
    """What came of a point: F (targets,) and, where wanted, the map of ∇F per target, (targets, size, size)."""

    values: list[float]
    products: Tensor | None = None


@dataclass(frozen=True, eq=False)
class TargetMap:
    """What a method makes of one target: `map` (size, size) float64, letterbox pixels, summed over colour.

    The completeness fields are None for methods that promise nothing about the sum of their map. `layer`: where an
    activation map was taken.
    """

    target: Target
    map: Tensor
    value_at_input: float
    value_at_baseline: float | None
    evaluations: int
    completeness_error: float | None = None
    error_bound: float | None = None
    converged: bool | None = None
    dtype: torch.dtype = torch.float32
    notes: tuple[str, ...] = ()
    layer: int | None = None


Ask = Generator[list[Point], list[Reply], list[TargetMap]]


def integrated_gradients(
    path: Path,
    targets: Sequence[Target],
    *,
    tolerance: float = 0.05,
    max_evaluations: int = 256,
    rule: Rule = DEFAULT_RULE,
    dtype: torch.dtype = torch.float32,
) -> Ask:
    """Coroutine for the integrals of `targets` along `path`: refined until `error_bound` ≤ `tolerance`.

    All targets share the forward pass of a point. A target stops by itself; one that would need more than
    `max_evaluations` gradients is returned as it stands, not converged.
    """
    rule = rule.within(max_evaluations)
    meshes = [Mesh(rule) for _ in targets]
    products: list[dict[float, Tensor]] = [{} for _ in targets]
    spent = [0] * len(targets)
    active = set(range(len(targets)))
    while active:
        plan: dict[tuple[float, bool], list[int]] = {}
        for k in sorted(active):
            for v, gradient in meshes[k].missing().items():
                plan.setdefault((v, gradient), []).append(k)
        points = [
            Point(path, rule.alpha(v), tuple(targets[k] for k in ks), gradient, dtype)
            for (v, gradient), ks in plan.items()
        ]
        replies = yield points
        for ((v, gradient), ks), reply in zip(plan.items(), replies, strict=True):
            for row, k in enumerate(ks):
                meshes[k].value[v] = reply.values[row]
                if gradient and reply.products is not None:
                    products[k][v] = reply.products[row]
                    meshes[k].slope[v] = float(reply.products[row].sum(dtype=torch.float64))
                    spent[k] += 1
        for k in sorted(active):
            if not _refined(meshes[k], spent[k], tolerance, max_evaluations):
                active.remove(k)
            kept = meshes[k].weights()
            products[k] = {v: q for v, q in products[k].items() if v in kept}
    return [
        _integral(target, mesh, nodes, count, tolerance, dtype)
        for target, mesh, nodes, count in zip(targets, meshes, products, spent, strict=True)
    ]


def fixed_integral(path: Path, targets: Sequence[Target], rule: Rule, dtype: torch.dtype = torch.float32) -> Ask:
    """Coroutine for the integral on the nodes of `rule`, of gradients that are none of F.

    Nothing is known of its error: F's differences say what the sum of F's own gradient must be, not of another.
    """
    mesh = Mesh(rule)
    nodes = mesh.missing()
    replies = yield [Point(path, rule.alpha(v), tuple(targets), wanted, dtype) for v, wanted in nodes.items()]
    found = dict(zip(nodes, replies, strict=True))
    maps = []
    for k, target in enumerate(targets):
        total = torch.zeros(path.x.shape[1:], dtype=torch.float64, device=path.x.device)
        for v, weight in mesh.weights().items():
            products = found[v].products
            assert products is not None
            total.add_(products[k].double(), alpha=weight)
        spent = sum(nodes.values())
        maps.append(TargetMap(target, total, found[1.0].values[k], found[0.0].values[k], spent, dtype=dtype))
    return maps


def _refined(mesh: Mesh, spent: int, tolerance: float, max_evaluations: int) -> bool:
    """Refine `mesh` if it has not converged and may still grow; False when it is final."""
    if mesh.bound() <= tolerance:
        return False
    panels = mesh.panels
    mesh.refine(tolerance)
    if spent + sum(mesh.missing().values()) > max_evaluations:
        mesh.panels = panels
        return False
    return True


def _integral(
    target: Target,
    mesh: Mesh,
    products: dict[float, Tensor],
    spent: int,
    tolerance: float,
    dtype: torch.dtype,
) -> TargetMap:
    weights = mesh.weights()
    total = torch.zeros_like(next(iter(products.values())), dtype=torch.float64)
    for v in sorted(weights):
        total.add_(products[v].double(), alpha=weights[v])
    bound = mesh.bound()
    return TargetMap(
        target,
        total,
        mesh.value[1.0],
        mesh.value[0.0],
        spent,
        abs(float(total.sum()) - mesh.delta) / mesh.scale,
        bound,
        bound <= tolerance,
        dtype,
    )
