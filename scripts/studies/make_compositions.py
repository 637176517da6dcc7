"""Pictures that a detector may well meet, in which it confuses more than on plain ones: nobody pushes it.

    python scripts/studies/make_compositions.py --images DIR --labels DIR --model FILE --out DIR [--seed 0]

Each labelled picture is written once of each kind, its labels with it:

- *occluded*: across the middle third of each object lies a piece of the same picture, taken elsewhere;
- *cut*: the picture ends in the middle of one object, as a bag at the edge of the belt;
- *contrast*: gamma of 0.5 or 2, as another scanner's or another display window;
- *coarse*: seen through half the resolution.

`sources.json` says of each picture which photo it was made of and how. `--model` gives the classes of the labels only.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from detxai.inputs import decode, labels, sources
from detxai.models import checkpoints, detectors
from detxai.values import Box, Pixels

#: Labels of which less than this is left are none any more.
LEFT = 0.3
#: What is left of the object at which a picture is cut.
CUT = 0.6
GAMMAS = (0.5, 2.0)
Placed = Sequence[tuple[int, Box]]
Composition = Callable[[Pixels, Placed, np.random.Generator], tuple[Pixels, Placed]]


def occluded(pixels: Pixels, placed: Placed, rng: np.random.Generator) -> tuple[Pixels, Placed]:
    made, (height, width) = pixels.copy(), pixels.shape[:2]
    for _, box in placed:
        x0, y0, x1, y1 = (round(v) for v in box)
        if x1 - x0 >= y1 - y0:
            x0, x1 = x0 + (x1 - x0) // 3, x1 - (x1 - x0) // 3
        else:
            y0, y1 = y0 + (y1 - y0) // 3, y1 - (y1 - y0) // 3
        x0, y0, x1, y1 = max(x0, 0), max(y0, 0), min(x1, width), min(y1, height)
        from_x, from_y = rng.integers(0, width - (x1 - x0) + 1), rng.integers(0, height - (y1 - y0) + 1)
        made[y0:y1, x0:x1] = pixels[from_y : from_y + y1 - y0, from_x : from_x + x1 - x0]
    return made, placed


def cut(pixels: Pixels, placed: Placed, rng: np.random.Generator) -> tuple[Pixels, Placed]:
    if not placed:
        return pixels, placed
    _, (x0, _, x1, _) = placed[int(rng.integers(len(placed)))]
    if x0 + x1 > pixels.shape[1]:  # it lies right: the right side goes
        edge = max(round(x0 + CUT * (x1 - x0)), 32)
        made, shift = pixels[:, :edge], 0
    else:
        shift = min(round(x1 - CUT * (x1 - x0)), pixels.shape[1] - 32)
        made = pixels[:, shift:]
    kept = []
    for class_id, (a, top, b, bottom) in placed:
        left, right = max(a - shift, 0.0), min(b - shift, float(made.shape[1]))
        if right - left >= LEFT * (b - a):
            kept.append((class_id, (left, top, right, bottom)))
    return np.ascontiguousarray(made), kept


def contrast(pixels: Pixels, placed: Placed, rng: np.random.Generator) -> tuple[Pixels, Placed]:
    table = (255 * np.linspace(0, 1, 256) ** rng.choice(GAMMAS)).round().astype(np.uint8)
    return table[pixels], placed


def coarse(pixels: Pixels, placed: Placed, _: np.random.Generator) -> tuple[Pixels, Placed]:
    height, width = pixels.shape[:2]
    small = cv2.resize(pixels, (max(width // 2, 1), max(height // 2, 1)), interpolation=cv2.INTER_AREA)
    return np.asarray(cv2.resize(small, (width, height), interpolation=cv2.INTER_LINEAR), np.uint8), placed


KINDS: dict[str, Composition] = {"occluded": occluded, "cut": cut, "contrast": contrast, "coarse": coarse}


def save(out: Path, name: str, pixels: Pixels, placed: Placed) -> None:
    """The picture as PNG and its YOLO labels."""
    height, width = pixels.shape[:2]
    Image.fromarray(pixels).save(out / "images" / f"{name}.png")
    rows = [
        f"{c} {(x0 + x1) / 2 / width:.6f} {(y0 + y1) / 2 / height:.6f} {(x1 - x0) / width:.6f} {(y1 - y0) / height:.6f}"
        for c, (x0, y0, x1, y1) in placed
    ]
    (out / "labels" / f"{name}.txt").write_text("".join(f"{row}\n" for row in rows))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=Path, required=True, help="folder of pictures")
    parser.add_argument("--labels", type=Path, required=True, help="folder of YOLO labels")
    parser.add_argument("--model", help="a model file; default: the bundled one")
    parser.add_argument("--out", type=Path, required=True, help="folder to write images/, labels/, sources.json to")
    parser.add_argument("--count", type=int, help="only the first so many pictures")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    for folder in ("images", "labels"):
        (args.out / folder).mkdir(parents=True, exist_ok=True)
    drawn = labels.Folder(args.labels, detectors.build(checkpoints.load(args.model)).info.names)
    made = []
    for ref in list(sources.find([str(args.images)]).refs)[: args.count]:
        marks, pixels = drawn.read(ref), decode.load(ref).pixels
        if marks is None:
            continue
        placed = [(m.class_id, m.box) for m in marks.at(pixels.shape[1], pixels.shape[0]) if m.class_id is not None]
        rng = np.random.default_rng([args.seed, *ref.path.encode()])
        for kind, compose in KINDS.items():
            name = f"{Path(ref.path).stem}.{kind}"
            save(args.out, name, *compose(pixels, placed, rng))
            made.append({"picture": f"{name}.png", "photo": ref.path, "kind": kind})
    (args.out / "sources.json").write_text(json.dumps(made, indent=1))
    print(f"{len(made)} pictures of {len(made) // len(KINDS)} photos")


if __name__ == "__main__":
    main()
