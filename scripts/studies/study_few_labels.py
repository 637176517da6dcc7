"""What is a calibration from few labels worth, and how strong should its priors be?

    python scripts/studies/study_few_labels.py --tree DIR [--boxes 20,50,100,200] [--draws 40]
    python scripts/studies/study_few_labels.py --tree DIR --priors      (which strength: on generated X-rays)

`DIR`: an output tree of `detxai explain --labels`. Whole pictures are drawn until they hold so many judged boxes; a
calibration is fitted on them as `detxai calibrate evidence` does, and looked at on all the other pictures: AUROC of
trust beside that of the score; its gain (log loss of the score less its own, in nats a box), and how often the interval
that the calibration gives of its own gain holds that; calibration error; and the right and wrong boxes that the fitted
thresholds call weak or worse. Figures are means over draws, with the 5 and 95 % quantiles of single draws.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import study_tools as tools
from numpy.typing import NDArray

from detxai.errors import UsageError
from detxai.evidence.calibration import calibration_error, vector
from detxai.evidence.fitting import PRIOR, PRIOR_BOXES, Fitted, LabelledDetection, auroc, fit, log_losses
from detxai.evidence.measures import sigmoid
from detxai.evidence.typicality import typicality
from detxai.evidence.verdict import Numbers, Thresholds, verdict
from detxai.output.tree import Tree
from detxai.run.calibrate_evidence import labelled_detections

#: Strengths that --priors tries: of the default thresholds in boxes, of coefficients as a precision.
BOXES, PRECISIONS = (0, 50, 100), (10.0, 30.0)
FIGURES = (
    "AUROC",
    "AUROC of the score",
    "gain",
    "gain in its interval",
    "error",
    "error of the score",
    "right",
    "wrong",
)


def drawn(rows: Sequence[LabelledDetection], count: int, seed: int) -> tuple[list[LabelledDetection], ...]:
    """Whole pictures at random until they hold `count` boxes, and all the others."""
    names = sorted({row.image for row in rows})
    np.random.default_rng(seed).shuffle(names)
    sizes = {name: sum(row.image == name for row in rows) for name in names}
    enough = np.searchsorted(np.cumsum([sizes[name] for name in names]), count) + 1
    chosen = set(names[:enough])
    return [row for row in rows if row.image in chosen], [row for row in rows if row.image not in chosen]


def measured(row: LabelledDetection, fitted: Fitted) -> Numbers:
    """The evidence of a detection with its typicality under a calibration."""
    usual = next((c for c in fitted.classes if c.class_id == row.class_id), None)
    return {**row.evidence, "typicality": None if usual is None else typicality(row.grid, usual.mean)}


def trust(row: LabelledDetection, fitted: Fitted) -> float:
    """What a calibration says of a detection that it has not seen."""
    total = fitted.intercept
    values = vector({**measured(row, fitted), "logit": row.logit}, [f.name for f in fitted.features])
    for value, f in zip(values, fitted.features, strict=True):
        if not np.isnan(value):
            total += f.weight * (min(max(value, f.low), f.high) - f.mean) / f.scale
    return sigmoid(total)


def bothered(rows: Sequence[LabelledDetection], fitted: Fitted, limits: Thresholds) -> NDArray[np.bool_]:
    """Which boxes are called weak or worse."""
    return np.array([verdict(measured(row, fitted), True, thresholds=limits)[0] != "supported" for row in rows])


def trial(
    some: Sequence[LabelledDetection], rest: Sequence[LabelledDetection], boxes: float, prior: float
) -> dict[str, float]:
    """What a calibration on `some` does on the `rest`."""
    fitted = fit(some, len({row.image for row in some}), boxes, prior)
    right = np.array([row.right for row in rest])
    own, score = (np.array([f(row) for row in rest]) for f in (lambda r: trust(r, fitted), lambda r: sigmoid(r.logit)))
    flagged = bothered(rest, fitted, fitted.thresholds)
    gained = float((log_losses(right, score) - log_losses(right, own)).mean())
    claimed = fitted.quality.gain
    assert claimed is not None
    return {
        "AUROC": auroc(right, own),
        "AUROC of the score": auroc(right, score),
        "gain": gained,
        "gain in its interval": float(claimed.low <= gained <= claimed.high),
        "error": calibration_error(right, own),
        "error of the score": calibration_error(right, score),
        "right": float(flagged[right].mean()),
        "wrong": float(flagged[~right].mean()),
    }


def trials(
    rows: Sequence[LabelledDetection], count: int, draws: int, boxes: float, prior: float
) -> tuple[list[dict[str, float]], int]:
    """Of each draw that could be fitted, and how many could not."""
    made, refused = [], 0
    for seed in range(draws):
        try:
            made.append(trial(*drawn(rows, count, seed), boxes, prior))
        except UsageError:
            refused += 1
    return made, refused


def lines(
    rows: Sequence[LabelledDetection], counts: Sequence[int], draws: int, strengths: Sequence[tuple[float, float]]
) -> Iterator[list[object]]:
    for count, (boxes, prior) in itertools.product(counts, strengths):
        made, refused = trials(rows, count, draws, boxes, prior)
        cells: list[object] = [count, boxes, prior, refused]
        for name in FIGURES if made else ():
            values = [one[name] for one in made]
            low, high = np.quantile(values, [0.05, 0.95])
            spread = "" if name == "gain in its interval" else f" ({low:.3f} to {high:.3f})"
            cells.append(f"{np.mean(values):.3f}{spread}")
        yield cells


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tree", type=Path, required=True, help="of detxai explain --labels")
    parser.add_argument("--boxes", default="20,50,100,200")
    parser.add_argument("--draws", type=int, default=40)
    parser.add_argument("--priors", action="store_true", help="try several strengths of the priors")
    args = parser.parse_args(argv)
    rows = [row for record in Tree(args.tree).read() for row in labelled_detections(record)]
    right = np.array([row.right for row in rows])
    print(f"{right.sum()} right and {(~right).sum()} wrong boxes on {len({row.image for row in rows})} pictures")
    always = np.array([verdict(row.evidence, True)[0] != "supported" for row in rows])
    share = [float(always[kind].mean()) for kind in (right, ~right)]
    print(f"the defaults call {share[0]:.3f} of the right and {share[1]:.3f} of the wrong weak or worse\n")
    tried = [(PRIOR_BOXES, PRIOR)]
    if args.priors:
        tried = [(b, PRIOR) for b in BOXES] + [(PRIOR_BOXES, p) for p in PRECISIONS if p != PRIOR]
    head = ("boxes", "prior: boxes", "precision", "refused", *FIGURES)
    print(tools.table(list(lines(rows, [int(n) for n in args.boxes.split(",")], args.draws, tried)), head))


if __name__ == "__main__":
    main()
