"""Round a trained checkpoint to fp16, measure it on an unseen seed and write it as safetensors.

    python scripts/samples/export_sample.py runs/bags/last.pt bags-yolov8n-320.safetensors --seed 13

The figures in the file's metadata are those of the rounded weights, computed in float32.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

os.environ.setdefault("YOLO_AUTOINSTALL", "0")
os.environ.setdefault("YOLO_OFFLINE", "1")

import torch
from safetensors.torch import save_file
from train_sample import evaluate
from training_data import make_set
from ultralytics.nn.tasks import DetectionModel

FORMAT = "detxai.model/1"


def load(path: Path) -> tuple[DetectionModel, dict]:
    """Rebuild the unfused model of a checkpoint in eval mode, and the checkpoint itself."""
    kept = torch.load(path, map_location="cpu", weights_only=True)
    model = DetectionModel(kept["yaml"], nc=len(kept["names"]), verbose=False)
    model.load_state_dict(kept["state"])
    return model.eval(), kept


def to_half(model: DetectionModel) -> dict[str, torch.Tensor]:
    """State of the model as contiguous fp16 tensors, without the batch counters of its norms."""
    return {
        key: value.half().contiguous()
        for key, value in model.state_dict().items()
        if not key.endswith("num_batches_tracked")
    }


def metadata(name: str, kept: dict, figures: dict, seed: int, count: int) -> dict[str, str]:
    """The safetensors metadata: everything needed to rebuild the model, all values strings."""
    training = {**kept["summary"], "figures": {**figures, "seed": seed, "images": count}}
    return {
        "format": FORMAT,
        "family": Path(kept["summary"]["architecture"]).stem[:6],
        "architecture": json.dumps(kept["yaml"]),
        "names": json.dumps({str(k): v for k, v in kept["names"].items()}),
        "imgsz": str(kept["summary"]["imgsz"]),
        "stride": json.dumps([int(v) for v in kept["stride"]]),
        "name": name,
        "license": "AGPL-3.0-or-later",
        "training": json.dumps(training),
    }


def main(argv: list[str] | None = None) -> None:
    """Export one checkpoint and print its figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("target", type=Path, help="the .safetensors to write; its stem is the name")
    parser.add_argument("--seed", type=int, default=13, help="seed of the images to measure on")
    parser.add_argument("--count", type=int, default=300)
    args = parser.parse_args(argv)

    model, kept = load(args.checkpoint)
    half = to_half(model)
    model.load_state_dict(half, strict=False)
    unseen = make_set(args.seed, args.count, kept["summary"]["imgsz"], kept["summary"]["catalogue"])
    figures = evaluate(model, unseen, list(kept["names"].values()), bf16=False)
    args.target.parent.mkdir(parents=True, exist_ok=True)
    save_file(half, args.target, metadata(args.target.stem, kept, figures, args.seed, args.count))
    args.target.chmod(0o644)  # safetensors writes files for the owner alone
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
