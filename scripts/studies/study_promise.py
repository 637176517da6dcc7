"""Does a list with a promise hold what it promises, and how long is it?

    python scripts/studies/study_promise.py --images DIR --labels DIR --model FILE [--recall 0.95] [--splits 1000]

Draws half of the labelled pictures again and again, chooses the threshold on them as `detxai calibrate evidence
--recall` does, and looks at the other half, which chose nothing: the share of a picture's items that is on the list,
and how many boxes the list has. The promise speaks of the mean over draws; beside it stands the spread, since one list
comes from one draw. `--test-images`, `--test-labels`: look at these pictures instead of the other half.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import study_tools as tools

from detxai import RunConfig
from detxai.errors import UsageError
from detxai.evidence.promise import threshold
from detxai.inputs.sources import find
from detxai.run.plan import make_plan
from detxai.run.promise import ItemScores, item_scores


def scores_of(model: str | None, images: Path, labels: Path) -> ItemScores:
    """Item and box scores of every labelled picture, one forward each."""
    config = RunConfig(model={"path": model}, detection={"labels": labels}, attribution={"evidence": "none"})
    return item_scores(make_plan(config), find([str(images)]).refs)


def held(items: Sequence[Sequence[float]], least: float) -> float:
    """Mean share of a picture's items that are listed above `least`."""
    return float(np.mean([np.mean(np.greater(own, least)) for own in items]))


def length(boxes: Sequence[Sequence[float]], least: float) -> float:
    """Listed boxes a picture."""
    return float(np.mean([np.greater(own, least).sum() for own in boxes]))


def trials(first: ItemScores, other: ItemScores | None, recall: float, count: int, splits: int) -> list[list[float]]:
    """Of each split into `count` pictures that choose and others: (held share, boxes a picture, threshold)."""
    rng, rows = np.random.default_rng(0), []
    for _ in range(splits):
        order = rng.permutation(len(first.items))
        least = threshold([first.items[i] for i in order[:count]], recall)
        rest = [first.items[i] for i in order[count:]] if other is None else other.items
        rows.append([held(rest, least), length((other or first).boxes, least), least])
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--labels", type=Path, required=True)
    parser.add_argument("--test-images", type=Path)
    parser.add_argument("--test-labels", type=Path)
    parser.add_argument("--model")
    parser.add_argument("--recall", type=float, action="append", help="repeatable [0.8, 0.9, 0.95]")
    parser.add_argument("--count", type=int, action="append", help="pictures that choose [half]; repeatable")
    parser.add_argument("--splits", type=int, default=1000)
    args = parser.parse_args(argv)
    first = scores_of(args.model, args.images, args.labels)
    other = scores_of(args.model, args.test_images, args.test_labels) if args.test_images else None
    print(f"{len(first.items)} pictures with {sum(map(len, first.items))} items\n")
    rows: list[list[object]] = []
    for recall in args.recall or (0.8, 0.9, 0.95):
        for count in args.count or [len(first.items) // 2]:
            try:
                made = np.array(trials(first, other, recall, count, args.splits))
            except UsageError as error:
                rows.append([recall, count, f"refused: {error}", "", "", ""])
                continue
            low, high = np.quantile(made[:, 0], [0.05, 0.95])
            mean = made.mean(0)
            spread = f"{low:.3f} to {high:.3f}"
            rows.append([recall, count, f"{mean[0]:.3f}", spread, f"{mean[1]:.1f}", f"{np.median(made[:, 2]):.4f}"])
    head = (
        "promised",
        "pictures that chose",
        "held: mean",
        "of single lists, 5 to 95 %",
        "boxes a picture",
        "threshold",
    )
    print(tools.table(rows, head))


if __name__ == "__main__":
    main()
