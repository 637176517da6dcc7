"""Runs every family of detectors from its yaml and prints what came of it, as a Markdown table.

Weights are random, but BatchNorm statistics are those of real pictures (the two that ship with ultralytics): untouched
random weights output constants. Accuracy is nobody's claim here; that gradients, heads and integrals work is.

    python scripts/checks/families.py > families.md
    python scripts/checks/families.py --methods all          every method on every target that it explains
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from ultralytics.nn import tasks
from ultralytics.utils import ASSETS

from detxai.attribution.engine import Engine, solve
from detxai.attribution.integral import integrated_gradients
from detxai.attribution.methods import METHODS, Settings
from detxai.attribution.points import Segment, TargetMap
from detxai.models.detector import Detector
from detxai.models.detectors import build, self_test
from detxai.models.predictions import closeness
from detxai.values import Checkpoint, Target
from detxai.vocabulary import BLACK_BOX_METHODS, EDGES
from detxai.vocabulary import METHODS as WORDS

SIZE = 128
SEED = 7
#: Evaluations allowed, by whether the head is sparse: a decoder runs in full and is slow on a CPU.
MOST = {True: 256, False: 48}


class Family(NamedTuple):
    """How a family is built here, and what is expected of it. `small`: overrides that shrink the yaml.

    `dark`: the baseline is the picture at this brightness, one of those that the statistics were computed on. The slope
    of a random ReLU network (v6) jumps too often for a longer path.
    """

    yaml: str
    model: str = "DetectionModel"
    branch: str = "one2many"
    sparse: bool = True
    size: int = SIZE
    dark: float = 0.4
    small: tuple[tuple[str, Any], ...] = ()


THIN = (("width_multiple", 0.25), ("depth_multiple", 0.34))
FAMILIES = {
    "v3u": Family("yolov3.yaml", small=THIN),
    "v3u-spp": Family("yolov3-spp.yaml", small=THIN),
    "v3u-tiny": Family("yolov3-tiny.yaml", small=(("width_multiple", 0.5),)),
    "v5u": Family("yolov5n.yaml"),
    "v5u-p6": Family("yolov5n-p6.yaml"),
    "v6": Family("yolov6n.yaml", dark=0.9),
    "v8": Family("yolov8n.yaml"),
    "v8-p2": Family("yolov8n-p2.yaml"),
    "v8-p6": Family("yolov8n-p6.yaml"),
    "v8-ghost": Family("yolov8n-ghost.yaml"),
    "v9": Family("yolov9t.yaml"),
    "v10": Family("yolov10n.yaml", branch="one2one"),
    "11": Family("yolo11n.yaml"),
    "12": Family("yolo12n.yaml"),
    "26": Family("yolo26n.yaml", branch="one2one"),
    "v8-seg": Family("yolov8n-seg.yaml", "SegmentationModel"),
    "11-pose": Family("yolo11n-pose.yaml", "PoseModel"),
    "11-obb": Family("yolo11n-obb.yaml", "OBBModel"),
    "26-seg": Family("yolo26n-seg.yaml", "SegmentationModel", "one2one"),
    "26-pose": Family("yolo26n-pose.yaml", "PoseModel", "one2one"),
    "26-obb": Family("yolo26n-obb.yaml", "OBBModel", "one2one"),
    "world": Family("yolov8n-world.yaml", "WorldModel"),
    "world-v2": Family("yolov8n-worldv2.yaml", "WorldModel"),
    "yoloe-v8": Family("yoloe-v8n.yaml", "YOLOEModel"),
    "yoloe-26": Family("yoloe-26n.yaml", "YOLOEModel", "one2one"),
    "yoloe-11-seg": Family("yoloe-11n-seg.yaml", "YOLOESegModel"),
    "rtdetr": Family("rtdetr-l.yaml", "RTDETRDetectionModel", "decoder", sparse=False, dark=0.985),
    "rtdetr-v8": Family("yolov8n-rtdetr.yaml", "RTDETRDetectionModel", "decoder", sparse=False, dark=0.985),
}


@cache
def photo(name: str, size: int) -> Tensor:
    """(3, size, size) float32: a picture that ultralytics ships, letterboxed (neither is square)."""
    picture = Image.open(ASSETS / name).convert("RGB")
    picture.thumbnail((size, size))
    square = np.full((size, size, 3), 114, np.uint8)
    top, left = (size - picture.height) // 2, (size - picture.width) // 2
    square[top : top + picture.height, left : left + picture.width] = np.asarray(picture)
    return torch.from_numpy(square).permute(2, 0, 1).float() / 255


def photos(size: int, dark: float) -> Tensor:
    """(8, 3, size, size): two pictures, mirrored, and darker: no place on the path to black is far from them."""
    two = torch.stack([photo("bus.jpg", size), photo("zidane.jpg", size)])
    return torch.cat([two, two.flip(-1), two * dark, two.flip(-1) * 0.1])


def network(family: Family) -> Any:
    """The family's network with seeded random weights and BatchNorm statistics of real pictures."""
    torch.manual_seed(SEED)
    yaml = tasks.yaml_model_load(family.yaml) | dict(family.small)
    module = getattr(tasks, family.model)(yaml, ch=3, nc=12, verbose=False)
    if family.model.startswith("YOLOE"):
        module.set_classes([f"thing {i}" for i in range(12)], nn.functional.normalize(torch.randn(1, 12, 512), dim=-1))
    if family.branch == "decoder":  # their last layers begin at zero, which leaves every box where it is
        head = module.model[-1]
        head.num_queries = 24
        for mlp in (head.enc_bbox_head, *head.dec_bbox_head):
            nn.init.normal_(mlp.layers[-1].weight, std=0.1)
    module.names = {i: f"thing {i}" for i in range(12)}
    calibrate(module, photos(2 * family.size, family.dark))
    if family.branch == "one2one":
        module.model[-1].end2end = True
    return module


