"""What evidence costs on top of the attribution: the same images without, with basic and with full evidence, in turn.

    python scripts/studies/cost_of_evidence.py --images samples/images
    python scripts/studies/cost_of_evidence.py --images DIR --model FILE --count 24

Seconds of the processor, which other jobs on the machine disturb less than the clock, from file to record, nothing
written. Images go in groups that fill the device's packs; each group is done with every amount of evidence, in an
order that turns, so that a slow moment meets them alike. Intervals are 95 %, bootstrapped by group.
"""

from __future__ import annotations

import argparse
import time
from itertools import islice
from pathlib import Path

import numpy as np
import study_tools as tools
import torch

from detxai import Explainer, RunConfig
from detxai.inputs.sources import find
from detxai.models import checkpoints
from detxai.values import ImageRef

AMOUNTS = ("none", "basic", "full")


def measured(explainers: dict[str, Explainer], groups: list[list[ImageRef]]) -> tuple[np.ndarray, int]:
    """(groups, amounts) seconds, and the detections that were explained; the first group warms up and is done again."""
    taken, counts = np.zeros((len(groups), len(explainers))), np.zeros(len(groups), int)
    for number, refs in [(0, groups[0]), *enumerate(groups)]:
        for turn in range(len(explainers)):
            column = (turn + number) % len(explainers)
            start = time.process_time()
            results = list(list(explainers.values())[column].explain(refs))
            taken[number, column] = time.process_time() - start
        counts[number] = sum(len(result.record.detections or ()) for result in results)
    return taken, int(counts.sum())


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--model", help="default: the bundled detector")
    parser.add_argument("--count", type=int, help="only the first N images")
    parser.add_argument("--conf", type=float, default=0.25)
    parser.add_argument("--group", type=int, default=6, help="images in a group")
    args = parser.parse_args(argv)
    refs = list(islice(find([str(args.images)]).refs, args.count))
    groups = [refs[i : i + args.group] for i in range(0, len(refs), args.group)]
    checkpoint = checkpoints.load(args.model)
    base = {"model": {"path": args.model}, "detection": {"conf": args.conf}}
    explainers = {
        amount: Explainer(RunConfig.model_validate(base | {"attribution": {"evidence": amount}}), checkpoint=checkpoint)
        for amount in AMOUNTS
    }
    taken, detections = measured(explainers, groups)
    drawn = tools.resampled(range(len(groups))) @ taken
    threads = torch.get_num_threads()
    print(f"{detections} detections on {len(refs)} images, torch {torch.__version__}, threads: {threads}")
    rows = []
    for column, amount in enumerate(AMOUNTS):
        share = 100 * (drawn[:, column] / drawn[:, 0] - 1)
        low, high = np.percentile(share, (2.5, 97.5))
        total = taken[:, column].sum()
        more = 100 * (total / taken[:, 0].sum() - 1)
        rows.append([amount, f"{total / detections:.3f}", f"{more:+.0f} % ({low:+.0f} to {high:+.0f})"])
    print(tools.table(rows, ("evidence", "seconds a detection", "on top of the attribution")))


if __name__ == "__main__":
    main()
