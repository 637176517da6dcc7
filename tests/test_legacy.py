"""Checkpoints of the original YOLOv5 and YOLOv3 repositories, without their code."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from families import calibrate, photo, photos
from PIL import Image, ImageOps
from torch import nn
from ultralytics.nn import tasks
from ultralytics.utils import ASSETS

from detxai.attribution.engine import solve
from detxai.attribution.integral import integrated_gradients
from detxai.attribution.points import Segment
from detxai.config.fingerprint import fingerprint
from detxai.config.settings import RunConfig
from detxai.errors import ModelError
from detxai.models import checkpoints, detectors
from detxai.models.detector import Pin
from detxai.models.heads.anchor_based import score_logit
from detxai.models.predictions import reported
from detxai.output.records import RECORD_SCHEMA
from detxai.run.pipeline import Explainer
from detxai.values import Target

SHARED = Path(__file__).parents[2] / "shared"
COCO = SHARED / "weights" / "yolov5n_coco.pt"
EXPECTED = SHARED / "expected" / "yolov5n_coco.json"
PHOTOS = SHARED / "data" / "natural-dev" / "darknet"
ANCHORS = [[10, 13, 16, 30, 33, 23], [30, 61, 62, 45, 59, 119], [116, 90, 156, 198, 373, 326]]
STRIDES = (8, 16, 32)

#: The yaml of an early release: Focus first, SPP before the neck, BottleneckCSP with LeakyReLU inside.
OLD = {
    "nc": 4,
    "depth_multiple": 0.33,
    "width_multiple": 0.25,
    "anchors": ANCHORS,
    "backbone": [
        [-1, 1, "Focus", [64, 3]],
        [-1, 1, "Conv", [128, 3, 2]],
        [-1, 3, "BottleneckCSP", [128]],
        [-1, 1, "Conv", [256, 3, 2]],
        [-1, 3, "C3", [256]],
        [-1, 1, "Conv", [512, 3, 2]],
        [-1, 3, "C3", [512]],
        [-1, 1, "Conv", [1024, 3, 2]],
        [-1, 1, "SPP", [1024, [5, 9, 13]]],
    ],
    "head": [
        [-1, 1, "Conv", [512, 1, 1]],
        [-1, 1, "nn.Upsample", ["None", 2, "nearest"]],
        [[-1, 6], 1, "Concat", [1]],
        [-1, 1, "C3", [512, False]],
        [-1, 1, "nn.Upsample", ["None", 2, "nearest"]],
        [[-1, 4], 1, "Concat", [1]],
        [-1, 1, "C3", [256, False]],
        [[15, 12, 8], 1, "Detect", ["nc", "anchors"]],
    ],
}


# -- a repository that exists only here, and only while its checkpoint is written -----------------------


@pytest.fixture
def repository() -> Iterator[Any]:
    """A function that makes an instance of a class of `models.yolo` or `models.common`, as it is pickled there."""
    made = {name: ModuleType(name) for name in ("models", "models.yolo", "models.common")}
    sys.modules.update(made)

    def instance(room: str, name: str, source: nn.Module | None = None) -> Any:
        module = made[f"models.{room}"]
        if not hasattr(module, name):
            setattr(module, name, type(name, (nn.Module,), {"__module__": module.__name__}))
        part = getattr(module, name)()
        if source is not None:
            part.__dict__.update({k: v for k, v in source.__dict__.items() if k != "forward"})
        return part

    yield instance
    for name in made:
        del sys.modules[name]


def relabelled(part: nn.Module, instance: Any) -> nn.Module:
    """`part` and all below it with the classes of the other repository instead of ultralytics'."""
    for name, child in list(part.named_children()):
        part._modules[name] = relabelled(child, instance)
    return instance("common", type(part).__name__, part) if "ultralytics" in type(part).__module__ else part


def write(file: Path, instance: Any, yaml: dict[str, Any] = OLD) -> nn.Sequential:
    """Write a legacy checkpoint with seeded random weights; returns its layers, which still have their code."""
    torch.manual_seed(3)
    *rows, (feeds, _, _, _) = yaml["backbone"] + yaml["head"]
    layers, _ = tasks.parse_model({**yaml, "backbone": rows, "head": [], "anchors": 0}, ch=3, verbose=False)
    for part in layers.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.eps = 1e-3
    calibrate(_Wired(layers), photos(256, 0.4))
    widths = [_Wired(layers).widths[i] for i in feeds]
    detect = instance("yolo", "Detect")
    detect.nc, detect.nl, detect.na, detect.i, detect.f = yaml["nc"], 3, 3, len(rows), feeds
    anchors = torch.tensor(yaml["anchors"]).float().view(3, 3, 2)
    detect.register_buffer("anchors", anchors / torch.tensor(STRIDES).view(3, 1, 1))
    detect.m = nn.ModuleList(nn.Conv2d(width, 3 * (5 + yaml["nc"]), 1) for width in widths)
    model = instance("yolo", "Model")
    shells = relabelled(nn.Sequential(*(_copy(layer) for layer in layers), detect), instance)
    model.model, model.yaml, model.stride = shells, yaml, torch.tensor(STRIDES).float()
    model.names = [f"thing {i}" for i in range(yaml["nc"])]
    torch.save({"epoch": -1, "model": model.half(), "ema": None}, file)
    return nn.Sequential(*layers, *(_copy(conv).float() for conv in detect.m))


