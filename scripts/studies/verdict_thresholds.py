"""Read the verdict's default thresholds off generated X-rays: right detections against wrong ones.

    python scripts/samples/make_xrays.py --out bags --count 120 --seed 61
    python scripts/samples/make_xrays.py --out cheat --count 40 --seed 62 --catalogue cheat --tag always
    python scripts/studies/verdict_thresholds.py --images bags/images --labels bags/labels \\
        --shortcut-images cheat/images --shortcut-model cheat.safetensors

Wrong are *swaps*, right boxes asked as every other class, and *shortcuts*: detections of a model that is known to
decide the class by something outside the box (see study_cheat.py). A threshold of `weak` is the loosest that
95 % of the wrong ones fail, but never so tight that more than 2 % of the right ones do; that of `unsupported` is the
median of the wrong ones. Defaults are rounded to the lenient side; those of leads (0: another class is ahead, 1: a
factor e in odds), and of what these pictures cannot show, are set by meaning and only checked here.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from detxai import Explainer, RunConfig
from detxai.evidence.verdict import DEFAULTS, RULES, VerdictRule, verdict

#: The kind of wrong detection that a measure is there to see, and whether its thresholds are read off these pictures.
SEES = {
    "lead_only_box": ("shortcut", False),
    "lead_softened": ("swap", False),
    "outside_share": ("shortcut", True),
    "one_sidedness": ("swap", True),
    "sufficiency": ("shortcut", True),
    "necessity": ("swap", False),
    "lift": ("swap", False),
    "ground_share": ("shortcut", False),
    "padding_share": ("shortcut", False),
}
ALARMS, CAUGHT = 0.02, 0.95
Row = dict[str, Any]


def rows(model: Path | None, images: Path, labels: Path | None, as_class: Iterable[str], conf: float) -> list[Row]:
    """The evidence of everything explained; `kind`: right, swap, shortcut (without labels) or false."""
    config = RunConfig(
        model={"path": model and str(model)},
        detection={"labels": labels, "conf": conf},
        attribution={"as_class": tuple(as_class)},
    )
    measured = []
    for result in Explainer(config).explain_sources(images):
        for d in result.record.detections or ():
            right = d.match is not None and d.match.status == "true"
            own = "shortcut" if labels is None else "right" if right else "false"
            for kind, e in [(own, d.evidence), *(("swap", a.evidence) for a in d.attributions if a.as_class and right)]:
                if e is not None and e.verdict != "unknown":
                    measured.append({"kind": kind, **e.model_dump()})
    return measured


def derived(rule: VerdictRule, right: np.ndarray, wrong: np.ndarray) -> tuple[float, float]:
    """(weak, unsupported) of a measure by the procedure above."""
    side = -1.0 if rule.high else 1.0
    weak = min(float(np.quantile(side * right, ALARMS)), float(np.quantile(side * wrong, CAUGHT)))
    return side * weak, side * min(float(np.median(side * wrong)), weak)


def _few(values: Iterable[float]) -> str:
    return " ".join(f"{v:.3g}" for v in values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--labels", type=Path, required=True)
    parser.add_argument("--model", type=Path, help="default: the bundled detector")
    parser.add_argument("--shortcut-images", type=Path, required=True)
    parser.add_argument("--shortcut-model", type=Path, required=True)
    parser.add_argument("--conf", type=float, default=0.25)
    args = parser.parse_args()

    names = (args.labels / "classes.txt").read_text().split()
    measured = rows(args.model, args.images, args.labels, names, args.conf)
    measured += rows(args.shortcut_model, args.shortcut_images, None, (), args.conf)
    of = {kind: [row for row in measured if row["kind"] == kind] for kind in ("right", "false", "swap", "shortcut")}
    print(f"| measure | right ({len(of['right'])}): 2, 50, 98 % | wrong: 5, 50, 95 % | derived | default |")
    print("|---|---|---|---|---|")
    for rule in RULES:
        if rule.measure in SEES:
            kind, read = SEES[rule.measure]
            right, wrong = (
                np.array([row[rule.measure] for row in of[k] if row[rule.measure] is not None]) for k in ("right", kind)
            )
            spread = _few(np.quantile(right, (0.02, 0.5, 0.98))), _few(np.quantile(wrong, (0.05, 0.5, 0.95)))
            limits = _few(derived(rule, right, wrong)) if read else "by meaning"
            default = _few(DEFAULTS[rule.measure])
            print(f"| {rule.measure} | {spread[0]} | {kind} ({len(wrong)}): {spread[1]} | {limits} | {default} |")
    print("\n| kind | number | supported | weak | unsupported |")
    print("|---|---|---|---|---|")
    for kind, column in of.items():
        words = [verdict(row, True)[0] for row in column]
        shares = " | ".join(str(words.count(word)) for word in ("supported", "weak", "unsupported"))
        print(f"| {kind} | {len(words)} | {shares} |")


if __name__ == "__main__":
    main()
