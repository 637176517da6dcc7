"""Confusions that nobody pushed: does evidence tell a real report of the wrong class from a right one of its score?

    python scripts/studies/study_confusions.py --images DIR --labels DIR --model FILE [--conf 0.05] [--tree DIR]

Of all reports from `--conf` on, those on a label of another class are held against right ones, each against the
`--per` right ones of the nearest score that are not taken yet, so that the score knows next to nothing. Prints AUROC
for right against confused, with 95 % intervals bootstrapped by picture: of the score (about 0.5 by the matching), of
what two forwards give, of the evidence and of both (ridge regressions cross-validated by picture, from 20 confusions
on: with fewer they fall below chance), of the verdict, and of single measures alone.
"""

from __future__ import annotations

import argparse
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import study_evidence as study
import study_tools as tools

ALONE = ("lead_only_box", "lead_softened", "outside_share", "sufficiency", "one_sidedness")
#: Fewer confusions than this make no regression.
FEWEST = 20
RANK = {"supported": 0.0, "unknown": -1.0, "weak": -2.0, "unsupported": -3.0}


def matched(reports: Sequence[study.Seen], per: int) -> list[study.Seen]:
    """Every confusion and, for each, the `per` right reports of the nearest score, none of them twice."""
    wrong = sorted((r for r in reports if not r.right), key=lambda r: -r.forwards["score"])
    free, kept = [r for r in reports if r.right], []
    for confusion in wrong:
        free.sort(key=lambda r: abs(r.forwards["score"] - confusion.forwards["score"]))
        kept += [confusion, *free[:per]]
        free = free[per:]
    return kept


def lines(reports: Sequence[study.Seen]) -> list[list[object]]:
    """What each competitor makes of the matched reports: its AUROC, and its difference from two forwards."""
    y, photos = np.array([r.right for r in reports]), [r.photo for r in reports]
    forwards = study.matrix([r.forwards for r in reports])[1]
    evidence = study.matrix([r.evidence for r in reports])[1]
    score = np.array([r.forwards["score"] for r in reports])
    trusts = {"score": score, "verdict": np.array([RANK[r.verdict] for r in reports])}
    if (~y).sum() >= FEWEST:
        both = np.column_stack([forwards, evidence])
        for name, columns in (("two forwards", forwards), ("evidence", evidence), ("two forwards + evidence", both)):
            trusts[name] = tools.cross_validated(columns, y, photos)
    for name in ALONE:
        values = np.array([r.evidence.get(name, np.nan) for r in reports])
        side = -1.0 if name == "outside_share" else 1.0
        trusts[f"{name} alone"] = side * np.nan_to_num(values, nan=float(np.nanmedian(values)))
    return [
        [name, tools.estimate(y, trust, photos), tools.difference(y, trust, score, photos)]
        for name, trust in trusts.items()
    ]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--per", type=int, default=2, help="right reports for each confusion")
    args = study.every_report(parser, argv, against="wrong-class", conf=0.05)
    with tempfile.TemporaryDirectory() as spare:
        reports = matched(study.collected(args, args.tree or Path(spare)), args.per)
    right = sum(r.right for r in reports)
    print(f"{len(reports) - right} confusions and {right} right reports on {len({r.photo for r in reports})} pictures")
    for kind in (False, True):
        scores = [r.forwards["score"] for r in reports if r.right == kind]
        words = Counter(r.verdict for r in reports if r.right == kind)
        said = ", ".join(f"{words[w]} {w}" for w in RANK if words[w])
        print(f"{'right' if kind else 'confused'}: median score {np.median(scores):.2f}; {said}")
    print("\n" + tools.table(lines(reports), ("what", "AUROC", "over the score")))


if __name__ == "__main__":
    main()
