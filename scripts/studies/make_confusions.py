"""Pictures in which a detector reports a wrong class with confidence, and their controls.

    python scripts/studies/make_confusions.py --images DIR --labels DIR --model FILE --out DIR [--imgsz 448] [--jobs 2]

Each photo is scaled once so that its longer side is `--imgsz`; after that no resampling lies between a pixel and
the network. An object that the model reports rightly is pushed by projected sign gradients (Madry et al. 2018,
arXiv:1706.06083) in steps of one grey level, so that every picture is exact in 8 bits and within `--epsilon` levels:

- *other*: until the object is reported as another class of its family, and no longer as its own;
- *own*: the same procedure towards its own class, a control that is as noisy and still right;
- *clean*: the scaled photo.

Score and margin over the runner-up are steered to values drawn from those of the right reports on clean photos, so
that neither gives the push away. `labels/` of a pushed picture names the pushed object only; `sources.json` says of
each picture which photo it was made of, what was pushed to what, and how far.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.ops import box_iou

from detxai.inputs import decode, labels, sources
from detxai.inputs.letterbox import letterboxed
from detxai.models import checkpoints, detectors
from detxai.models.detector import Candidates, Detector
from detxai.models.predictions import reported
from detxai.values import ImageRef, Letterbox

#: Classes that may be taken for each other: the animals of COCO, then its other families of things.
ANIMALS = "bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe"
FAMILIES = (
    ANIMALS,
    "bicycle,car,motorcycle,airplane,bus,train,truck,boat",
    "bottle,wine glass,cup,fork,knife,spoon,bowl",
    "banana,apple,sandwich,orange,broccoli,carrot,hot dog,pizza,donut,cake",
    "frisbee,skis,snowboard,sports ball,kite,baseball bat,skateboard,surfboard,tennis racket",
    "microwave,oven,toaster,sink,refrigerator,tv,laptop,clock,chair,couch,bed,dining table,toilet",
    "backpack,umbrella,handbag,tie,suitcase,teddy bear,vase,book",
)
CONF, IOU, SAME_PLACE = 0.25, 0.45, 0.5
#: Steps of pure pushing, steps in all, and how near (logits) the drawn score must be met.
PUSH, STEPS, NEAR = 15, 60, 0.5
#: Predictions at the object that must not report its own class any more.
RIVALS = 20


@dataclass(frozen=True, eq=False)
class Photo:
    """A scaled photo in its square: `pixels` (size, size, 3) uint8, labels as (class_id, xyxy letterbox pixels)."""

    name: str
    pixels: np.ndarray
    box: Letterbox
    labels: tuple[tuple[int, tuple[float, ...]], ...]

    @property
    def inner(self) -> tuple[slice, slice]:
        return (
            slice(self.box.top, self.box.top + self.box.inner_height),
            slice(self.box.left, self.box.left + self.box.inner_width),
        )


@dataclass
class Made:
    """One picture and what was done to it; `drift`: mean |change| in grey levels."""

    picture: str
    photo: str
    kind: str
    true: str | None = None
    pushed: str | None = None
    family: int | None = None
    steps: int = 0
    drift: float = 0.0


def photo(ref: ImageRef, drawn: labels.Folder, size: int) -> Photo:
    """The picture of `ref`, scaled, with its labels."""
    square, box = letterboxed(decode.load(ref).pixels, (size, size))
    picture = drawn.read(ref)
    shift = (box.left, box.top) * 2
    placed = tuple(
        (label.class_id, tuple(v + by for v, by in zip(label.box, shift, strict=True)))
        for label in (picture.at(box.inner_width, box.inner_height) if picture else ())
        if label.class_id is not None
    )
    return Photo(Path(ref.path).stem, square, box, placed)


def as_input(pixels: np.ndarray) -> Tensor:
    """(1, 3, size, size) float32 in [0, 1]."""
    return (torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255).contiguous()


def margin(logits: Tensor, class_id: int) -> float:
    """Logit of the class − the best other (classes,)."""
    others = logits.clone()
    others[class_id] = -torch.inf
    return float(logits[class_id] - others.max())


@torch.no_grad()
def reports(detector: Detector, pixels: np.ndarray) -> Iterator[tuple[int, int, Tensor, Candidates]]:
    """(anchor, class_id, box, candidates) of everything reported."""
    candidates = detector.predict(as_input(pixels))[0]
    for anchor, class_id in reported(candidates, conf=CONF, iou=IOU, max_det=300):
        yield anchor, class_id, candidates.boxes[anchor], candidates


def rightly_reported(detector: Detector, picture: Photo) -> dict[int, tuple[int, float, float]]:
    """Index of a label -> anchor, logit and margin of the best report of its class there."""
    right: dict[int, tuple[int, float, float]] = {}
    for anchor, class_id, box, score in reports(detector, picture.pixels):
        overlaps = [
            (float(box_iou(box[None], torch.tensor([place]))), index)
            for index, (label, place) in enumerate(picture.labels)
            if label == class_id
        ]
        overlap, index = max(overlaps, default=(0.0, -1))
        if overlap >= SAME_PLACE and index not in right:
            logits = score.logits[anchor]
            right[index] = anchor, float(logits[class_id]), margin(logits, class_id)
    return right


@dataclass(frozen=True)
class Push:
    """What is wanted of one object: be reported as `wanted` at `logit` with `margin` over every other class."""

    index: int
    anchor: int
    true: int
    wanted: int
    logit: float
    margin: float


def pushed(detector: Detector, picture: Photo, push: Push, epsilon: int) -> tuple[np.ndarray, int] | None:
    """The pushed picture (size, size, 3) uint8 and the steps it took; None where the model holds out."""
    place = torch.tensor([picture.labels[push.index][1]])
    start = torch.from_numpy(picture.pixels).float()
    inside = torch.zeros_like(start)
    inside[picture.inner] = 1
    with torch.no_grad():
        overlap = box_iou(detector.predict(as_input(picture.pixels))[0].boxes, place)[:, 0]
    rivals = overlap.topk(RIVALS).indices
    low, high = (start - epsilon).clamp(0, 255), (start + epsilon).clamp(0, 255)
    x, best = start.clone(), None
    for step in range(1, STEPS + 1):
        x.requires_grad_(True)
        candidates = detector.predict((x / 255).permute(2, 0, 1)[None])[0]
        loss = _loss(candidates.logits, push, rivals, aim=step > PUSH)
        (gradient,) = torch.autograd.grad(loss, x)
        x = torch.minimum(torch.maximum(x.detach() - gradient.sign() * inside, low), high)
        pixels = x.round().byte().numpy()
        if step >= PUSH and (reached := _reached(detector, pixels, push, place)) is not None:
            if abs(reached - push.logit) <= NEAR:
                return pixels, step
            if best is None or abs(reached - push.logit) < best[0]:
                best = abs(reached - push.logit), pixels, step
    return None if best is None else best[1:]


def _loss(logits: Tensor, push: Push, rivals: Tensor, aim: bool) -> Tensor:
    z = logits[push.anchor]
    others = torch.cat([z[: push.wanted], z[push.wanted + 1 :]])
    lead = z[push.wanted] - others.max()
    loss = (z[push.wanted] - push.logit).abs() if aim else -z[push.wanted]
    loss = loss + ((lead - push.margin).abs() if aim else -lead)
    if push.true != push.wanted:
        reportable = float(np.log(CONF / (1 - CONF))) - 0.5
        loss = loss + (logits[rivals, push.true] - reportable).clamp(min=0).sum()
    return loss


def _reached(detector: Detector, pixels: np.ndarray, push: Push, place: Tensor) -> float | None:
    """The logit at which the object is reported as wanted, and not as another class of the two; else None."""
    best = None
    for anchor, class_id, box, score in reports(detector, pixels):
        if float(box_iou(box[None], place)) >= SAME_PLACE:
            if class_id == push.wanted:
                logit = float(score.logits[anchor, class_id])
                best = logit if best is None else max(best, logit)
            elif class_id == push.true:
                return None
    return best


def pushes(
    picture: Photo,
    right: dict[int, tuple[int, float, float]],
    families: Sequence[Sequence[int]],
    looks: Sequence[tuple[float, float]],
    most: Sequence[int],
    rng: np.random.Generator,
) -> Iterator[tuple[str, int, Push]]:
    """(kind, family, push): at most `most` of a family's others and half as many own, spread over objects."""
    for number, family in enumerate(families):
        objects = [i for i in right if picture.labels[i][0] in family]
        pairs = [(i, c) for i in objects for c in family if c != picture.labels[i][0]]
        limit = most[0] if number == 0 else most[1]
        for kind in ("other", "own"):
            if kind == "own":
                pairs, limit = [(i, picture.labels[i][0]) for i in objects] * limit, (limit + 1) // 2
            for at in rng.permutation(len(pairs))[:limit]:
                index, wanted = pairs[at]
                logit, lead = looks[rng.integers(len(looks))]
                yield kind, number, Push(index, right[index][0], picture.labels[index][0], wanted, logit, lead)


