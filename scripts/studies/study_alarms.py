"""Which boxes do the verdict's rules bother, right ones and wrong ones, and which limits of the leads catch most?

    python scripts/samples/make_xrays.py --out harder --count 260 --seed 91 --harder
    python scripts/studies/study_alarms.py --images harder/images --labels harder/labels [--model FILE] [--tree DIR]

Prints, for the rules as they stand: what they call weak or worse, and unsupported, of the right and of the wrong boxes,
all together, those that forwards decide, the two leads, and those that look at the map; what each rule says of them,
and what it alone says (a rule that alone bothers about as many right boxes as wrong ones does not earn its alarms);
among the limits of `lead_only_box` and `lead_softened` in steps of half a logit that bother no more right boxes than
the present ones, those that catch most of the wrong; and how many wrong boxes are among the first of the list, in the
order of `detxai list`, of the score alone, and of others. Intervals are 95 %, bootstrapped by picture.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import study_evidence as study
import study_tools as tools
from numpy.typing import NDArray

from detxai.evidence.verdict import DEFAULTS, RULES, Thresholds

ONLY_BOX, SOFTENED = "lead_only_box", "lead_softened"
#: The rules that together decide less: no map is needed for the forwards, none of the forwards for the map.
FORWARDS = (ONLY_BOX, SOFTENED, "sufficiency", "necessity")
STEPS = np.arange(0, 6.5, 0.5)
#: Places in the list up to which wrong boxes are counted.
FIRST = (20, 40, 80)
Grades = NDArray[np.int64]


def grades(evidence: Sequence[Mapping[str, Any]], limits: Thresholds) -> dict[str, Grades]:
    """By rule that has limits: 0 good, 1 weak, 2 unsupported, of every box."""
    graded = {}
    for rule in (rule for rule in RULES if rule.measure in limits):
        values = [e.get(rule.measure) for e in evidence]
        graded[rule.measure] = np.array([0 if v is None else rule.grade(v, limits[rule.measure]) for v in values])
    return graded


def worst(by_rule: Mapping[str, Grades]) -> Grades:
    """The grade of each box: its worst rule decides."""
    return np.max(list(by_rule.values()), axis=0)


def share(hit: NDArray[np.bool_]) -> str:
    return f"{hit.mean():.1%}" if len(hit) else "–"


def by_rule(graded: Mapping[str, Grades], right: NDArray[np.bool_]) -> str:
    """What each rule says, and what it says where all others are content."""
    rows = []
    for name, own in graded.items():
        others = worst({k: v for k, v in graded.items() if k != name})
        alone = (own > 0) & (others == 0)
        hits = (own > 0, own > 1, alone)
        rows.append([name, *(share(hit[who]) for hit in hits for who in (right, ~right))])
    head = ("rule", "weak or worse: right", "wrong", "unsupported: right", "wrong", "alone: right", "wrong")
    return tools.table(rows, head)


def interval(hit: NDArray[np.bool_], among: NDArray[np.bool_], photos: Sequence[str]) -> str:
    """Share of `hit` in `among`, with its interval."""
    i = tools.estimate(hit, among.astype(float), photos, lambda h, a, w: (w * a * h).sum(1) / (w * a).sum(1))
    return f"{100 * i.value:.1f} % ({100 * i.low:.0f} to {100 * i.high:.0f})"


def by_kind(graded: Mapping[str, Grades], right: NDArray[np.bool_], photos: Sequence[str]) -> str:
    """What all rules say together, and what some would without the others; the difference in AUROC from all."""
    every, rows = -worst(graded).astype(float), []
    for name, kept in (
        ("all rules", list(graded)),
        ("forwards alone", FORWARDS),
        ("the two leads alone", FORWARDS[:2]),
        ("the map alone", [k for k in graded if k not in FORWARDS]),
    ):
        words = worst({k: graded[k] for k in kept})
        cells = [interval(words > least, who, photos) for least in (0, 1) for who in (right, ~right)]
        rows.append([name, *cells, tools.difference(right, -words.astype(float), every, photos)])
    head = ("verdict of", "weak or worse: right", "wrong", "unsupported: right", "wrong", "AUROC over all rules")
    return tools.table(rows, head)


def best_leads(evidence: Sequence[Mapping[str, Any]], right: NDArray[np.bool_]) -> str:
    """Weak limits of the two leads that catch most wrong boxes at no more bothered right ones than DEFAULTS."""
    present = worst(grades(evidence, DEFAULTS)) > 0
    most = present[right].mean()
    rest = worst(grades(evidence, {k: v for k, v in DEFAULTS.items() if k not in (ONLY_BOX, SOFTENED)})) > 0
    only, soft = (np.array([np.inf if e.get(k) is None else e[k] for e in evidence]) for k in (ONLY_BOX, SOFTENED))
    tried = {(a, b): rest | (only < a) | (soft < b) for a, b in product(STEPS, STEPS)}
    allowed = {limits: hit for limits, hit in tried.items() if hit[right].mean() <= most}
    only_box, softened = max(allowed, key=lambda limits: (allowed[limits][~right].mean(), -sum(limits)))
    hit = allowed[only_box, softened]
    return (
        f"limits that catch most at no more alarms: {ONLY_BOX} {only_box:g}, {SOFTENED} {softened:g}:"
        f" {share(hit[right])} of the right, {share(hit[~right])} of the wrong"
    )


def orders(words: Grades, right: NDArray[np.bool_], score: NDArray[np.float64], photos: Sequence[str]) -> str:
    """How many wrong boxes are among the first of each order; `words`: the verdicts as grades."""
    rank, look = -words.astype(float), -(words > 0).astype(float)
    weights, rows = tools.resampled(photos), []
    for name, key in (
        ("as detxai list has it", look + score),
        ("by verdict, then the lowest score", rank + score),
        ("lowest score, no verdict", score),
        ("by verdict, then the highest score", rank - score),
    ):
        order = np.argsort(key, kind="stable")
        drawn, wrong = weights[:, order], weights[:, order] * ~right[order]
        cells: list[Any] = [name]
        for first in FIRST:
            among = (wrong * (np.cumsum(drawn, 1) <= first)).sum(1)
            low, high = np.quantile(among, [0.025, 0.975])
            cells.append(f"{(~right[order])[:first].sum()} ({low:.0f} to {high:.0f})")
        rows.append(cells)
    return tools.table(rows, ("wrong ones among the first", *map(str, FIRST)))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    args = study.every_report(parser, argv)
    with tempfile.TemporaryDirectory() as spare:
        boxes = [
            (d["evidence"], s.right, d["score"], s.photo)
            for record, own in study.with_records(args, args.tree or Path(spare))
            for d, s in zip(record["detections"], own, strict=True)
            if d["evidence"]["verdict"] != "unknown"
        ]
    evidence, right = [e for e, *_ in boxes], np.array([r for _, r, *_ in boxes])
    photos = [photo for *_, photo in boxes]
    graded = grades(evidence, DEFAULTS)
    words = worst(graded)
    print(f"{right.sum()} right and {(~right).sum()} wrong boxes\n")
    print(by_kind(graded, right, photos) + "\n")
    print(by_rule(graded, right) + "\n")
    print(best_leads(evidence, right) + "\n")
    print(orders(words, right, np.array([s for _, _, s, _ in boxes]), photos))


if __name__ == "__main__":
    main()
