"""Prints what the first forward pass of large detectors costs beside the bounds of `detxai.models.bounds`.

python scripts/checks/costs.py yolov9e.yaml yolo12x.yaml rtdetr-x.yaml --size 640
"""

from __future__ import annotations

import argparse

import torch
from ultralytics.nn import tasks

from detxai.models import detectors
from detxai.models.bounds import Bounds
from detxai.values import Checkpoint


def main() -> None:
    """Print a Markdown table: of each bound, the share that is used."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("yaml", nargs="+")
    parser.add_argument("--size", type=int, default=640)
    arguments = parser.parse_args()
    print("| model | size | operations | numbers | multiplications |\n|---|---|---|---|---|")
    for yaml in arguments.yaml:
        kind = tasks.RTDETRDetectionModel if yaml.startswith("rtdetr") else tasks.DetectionModel
        module = kind(yaml, nc=80, verbose=False)
        module.names = {i: str(i) for i in range(80)}
        detector = detectors.build(Checkpoint(yaml, "", "ultralytics", module, yaml, module.names, arguments.size))
        bounds = Bounds(yaml, arguments.size**2)
        most = bounds.left, bounds.numbers, bounds.work
        with torch.no_grad(), bounds:
            detector.predict(torch.rand(1, 3, arguments.size, arguments.size))
        left = bounds.left, bounds.numbers, bounds.work
        shares = [f"{100 * (1 - one / other):.0f} %" for one, other in zip(left, most, strict=True)]
        print(f"| {yaml} | {arguments.size} | {' | '.join(shares)} |", flush=True)


if __name__ == "__main__":
    main()
