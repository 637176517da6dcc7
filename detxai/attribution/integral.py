"""Integrated gradients of many targets of one image, to a wanted error.

Written as a coroutine: it yields the path points it needs and is sent their values and gradients, so that the engine
can pack the points of many images together. The symbols are those of Sundararajan, Taly & Yan (2017):
x the image, b the baseline, α the position on the path, F a target, f(α) = ∇F · (x − b) its slope.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from functools import partial

import torch
from torch import Tensor

from detxai.attribution.memory import Held
from detxai.attribution.points import Ask, Asked, Point, Reply, Segment, Sum, TargetMap
from detxai.attribution.quadrature import Mesh, Rule, cubic
from detxai.values import Target

#: Of the rules in `scripts/bench/compare_rules.py` the one with the best maps for its cost; it begins with 8 gradients.
DEFAULT_RULE = cubic()
#: Gradients computed again at a time.
AT_ONCE = 8

#: Places on a path, and what the gradient of each weighs, a weight a sum.
Nodes = list[tuple[float, tuple[float, ...]]]


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
        final: dict[int, tuple[Target, Mesh, dict[float, Held]]] = {}
        for k in active:
            refine = partial(meshes[k].refine, tolerance)
            if not (meshes[k].bound() > tolerance and _grown(meshes[k], refine, max_evaluations)):
                gradients = held[k] if map_tolerance is None else dict(held[k])  # which are taken as they are added
                final[k] = targets[k], meshes[k], gradients
        done = yield from _maps(path, final, tolerance, dtype)
        for k in [k for k, m in done.items() if map_tolerance is not None and (m.map_error or 0.0) > map_tolerance]:
            if _grown(meshes[k], meshes[k].halve, max_evaluations):
                del done[k]
        for k in done:
            held[k].clear()
        by_target |= done
    return [by_target[k] for k in range(len(targets))]


def _grown(mesh: Mesh, refine: Callable[[], None], max_evaluations: int) -> bool:
    """Let `refine` divide the panels of `mesh` if it may still grow; False when it is final."""
    panels = mesh.panels
    refine()
    if len(mesh.slope) + sum(mesh.missing().values()) > max_evaluations:
        mesh.panels = panels
        return False
    return True


def _maps(
    path: Segment, final: dict[int, tuple[Target, Mesh, dict[float, Held]]], tolerance: float, dtype: torch.dtype
) -> Generator[Asked, list[Reply], dict[int, TargetMap]]:
    """Coroutine: the maps of targets on their `final` meshes, of gradients which are taken from where they are held."""
    nodes = {k: _weighted(mesh) for k, (_, mesh, _) in final.items()}
    whole = [k for k, (_, _, held) in final.items() if all(v in held for v, _ in nodes[k])]
    # No name holds the sums here, so that each lets go of its gradients once it is made.
    replies = (yield [_sum(path, nodes[k], final[k][2], mapped=True) for k in whole]) if whole else ()
    known = dict(zip(whole, replies, strict=True))
    del replies
    maps: dict[int, TargetMap] = {}
    for k, (target, mesh, held) in final.items():
        own = known.pop(k) if k in known else (yield from _again(path, target, mesh.rule, nodes[k], held, dtype))
        total, bound = own.product(0), mesh.bound()
        maps[k] = TargetMap(
            target,
            total[0].double(),
            mesh.value[1.0],
            mesh.value[0.0],
            len(mesh.slope),
            bound,
            bound <= tolerance,
            dtype,
            doubt=own.values[0] if len(total) > 1 else None,
            size=own.slopes[0],
        )
    return maps


def _weighted(mesh: Mesh) -> Nodes:
    """Where the gradients of a map lie, and what each weighs in it and in its distance to the map of every other."""
    coarse = mesh.coarse()
    return [(v, (w,) if coarse is None else (w, w - coarse.get(v, 0.0))) for v, w in sorted(mesh.weights().items())]


def _sum(path: Segment, nodes: Nodes, held: dict[float, Held], before: Tensor | None = None, *, mapped: bool) -> Sum:
    """Of the gradients at `nodes`, which are not held here any more then."""
    return Sum(path, [held.pop(v) for v, _ in nodes], [weights for _, weights in nodes], before, mapped)


def _again(
    path: Segment, target: Target, rule: Rule, nodes: Nodes, held: dict[float, Held], dtype: torch.dtype
) -> Generator[Asked, list[Reply], Reply]:
    """Coroutine: maps of one target of which not all gradients had room: they are computed again, some at a time."""
    total: Tensor | None = None
    for start in range(0, len(nodes), AT_ONCE):
        part, rest = nodes[start : start + AT_ONCE], nodes[start + AT_ONCE :]
        lost = [v for v, _ in part if v not in held]
        points = [Point(path, rule.alpha(v), (target,), True, dtype, field=path.field) for v in lost]
        replies = (yield points) if points else []
        held.update((v, reply.kept(0)) for v, reply in zip(lost, replies, strict=True))
        del replies
        (summed,) = yield [_sum(path, part, held, total, mapped=not rest)]
        total = summed.product(0)
    return summed
