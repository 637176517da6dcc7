"""Evidence of an explained image: what is tried on the device, and what becomes of map and trials."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from detxai.attribution.ablation import Case, TrialOutcome, trials, without_neighbours
from detxai.attribution.methods import Settings, ig
from detxai.attribution.points import Asked, Point, Reply, Segment, TargetMap
from detxai.evidence import measures
from detxai.evidence.calibration import EvidenceCalibration
from detxai.evidence.maps import grid
from detxai.evidence.model import Contrast, Evidence, EvidenceLevel, Neighbour
from detxai.evidence.neighbours import near, rests_on
from detxai.evidence.verdict import DEFAULTS, verdict
from detxai.inputs.letterbox import boxes_to_letterbox
from detxai.run.prepare import Pictures
from detxai.run.results import Explanation
from detxai.run.targets import MapKey, Variant, WantedTarget, rival
from detxai.statistics import rank_correlation
from detxai.values import Detection, Letterbox, Map

Maps = Mapping[Variant, Sequence[TargetMap]]


def assessed_maps(wanted: Sequence[WantedTarget], variants: Sequence[Variant]) -> list[MapKey]:
    """The maps that get evidence: of the predicted class under the first method, of classes asked for under all."""
    return [
        (variant, j)
        for variant in variants
        for j, item in enumerate(wanted)
        if item.target.kind == "class" and (item.as_class or variant == variants[0])
    ]


@dataclass(frozen=True)
class TrialPlan:
    """What trials of a run need: how much evidence is wanted, and the arithmetic. Of a black box no logits can be
    pinned: nothing is tried."""

    level: EvidenceLevel
    black_box: bool
    settings: Settings
    targets_at_once: int

    def trials(
        self,
        shown: Pictures,
        detections: Sequence[Detection],
        wanted: Sequence[WantedTarget],
        maps: Maps,
    ) -> Generator[list[Point], list[Reply], dict[MapKey, list[TrialOutcome]]]:
        """Coroutine: the trials of every map that gets evidence."""
        if self.level is EvidenceLevel.NONE or self.black_box:
            return {}
        owners = _owners(wanted, maps)
        cases = [_case(detections[index], keys, wanted, maps) for index, keys in owners.items()]
        thorough = len(shown.fills) if self.level is EvidenceLevel.FULL else 1
        outcomes = yield from trials(shown.x, shown.fills, shown.softened, cases, self.settings.dtype, thorough)
        return {
            key: [t for t in column if t.map in (None, k)]
            for keys, column in zip(owners.values(), outcomes, strict=True)
            for k, key in enumerate(keys)
        }

    def neighbours(
        self,
        shown: Pictures,
        letterbox: Letterbox,
        detections: Sequence[Detection],
        wanted: Sequence[WantedTarget],
        maps: Maps,
    ) -> Generator[list[Point], list[Reply], dict[int, dict[int, dict[int, float]]]]:
        """Coroutine, full evidence: by detection and neighbour the logits by class id that are left without it.

        Each becomes the first of the fills. A label that was missed is nobody's neighbour.
        """
        if self.level is not EvidenceLevel.FULL or self.black_box:
            return {}
        places = [tuple(box) for box in boxes_to_letterbox([d.box for d in detections], letterbox).tolist()]
        owners, there = _owners(wanted, maps), [k for k, d in enumerate(detections) if d.kind != "missed"]
        cases = [
            (_case(detections[i], keys, wanted, maps), {k: places[k] for k in near(i, places, there)})
            for i, keys in owners.items()
        ]
        fill = next(iter(shown.fills.values()))
        left = yield from without_neighbours(shown.x, fill, cases, self.settings.dtype)
        return dict(zip(owners, left, strict=True))

    def second_maps(
        self, shown: Pictures, wanted: Sequence[WantedTarget], maps: Maps
    ) -> Generator[Asked, list[Reply], dict[MapKey, tuple[str, TargetMap]]]:
        """Coroutine, full evidence: integrals from the last of `fills` for every integral that gets evidence."""
        if self.level is not EvidenceLevel.FULL:
            return {}
        keys = [(v, j) for v, j in assessed_maps(wanted, list(maps)) if maps[v][j].converged is not None]
        name = list(shown.fills)[-1]
        second: dict[MapKey, tuple[str, TargetMap]] = {}
        for start in range(0, len(keys), self.targets_at_once):
            some = keys[start : start + self.targets_at_once]
            column = yield from ig(
                [Segment(shown.x, shown.fills[name])], [wanted[j].target for _, j in some], self.settings
            )
            second |= {key: (name, one) for key, one in zip(some, column, strict=True)}
        return second


def _owners(wanted: Sequence[WantedTarget], maps: Maps) -> dict[int, list[MapKey]]:
    """The maps that get evidence by the number of their detection."""
    owners: dict[int, list[MapKey]] = {}
    for key in assessed_maps(wanted, list(maps)):
        owners.setdefault(wanted[key[1]].detection, []).append(key)
    return owners


def _case(d: Detection, keys: Sequence[MapKey], wanted: Sequence[WantedTarget], maps: Maps) -> Case:
    """The trials of one detection, whose maps `keys` get evidence."""
    target = wanted[keys[0][1]].target
    assert target.box is not None
    best = [c.class_id for c in d.classes[: measures.RIVALS + 1]]
    ids = dict.fromkeys([*(wanted[j].target.class_id for _, j in keys), *best])
    pinned = tuple(replace(target, class_id=i) for i in ids)
    return Case(target.box, pinned, tuple(maps[variant][j].map for variant, j in keys))


def evidence(
    d: Detection,
    item: Explanation,
    ground: NDArray[np.bool_] | None,
    outcomes: Sequence[TrialOutcome],
    calibration: EvidenceCalibration | None = None,
    contrasts: Sequence[Explanation] = (),
    second: tuple[str, Map] | None = None,
    neighbours: tuple[Neighbour, ...] = (),
) -> Evidence:
    """The evidence for the class that `item` explains at `d`.

    `ground` (height, width): where the picture is empty; `calibration`: of this model, for maps of its own method;
    `contrasts`: maps of differences at `d`; `second`: another baseline's name and its map, source pixels;
    `neighbours`: what is left without each.
    """
    a, class_id = item.attribution, item.attribution.target.class_id
    logits = {c.class_id: c.logit for c in d.classes}
    others = measures.rivals(class_id, list(logits))
    of_map = measures.of_map(a, item.sums, ground)
    rows = [(t.what, t.fill, t.logits) for t in outcomes]
    of_trials = measures.of_trials(class_id, others, a.value_at_input, a.value_at_baseline, rows)
    margin = logits[class_id] - logits[others[0]] if others else None
    numbers: dict[str, float | None] = {**vars(of_map), **of_trials.numbers, "margin": margin}
    limits, trust, calibrated = DEFAULTS, None, False
    if calibration is not None and (a.method, a.gradient) == (calibration.method, "plain"):
        limits, calibrated = calibration.thresholds, True
        numbers["typicality"] = calibration.typicality(class_id, item.sums.cells)
        trust = calibration.trust(numbers, a.value_at_input) if class_id == d.class_id else None
    strongest = rival(d, of_trials.rival)
    word, reasons = verdict(numbers, a.converged, "" if strongest is None else strongest.class_name, limits)
    said = {"verdict": word, "reasons": tuple(reasons), "calibrated": calibrated, "trust": trust}
    more: dict[str, object] = {"runner_up": rival(d, next(iter(others), None)), "trials": of_trials.rows}
    more |= {"neighbours": neighbours or None, "rests_on": rests_on(neighbours)}
    return Evidence.model_validate({**numbers, **said, **more, **_thorough(d, item, contrasts, second)})


def _thorough(
    d: Detection, item: Explanation, contrasts: Sequence[Explanation], second: tuple[str, Map] | None
) -> dict[str, object]:
    """What full evidence adds: contrasts of the class, and how well its map agrees with that of another baseline."""
    against = [c for c in contrasts if c.attribution.target.class_id == item.attribution.target.class_id]
    more: dict[str, object] = {"contrasts": tuple(_contrast(d, c) for c in against) or None}
    if second is not None:
        name, values = second
        more |= {
            "second_baseline": name,
            "baseline_agreement": rank_correlation(item.sums.cells, grid(values, d.box)),
        }
    return more


def _contrast(d: Detection, item: Explanation) -> Contrast:
    other = rival(d, item.attribution.target.other)
    assert other is not None
    numbers = measures.of_map(item.attribution, item.sums, None)
    return Contrast(
        class_id=other.class_id,
        class_name=other.class_name,
        net_inside=numbers.net_inside,
        positive_inside=numbers.positive_inside,
        negative_inside=numbers.negative_inside,
        net_outside=numbers.net_outside,
        converged=item.attribution.converged,
    )
