"""Does the interval that `detxai calibrate evidence` gives of its own gain hold the truth?

    python scripts/studies/study_gain.py [--boxes 20,50,100,200] [--trials 200]

Labelled detections are drawn from a law that is known: pictures of one or more boxes with something in common, a score
that is off (or not), evidence that knows more (or not). A calibration is fitted as `detxai calibrate evidence` does;
what it truly gains over the score is its mean on many boxes drawn afresh. *Held*: the share of trials whose interval
holds that truth, with Wilson's interval; 0.95 is promised. *Above*: how often the interval lies above zero, and how
often that was false. No picture, model or label is needed.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import study_tools as tools
from study_few_labels import trust

from detxai.errors import UsageError
from detxai.evidence.calibration import LOGARITHMIC
from detxai.evidence.fitting import Fitted, LabelledDetection, fit, log_losses
from detxai.evidence.measures import sigmoid

#: Boxes drawn afresh that stand for the truth.
TRUTH = 3000
#: Names of the evidence that is drawn; the first alone can know anything.
MEASURES = ("lead_only_box", "lead_softened", "lift", "net_inside", "outside_share", "coherence", "concentration",
            "necessity", "necessity_top", "sufficiency", "lead_faded", "early_share", "half_share", "margin",
            "area_share", "one_sidedness")  # fmt: skip


@dataclass(frozen=True)
class Law:
    """How boxes come about: mean and spread of their true log-odds, the score's slope and offset, what evidence knows.

    `knows`: correlation of the first measure with the truth that the score does not see; `common`: spread of what the
    boxes of a picture share.
    """

    mean: float = 1.5
    spread: float = 1.5
    slope: float = 1.0
    offset: float = 0.0
    knows: float = 0.0
    common: float = 0.7

    def boxes(self, count: int, rng: np.random.Generator) -> list[LabelledDetection]:
        """Whole pictures until they hold `count` boxes."""
        rows: list[LabelledDetection] = []
        while len(rows) < count:
            picture, shared = f"{len(rows)}", rng.normal(scale=self.common)
            rows += [self._box(picture, shared, rng) for _ in range(1 + rng.poisson(1.0))]
        return rows

    def _box(self, picture: str, shared: float, rng: np.random.Generator) -> LabelledDetection:
        seen = rng.normal(self.mean, self.spread)
        unseen = rng.normal()
        values = rng.normal(size=len(MEASURES))
        values[0] = self.knows * unseen + np.sqrt(1 - self.knows**2) * values[0]
        known = zip(MEASURES, values.tolist(), strict=True)
        evidence = {k: float(np.exp(v)) if k in LOGARITHMIC else v for k, v in known}
        right = bool(rng.random() < sigmoid(seen + shared + unseen))
        logit = self.slope * seen + self.offset
        return LabelledDetection(picture, 0, "item", logit, evidence, rng.normal(size=(8, 8)).tolist(), right)


LAWS = {
    "a fair score, evidence that knows nothing": Law(slope=0.8),
    "a score that is too sure": Law(slope=2.0, offset=1.0),
    "evidence that knows more": Law(slope=0.8, knows=0.9),
    "few wrong boxes": Law(mean=3.0, slope=0.8, offset=0.5),
}


def true_gain(fitted: Fitted, rows: list[LabelledDetection]) -> float:
    """Mean log loss of the score less that of trust on boxes that the fit has not seen."""
    right = np.array([row.right for row in rows])
    own, score = (np.array([f(row) for row in rows]) for f in (lambda r: trust(r, fitted), lambda r: sigmoid(r.logit)))
    return float((log_losses(right, score) - log_losses(right, own)).mean())


def trials(law: Law, count: int, number: int) -> Iterator[tuple[float, float, float, float]]:
    """(truth, value, low, high) of each trial that could be fitted."""
    afresh = law.boxes(TRUTH, np.random.default_rng(1))
    for seed in range(number):
        rows = law.boxes(count, np.random.default_rng([seed, count]))
        try:
            fitted = fit(rows, len({row.image for row in rows}))
        except UsageError:
            continue
        claimed = fitted.quality.gain
        assert claimed is not None
        yield true_gain(fitted, afresh), claimed.value, claimed.low, claimed.high


def line(name: str, law: Law, count: int, number: int) -> list[object]:
    """A row of the table."""
    truth, value, low, high = np.array(list(trials(law, count, number))).T
    held = tools.wilson(int(((low <= truth) & (truth <= high)).sum()), len(truth))
    above = low > 0
    return [
        name, count, len(truth), held, f"{truth.mean():.3f}", f"{value.mean():.3f}", f"{np.median(high - low):.3f}",
        f"{above.mean():.0%}, {(above & (truth <= 0)).mean():.1%} falsely",
    ]  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--boxes", default="20,50,100,200")
    parser.add_argument("--trials", type=int, default=200)
    args = parser.parse_args(argv)
    rows = [line(name, law, int(n), args.trials) for name, law in LAWS.items() for n in args.boxes.split(",")]
    print(tools.table(rows, ("law", "boxes", "trials", "held", "true gain", "claimed", "width", "above zero")))


if __name__ == "__main__":
    main()
