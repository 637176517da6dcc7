"""Darknet networks: equal to OpenCV's reader, explained like any other, and nothing but numbers read from a file."""

from __future__ import annotations

import random
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import photo
from test_families import ENOUGH
from torch import Tensor

from detxai.attribution.engine import solve
from detxai.attribution.integral import integrated_gradients
from detxai.attribution.points import Segment
from detxai.config.settings import RunConfig
from detxai.errors import ModelError
from detxai.models import checkpoints, darknet, detectors
from detxai.models.detector import Detector, Pin
from detxai.models.predictions import reported
from detxai.models.trunk import Trunk
from detxai.run.pipeline import Explainer
from detxai.run.plan import make_plan
from detxai.values import Target
from detxai.vocabulary import EDGES

SHARED = Path(__file__).parents[2] / "shared"
FASTEST = SHARED / "weights" / "yolo-fastest-1.1_coco"
needs_shared = pytest.mark.skipif(not FASTEST.is_dir(), reason="the shared weights are not here")

ANCHORS = "10,13, 16,30, 33,23, 30,61, 62,45, 59,119, 116,90, 156,198, 373,326"


# -- cfgs of the well-known networks, from Redmon's and Bochkovskiy's publications --------------------


class Cfg:
    """Writes a cfg. `thin` divides the numbers of filters."""

    def __init__(self, size: int, thin: int = 1, classes: int = 3) -> None:
        self.text, self.thin, self.classes = (
            f"[net]\nwidth={size}\nheight={size}\nchannels=3\n",
            thin,
            classes,
        )

    def add(self, kind: str, **options: Any) -> Cfg:
        self.text += f"\n[{kind}]\n" + "".join(f"{k}={v}\n" for k, v in options.items())
        return self

    def conv(self, filters: int, size: int = 3, stride: int = 1) -> Cfg:
        return self.add(
            "convolutional", batch_normalize=1, filters=max(filters // self.thin, 8), size=size, stride=stride,
            pad=1, activation="leaky",
        )  # fmt: skip

    def yolo(self, mask: str, *, logistic: bool = False, **options: Any) -> Cfg:
        filters = (mask.count(",") + 1) * (5 + self.classes)
        activation = "logistic" if logistic else "linear"
        self.add("convolutional", filters=filters, size=1, stride=1, pad=1, activation=activation)
        return self.add("yolo", mask=mask, anchors=ANCHORS, classes=self.classes, num=9, **options)

    def residuals(self, filters: int, count: int) -> Cfg:
        for _ in range(count):
            self.conv(filters // 2, 1).conv(filters).add("shortcut", **{"from": -3}, activation="linear")
        return self


def yolov3(cfg: Cfg, *, spp: bool = False) -> Cfg:
    cfg.conv(32)
    for filters, count in ((64, 1), (128, 2), (256, 8), (512, 8), (1024, 4)):
        cfg.conv(filters, stride=2).residuals(filters, count)
    cfg.conv(512, 1).conv(1024).conv(512, 1)
    if spp:
        for size, back in ((5, -2), (9, -4)):
            cfg.add("maxpool", size=size, stride=1).add("route", layers=back)
        cfg.add("maxpool", size=13, stride=1).add("route", layers="-1,-3,-5,-6").conv(512, 1)
    cfg.conv(1024).conv(512, 1).conv(1024).yolo("6,7,8")
    for filters, skip, mask in ((256, 61, "3,4,5"), (128, 36, "0,1,2")):
        cfg.add("route", layers=-4).conv(filters, 1).add("upsample", stride=2).add("route", layers=f"-1, {skip}")
        for _ in range(3):
            cfg.conv(filters, 1).conv(2 * filters)
        cfg.yolo(mask)
    return cfg


def yolov3_tiny(cfg: Cfg) -> Cfg:
    for filters in (16, 32, 64, 128, 256):
        cfg.conv(filters).add("maxpool", size=2, stride=2)
    cfg.conv(512).add("maxpool", size=2, stride=1).conv(1024).conv(256, 1).conv(512).yolo("3,4,5")
    cfg.add("route", layers=-4).conv(128, 1).add("upsample", stride=2).add("route", layers="-1, 8").conv(256)
    return cfg.yolo("0,1,2")


def yolov4_tiny(cfg: Cfg) -> Cfg:
    cfg.conv(32, stride=2).conv(64, stride=2)
    for filters in (64, 128, 256):
        cfg.conv(filters).add("route", layers=-1, groups=2, group_id=1).conv(filters // 2).conv(filters // 2)
        cfg.add("route", layers="-1,-2").conv(filters, 1).add("route", layers="-6,-1")
        cfg.add("maxpool", size=2, stride=2)
    cfg.conv(512).conv(256, 1).conv(512).yolo("3,4,5", scale_x_y=1.05)
    cfg.add("route", layers=-4).conv(128, 1).add("upsample", stride=2).add("route", layers="-1, 23").conv(256)
    return cfg.yolo("0,1,2", scale_x_y=1.05)


def yolov4_csp_head(cfg: Cfg) -> Cfg:
    cfg.conv(16, stride=2).conv(32, stride=2).add(
        "convolutional", filters=32, size=3, pad=1, stride=2, activation="mish"
    )
    return cfg.yolo("0,1,2", logistic=True, new_coords=1, scale_x_y=2.0)


NETWORKS = {
    "yolov3": lambda: yolov3(Cfg(96, 8)),
    "yolov3-spp": lambda: yolov3(Cfg(96, 8), spp=True),
    "yolov3-tiny": lambda: yolov3_tiny(Cfg(128, 4)),
    "yolov4-tiny": lambda: yolov4_tiny(Cfg(128, 2)),
    "yolov4-csp": lambda: yolov4_csp_head(Cfg(64, 1)),
}


def random_weights(cfg: str, size: int, seed: int = 0) -> bytes:
    """A weights file for `cfg`: seeded kernels, and BatchNorm statistics measured on a picture."""
    generator = np.random.default_rng(seed)
    every = darknet.sections(cfg)
    kinds = [s for s in every if s.kind == "convolutional"]
    # Residual branches are small, as training leaves them: otherwise 23 random ones in a row are noise.
    calm = {a for a, b in zip(every, every[1:], strict=False) if b.kind == "shortcut"}
    parts: list[list[np.ndarray]] = []
    channels = convolutions(cfg)
    for section, conv in zip(kinds, channels, strict=True):
        n, fan = conv.out_channels, conv.weight[0].numel()
        normalised = section.number("batch_normalize", 0)
        part = [generator.normal(0, 0.1, n)]
        part += [np.full(n, 0.2 if section in calm else 1.0), np.zeros(n), np.ones(n)] if normalised else []
        parts.append([*part, generator.normal(0, (1 if normalised else 2) / fan**0.5, conv.weight.numel())])

    def packed() -> bytes:
        header = np.array([0, 2, 5, 0, 0], "<i4").tobytes()
        return header + b"".join(np.asarray(p, "<f4").tobytes() for part in parts for p in part)

    network = darknet.load(cfg.encode(), packed()).eval()

    def measured(part: list[np.ndarray]) -> Any:
        def hook(module: Any, _: Any, output: Tensor) -> Tensor:
            raw = (output - module.bias.view(-1, 1, 1)) / part[1][0]
            part[2], part[3] = raw.mean((0, 2, 3)).numpy(), raw.var((0, 2, 3)).clamp(min=1e-3).numpy()
            scale, mean = (torch.from_numpy(p).view(-1, 1, 1) for p in (part[3] ** -0.5, part[2]))
            return (raw - mean) * scale * part[1][0] + module.bias.view(-1, 1, 1)

        return hook

    owned = [layer for layer in network.layers if isinstance(layer, darknet.Convolution)]
    for layer, part in zip(owned, parts, strict=True):
        if len(part) == 5:
            layer.conv.register_forward_hook(measured(part))
    bus, zidane = photo("bus.jpg", 2 * size), photo("zidane.jpg", 2 * size)
    x = torch.stack([bus, zidane, bus.flip(-1), 0.85 * bus])
    with torch.no_grad():
        Trunk(network.layers)(x, [len(network.layers) - 1])
        Trunk(network.layers)(x, [scale.feed for scale in network.scales])
    return packed()


def convolutions(cfg: str) -> list[torch.nn.Conv2d]:
    """The convolutions of a cfg without weights, on the meta device."""
    net, *rest = darknet.sections(cfg)
    builder = darknet._Builder(net)
    for section in rest:
        getattr(builder, section.kind)(section)
    return [layer.conv for layer in builder.layers if isinstance(layer, darknet.Convolution)]


def saved(folder: Path, name: str, cfg: str, size: int) -> Path:
    (folder / f"{name}.cfg").write_text(cfg)
    (folder / f"{name}.weights").write_bytes(random_weights(cfg, size))
    return folder / f"{name}.cfg"


@pytest.fixture(scope="module", params=NETWORKS)
def detector(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Detector:
    cfg = NETWORKS[request.param]().text
    size = int(darknet.sections(cfg)[0].options["width"])
    file = saved(tmp_path_factory.mktemp("darknet"), request.param, cfg, size)
    return detectors.build(checkpoints.load(str(file)))


def test_a_random_network_is_explained(detector: Detector) -> None:
    size = detector.info.imgsz
    x = photo("bus.jpg", size)
    dark = 0.95 * x  # a longer path is too rough in a random network
    with torch.no_grad():
        found, empty = (detector.predict(y[None])[0] for y in (x, dark))
    assert detector.info.sparse
    assert detector.info.targets == ("class", "objectness", *EDGES)
    for level in range(int(found.levels.max()) + 1):
        here = (found.levels == level).nonzero().flatten().tolist()
        pins = [
            Pin(0, Target(a, level, kind, a % 3))
            for a in {here[0], here[-1], here[len(here) // 2], here[len(here) // 3]}
            for kind in detector.info.targets
        ]
        mixed = torch.linspace(-1, 1, len(pins))
        both = []
        for function in (detector.values, detector.full_values):
            y = x[None].clone().requires_grad_(True)
            values = function(y, pins)
            (gradient,) = torch.autograd.grad((values * mixed).sum(), y)
            both.append((values.detach(), gradient))
        torch.testing.assert_close(both[0][0], both[1][0], atol=1e-4, rtol=1e-5)
        assert float((both[0][1] - both[1][1]).norm() / both[1][1].norm()) <= 1e-4
    moved = (found.logits - empty.logits).abs()
    anchor, class_id = divmod(int((moved - 3 * ENOUGH).abs().argmin()), 3)
    assert float(moved[anchor, class_id]) >= ENOUGH
    target = Target(anchor, int(found.levels[anchor]), "class", class_id)
    (integral,) = solve(detector.values, integrated_gradients(Segment(x, dark), [target]))
    assert integral.converged
    assert integral.completeness_error <= 0.05
    assert integral.value_at_input == pytest.approx(float(found.logits[anchor, class_id]), abs=1e-3)


def test_width_and_height_of_a_cfg_may_differ(tmp_path: Path) -> None:
    """Rows and columns are not mixed up: the sparse values are the whole network's, and a larger size takes both."""
    cfg = re.sub("height=.*", "height=64", yolov4_tiny(Cfg(128, 2)).text, count=1)
    built = detectors.build(checkpoints.load(str(saved(tmp_path, "wide", cfg, 128))))
    assert built.info.own_shape == (64, 128)
    plan = make_plan(RunConfig.model_validate({"model": {"path": str(tmp_path / "wide.cfg")}}))
    assert (plan.shape, plan.fit, plan.rect) == ((64, 128), "darknet", False)
    canvas, box = plan.letterboxed(np.zeros((30, 40, 3), np.uint8))
    assert (canvas.shape, box.inner_width, box.inner_height) == ((64, 128, 3), 128, 64)


def test_the_full_yolov3_builds_and_runs(tmp_path: Path) -> None:
    text = yolov3(Cfg(64, classes=80)).text
    counted = sum(c.weight.numel() for c in convolutions(text))
    assert counted == 61_895_776  # the published network
    needed = sum(c.weight.numel() + c.out_channels * (1 if c.out_channels == 255 else 4) for c in convolutions(text))
    tile = np.random.default_rng(0).uniform(0.005, 0.02, 1 << 16).astype("<f4")
    values = np.resize(tile, needed)
    network = darknet.load(text.encode(), np.array([0, 2, 5, 0, 0], "<i4").tobytes() + values.tobytes())
    assert [scale.stride for scale in network.scales] == [32, 16, 8]
    assert [scale.anchors[0].tolist() for scale in network.scales] == [[116, 90], [30, 61], [10, 13]]
    with torch.no_grad():
        outputs = Trunk(network.layers)(torch.rand(1, 3, 64, 64), [scale.feed for scale in network.scales])
    assert [tuple(outputs[scale.feed].shape) for scale in network.scales] == [
        (1, 1024, 2, 2), (1, 512, 4, 4), (1, 256, 8, 8),
    ]  # fmt: skip


# -- against references ---------------------------------------------------------------------------


@needs_shared
@pytest.mark.parametrize("name", ["yolo-fastest-1.1", "yolo-fastest-1.1-xl"])
def test_outputs_equal_opencvs(name: str) -> None:
    cv2 = pytest.importorskip("cv2")
    pixels = cv2.imread(str(SHARED / "data" / "natural-dev" / "darknet" / "dog.jpg"))[..., ::-1]
    stretched = cv2.resize(np.ascontiguousarray(pixels), (320, 320), interpolation=cv2.INTER_LINEAR)
    x = torch.from_numpy(stretched).permute(2, 0, 1)[None].float() / 255
    loaded = checkpoints.load(str(FASTEST / f"{name}.cfg"))
    network = loaded.module
    with torch.no_grad():
        outputs = Trunk(network.layers)(x, [scale.feed for scale in network.scales])
        raw = [scale.conv(outputs[scale.feed]).permute(0, 2, 3, 1).numpy() for scale in network.scales]
    reference = np.load(SHARED / "expected" / f"{name}_dog320.npz")
    for ours, key in zip(raw, reference, strict=True):
        np.testing.assert_allclose(ours, reference[key], atol=1e-3, rtol=0)
    # … and from raw outputs to boxes and scores as Darknet's own get_yolo_box does it.
    with torch.no_grad():
        found = detectors.build(loaded).predict(x)[0]
    scale, (row, column, anchor) = network.scales[0], (4, 3, 1)
    t = raw[0][0, row, column].reshape(3, 85)[anchor].astype(np.float64)
    sigmoid = 1 / (1 + np.exp(-t))
    centre = (sigmoid[:2] + np.array([column, row])) / 10 * 320
    half = np.exp(t[2:4]) * scale.anchors[anchor].numpy() / 2
    index = anchor * 100 + row * 10 + column
    np.testing.assert_allclose(found.boxes[index], np.concatenate([centre - half, centre + half]), atol=1e-2)
    np.testing.assert_allclose(found.scores[index], sigmoid[4] * sigmoid[5:], atol=1e-5)
    best = reported(found, conf=0.5, iou=0.45, max_det=10)
    assert {loaded.names[c] for _, c in best} >= {"dog", "bicycle", "car"}


@pytest.mark.parametrize(("size", "stride", "side"), [(2, 2, 8), (2, 2, 7), (2, 1, 6), (5, 1, 6), (3, 2, 9)])
def test_pooling_is_darknets(size: int, stride: int, side: int) -> None:
    x = torch.randn(1, 1, side, side, generator=torch.Generator().manual_seed(0))
    padding = size - 1
    out = (side + padding - size) // stride + 1
    expected = torch.full((out, out), -torch.inf)
    for i in range(out):
        for j in range(out):
            for n in range(size):
                for m in range(size):
                    h, w = -(padding // 2) + i * stride + n, -(padding // 2) + j * stride + m
                    if 0 <= h < side and 0 <= w < side:
                        expected[i, j] = torch.maximum(expected[i, j], x[0, 0, h, w])
    torch.testing.assert_close(darknet.MaxPool(size, stride, padding)(x)[0, 0], expected)


# -- files as users have them ---------------------------------------------------------------------


def test_names_and_hash(tmp_path: Path) -> None:
    file = saved(tmp_path, "small", yolov4_csp_head(Cfg(64)).text, 64)
    first = checkpoints.load(str(file))
    assert first.names == {0: "0", 1: "1", 2: "2"}
    assert (first.kind, first.imgsz) == ("darknet", 64)
    (tmp_path / "things.names").write_text("knife\ngun\nrope\n")
    assert checkpoints.load(str(file)).names[1] == "gun"
    (tmp_path / "other.names").write_text("a\nb\nc\n")
    assert checkpoints.load(str(file)).names[1] == "1"  # two files, none of this name: nothing is guessed
    (tmp_path / "small.names").write_text("x\ny\nz\n")
    assert checkpoints.load(str(file)).names[1] == "y"
    assert checkpoints.load(str(file), names=tmp_path / "things.names", sha256=first.sha256).names[2] == "rope"
    (tmp_path / "short.names").write_text("one\n")
    with pytest.raises(ModelError, match="1 class names"):
        checkpoints.load(str(file), names=tmp_path / "short.names")
    with pytest.raises(ModelError, match="not the pinned"):
        checkpoints.load(str(file), sha256="0" * 64)
    (tmp_path / "small.weights").unlink()
    with pytest.raises(ModelError, match="weights beside the cfg"):
        checkpoints.load(str(file))


@pytest.mark.parametrize("part", range(10))
def test_a_truncated_file_is_refused(tmp_path: Path, part: int) -> None:
    file = saved(tmp_path, "small", yolov4_csp_head(Cfg(64)).text, 64)
    whole = file.with_suffix(".weights").read_bytes()
    file.with_suffix(".weights").write_bytes(whole[: len(whole) * part // 10])
    with pytest.raises(ModelError, match=r"do not belong together|no header"):
        checkpoints.load(str(file))


GOOD = yolov4_csp_head(Cfg(64)).text


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("activation=mish", "activation=__import__('os').system('true')", "activation="),
        ("filters=32", "filters=999999999", "filters"),
        ("filters=32", "filters=-1", "filters"),
        ("filters=32", "filters=nan", "filters"),
        ("filters=32", "filters=33", "do not belong together"),
        ("[yolo]", "[region]", "not supported"),
        ("[net]", "[convolutional]", r"\[net\]"),
        ("mask=0,1,2", "mask=0,1,9", "mask"),
        ("channels=3", "channels=1", "channels"),
        ("width=64", "width=99999999", "width"),
        ("[yolo]", "[route]\nlayers=7\n[yolo]", "outside the network"),
        ("[yolo]", "[__init__]\n[yolo]", "not supported"),
        ("[yolo]", "[dropout]\n[yolo]", "must follow"),
        ("size=3", "size=three", "not a number"),
        ("size=3", "size=3\nstray", "neither a"),
        ("[yolo]", "[dropout]\n" * 1001 + "[yolo]", "sections"),
        (GOOD[GOOD.index("[yolo]") :], "", "no .yolo. section"),
    ],
)  # fmt: skip
def test_a_malformed_cfg_is_refused(old: str, new: str, message: str) -> None:
    blob = random_weights(GOOD, 64)
    darknet.load(GOOD.encode(), blob)
    with pytest.raises(ValueError, match=message):
        darknet.load(GOOD.replace(old, new, 1).encode(), blob)


def test_numbers_that_are_not_finite_are_refused() -> None:
    blob = random_weights(GOOD, 64)
    with pytest.raises(ValueError, match="finite"):
        darknet.load(GOOD.encode(), blob[:-4] + np.array([np.nan], "<f4").tobytes())


def test_no_garbage_escapes_as_another_error() -> None:
    dice, blob = random.Random(1), random_weights(GOOD, 64)
    for _ in range(300):
        text = bytearray(GOOD.encode())
        for _ in range(dice.randint(1, 6)):
            text[dice.randrange(len(text))] = dice.choice(b"0123456789-,=[]\n\xff#az")
        try:
            darknet.load(bytes(text), blob)
        except ValueError:
            continue


@needs_shared
def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    shutil.copy(FASTEST / "yolo-fastest-1.1.cfg", tmp_path / "a.cfg")
    shutil.copy(FASTEST / "yolo-fastest-1.1-xl.weights", tmp_path / "a.weights")
    with pytest.raises(ModelError, match="do not belong together"):
        checkpoints.load(str(tmp_path / "a.cfg"))


@needs_shared
def test_darknet_sees_a_stretched_square_and_the_record_says_so() -> None:
    file = SHARED / "data/natural-dev/darknet/dog.jpg"
    cfg = SHARED / "weights/yolo-fastest-1.1_coco/yolo-fastest-1.1.cfg"
    settings = {"method": "drise", "max_evaluations": 2, "evidence": "none"}
    scores = {}
    for fit in ("auto", "stretch", "letterbox"):
        detection = {"imgsz": 320, "max_det": 1, "letterbox": fit}
        values = {"model": {"path": str(cfg)}, "attribution": settings, "detection": detection}
        (result,) = Explainer(RunConfig.model_validate(values)).explain_sources(file)
        record = result.record
        assert record.model is not None
        assert record.detections is not None
        scores[record.model.letterbox] = record.detections[0].score
    assert set(scores) == {"darknet", "stretch", None}
    assert scores["darknet"] == pytest.approx(scores["stretch"], abs=0.02)
    assert len(set(scores.values())) == 3
