"""Confusions that nobody pushed: does evidence tell a real report of the wrong class from a right one of its score?

    python scripts/studies/study_confusions.py --images DIR --labels DIR --model FILE [--conf 0.05] [--tree DIR]
    python scripts/studies/study_confusions.py --images OUT/images --labels OUT/labels --model FILE \\
        --sources OUT/sources.json                                             (OUT: of make_compositions.py)

Of all reports from `--conf` on, those on a label of another class are held against right ones on pictures of the same
kind, each against the `--per` right ones of the nearest score that are not taken yet; only these are explained, and of
these only right ones within NEAR of their confusion count, so that the score knows next to nothing. A confusion is
*alone* where the object is not reported in its own class as well. Prints AUROC for right against confused, with 95 %
intervals bootstrapped by photo: of the score (about 0.5 by the matching), of the margin over the runner-up, which the
same forward gives, of the verdict, of single measures, and of what two forwards give, of the evidence and of both
(ridge regressions cross-validated by photo, from 30 confusions on: with fewer they fall below chance).
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import study_evidence as study
import study_tools as tools

from detxai.inputs import labels

ALONE = ("margin", "lead_only_box", "lead_softened", "outside_share", "sufficiency", "one_sidedness")
#: Fewer confusions than this make no regression.
FEWEST = 30
RANK = {"supported": 0.0, "unknown": -1.0, "weak": -2.0, "unsupported": -3.0}
#: Scores of one report that were computed twice differ by less.
SAME_SCORE = 1e-3
#: Logits between the scores of a confusion and of a right report that is held against it.
NEAR = 0.3


def origins(args: argparse.Namespace) -> Mapping[str, Mapping[str, Any]]:
    """What each picture was made of, by its path; nothing for pictures as they are."""
    return {} if args.sources is None else {m["picture"]: m for m in json.loads(args.sources.read_text())}


def chosen(args: argparse.Namespace, drawn: labels.Folder) -> list[dict[str, Any]]:
    """At most `args.most` confusions, marked `alone` or not, each with the `args.per` right reports nearest in score.

    None is taken twice, and all of one kind of picture.
    """
    rows, kinds = list(study.reports(args, drawn)), origins(args)
    own = {(entry["file_name"], m.label) for entry, m in rows if m.status == "true"}
    free = [entry for entry, m in rows if m.status == "true"]
    wrong = [
        {**entry, "alone": (entry["file_name"], m.label) not in own} for entry, m in rows if m.status == args.against
    ]
    np.random.default_rng(0).shuffle(wrong)  # type: ignore[arg-type]  # a list will do
    kept = []
    for confusion in sorted(wrong[: args.most], key=lambda e: -float(e["score"])):
        kind = kinds.get(confusion["file_name"], {}).get("kind")
        like = [entry for entry in free if kinds.get(entry["file_name"], {}).get("kind") == kind]
        like.sort(key=lambda entry: abs(entry["score"] - confusion["score"]))
        kept += [confusion, *like[: args.per]]
        free = [entry for entry in free if not any(entry is one for one in like[: args.per])]
    return kept


def near(entries: Sequence[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    """Of `chosen` the confusions with a right report near in score, and these reports."""
    confusion: Mapping[str, Any] | None = None
    for entry in entries:
        if "alone" in entry:
            confusion, told = entry, False
        elif confusion is not None and abs(log_odds(entry["score"]) - log_odds(confusion["score"])) <= NEAR:
            if not told:
                yield confusion
            told = True
            yield entry


def log_odds(score: float) -> float:
    """The logit of a score, which is not quite 0 or 1."""
    return float(np.log(score) - np.log1p(-score))


def counted(reports: Sequence[study.Seen], entries: Sequence[Mapping[str, Any]]) -> list[tuple[study.Seen, bool]]:
    """The reports that are near, and whether each is a confusion alone at its object."""
    pairs = []
    for r in reports:
        own = [e for e in entries if (e["file_name"], e["category_id"]) == (r.picture, r.class_id)]
        same = [e for e in own if abs(e["score"] - r.forwards["score"]) < SAME_SCORE]
        if same:
            pairs.append((r, bool(same[0].get("alone"))))
    return pairs


def lines(reports: Sequence[study.Seen]) -> Iterator[list[object]]:
    """What each competitor makes of the matched reports: its AUROC, and its difference from the margin."""
    y, photos = np.array([r.right for r in reports]), [r.photo for r in reports]
    forwards = study.matrix([r.forwards for r in reports])[1]
    evidence = study.matrix([r.evidence for r in reports])[1]
    score = np.array([r.forwards["score"] for r in reports])
    trusts = {"score": score, "verdict": np.array([RANK[r.verdict] for r in reports])}
    for name in ALONE:
        values = np.array([{**r.evidence, **r.forwards}.get(name, np.nan) for r in reports])
        side = -1.0 if name == "outside_share" else 1.0
        trusts[f"{name} alone"] = side * np.nan_to_num(values, nan=float(np.nanmedian(values)))
    if (~y).sum() >= FEWEST:
        both = np.column_stack([forwards, evidence])
        for name, columns in (("two forwards", forwards), ("evidence", evidence), ("two forwards + evidence", both)):
            trusts[name] = tools.cross_validated(columns, y, photos, centred=True)
    for name, trust in trusts.items():
        yield [
            name,
            tools.estimate(y, trust, photos),
            tools.difference(y, trust, trusts["margin alone"], photos),
        ]


def report(reports: Sequence[study.Seen]) -> None:
    """Prints the figures of some matched reports."""
    right = sum(r.right for r in reports)
    print(f"{len(reports) - right} confusions and {right} right reports of {len({r.photo for r in reports})} photos")
    for kind in (False, True):
        scores = [r.forwards["score"] for r in reports if r.right == kind]
        words = Counter(r.verdict for r in reports if r.right == kind)
        said = ", ".join(f"{words[w]} {w}" for w in RANK if words[w])
        print(f"{'right' if kind else 'confused'}: median score {np.median(scores):.2f}; {said}")
    print("\n" + tools.table(list(lines(reports)), ("what", "AUROC", "over the margin")) + "\n")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--per", type=int, default=2, help="right reports for each confusion")
    parser.add_argument("--most", type=int, default=100, help="confusions, drawn at random where there are more")
    parser.add_argument("--sources", type=Path, help="JSON: picture, photo it was made of, kind")
    args = study.every_report(parser, argv, against="wrong-class", conf=0.05, chosen=chosen)
    with tempfile.TemporaryDirectory() as spare:
        tree = args.tree or Path(spare)
        reports = study.collected(args, tree)
        pairs = counted(reports, list(near(json.loads((tree / ".reports.json").read_text()))))
    reports = [r for r, _ in pairs]
    print("## All\n")
    report(reports)
    print("## Confusions alone at their object, and all right reports\n")
    report([r for r, alone in pairs if alone or r.right])
    for kind in sorted({r.kind for r in reports}) if args.sources else ():
        print(f"## Pictures: {kind}\n")
        report([r for r in reports if r.kind == kind])


if __name__ == "__main__":
    main()