class _Wired(nn.Module):
    """The layers of a yaml, run one after the other; what each of them put out is kept."""

    def __init__(self, layers: nn.Sequential) -> None:
        super().__init__()
        self.layers = layers

    @property
    def widths(self) -> list[int]:
        with torch.no_grad():
            return [y.shape[1] for y in self(torch.zeros(1, 3, 64, 64))]

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        outputs: list[torch.Tensor] = []
        for layer in self.layers:
            wired: Any = layer.f
            x = (
                (outputs[wired] if outputs else x) if isinstance(wired, int) else [outputs[i] for i in wired]  # type: ignore[assignment]
            )
            x = layer(x)
            outputs.append(x)
        return outputs


def _copy(part: nn.Module) -> Any:
    import copy

    return copy.deepcopy(part)


def test_an_old_checkpoint_is_rebuilt_and_explained(tmp_path: Path, repository: Any) -> None:
    layers = write(tmp_path / "old.pt", repository)
    for name in ("models", "models.yolo", "models.common"):
        del sys.modules[name]
    try:
        checkpoint = checkpoints.load(str(tmp_path / "old.pt"))
    finally:
        sys.modules.update({name: ModuleType(name) for name in ("models", "models.yolo", "models.common")})
    assert (checkpoint.kind, checkpoint.trusted, checkpoint.names[3]) == ("legacy", False, "thing 3")
    detector = detectors.build(checkpoint)
    assert detector.info.sparse
    assert detector.info.targets == ("class", "objectness", "left", "top", "right", "bottom")
    x = photo("bus.jpg", 128)[None]
    *trunk, a, b, c = layers.half().float()  # as the checkpoint rounds them
    with torch.no_grad():
        found = detector.predict(x)[0]
        outputs = _Wired(nn.Sequential(*trunk).eval())(x)
        boxes, scores = [], []
        for conv, feed, stride, sizes in zip((a, b, c), OLD["head"][-1][0], STRIDES, ANCHORS, strict=True):
            raw = conv(outputs[feed])
            y = raw.view(3, 9, *raw.shape[-2:]).permute(0, 2, 3, 1).sigmoid()
            grid = torch.stack(torch.meshgrid(*(torch.arange(n) for n in y.shape[1:3]), indexing="xy"), -1)
            centre = (y[..., :2] * 2 - 0.5 + grid) * stride
            half = (y[..., 2:4] * 2) ** 2 * torch.tensor(sizes).float().view(3, 1, 1, 2) / 2
            boxes.append(torch.cat([centre - half, centre + half], -1).reshape(-1, 4))
            scores.append((y[..., 4:5] * y[..., 5:]).reshape(-1, 4))
    torch.testing.assert_close(found.boxes, torch.cat(boxes), atol=2e-2, rtol=1e-4)
    torch.testing.assert_close(found.scores, torch.cat(scores), atol=1e-3, rtol=0)
    torch.testing.assert_close(found.logits.sigmoid(), found.scores, atol=1e-6, rtol=0)
    for level in range(3):
        here = (found.levels == level).nonzero().flatten().tolist()
        at = (here[0], here[-1], here[len(here) // 2])
        pins = [Pin(0, Target(anchor, level, kind, 1)) for anchor in at for kind in detector.info.targets]
        y = x.clone().requires_grad_(True)
        sparse, full = detector.values(y, pins), detector.full_values(y, pins)
        torch.testing.assert_close(sparse, full, atol=1e-4, rtol=1e-5)
        mixed = torch.linspace(-1, 1, len(pins))
        one, other = (torch.autograd.grad((v * mixed).sum(), y, retain_graph=True)[0] for v in (sparse, full))
        assert float(other.norm()) > 0
        assert float((one - other).norm() / other.norm()) <= 1e-4
    with torch.no_grad():
        dark = detector.predict(0.8 * x)[0]
    moved = (found.logits - dark.logits).abs()
    anchor, class_id = divmod(int((moved - 1).abs().argmin()), 4)
    target = Target(anchor, int(found.levels[anchor]), "class", class_id)
    (integral,) = solve(detector.values, integrated_gradients(Segment(x[0], 0.8 * x[0]), [target]))
    assert integral.completeness_error <= 0.05
    assert abs(integral.value_at_input - integral.value_at_baseline) >= 0.3


def test_the_score_is_objectness_times_class() -> None:
    objectness, classes = torch.tensor([[-3.0], [90.0], [-90.0]]), torch.tensor([[2.0], [90.0], [-90.0]])
    logit = score_logit(objectness.double(), classes.double())
    score = objectness.double().sigmoid() * classes.double().sigmoid()
    assert float(logit[0]) == pytest.approx(float((score[0] / (1 - score[0])).log()))
    assert bool(logit.isfinite().all())  # where σ·σ is 1 or 0 in any float, too
    # An objectness that is sure leaves the class alone, and the other way round.
    assert float(score_logit(torch.tensor(40.0), torch.tensor(1.5))) == pytest.approx(1.5)
    assert float(score_logit(torch.tensor(1.5), torch.tensor(40.0))) == pytest.approx(1.5)


def changed(file: Path, change: Any) -> Path:
    """`file` with `change` done to its model."""
    content = torch.load(file, weights_only=False)
    change(content["model"])
    torch.save(content, file)
    return file


def test_what_is_stored_decides_not_what_the_yaml_says(tmp_path: Path, repository: Any) -> None:
    write(tmp_path / "old.pt", repository)
    x = photo("bus.jpg", 128)[None]
    with torch.no_grad():
        before = detectors.build(checkpoints.load(str(tmp_path / "old.pt"))).predict(x)[0]

        def lie(model: Any) -> None:
            code = [-1, 1, "__import__('os').system", ["true"]]
            model.yaml = OLD | {"activation": "__import__('os').system('true')", "backbone": [code]}

        after = detectors.build(checkpoints.load(str(changed(tmp_path / "old.pt", lie)))).predict(x)[0]
    assert torch.equal(before.logits, after.logits)


@pytest.mark.parametrize("act", [nn.LeakyReLU(0.1), nn.Hardswish(), nn.ReLU()], ids=lambda act: type(act).__name__)
def test_legacy_activations_are_those_of_the_layers(tmp_path: Path, repository: Any, act: nn.Module) -> None:
    """Releases before SiLU carry their activation in the modules alone; the pooling and the first kernel likewise."""
    layers = write(tmp_path / "old.pt", repository)

    def older(model: Any) -> None:
        for part in model.modules():
            if isinstance(getattr(part, "act", None), nn.SiLU):
                part.act = act
        model.model[8].m[0] = nn.MaxPool2d(3, 1, 1)

    changed(tmp_path / "old.pt", older)
    x = photo("bus.jpg", 128)[None]
    detector = detectors.build(checkpoints.load(str(tmp_path / "old.pt")))
    *trunk, a, b, c = layers.half().float()
    for part in layers.modules():
        if isinstance(getattr(part, "act", None), nn.SiLU):
            part.act = act
    trunk[8].m[0] = nn.MaxPool2d(3, 1, 1)
    with torch.no_grad():
        found, outputs = detector.predict(x)[0], _Wired(nn.Sequential(*trunk).eval())(x)
        raw = [conv(outputs[feed]) for conv, feed in zip((a, b, c), OLD["head"][-1][0], strict=True)]
    y = torch.cat([r.view(3, 9, -1).transpose(1, 2).reshape(-1, 9) for r in raw])
    torch.testing.assert_close(found.logits, score_logit(y[:, 4:5], y[:, 5:]), atol=1e-3, rtol=1e-4)
    assert checkpoints.build(tasks.yaml_model_load("yolov8n.yaml"), {0: "a"}).model[0].act.__class__ is nn.SiLU


def _unknown(model: Any) -> None:
    model.model[1].extra = nn.Conv2d(1, 1, 1).half()


def _wider(model: Any) -> None:
    model.model[1].conv.stride = (1 << 20, 1)


def _hooked(model: Any) -> None:
    model.model[1]._forward_hooks[0] = "a hook"


def _fewer_names(model: Any) -> None:
    model.names = ["one"]


def _other_head(model: Any) -> None:
    model.model[-1] = nn.Conv2d(1, 1, 1).half()


def _later(model: Any) -> None:
    model.model[1].f = 5


@pytest.mark.parametrize("change", [_unknown, _wider, _hooked, _fewer_names, _other_head, _later])
def test_what_cannot_be_rebuilt_is_refused_by_its_name(tmp_path: Path, repository: Any, change: Any) -> None:
    write(tmp_path / "old.pt", repository)
    with pytest.raises(ModelError, match=r"layer 1|names|Conv2d head"):
        detectors.build(checkpoints.load(str(changed(tmp_path / "old.pt", change))))


@pytest.mark.skipif(not (COCO.exists() and EXPECTED.exists()), reason="the shared weights are not here")
@pytest.mark.parametrize("name", ["bus.jpg", "zidane.jpg", "giraffe.jpg", "dog.jpg", "person.jpg", "horses.jpg"])
def test_the_official_checkpoint_detects_what_its_own_code_detects(name: str) -> None:
    file = ASSETS / name
    file = file if file.exists() else SHARED / "data" / "natural-dev" / "darknet" / name
    detector = detectors.build(checkpoints.load(str(COCO)))
    picture = Image.open(file).convert("RGB")
    picture = ImageOps.contain(picture, (640, 640), Image.Resampling.BILINEAR)  # as the expected boxes were made
    square = np.array(ImageOps.pad(picture, (640, 640), color=(114, 114, 114)))
    x = torch.from_numpy(square).permute(2, 0, 1)[None].float() / 255
    with torch.no_grad():
        found = detector.predict(x)[0]
    ours = reported(found, conf=0.25, iou=0.45, max_det=300)
    theirs = json.loads(EXPECTED.read_text())[name]
    assert [detector.info.names[c] for _, c in ours] == [d["class"] for d in theirs]
    for (anchor, class_id), expected in zip(ours, theirs, strict=True):
        assert float(found.scores[anchor, class_id]) == pytest.approx(expected["score"], abs=0.01)
        assert found.boxes[anchor].tolist() == pytest.approx(expected["box_letterbox640"], abs=2)


def letterbox_of_the_repository(file: Path, size: int = 640) -> np.ndarray[Any, Any]:
    """(size, size, 3) uint8 RGB: OpenCV's decoder and bilinear filter, half of the grey on each side, as it rounds."""
    pixels = cv2.imread(str(file))
    height, width = pixels.shape[:2]
    gain = min(size / height, size / width)
    inner = (round(width * gain), round(height * gain))
    across, down = ((size - side) / 2 for side in inner)
    sides = [round(half + more) for half in (down, across) for more in (-0.1, 0.1)]
    resized = cv2.resize(pixels, inner, interpolation=cv2.INTER_LINEAR)
    return cv2.copyMakeBorder(resized, *sides, cv2.BORDER_CONSTANT, value=(114, 114, 114))[..., ::-1]


@pytest.mark.skipif(not COCO.exists(), reason="the shared weights are not here")
@pytest.mark.parametrize(
    "photos",
    [
        [ASSETS / "bus.jpg"],
        pytest.param([ASSETS / "zidane.jpg", *sorted(PHOTOS.glob("*.jpg"))], marks=pytest.mark.slow),
    ],
    ids=["bus", "all"],
)
def test_records_hold_the_scores_of_the_repositorys_own_pipeline(photos: list[Path]) -> None:
    """Its letterbox is made here without ours; an averaging resize moves scores by up to 0.08."""
    settings = {"method": "drise", "max_evaluations": 2, "evidence": "none"}
    explainer = Explainer(RunConfig.model_validate({"model": {"path": str(COCO)}, "attribution": settings}))
    farthest = 0.0
    for result, file in zip(explainer.explain(photos), photos, strict=True):
        square = torch.from_numpy(letterbox_of_the_repository(file).copy()).permute(2, 0, 1)[None].float() / 255
        with torch.no_grad():
            found = explainer.plan.detector.predict(square)[0]
        reports = reported(found, conf=0.25, iou=0.7, max_det=300)
        theirs = sorted((float(found.scores[a, c]) for a, c in reports), reverse=True)
        assert result.record.detections is not None
        ours = [d.score for d in result.record.detections]
        assert ours == pytest.approx(theirs, abs=0.005), file.name
        farthest = max([farthest, *(abs(a - b) for a, b in zip(ours, theirs, strict=True))])
        assert result.record.model is not None
        assert result.record.model.letterbox is None
    print(f"{len(photos)} photos: scores differ by at most {farthest:.5f}")


def test_trees_of_another_letterbox_are_done_again(tmp_path: Path, repository: Any) -> None:
    """The square of legacy models was Pillow's once, and their fingerprints did not say so."""
    write(tmp_path / "old.pt", repository)
    settings = {"method": "drise", "max_evaluations": 2, "evidence": "none"}
    model, detection = {"path": str(tmp_path / "old.pt")}, {"imgsz": 64, "max_det": 1}
    config = RunConfig.model_validate({"model": model, "detection": detection, "attribution": settings})
    explainer = Explainer(config)
    (result,) = explainer.explain_sources(ASSETS / "bus.jpg")
    plan, sha256 = explainer.plan, hashlib.sha256((ASSETS / "bus.jpg").read_bytes()).hexdigest()
    then, now = (
        fingerprint(plan.config, sha256, plan.info.sha256, RECORD_SCHEMA, fit=fit) for fit in (None, "letterbox")
    )
    assert result.record.fingerprint == now != then
