"""Integrated gradients of many targets of one image, to a wanted error.

Written as a coroutine: it yields the path points it needs and is sent their values and gradients, so that the engine
can pack the points of many images together. The symbols are those of Sundararajan, Taly & Yan (2017):
x the image, b the baseline, α the position on the path, F a target, f(α) = ∇F · (x − b) its slope.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from detxai.attribution.points import Ask, Point, Segment, TargetMap
from detxai.attribution.quadrature import Mesh, Rule, cubic
from detxai.values import Target

#: Of the rules in `scripts/bench/compare_rules.py` the one with the best maps for its cost; it begins with 8 gradients.
DEFAULT_RULE = cubic()


def integrated_gradients(
    path: Segment,
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
        replies = yield [
            Point(path, rule.alpha(v), tuple(targets[k] for k in ks), gradient, dtype, field=path.field)
            for (v, gradient), ks in plan.items()
        ]
        for ((v, _), ks), reply in zip(plan.items(), replies, strict=True):
            slopes = [] if reply.products is None else path.slopes(reply.products)
            for row, k in enumerate(ks):
                meshes[k].value[v] = reply.values[row]
                if reply.products is not None:
                    products[k][v], meshes[k].slope[v] = reply.products[row], slopes[row]
                    spent[k] += 1
        for k in sorted(active):
            if not _refined(meshes[k], spent[k], tolerance, max_evaluations):
                active.remove(k)
            kept = meshes[k].weights()
            products[k] = {v: q for v, q in products[k].items() if v in kept}
    return [
        _integral(path, target, mesh, nodes, count, tolerance, dtype)
        for target, mesh, nodes, count in zip(targets, meshes, products, spent, strict=True)
    ]


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
    path: Segment,
    target: Target,
    mesh: Mesh,
    products: dict[float, Tensor],
    spent: int,
    tolerance: float,
    dtype: torch.dtype,
) -> TargetMap:
    weights = mesh.weights()
    integral = torch.zeros_like(next(iter(products.values())))
    for v in sorted(weights):
        integral.add_(products[v], alpha=weights[v])
    found, bound = path.map(integral), mesh.bound()
    error = abs(float(found.sum()) - mesh.delta) / mesh.scale
    ends = mesh.value[1.0], mesh.value[0.0]
    return TargetMap(target, found, *ends, spent, error, bound, bound <= tolerance, dtype)
