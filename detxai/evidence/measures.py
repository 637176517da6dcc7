"""Maps and trials to numbers. Frames are source pixels; units those of the map (logits for a class)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from detxai.evidence.maps import grid
from detxai.values import Attribution, Box, Map, Pixels
from detxai.vocabulary import FADED, ONLY_BOX, SOFTENED, WITHOUT_BOX, WITHOUT_TOP

#: Share of the box's pixels whose part of the positive attribution is the concentration.
TOP_PIXELS = 0.05
#: A pixel is ground when every channel is within this many levels of the ground's colour.
GROUND_NEAR = 16
#: Below this change from baseline to picture, in logits, shares of it mean nothing.
TINY = 1e-3
#: The classes a lead is over: the best this many beside the one in question.
RIVALS = 4


def ground_mask(pixels: Pixels, colour: tuple[int, int, int] | None) -> NDArray[np.bool_] | None:
    """(height, width): where a picture shows its empty ground; None for a picture without one."""
    if colour is None:
        return None
    low = np.clip(np.array(colour) - GROUND_NEAR, 0, 255).astype(np.uint8)
    high = np.clip(np.array(colour) + GROUND_NEAR, 0, 255).astype(np.uint8)
    return np.asarray(((pixels >= low) & (pixels <= high)).all(-1))


def of_map(a: Attribution, box: Box, ground: NDArray[np.bool_] | None) -> dict[str, float | None]:
    """The measures that the map of `a` alone gives, by their names in `Evidence`; inside + outside = the picture."""
    positive = np.maximum(a.map, 0)
    whole, net = (float(m.sum(dtype=np.float64)) for m in (positive, a.map))
    cells = grid(a.map, box)
    net_inside = float(cells.sum())
    inside = min(float(grid(positive, box, 1).sum()), whole)
    outside, net_outside = whole - inside, net - net_inside
    magnitude = 2 * whole - net
    inner, outer = max(net_inside, 0.0), max(net_outside, 0.0)
    share = _area_share(box, a.map.shape)
    empty = None if ground is None else _ratio(float(np.abs(a.map[ground]).sum(dtype=np.float64)), magnitude)
    return {
        "net_inside": net_inside,
        "positive_inside": inside,
        "negative_inside": min(net_inside - inside, 0.0),
        "net_outside": net_outside,
        "positive_outside": outside,
        "negative_outside": min(net_outside - outside, 0.0),
        "one_sidedness": _ratio(net_inside, float(np.abs(cells).sum())),
        "outside_share": _ratio(outer, inner + outer),
        "coherence": _ratio(float(np.abs(cells).sum()), 2 * inside - net_inside),
        "area_share": share,
        "lift": _ratio(inside, whole * share),
        "concentration": concentration(positive, box),
        "ground_share": empty,
        "padding_share": _ratio(a.padding_mass, a.padding_mass + magnitude) or 0.0,
        "completeness_error": a.completeness_error,
    }


def near_edge(values: Map, box: Box, edge: str) -> float | None:
    """Share of |attribution| in the third of `box` that is nearest to its `edge`: 1/3 where all parts count alike.

    Of a map (height, width) of that edge's place, summed over 9 x 9 cells first; None where there is none.
    """
    cells = np.abs(grid(values, box, 9))
    third = {"left": cells[:, :3], "top": cells[:3], "right": cells[:, 6:], "bottom": cells[6:]}[edge]
    return _ratio(float(third.sum()), float(cells.sum()))


def _area_share(box: Box, shape: Sequence[int]) -> float:
    height, width = shape
    x, y = np.clip(box[::2], 0, width), np.clip(box[1::2], 0, height)
    return float((x[1] - x[0]) * (y[1] - y[0]) / (height * width))


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole > 0 else None


def concentration(positive: Map, box: Box) -> float | None:
    """Share of `positive` (height, width) that the TOP_PIXELS of the box's pixels hold; None where there is none."""
    left, top = (max(math.floor(v), 0) for v in box[:2])
    part = positive[top : math.ceil(box[3]), left : math.ceil(box[2])].ravel()
    total = float(part.sum(dtype=np.float64))
    if total <= 0:
        return None
    count = max(1, round(TOP_PIXELS * part.size))
    return float(np.partition(part, -count)[-count:].sum(dtype=np.float64)) / total


def rivals(class_id: int, order: Sequence[int]) -> list[int]:
    """The best RIVALS classes of `order` (class ids by falling score) beside `class_id`."""
    return [i for i in order if i != class_id][:RIVALS]


def of_trials(
    class_id: int,
    others: Sequence[int],
    logit: float,
    at_baseline: float | None,
    trials: Sequence[tuple[str, str, Mapping[int, float]]],
) -> dict[str, Any]:
    """The measures of `trials` (what, fill, logits by class id), by their names in `Evidence`.

    `logit` of `class_id` at the picture itself, and `at_baseline`; `others`: the rivals its lead is over.
    """
    rows: list[dict[str, Any]] = []
    kept: dict[str, list[float]] = {}
    leads: dict[str, list[float]] = {}
    way: dict[str, float] = {}
    for what, fill, logits in trials:
        own = logits[class_id]
        other = max(others, key=lambda i: logits[i], default=None)
        lead = None if other is None else own - logits[other]
        rows.append({"what": what, "fill": fill, "score": sigmoid(own), "logit": own, "lead": lead, "other": other})
        # As a difference of logarithms: the scores themselves may be too small to divide.
        kept.setdefault(what, []).append(math.exp(min(log_sigmoid(own) - log_sigmoid(logit), 0.0)))
        if lead is not None:
            leads.setdefault(what, []).append(lead)
        # The first fill is the baseline of the map: between it and the picture lies all there is to explain.
        if what not in way and at_baseline is not None and abs(logit - at_baseline) > TINY:
            way[what] = (own - at_baseline) / (logit - at_baseline)
    earlier, later = FADED
    mean_kept, mean_lead = ({what: sum(v) / len(v) for what, v in of.items()} for of in (kept, leads))
    return {
        "necessity": 1 - mean_kept[WITHOUT_BOX] if rows else None,
        "necessity_top": 1 - mean_kept[WITHOUT_TOP] if rows else None,
        "sufficiency": mean_kept[ONLY_BOX] if rows else None,
        "lead_only_box": mean_lead.get(ONLY_BOX),
        "lead_softened": mean_lead.get(SOFTENED),
        "lead_faded": _mean([lead for what in FADED for lead in leads.get(what, ())]),
        "early_share": way.get(earlier),
        "half_share": way.get(later),
        "trials": rows,
    }


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def sigmoid(logit: float) -> float:
    """The score in [0, 1] of which `logit` is the log-odds."""
    return math.exp(log_sigmoid(logit))


def log_sigmoid(logit: float) -> float:
    """Logarithm of `sigmoid`, without overflow."""
    return min(logit, 0.0) - math.log1p(math.exp(-abs(logit)))


def rank_correlation(a: NDArray[Any], b: NDArray[Any]) -> float | None:
    """Spearman's rank correlation of two arrays of one shape, ties at their mean rank; None for a constant one."""
    ranks = [_ranks(np.asarray(v).ravel()) for v in (a, b)]
    centred = [r - r.mean() for r in ranks]
    scale = math.sqrt(float((centred[0] ** 2).sum()) * float((centred[1] ** 2).sum()))
    return float((centred[0] * centred[1]).sum()) / scale if scale > 0 else None


def _ranks(values: NDArray[Any]) -> NDArray[np.float64]:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = counts.cumsum()
    return np.asarray((last - (counts - 1) / 2)[inverse], np.float64)
