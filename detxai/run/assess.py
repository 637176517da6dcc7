"""Evidence of an explained image: what is tried on the device, and what becomes of map and trials."""

from __future__ import annotations

from collections.abc import Generator, Hashable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from detxai.attribution.ablation import Case, Trial, trials
from detxai.attribution.methods import ig
from detxai.attribution.points import Point, Reply, Segment, TargetMap
from detxai.evidence import measures
from detxai.evidence.calibration import Calibration
from detxai.evidence.maps import grid
from detxai.evidence.model import Contrast, Evidence, Rival
from detxai.evidence.verdict import DEFAULTS, verdict
from detxai.run.plan import Plan
from detxai.values import Attribution, Detection, Map, Target
from detxai.vocabulary import ONLY_BOX

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
    softened: Tensor,
    detections: Sequence[Detection],
    wanted: Sequence[Wanted],
    maps: Mapping[Any, Sequence[TargetMap]],
) -> Generator[list[Point], list[Reply], dict[Key, list[Trial]]]:
    """Coroutine: the trials of every map that gets evidence; none for black boxes, whose logits cannot be pinned."""
    if plan.config.attribution.evidence == "none" or plan.network is None:
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
    thorough = len(fills) if plan.config.attribution.evidence == "full" else 1
    found = yield from trials(x, fills, softened, cases, plan.dtype, thorough)
    return {
        key: [t for t in column if t.map in (None, k)]
        for keys, column in zip(owners.values(), found, strict=True)
        for k, key in enumerate(keys)
    }


def again(
    plan: Plan,
    x: Tensor,
    fills: Mapping[str, Tensor],
    wanted: Sequence[Wanted],
    maps: Mapping[Any, Sequence[TargetMap]],
) -> Generator[list[Point], list[Reply], dict[Key, tuple[str, TargetMap]]]:
    """Coroutine, `--evidence full`: integrals from the second of `fills` for every integral that gets evidence."""
    if plan.config.attribution.evidence != "full":
        return {}
    keys = [key for key in judged(wanted, list(maps)) if maps[key[0]][key[1]].converged is not None]
    name = list(fills)[-1]
    found: dict[Key, tuple[str, TargetMap]] = {}
    for start in range(0, len(keys), plan.targets_at_once):
        part = keys[start : start + plan.targets_at_once]
        column = yield from ig([Segment(x, fills[name])], [wanted[j][1] for _, j in part], plan.settings)
        found |= {key: (name, second) for key, second in zip(part, column, strict=True)}
    return found


def runner_up(d: Detection) -> int | None:
    """The best class at `d` beside its own; None where the model has one."""
    return next((c.class_id for c in d.classes if c.class_id != d.class_id), None)


def rival(d: Detection, class_id: int | None) -> Rival | None:
    """The class `class_id` at `d`, as records name it."""
    names = {c.class_id: c.class_name for c in d.classes}
    return None if class_id is None else Rival(class_id=class_id, class_name=names[class_id])


def full(
    found: Evidence,
    d: Detection,
    a: Attribution,
    mates: Sequence[Attribution],
    baseline: str,
    second: Map | None,
) -> Evidence:
    """`found` with its contrasts among `mates`, and how well `a` agrees with the map `second` from `baseline`."""
    contrasts = []
    for mate in mates:
        other = rival(d, mate.target.other)
        if other is not None and mate.target.class_id == a.target.class_id:
            numbers: dict[str, Any] = measures.of_map(mate, d.box, None) | other.model_dump()
            contrasts.append(Contrast(**numbers, converged=mate.converged))
    more: dict[str, Any] = {"contrasts": tuple(contrasts) or None}
    if second is not None:
        cells = [grid(values, d.box) for values in (a.map, second)]
        more |= {"second_baseline": baseline, "baseline_agreement": measures.rank_correlation(*cells)}
    return Evidence(**(dict(found) | more))


def evidence(
    d: Detection,
    a: Attribution,
    ground: NDArray[np.bool_] | None,
    tried: Sequence[Trial],
    calibration: Calibration | None = None,
) -> Evidence:
    """The evidence for the class that `a` explains at `d`.

    `ground` (height, width): where the picture is empty; `calibration`: of this model, for maps of its own method.
    """
    class_id = a.target.class_id
    order = [c.class_id for c in d.classes]
    logits = {c.class_id: c.logit for c in d.classes}
    others = measures.rivals(class_id, order)
    next_best = rival(d, next(iter(others), None))
    numbers: dict[str, Any] = measures.of_map(a, d.box, ground)
    rows = [(t.what, t.fill, t.logits) for t in tried]
    numbers |= measures.of_trials(class_id, others, a.value_at_input, a.value_at_baseline, rows)
    numbers["runner_up"] = next_best
    numbers["margin"] = None if next_best is None else logits[class_id] - logits[next_best.class_id]
    alone = [t for t in numbers["trials"] if t["what"] == ONLY_BOX and t["other"] is not None]
    strongest = rival(d, min(alone, key=lambda t: t["lead"])["other"]) if alone else None
    limits = DEFAULTS
    fits = calibration is not None and (a.method, a.gradient) == (calibration.method, "plain")
    if calibration is not None and fits:
        limits = calibration.thresholds
        numbers["typicality"] = calibration.typicality(class_id, grid(a.map, d.box))
        own = class_id == d.class_id
        numbers["trust"] = calibration.trust(numbers, a.value_at_input) if own else None
    word, reasons = verdict(numbers, a.converged, "" if strongest is None else strongest.class_name, limits)
    return Evidence(verdict=word, reasons=tuple(reasons), calibrated=fits, **numbers)
