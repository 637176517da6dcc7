"""An output tree of generated records, as a night's run would leave it, to try `list`, `report` and `diff` on.

    python scripts/bench/make_tree.py OUT --images 5000 --seed 0

No model has seen anything: boxes, scores and evidence are drawn at random, but as records of real runs are built. A
tenth of the knives is a planted shortcut: all their evidence lies in the lower left corner of the box.
"""

from __future__ import annotations

import argparse
import hashlib
import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from detxai.evidence import verdict
from detxai.output import records
from detxai.output.store import picture_stem

NAMES = ("gun", "knife", "pliers", "scissors", "wrench")
MODEL = {"name": "generated.pt", "sha256": "0" * 64, "family": "yolov8", "head": "one2many", "imgsz": 320}
SIDE = 640


def grid(rng: np.random.Generator, class_id: int, shortcut: bool) -> Any:
    """Signed evidence (8, 8): a blob where the class has its own, or in the lower left corner."""
    rows, cols = np.mgrid[:8, :8]
    places = ((3, 2), (2, 5), (4, 4), (5, 3), (3, 6))
    row, col = (7, 0) if shortcut else np.asarray(places[class_id]) + rng.normal(0, 0.8, 2)
    width = 0.8 if shortcut else rng.uniform(1.0, 2.2)
    blob = np.exp(-((rows - row) ** 2 + (cols - col) ** 2) / (2 * width**2))
    return rng.uniform(6, 16) * blob / blob.sum() + rng.normal(0, 0.05, (8, 8))


def measures(rng: np.random.Generator, cells: Any, right: bool, box: list[float]) -> dict[str, Any]:
    """Every number of the evidence, likelier good where the box is `right`."""
    good = rng.beta(6, 2) if right else rng.beta(2, 3)
    positive, negative = float(cells[cells > 0].sum()), float(cells[cells < 0].sum())
    outside = float(rng.exponential(0.3 if right else 3.0))
    net = positive + negative
    return {
        "net_inside": net, "positive_inside": positive, "negative_inside": negative, "net_outside": outside,
        "positive_outside": outside + 1, "negative_outside": -1.0,
        "one_sidedness": net / (positive - negative), "outside_share": outside / (outside + max(net, 0.1)),
        "coherence": float(rng.uniform(0.1, 0.9)), "area_share": (box[2] - box[0]) * (box[3] - box[1]) / SIDE**2,
        "lift": 1 + 20 * good, "concentration": 0.2 + 0.5 * good, "ground_share": 0.2 * (1 - good),
        "padding_share": 0.01, "completeness_error": 0.01, "margin": 12 * good, "necessity": 0.4 + 0.6 * good,
        "necessity_top": good, "sufficiency": good, "lead_only_box": 9 * good - 1, "lead_softened": 8 * good - 0.5,
        "lead_faded": 4 * good, "early_share": 0.3 * good, "half_share": 0.4 + 0.4 * good,
    }  # fmt: skip


def detection(rng: np.random.Generator) -> dict[str, Any]:
    """One box of a record."""
    class_id = int(rng.choice(len(NAMES), p=(0.3, 0.4, 0.1, 0.12, 0.08)))
    shortcut = class_id == 1 and rng.random() < 0.1
    right = rng.random() < 0.8 and not shortcut
    score = float(np.clip(rng.beta(5, 2) if right else rng.beta(3, 4), 0.25, 0.99))
    left, top = rng.uniform(0, 400, 2)
    box = [left, top, left + rng.uniform(60, 240), top + rng.uniform(60, 240)]
    cells = grid(rng, class_id, shortcut)
    values = measures(rng, cells, right, box)
    other = (class_id + 1) % len(NAMES)
    word, reasons = verdict.verdict(values, True, NAMES[other])
    named = {"class_id": class_id, "class_name": NAMES[class_id], "score": score, "logit": np.log(score / (1 - score))}
    attribution = {
        "method": "ig", "target": "class", "class_id": class_id, "class_name": NAMES[class_id],
        "baseline": "auto:#fbf7ea", "precision": "fp32", "path": "sparse", "value_at_input": named["logit"],
        "value_at_baseline": -9.5, "sum": named["logit"] + 9.5, "completeness_error": 0.01, "error_bound": 0.03,
        "converged": True, "evaluations": 16, "net_inside": float(cells.sum()), "inside_share": 0.8,
        "peak": [box[0] + 5, box[1] + 5], "grid": {"rows": 8, "cols": 8, "values": cells.tolist()},
        "overlay": None, "map": None,
    }  # fmt: skip
    judged = {
        "verdict": word, "reasons": reasons, "calibrated": False,
        "runner_up": {"class_id": other, "class_name": NAMES[other]}, "trials": [], **values,
    }  # fmt: skip
    return {"kind": "detection", **named, "top_classes": [named], "box": box,
            "attributions": [attribution], "evidence": judged}  # fmt: skip


def record(rng: np.random.Generator, number: int, *, overlays: bool = False) -> records.Record:
    """The record of one image; every 500th could not be read."""
    path = f"belt-{1 + number % 4}/bag-{number:05d}.jpg"
    image = {"path": path, "sha256": f"{number:064x}", "width": SIDE, "height": SIDE}
    if number % 500 == 499:
        error = {"code": "truncated", "message": "the file ends too early"}
        return records.Record.model_validate({"status": "failed", "image": image, "error": error})
    boxes = [detection(rng) for _ in range(int(rng.poisson(2.2)))]
    boxes.sort(key=lambda box: -box["score"])
    for k, box in enumerate(boxes):
        box["id"] = k
        for a in box["attributions"]:
            a["overlay"] = picture_stem(path, k, "ig") + ".png" if overlays else None
    return records.Record.model_validate(
        {
            "status": "ok",
            "fingerprint": hashlib.sha256(path.encode()).hexdigest(),
            "image": image,
            "model": MODEL,
            "detections": boxes,
        }
    )


def picture(box: records.DetectionRecord) -> bytes:
    """A small stand-in for an overlay."""
    image = Image.new("RGB", (SIDE // 2, SIDE // 2), (251, 247, 234))
    ImageDraw.Draw(image).rectangle([v / 2 for v in box.box], outline=(0, 90, 160), width=3)
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def write(folder: Path, images: int, seed: int = 0, *, overlays: bool = False) -> None:
    """The tree of `images` records in `folder`, the same bytes for the same seed."""
    rng = np.random.default_rng(seed)
    for number in range(images):
        made = record(rng, number, overlays=overlays)
        file = folder / f"{made.image.path}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        for box in made.detections or ():
            for name in (a.overlay for a in box.attributions if a.overlay):
                (file.parent / name).write_bytes(picture(box))
        file.write_bytes(records.dump(made))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--overlays", action="store_true", help="also small pictures")
    given = parser.parse_args()
    write(given.output, given.images, given.seed, overlays=given.overlays)


if __name__ == "__main__":
    main()
