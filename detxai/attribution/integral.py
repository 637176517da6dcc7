"""Integrated gradients of many targets of one image, to a wanted error.

Written as a coroutine: it yields the path points it needs and is sent their values and gradients, so that the engine
can pack the points of many images together. The symbols are those of Sundararajan, Taly & Yan (2017):
x the image, b the baseline, α the position on the path, F a target, f(α) = ∇F · (x − b) its slope.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from functools import partial

import torch

from detxai.attribution.memory import Held
from detxai.attribution.points import Ask, Look, Point, Reply, Segment, TargetMap, relative_doubt
from detxai.attribution.quadrature import Mesh, Rule, cubic
from detxai.values import Target

#: Of the rules in `scripts/bench/compare_rules.py` the one with the best maps for its cost; it begins with 8 gradients.
DEFAULT_RULE = cubic()
#: Gradients computed again at a time.
AT_ONCE = 8


def integrated_gradients(
    path: Segment,
    targets: Sequence[Target],
    *,
    tolerance: float = 0.05,
    max_evaluations: int = 256,
    map_tolerance: float | None = None,
    rule: Rule = DEFAULT_RULE,
    dtype: torch.dtype = torch.float32,
) -> Ask:
    """Coroutine for the integrals of `targets` along `path`: refined until `error_bound` ≤ `tolerance`.

    All targets share the forward pass of a point. A target stops by itself; one that would need more than
    `max_evaluations` gradients is returned as it stands, not converged. One whose `map_error` is above `map_tolerance`
    goes on with all its panels halved, as long as evaluations last.
    """
    rule = rule.within(max_evaluations)
    meshes = [Mesh(rule) for _ in targets]
    held: list[dict[float, Held]] = [{} for _ in targets]
    by_target: dict[int, TargetMap] = {}
    while active := [k for k in range(len(targets)) if k not in by_target]:
        plan: dict[tuple[float, bool], list[int]] = {}
        for k in active:
            for v, gradient in meshes[k].missing().items():
                plan.setdefault((v, gradient), []).append(k)
        replies = yield [
            Point(path, rule.alpha(v), tuple(targets[k] for k in ks), gradient, dtype, field=path.field, needed=False)
            for (v, gradient), ks in plan.items()
        ]
        for ((v, _), ks), reply in zip(plan.items(), replies, strict=True):
            for row, k in enumerate(ks):
                meshes[k].value[v] = reply.values[row]
                if reply.slopes:
                    meshes[k].slope[v] = reply.slopes[row]
                    held[k].update((v, one) for one in reply.held[row : row + 1] if one is not None)
        del replies, reply
        done = {}
        for k in active:
            refine = partial(meshes[k].refine, tolerance)
            if not (meshes[k].bound() > tolerance and _grown(meshes[k], refine, max_evaluations)):
                gradients = held[k] if map_tolerance is None else dict(held[k])  # which are taken as they are added
                done[k] = yield from _integral(path, targets[k], meshes[k], gradients, tolerance, dtype)
        for k in (yield from _doubtful(done, map_tolerance)):
            if _grown(meshes[k], meshes[k].halve, max_evaluations):
                del done[k]
        for k in done:
            held[k].clear()
        by_target |= done
    return [by_target[k] for k in range(len(targets))]


def _doubtful(maps: dict[int, TargetMap], map_tolerance: float | None) -> Generator[Look, list[Reply], list[int]]:
    """Coroutine: which of the `maps` may be further off than `map_tolerance`; None: nothing is too far."""
    if map_tolerance is None:
        return []
    known = {k: torch.stack([m.doubt, m.map.norm()]) for k, m in maps.items() if m.doubt is not None}
    if not known:
        return []
    (reply,) = yield Look(torch.stack(list(known.values()), 1))
    far = zip(known, reply.values, reply.slopes, strict=True)
    return [k for k, doubt, size in far if relative_doubt(doubt, size) > map_tolerance]


def _grown(mesh: Mesh, refine: Callable[[], None], max_evaluations: int) -> bool:
    """Let `refine` divide the panels of `mesh` if it may still grow; False when it is final."""
    panels = mesh.panels
    refine()
    if len(mesh.slope) + sum(mesh.missing().values()) > max_evaluations:
        mesh.panels = panels
        return False
    return True


def _integral(
    path: Segment, target: Target, mesh: Mesh, held: dict[float, Held], tolerance: float, dtype: torch.dtype
) -> Generator[list[Point], list[Reply], TargetMap]:
    """Coroutine: the map of one target on its final `mesh`; gradients that had no room are computed again."""
    nodes = sorted(mesh.weights().items())
    coarse = mesh.coarse()
    integral = difference = torch.zeros(())
    for start in range(0, len(nodes), AT_ONCE):
        part = nodes[start : start + AT_ONCE]
        lost = [mesh.rule.alpha(v) for v, _ in part if v not in held]
        points = [Point(path, alpha, (target,), True, dtype, field=path.field) for alpha in lost]
        again = iter((yield points) if points else ())
        for v, weight in part:
            gradient = held.pop(v).gradient if v in held else next(again).product(0)
            if not integral.dim():
                integral, difference = torch.zeros_like(gradient), torch.zeros_like(gradient)
            integral.add_(gradient, alpha=weight)
            if coarse is not None:
                difference.add_(gradient, alpha=weight - coarse.get(v, 0.0))
    ends, bound = (mesh.value[1.0], mesh.value[0.0]), mesh.bound()
    target_map = TargetMap(target, path.map(integral), *ends, len(mesh.slope), bound, bound <= tolerance, dtype)
    return target_map if coarse is None else replace(target_map, doubt=path.map(difference).norm())