def calibrate(module: nn.Module, pictures: Tensor) -> None:
    """Set the statistics of every BatchNorm to those of `pictures`; leaves the module in evaluation mode."""
    norms = [part for part in module.modules() if isinstance(part, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    with torch.no_grad():
        module.train()(pictures)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    module.eval()


def sensible(method: str, kind: str) -> bool:
    """Whether `method` explains targets of this kind."""
    return kind == "class" or (method not in BLACK_BOX_METHODS and not (WORDS[method].one_sided and kind in EDGES))


def explained(
    detector: Detector, method: str, targets: Sequence[Target], x: Tensor, dark: Tensor, evaluations: int = 4
) -> list[TargetMap]:
    """Maps of `targets` on x (3, size, size) by `method`, with few evaluations and in small packs."""
    with torch.no_grad():
        early = detector.trunk.early(x[None])
    settings = Settings(max_evaluations=evaluations, layer_of=detector.layer_of, early=early)
    engine = Engine(detector.values, x.device, 2, partial(closeness, detector), tap=detector.trunk.tap)
    paths = [Segment(x, dark), Segment(x, torch.full_like(x, 0.5))]
    ((_, maps),) = engine.run([(None, METHODS[method](paths, targets, settings))], 1)
    return maps


def detector_of(name: str, family: Family, module: Any) -> Detector:
    """The detector of the network `module`, with the family's own head."""
    return build(Checkpoint(name, "0" * 64, "ultralytics", module, name, module.names, 640), family.branch)


def matrix_row(name: str, family: Family, methods: Sequence[str]) -> tuple[str, ...]:
    """(family, for each method the targets that gave a map, and in how many seconds)."""
    module = network(family)
    detector = detector_of(name, family, module)
    x = photo("bus.jpg", family.size)
    with torch.no_grad():
        candidates = detector.predict(x[None])[0]
    anchor, class_id = divmod(int(candidates.logits.argmax()), candidates.logits.shape[1])
    left, top, right, bottom = candidates.boxes[anchor].tolist()
    level = int(candidates.levels[anchor])
    cells = [name]
    for method in methods:
        targets = [
            Target(anchor, level, kind, class_id, context=candidates.context, box=(left, top, right, bottom))
            for kind in detector.info.targets
            if sensible(method, kind)
        ]
        start = time.perf_counter()
        maps = explained(detector, method, targets, x, x * family.dark)
        seconds = time.perf_counter() - start
        said = [m.target.kind for m in maps if bool(m.map.isfinite().all()) and bool(m.map.any())]
        edges = sum(kind in EDGES for kind in said)
        own = [*(kind for kind in said if kind not in EDGES), *([f"{edges} edges"] if edges else [])]
        cells.append(f"{', '.join(own) or 'zero'} ({seconds:.1f} s)")
    return tuple(cells)


def row(name: str, family: Family) -> tuple[str, ...]:
    """(family, head, targets, path, largest gradient, error, evaluations) of one family, really run."""
    module = network(family)
    detector = detector_of(name, family, module)
    x = photo("bus.jpg", family.size)[None]
    dark = x * family.dark
    with torch.no_grad():
        candidates, then = detector.predict(x)[0], detector.predict(dark)[0]
    here = candidates.levels == 0
    moved = (candidates.logits - then.logits).abs() * here[:, None]
    if family.branch == "decoder":
        moved = candidates.logits  # other queries are selected on another picture
    anchor, class_id = divmod(int(moved.argmax()), moved.shape[1])
    target = Target(anchor, 0, "class", class_id, context=candidates.context)
    ask = integrated_gradients(Segment(x[0], dark[0]), [target], max_evaluations=MOST[detector.info.sparse])
    (integral,) = solve(detector.values, ask)
    edges = "edges" if "left" in detector.info.targets else ""
    own = [t for t in detector.info.targets if t in ("class", "objectness")]
    return (
        name,
        detector.info.head,
        ", ".join([*own, edges]),
        "sparse" if detector.info.sparse else "full",
        f"{self_test(detector, x):.2g}",
        f"{100 * float(integral.error_bound or 0):.1f} %",
        str(integral.evaluations) if integral.converged else f"{integral.evaluations} (not converged)",
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help=f"families; default: all of {', '.join(FAMILIES)}")
    about = f"run methods instead: all, or some of {', '.join(METHODS)}"
    parser.add_argument("--methods", nargs="+", metavar="NAME", help=about)
    arguments = parser.parse_args()
    chosen = arguments.names or list(FAMILIES)
    if arguments.methods:
        methods = list(METHODS) if arguments.methods == ["all"] else arguments.methods
        print("| family | " + " | ".join(methods) + " |")
        print("|---" * (1 + len(methods)) + "|")
        for name in chosen:
            print("| " + " | ".join(matrix_row(name, FAMILIES[name], methods)) + " |", flush=True)
        return
    print("| family | head explained | targets | gradients | largest input gradient | error bound | evaluations |")
    print("|---|---|---|---|---|---|---|")
    for name in chosen:
        print("| " + " | ".join(row(name, FAMILIES[name])) + " |", flush=True)


if __name__ == "__main__":
    main()