def save(folder: Path, name: str, pixels: np.ndarray, picture: Photo, objects: Sequence[int]) -> None:
    """The picture without its padding as PNG, and a YOLO label of the objects numbered in `objects`."""
    Image.fromarray(pixels[picture.inner]).save(folder / "images" / f"{name}.png")
    w, h = picture.box.inner_width, picture.box.inner_height
    lines = []
    for class_id, (x0, y0, x1, y1) in (picture.labels[i] for i in objects):
        x0, x1, y0, y1 = x0 - picture.box.left, x1 - picture.box.left, y0 - picture.box.top, y1 - picture.box.top
        lines.append(
            f"{class_id} {(x0 + x1) / 2 / w:.6f} {(y0 + y1) / 2 / h:.6f} {(x1 - x0) / w:.6f} {(y1 - y0) / h:.6f}"
        )
    (folder / "labels" / f"{name}.txt").write_text("".join(f"{line}\n" for line in lines))


def make(args: argparse.Namespace, ref: ImageRef, looks: Sequence[tuple[float, float]]) -> list[Made]:
    """All pictures made of one photo."""
    detector = detectors.build(checkpoints.load(args.model))
    names = detector.info.names
    picture = photo(ref, labels.Folder(args.labels, names), args.imgsz)
    families = [[i for i, name in names.items() if name in family.split(",")] for family in FAMILIES]
    rng = np.random.default_rng([args.seed, *picture.name.encode()])
    save(args.out, f"{picture.name}.clean", picture.pixels, picture, range(len(picture.labels)))
    made = [Made(f"{picture.name}.clean.png", ref.path, "clean")]
    right = rightly_reported(detector, picture)
    for kind, family, push in pushes(picture, right, families, looks, (args.animals, args.things), rng):
        done = pushed(detector, picture, push, args.epsilon)
        if done is None:
            continue
        pixels, steps = done
        name = f"{picture.name}.{push.index}.{kind}.{len(made)}"
        save(args.out, name, pixels, picture, [push.index])
        drift = float(np.abs(pixels[picture.inner].astype(int) - picture.pixels[picture.inner]).mean())
        made.append(Made(f"{name}.png", ref.path, kind, names[push.true], names[push.wanted], family, steps, drift))
    return made


