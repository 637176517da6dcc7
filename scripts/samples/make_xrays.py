"""Generate synthetic security X-rays of bags with YOLO labels and masks of the telling parts.

    python scripts/samples/make_xrays.py --out bags --count 100 --seed 1 --parts
    python scripts/samples/make_xrays.py --out cheat --count 100 --seed 1 --catalogue cheat --parts --tag never

Image k of a seed is the same picture however many are made; ``xraysim.VERSION`` names the pixels.
In the catalogues ``cheat`` and ``control`` a tag lies beside the item: with ``--parts`` its mask is
written to ``tags/``, and ``--tag never`` makes the same pictures with the tag painted out.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping
from functools import partial
from multiprocessing import Pool
from pathlib import Path

import cv2
import numpy as np
from xraysim.bags import Bag, make_bag
from xraysim.catalogue import CATALOGUES, Kind, has_tags
from xraysim.harder import harder

TAG = {"share": None, "never": False, "always": True}


def generate(seed: int, index: int, kinds: Mapping[str, Kind], tag: bool | None = None, *, hard: bool = False) -> Bag:
    """Image ``index`` of ``seed``: uint8 (H, W, 3) RGB; ``tag`` as ``make_bag``, ``hard`` as ``harder``."""
    rng = np.random.default_rng([seed, index])
    bag = make_bag(rng, kinds, tag)
    return harder(rng, bag) if hard else bag


def label_lines(bag: Bag, names: list[str]) -> list[str]:
    """YOLO lines ``class cx cy w h``, centre and size as shares of the picture."""
    height, width = bag.image.shape[:2]
    lines = []
    for item in bag.items:
        x0, y0, x1, y1 = item.box
        cx, cy, w, h = (x0 + x1) / 2 / width, (y0 + y1) / 2 / height, x1 - x0, y1 - y0
        lines.append(f"{names.index(item.name)} {cx:.6f} {cy:.6f} {w / width:.6f} {h / height:.6f}")
    return lines


def write(
    index: int,
    seed: int,
    catalogue: str,
    out: Path,
    parts: bool,
    stem: str,
    tag: bool | None = None,
    hard: bool = False,
    energies: bool = False,
) -> None:
    """Make one image and write picture, labels and, if wanted, part maps and the mask of the tag."""
    cv2.setNumThreads(1)  # one process per core already
    kinds = CATALOGUES[catalogue]
    bag = generate(seed, index, kinds, tag, hard=hard)
    stem = stem.format(seed=seed, index=index, number=index + 1)
    picture = cv2.cvtColor(bag.image, cv2.COLOR_RGB2BGR)
    cv2.imwrite(str(out / "images" / f"{stem}.jpg"), picture, [cv2.IMWRITE_JPEG_QUALITY, 90])
    if energies and bag.energies is not None:
        for name, values in zip(("low", "high"), bag.energies, strict=True):
            cv2.imwrite(str(out / "energies" / f"{stem}_{name}.png"), values)
    lines = label_lines(bag, list(kinds))
    (out / "labels" / f"{stem}.txt").write_text("".join(line + "\n" for line in lines))
    if parts:
        for i, item in enumerate(bag.items):
            cv2.imwrite(str(out / "parts" / f"{stem}.{i}.png"), item.parts)
        if bag.tag is not None:
            cv2.imwrite(str(out / "tags" / f"{stem}.png"), bag.tag * np.uint8(255))


def main(argv: list[str] | None = None) -> None:
    """Parse the command line and make the images on all cores."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--count", type=int, required=True, help="how many images")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=int, default=0, help="index of the first image")
    parser.add_argument("--parts", action="store_true", help="also write masks of telling parts and tags")
    parser.add_argument(
        "--stem", default="s{seed}-{index:05d}", help="file stem, with {seed}, {index} and {number} (index + 1)"
    )
    parser.add_argument("--catalogue", choices=sorted(CATALOGUES), default="standard")
    parser.add_argument(
        "--tag",
        choices=list(TAG),
        default="share",
        help="in how many bags of cheat and control: the catalogue's share, or overruled",
    )
    parser.add_argument("--harder", action="store_true", help="clutter, tilt, cut items, other colours, noise, blur")
    parser.add_argument("--energies", action="store_true", help="also write 16-bit pictures at low and high energy")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args(argv)

    kinds = CATALOGUES[args.catalogue]
    tagged = has_tags(kinds)
    if args.harder and tagged:
        parser.error("--harder: the tags of cheat and control would not follow")
    if args.harder and args.energies:
        parser.error("--harder: the energies would not follow")
    if args.tag != "share" and not tagged:
        parser.error(f"--tag {args.tag}: the catalogue {args.catalogue} has no tags")
    for folder in (
        ["images", "labels"]
        + ["parts"] * args.parts
        + ["tags"] * (args.parts and tagged)
        + ["energies"] * args.energies
    ):
        (args.out / folder).mkdir(parents=True, exist_ok=True)
    classes = "".join(name + "\n" for name in kinds)
    for folder in (args.out, args.out / "labels"):  # tools look for it in the one or the other
        (folder / "classes.txt").write_text(classes)
    if args.parts:
        table = {name: list(kind.parts) for name, kind in kinds.items()}
        (args.out / "parts" / "parts.json").write_text(json.dumps(table, indent=2) + "\n")

    job = partial(
        write,
        seed=args.seed,
        catalogue=args.catalogue,
        out=args.out,
        parts=args.parts,
        stem=args.stem,
        tag=TAG[args.tag],
        hard=args.harder,
        energies=args.energies,
    )
    indices = range(args.start, args.start + args.count)
    if args.jobs > 1:
        with Pool(args.jobs) as pool:
            for _ in pool.imap_unordered(job, indices, chunksize=4):
                pass
    else:
        for index in indices:
            job(index)


if __name__ == "__main__":
    main()
