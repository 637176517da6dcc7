"""Maps and trials to numbers. Frames are source pixels; units those of the map (logits for a class)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from detxai.evidence.maps import MapSums, ratio
from detxai.evidence.model import Trial
from detxai.values import Attribution, Pixels
from detxai.vocabulary import FADED, ONLY_BOX, SOFTENED, WITHOUT_BOX, WITHOUT_TOP

#: A pixel is ground when every channel is within this many levels of the ground's colour.
GROUND_NEAR = 16
#: Below this change from baseline to picture, in logits, shares of it mean nothing.
TINY = 1e-3
#: The classes a lead is over: the best this many beside the one in question.
RIVALS = 4


def ground_mask(pixels: Pixels, colour: tuple[int, ...] | None) -> NDArray[np.bool_] | None:
    """(height, width): where a picture shows its empty ground; None for a picture without one."""
    if colour is None:
        return None
    import cv2

    low, high = (np.clip(np.array(colour, float) + by, 0, 255) for by in (-GROUND_NEAR, GROUND_NEAR))
    if len(colour) > 3:  # than OpenCV compares
        return np.asarray(((pixels >= low) & (pixels <= high)).all(2))
    return np.asarray(cv2.inRange(pixels, low, high)) > 0


@dataclass(frozen=True)
class MapMeasures:
    """What a map says of the class at a box, each by its name in `Evidence`; inside + outside = the picture."""

    net_inside: float
    positive_inside: float
    negative_inside: float
    net_outside: float
    positive_outside: float
    negative_outside: float
    one_sidedness: float | None
    outside_share: float | None
    coherence: float | None
    area_share: float
    lift: float | None
    concentration: float | None
    ground_share: float | None
    padding_share: float
    completeness_error: float | None


def of_map(a: Attribution, sums: MapSums, ground: NDArray[np.bool_] | None) -> MapMeasures:
    """The measures of the map of `a` with its `sums`; `ground` (height, width): where the picture is empty."""
    net_inside, inside = sums.net_inside, sums.positive_inside
    outside, net_outside = sums.positive - inside, sums.net - net_inside
    magnitude, cells = 2 * sums.positive - sums.net, float(np.abs(sums.cells).sum())
    inner, outer = max(net_inside, 0.0), max(net_outside, 0.0)
    empty = None if ground is None else ratio(float(np.abs(a.map[ground]).sum(dtype=np.float64)), magnitude)
    return MapMeasures(
        net_inside=net_inside,
        positive_inside=inside,
        negative_inside=min(net_inside - inside, 0.0),
        net_outside=net_outside,
        positive_outside=outside,
        negative_outside=min(net_outside - outside, 0.0),
        one_sidedness=ratio(net_inside, cells),
        outside_share=ratio(outer, inner + outer),
        coherence=ratio(cells, 2 * inside - net_inside),
        area_share=sums.area_share,
        lift=ratio(inside, sums.positive * sums.area_share),
        concentration=sums.concentration,
        ground_share=empty,
        padding_share=ratio(a.padding_mass, a.padding_mass + magnitude) or 0.0,
        completeness_error=a.completeness_error,
    )


def rivals(class_id: int, order: Sequence[int]) -> list[int]:
    """The best RIVALS classes of `order` (class ids by falling score) beside `class_id`."""
    return [i for i in order if i != class_id][:RIVALS]


@dataclass(frozen=True)
class TrialMeasures:
    """What trials say of the class at a box, each by its name in `Evidence`; None where there was no such trial.

    `rows`: the trials themselves, as records hold them; `rival`: the class that comes nearest with only the box kept.
    """

    necessity: float | None
    necessity_top: float | None
    sufficiency: float | None
    lead_only_box: float | None
    lead_softened: float | None
    lead_faded: float | None
    early_share: float | None
    half_share: float | None
    rows: tuple[Trial, ...]
    rival: int | None

    @property
    def numbers(self) -> dict[str, float | None]:
        """The measures by name."""
        return {name: value for name, value in vars(self).items() if name not in ("rows", "rival")}


#: A trial before it is measured: what was changed, by which fill, and the logits by class id.
TrialLogits = tuple[str, str, Mapping[int, float]]


def of_trials(
    class_id: int, others: Sequence[int], logit: float, at_baseline: float | None, trials: Sequence[TrialLogits]
) -> TrialMeasures:
    """The measures of `trials`: `logit` of `class_id` at the picture itself, and `at_baseline`.

    `others`: the rivals its lead is over.
    """
    rows: list[Trial] = []
    kept: dict[str, list[float]] = {}
    leads: dict[str, list[float]] = {}
    way: dict[str, float] = {}
    nearest: dict[int, float] = {}
    for what, fill, logits in trials:
        own = logits[class_id]
        other = max(others, key=lambda i: logits[i], default=None)
        lead = None if other is None else own - logits[other]
        rows.append(Trial(what=what, fill=fill, score=sigmoid(own), logit=own, lead=lead, other=other))  # type: ignore[arg-type]  # checked by the model
        # As a difference of logarithms: the scores themselves may be too small to divide.
        kept.setdefault(what, []).append(math.exp(min(log_sigmoid(own) - log_sigmoid(logit), 0.0)))
        if lead is not None and other is not None:
            leads.setdefault(what, []).append(lead)
            if what == ONLY_BOX:
                nearest[other] = min(lead, nearest.get(other, math.inf))
        # The first fill is the baseline of the map: between it and the picture lies all there is to explain.
        if what not in way and at_baseline is not None and abs(logit - at_baseline) > TINY:
            way[what] = (own - at_baseline) / (logit - at_baseline)
    earlier, later = FADED
    mean_kept, mean_lead = ({what: sum(v) / len(v) for what, v in of.items()} for of in (kept, leads))
    return TrialMeasures(
        necessity=1 - mean_kept[WITHOUT_BOX] if rows else None,
        necessity_top=1 - mean_kept[WITHOUT_TOP] if rows else None,
        sufficiency=mean_kept[ONLY_BOX] if rows else None,
        lead_only_box=mean_lead.get(ONLY_BOX),
        lead_softened=mean_lead.get(SOFTENED),
        lead_faded=_mean([lead for what in FADED for lead in leads.get(what, ())]),
        early_share=way.get(earlier),
        half_share=way.get(later),
        rows=tuple(rows),
        rival=min(nearest, key=lambda i: nearest[i], default=None),
    )


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def sigmoid(logit: float) -> float:
    """The score in [0, 1] of which `logit` is the log-odds."""
    return math.exp(log_sigmoid(logit))


def log_sigmoid(logit: float) -> float:
    """Logarithm of `sigmoid`, without overflow."""
    return min(logit, 0.0) - math.log1p(math.exp(-abs(logit)))
