"""Evidence of an explained image: what is tried on the device, and what becomes of map and trials."""

from __future__ import annotations

from collections.abc import Generator, Hashable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from detxai.attribution.path import Point, Reply, TargetMap
from detxai.attribution.trials import Case, Trial, trials
from detxai.data import Attribution, Detection, Target
from detxai.evidence import measures
from detxai.evidence.model import Evidence, Rival
from detxai.evidence.verdict import verdict
from detxai.plan import Plan

#: (detection, target, asked as another class).
Wanted = tuple[int, Target, bool]
#: A map of an image: which method, and which of what is wanted.
Key = tuple[Hashable, int]


def judged(wanted: Sequence[Wanted], methods: Sequence[Hashable]) -> list[Key]:
    """The maps that get evidence: of the predicted class under the first method, of classes asked for under all."""
    return [
        (method, j)
        for method in methods
        for j, (_, target, as_class) in enumerate(wanted)
        if target.kind == "class" and (as_class or method == methods[0])
    ]


def tried(
    plan: Plan,
    x: Tensor,
    fills: Mapping[str, Tensor],
    detections: Sequence[Detection],
    wanted: Sequence[Wanted],
    maps: Mapping[Any, Sequence[TargetMap]],
) -> Generator[list[Point], list[Reply], dict[Key, list[Trial]]]:
    """Coroutine: the trials of every map that gets evidence; none for black boxes, whose logits cannot be pinned."""
    if plan.config.attribution.evidence == "none" or not plan.info.differentiable:
        return {}
    owners: dict[int, list[Key]] = {}
    for method, j in judged(wanted, list(maps)):
        owners.setdefault(wanted[j][0], []).append((method, j))
    cases = []
    for index, keys in owners.items():
        target = wanted[keys[0][1]][1]
        assert target.box is not None
        best = [c.class_id for c in detections[index].classes[: measures.RIVALS + 1]]
        ids = dict.fromkeys([*(wanted[j][1].class_id for _, j in keys), *best])
        cases.append(
            Case(
                target.box,
                tuple(replace(target, class_id=i) for i in ids),
                tuple(maps[method][j].map for method, j in keys),
            )
        )
    found = yield from trials(x, fills, cases, plan.dtype)
    return {
        key: [t for t in column if t.map in (None, k)]
        for keys, column in zip(owners.values(), found, strict=True)
        for k, key in enumerate(keys)
    }


def evidence(d: Detection, a: Attribution, ground: NDArray[np.bool_] | None, tried: Sequence[Trial]) -> Evidence:
    """The evidence for the class that `a` explains at `d`. `ground` (height, width): where the picture is empty."""
    class_id = a.target.class_id
    order = [c.class_id for c in d.classes]
    logits = {c.class_id: c.logit for c in d.classes}
    others = measures.rivals(class_id, order)
    numbers: dict[str, Any] = measures.of_map(a, d.box, ground)
    rows = [(t.what, t.fill, t.logits) for t in tried]
    numbers |= measures.of_trials(class_id, others, logits[class_id], rows)
    if others:
        next_best = next(c for c in d.classes if c.class_id == others[0])
        numbers["runner_up"] = Rival(class_id=next_best.class_id, class_name=next_best.class_name)
        numbers["margin"] = logits[class_id] - next_best.logit
    else:
        numbers |= {"runner_up": None, "margin": None}
    word, reasons = verdict(numbers, a.converged)
    return Evidence(verdict=word, reasons=tuple(reasons), calibrated=False, **numbers)