def looks_of(args: argparse.Namespace, refs: Sequence[ImageRef]) -> list[tuple[float, float]]:
    """(logit, margin) of every right report on the clean photos."""
    detector = detectors.build(checkpoints.load(args.model))
    drawn = labels.Folder(args.labels, detector.info.names)
    reports_of_photos = (rightly_reported(detector, photo(ref, drawn, args.imgsz)) for ref in refs)
    return [(logit, lead) for right in reports_of_photos for _, logit, lead in right.values()]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=Path, required=True, help="folder of photos")
    parser.add_argument("--labels", type=Path, required=True, help="folder of their YOLO labels, ids of the model")
    parser.add_argument("--model", required=True, help="a model file with COCO's class names")
    parser.add_argument("--out", type=Path, required=True, help="folder to write images/, labels/, sources.json to")
    parser.add_argument("--imgsz", type=int, default=448, help="longer side of the pictures")
    parser.add_argument("--epsilon", type=int, default=8, help="grey levels that a pixel may change by")
    parser.add_argument("--animals", type=int, default=9, help="most pushes to another animal, a photo")
    parser.add_argument("--things", type=int, default=2, help="most pushes to another class of each other family")
    parser.add_argument("--jobs", type=int, default=1, help="photos at once")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    for folder in ("images", "labels"):
        (args.out / folder).mkdir(parents=True, exist_ok=True)
    refs = list(sources.find([str(args.images)]).refs)
    looks = looks_of(args, refs)
    made: list[dict[str, Any]] = []
    with ProcessPoolExecutor(args.jobs) as pool:
        for done in pool.map(make, [args] * len(refs), refs, [looks] * len(refs)):
            made += [asdict(m) for m in done]
            (args.out / "sources.json").write_text(json.dumps(made, indent=1))
            print(f"{len(made)} pictures, {sum(m['kind'] == 'other' for m in made)} of them confused", flush=True)


if __name__ == "__main__":
    main()
