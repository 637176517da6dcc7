"""The parts that detectors are made of, and whether the checks of the families can fail at all."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import test_families
import torch
from families import calibrate, photos
from PIL import Image
from test_families import FAMILIES, Case, made, network, own_output, photo
from torch import Tensor, nn
from torchvision.ops import DeformConv2d
from ultralytics.models.yolo.detect import DetectionPredictor
from ultralytics.nn import tasks
from ultralytics.nn.modules import Concat, Conv, DWConv
from ultralytics.utils import ASSETS

from detxai.config.settings import RunConfig
from detxai.errors import ModelError
from detxai.models import checkpoints
from detxai.models.detector import Candidates, Pin, scores_of
from detxai.models.detectors import build, self_test
from detxai.models.predictions import reported
from detxai.models.trunk import Trunk, freeze, fuse
from detxai.models.windows import reach
from detxai.run.pipeline import Explainer
from detxai.values import Checkpoint, Target
from detxai.vocabulary import EDGES


def checkpoint(module: Any, name: str = "some.pt") -> Checkpoint:
    return Checkpoint(name, "0" * 64, "ultralytics", module, "yolo", getattr(module, "names", {0: "thing"}), 640)


@pytest.fixture(scope="module")
def v8() -> Case:
    return made("v8")


# -- the checks can fail ----------------------------------------------------------------------------


class _Broken:
    """A detector whose sparse path is wrong: `change` gets the honest function, x and the pins."""

    def __init__(self, honest: Any, change: Callable[..., Tensor]) -> None:
        self.honest, self.change, self.info, self.module = honest, change, honest.info, honest.module
        self.predict, self.full_values = honest.predict, honest.full_values

    def values(self, x: Tensor, pins: Any) -> Tensor:
        return self.change(self.honest.values, x, [Pin(*pin) for pin in pins])


def _next_anchor(values: Any, x: Tensor, pins: list[Pin]) -> Tensor:
    moved = [Pin(p.row, dataclasses.replace(p.target, anchor=p.target.anchor ^ 1)) for p in pins]
    return values(x, moved)


def _other_class(values: Any, x: Tensor, pins: list[Pin]) -> Tensor:
    return values(x, [Pin(p.row, dataclasses.replace(p.target, class_id=11 - p.target.class_id)) for p in pins])


def _detached(values: Any, x: Tensor, pins: list[Pin]) -> Tensor:
    return values(x.detach(), pins) + 0 * x.sum()


def _half_detached(values: Any, x: Tensor, pins: list[Pin]) -> Tensor:
    return values(0.5 * x.detach() + 0.5 * x, pins)


@pytest.mark.parametrize("change", [_next_anchor, _other_class, _detached, _half_detached])
def test_a_wrong_sparse_path_is_noticed(v8: Case, change: Callable[..., Tensor]) -> None:
    broken = dataclasses.replace(v8, detector=_Broken(v8.detector, change))  # type: ignore[arg-type]
    with pytest.raises(AssertionError):
        test_families.test_sparse_equals_full(broken)


@pytest.mark.parametrize(
    "change", [_detached, *(pytest.param(c, marks=pytest.mark.slow) for c in (_next_anchor, _half_detached))]
)
def test_a_wrong_gradient_is_noticed(v8: Case, change: Callable[..., Tensor]) -> None:
    broken = dataclasses.replace(v8, detector=_Broken(v8.detector, change))  # type: ignore[arg-type]
    with pytest.raises(AssertionError):
        test_families.test_integral_is_complete(broken)


def test_a_detached_head_is_refused(v8: Case) -> None:
    with pytest.raises(ModelError, match="cannot be explained by gradients"):
        self_test(_Broken(v8.detector, _detached), v8.x)  # type: ignore[arg-type]


def test_constant_networks_make_the_tests_void(v8: Case) -> None:
    same = dataclasses.replace(v8, dark=v8.found)
    with pytest.raises(AssertionError, match="void"):
        same.moving(0)


# -- parts ------------------------------------------------------------------------------------------


def _stacks() -> dict[str, nn.Module]:
    torch.manual_seed(1)
    return {
        "v8": nn.Sequential(Conv(8, 12, 3), Conv(12, 12, 3), nn.Conv2d(12, 5, 1)),
        "11": nn.Sequential(
            nn.Sequential(DWConv(8, 8, 3), Conv(8, 6, 1)),
            nn.Sequential(DWConv(6, 6, 3), Conv(6, 6, 1)),
            nn.Conv2d(6, 5, 1),
        ),
        "large kernel": nn.Sequential(Conv(8, 8, 5), Conv(8, 8, 7, g=4), nn.Conv2d(8, 5, 3, padding=1)),
        "one by one": nn.Conv2d(8, 5, 1),
    }


def _layer(module: Any, number: int, *sources: int) -> Any:
    """`module` wired as ultralytics does it: from the layers `sources`, -1 the one before."""
    module.i, module.f = number, sources[0] if len(sources) == 1 else list(sources)
    return module


@pytest.mark.parametrize("name", _stacks())
@pytest.mark.parametrize("side", [1, 2, 5, 9])
def test_windows_equal_the_whole_map_at_every_cell(name: str, side: int) -> None:
    module = _stacks()[name]
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):  # biases, so that what lies beyond the map is not zero by luck
            nn.init.normal_(part.bias)
    module = freeze(fuse(module))
    trunk = Trunk([_layer(nn.Conv2d(3, 8, 1), 0, -1)])
    x = torch.randn(3, 3, side, side)
    windows = trunk.around(0, module, (side, side), x)
    assert windows is not None
    outputs = trunk(x, windows.wanted)
    cells = [(r, c) for r in range(side) for c in range(side)]
    for row in range(3):
        expected = module(outputs[0])[row].flatten(1).T
        torch.testing.assert_close(windows(outputs, [row] * len(cells), cells), expected, atol=1e-5, rtol=1e-5)


class _Everywhere(nn.Module):
    """Each cell looks at all others."""

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(2)
        weights = (flat.transpose(1, 2) @ flat).softmax(-1)
        return (flat @ weights.transpose(1, 2)).view_as(x)


@pytest.mark.parametrize(
    ("module", "scale", "ends"),
    [
        (nn.Conv2d(4, 4, 3, padding=1), Fraction(1), (-1, 1)),
        (nn.Conv2d(4, 4, 3, stride=2, padding=1), Fraction(2), (-1, 1)),
        (nn.Conv2d(4, 4, 6, stride=2, padding=2), Fraction(2), (-2, 3)),
        (nn.MaxPool2d(5, 1, 2), Fraction(1), (-2, 2)),
        (nn.Upsample(scale_factor=2), Fraction(1, 2), (0, 0)),
        (nn.ConvTranspose2d(4, 4, 2, 2), Fraction(1, 2), (0, 0)),
        (nn.Upsample(scale_factor=2, mode="bilinear"), Fraction(1, 2), (-1, 1)),
        (nn.Sequential(Conv(4, 4, 3), nn.ReLU(), Conv(4, 4, 5)), Fraction(1), (-3, 3)),
        (nn.Conv2d(4, 4, 3), Fraction(1), None),
        (nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Upsample(size=(32, 32))), Fraction(1), None),
        (_Everywhere(), Fraction(1), None),
    ],
)
def test_the_reach_of_a_layer_is_measured(module: Any, scale: Fraction, ends: tuple[int, int] | None) -> None:
    found = reach(module.eval(), [(4, scale)], torch.zeros(()))
    assert (found and (found.scale, found.low, found.high)) == (ends and (scale, *ends))


def _neck() -> Trunk:
    """A backbone of strides 2 and 4, and a neck up and down again that a stride-2 and a stride-4 head can read."""
    torch.manual_seed(2)
    return Trunk([
        _layer(Conv(3, 4, 3, 2), 0, -1), _layer(Conv(4, 6, 3, 2), 1, -1), _layer(nn.MaxPool2d(3, 1, 1), 2, -1),
        _layer(nn.Upsample(scale_factor=2), 3, -1), _layer(Concat(), 4, -1, 0), _layer(Conv(10, 8, 3), 5, -1),
        _layer(Conv(8, 6, 3, 2), 6, -1), _layer(Concat(), 7, -1, 2), _layer(Conv(12, 8, 3), 8, -1),
    ])  # fmt: skip


@pytest.mark.parametrize(("feed", "shape"), [(5, (96, 96)), (8, (96, 96)), (8, (104, 192)), (5, (160, 80))])
def test_layers_below_the_head_run_on_windows_too(feed: int, shape: tuple[int, int]) -> None:
    trunk, head = _neck(), Conv(8, 5, 3)
    for part in (*trunk.layers, head):
        freeze(part)
    x = torch.randn(2, 3, *shape)
    windows = trunk.around(feed, head, shape, x)
    assert windows is not None
    assert [step.number for step in windows.steps[:-1]] == list(range(1, feed + 1))
    assert windows.wanted == {0}, "what is read directly as well runs once, as a whole"
    rows, columns = (side // (2 if feed == 5 else 4) for side in shape)
    cells = [(r, c) for r in (0, 1, 2, 7, rows // 2, rows - 2, rows - 1) for c in (0, 3, columns // 2 + 1, columns - 1)]
    gradients = []
    for whole in (False, True):
        y = x.clone().requires_grad_(True)
        with trunk.whole() if whole else contextlib.nullcontext():
            part = trunk.around(feed, head, shape, y)
            assert part is not None
            assert (len(part.steps) == 1) == whole
            values = part(trunk(y, part.wanted), [k % 2 for k in range(len(cells))], cells)
        (gradient,) = torch.autograd.grad((values * torch.linspace(-1, 1, values.numel()).view_as(values)).sum(), y)
        gradients.append((values.detach(), gradient))
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


class _Deformable(nn.Module):
    """A deformable convolution, which reads where its input says: a NaN there would end the process."""

    def __init__(self) -> None:
        super().__init__()
        self.offsets, self.conv = nn.Conv2d(6, 18, 3, padding=1), DeformConv2d(6, 6, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x, self.offsets(x))


class _Placed(nn.Module):
    """A CoordConv: each cell knows where it lies."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(7, 6, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        place = torch.linspace(-1, 1, x.shape[-1]).expand(len(x), 1, *x.shape[2:])
        return self.conv(torch.cat([x, place], 1))


@pytest.mark.parametrize("kind", [_Deformable, _Placed])
def test_layers_that_follow_the_data_or_the_place_run_whole(kind: Any) -> None:
    trunk, head = _neck(), Conv(8, 5, 3)
    trunk.layers[2] = _layer(kind(), 2, -1)
    for part in (*trunk.layers, head):
        freeze(part)
    x, cells = torch.randn(2, 3, 96, 96), [(0, 0), (9, 11), (23, 23)]
    part = trunk.around(8, head, (96, 96), x)
    assert part is not None
    assert 2 not in {step.number for step in part.steps}
    assert len(part.steps) > 1
    found = part(trunk(x, part.wanted), [0, 1, 1], cells)
    whole = head(trunk(x, {8})[8])
    expected = torch.stack([whole[row, :, r, c] for row, (r, c) in zip([0, 1, 1], cells, strict=True)])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert reach(kind(), [(6, Fraction(1))], torch.zeros(())) is None


def test_a_head_that_reads_everything_takes_the_full_path() -> None:
    trunk = Trunk([_layer(nn.Conv2d(3, 4, 1), 0, -1)])
    assert trunk.around(0, _Everywhere(), (8, 8), torch.zeros(1)) is None


def test_the_trunk_runs_what_is_needed_only() -> None:
    module = network(FAMILIES["v8"])
    *layers, head = module.model
    x, ran = photo("bus.jpg", 128)[None], []
    for layer in layers:
        layer.register_forward_hook(lambda part, *_: ran.append(part.i))
    trunk = Trunk(layers)
    with torch.no_grad():
        whole = trunk(x, head.f)
        assert ran == list(range(22))
        ran.clear()
        first = trunk(x, head.f[:1])
    assert torch.equal(first[15], whole[15])
    assert ran == list(range(16))  # a stride-8 prediction needs no bottom-up path


def test_rows_do_not_see_each_other(v8: Case) -> None:
    x = torch.stack([photo("bus.jpg", 128), photo("zidane.jpg", 128), photo("bus.jpg", 128).flip(-1)])
    pins = [
        Pin(row, Target(anchor, level, kind, 3))
        for row in range(3)
        for anchor, level in ((17, 0), (260, 1), (335, 2))
        for kind in ("class", "top")
    ]
    with torch.no_grad():
        together = v8.detector.values(x, pins)
        alone = [v8.detector.values(x[p.row : p.row + 1], [Pin(0, p.target)])[0] for p in pins]
    torch.testing.assert_close(together, torch.stack(alone), atol=1e-4, rtol=1e-5)


def test_edges_are_in_source_pixels(v8: Case) -> None:
    """bus.jpg is 810 x 1080: at 128 it is 96 wide and shifted by 16."""
    anchor, gain = 100, 128 / 1080
    box = v8.found.boxes[anchor]
    for edge, value in zip(EDGES, box.tolist(), strict=True):
        offset = 16 if edge in ("left", "right") else 0
        target = Target(anchor, 0, edge, scale=1 / gain, offset=-offset / gain)
        with torch.no_grad():
            both = v8.detector.values(v8.x, [Pin(0, target)]), v8.detector.full_values(v8.x, [Pin(0, target)])
        for found in both:
            assert float(found) == pytest.approx((value - offset) / gain, abs=1e-2)


@pytest.mark.parametrize("name", ["v8", pytest.param("26", marks=pytest.mark.slow)])
def test_640_and_a_picture_that_is_not_square(name: str) -> None:
    module = network(FAMILIES[name])
    detector = build(checkpoint(module))
    x = photo("zidane.jpg", 640)[None]
    with torch.no_grad():
        found = detector.predict(x)[0]
    assert len(found.boxes) == 8400
    assert found.levels.bincount().tolist() == [6400, 1600, 400]
    _, decoded = own_output(module, x, FAMILIES[name].branch)
    torch.testing.assert_close(found.scores, decoded[:, 4:16], atol=2e-4, rtol=0)
    pins = [Pin(0, Target(a, level, k, 5)) for a, level in ((79, 0), (6440, 1), (8399, 2)) for k in ("class", "right")]
    y = x.clone().requires_grad_(True)
    sparse, full = detector.values(y, pins), detector.full_values(y, pins)
    torch.testing.assert_close(sparse, full, atol=2e-4, rtol=1e-5)
    one, other = (torch.autograd.grad(v.sum(), y, retain_graph=True)[0] for v in (sparse, full))
    assert float((one - other).norm() / other.norm()) <= 1e-4


@pytest.mark.parametrize(("wanted", "size"), [(608, 640), (672, 704)])
def test_sizes_of_a_p6_model_are_rounded_up_to_its_coarsest_cells(wanted: int, size: int) -> None:
    settings = {"method": "drise"}
    config = RunConfig.model_validate({"attribution": settings, "detection": {"imgsz": wanted}})
    plan = Explainer(config, checkpoint=checkpoint(network(FAMILIES["v8-p6"]))).plan
    assert plan.shape == (size, size)
    assert plan.warnings == (f"{wanted} pixels became {size}: the coarsest cells of some.pt are 64 pixels.",)


# -- channels ---------------------------------------------------------------------------------------


def banded(channels: int) -> Any:
    """A seeded YOLOv8 that reads pictures of so many channels."""
    torch.manual_seed(3)
    module = tasks.DetectionModel(tasks.yaml_model_load("yolov8n.yaml"), ch=channels, nc=12, verbose=False)
    calibrate(module, torch.cat([photos(128, 0.4)] * 2, 1)[:, :channels])
    module.names = {i: f"thing {i}" for i in range(12)}
    return module


def test_a_gray_model_sees_the_gray_of_a_picture(tmp_path: Path) -> None:
    module = banded(1)
    torch.save({"model": module, "train_args": {"imgsz": 128}}, tmp_path / "gray.pt")
    detector = build(checkpoints.load(str(tmp_path / "gray.pt")))
    x = photo("bus.jpg", 128)[None]
    gray = (x * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1, keepdim=True)
    pixels = np.ascontiguousarray((x[0] * 255).round().byte().permute(1, 2, 0).numpy()[..., ::-1])
    theirs = cv2.cvtColor(pixels, cv2.COLOR_BGR2GRAY)  # as ultralytics reads a picture for such a model
    assert float(np.abs(gray[0, 0].numpy() * 255 - theirs).max()) <= 0.51, "its gray is of 8 bits"
    with torch.no_grad():
        expected = module(gray)[1]["scores"][0].T
        assert float(expected.std()) > 0.1
        for picture in (x, gray.expand(1, 3, -1, -1)):
            torch.testing.assert_close(detector.predict(picture)[0].logits, expected, atol=2e-3, rtol=1e-3)
    assert self_test(detector, photo("bus.jpg", 128)[None]) > 0
    assert module.model[0].conv.in_channels == 1


def test_a_model_of_many_bands_reads_so_many(tmp_path: Path) -> None:
    torch.save({"model": banded(4), "train_args": {"imgsz": 128}}, tmp_path / "some.pt")
    loaded = checkpoints.load(str(tmp_path / "some.pt"))
    checkpoints.save(loaded, tmp_path / "some.safetensors")
    detectors = [build(loaded), build(checkpoints.load(str(tmp_path / "some.safetensors")))]
    x = photos(128, 0.4)[:, [0, 1, 2, 0]]
    one, other = (detector.predict(x)[0].logits for detector in detectors)
    torch.testing.assert_close(one, other)
    assert [(detector.info.channels, detector.info.sparse) for detector in detectors] == [(4, True)] * 2
    assert self_test(detectors[0], x[:1]) > 0


# -- broken models ----------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["cv2", "cv3"])
@pytest.mark.parametrize("method", ["ig", "drise"])
def test_a_nan_in_one_scale_is_found_when_the_model_is_loaded(part: str, method: str) -> None:
    module = copy.deepcopy(network(FAMILIES["v8"]))
    with torch.no_grad():
        getattr(module.model[-1], part)[1][-1].bias[0] = torch.nan
    config = RunConfig.model_validate({"attribution": {"method": method}, "detection": {"imgsz": 128}})
    with pytest.raises(ModelError, match="not finite"):
        Explainer(config, checkpoint=checkpoint(module))


def _stretching() -> Any:
    """A YOLOv8 whose last enlarging goes from corner to corner: what a cell reads depends on the size of the map."""
    module = copy.deepcopy(network(FAMILIES["v8"]))
    up = module.model[13]
    wired = {"i": up.i, "f": up.f, "type": up.type}
    module.model[13] = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)
    module.model[13].__dict__.update(wired)
    return module


def test_a_model_whose_parts_differ_from_the_whole_is_run_whole(tmp_path: Path) -> None:
    Image.open(ASSETS / "bus.jpg").save(tmp_path / "bus.png")
    settings = {"max_evaluations": 2, "evidence": "none"}
    detection = {"imgsz": 320, "max_det": 1, "candidates": 0.0, "conf": 0.9}
    config = RunConfig.model_validate({"attribution": settings, "detection": detection})
    module = _stretching()
    assert build(checkpoint(module)).info.sparse, "nothing tells before it is tested"
    explainer = Explainer(config, checkpoint=checkpoint(module))
    (warning,) = explainer.plan.warnings
    assert "all of it is run" in warning
    (result,) = explainer.explain_sources(tmp_path)
    (found,) = result.explanations
    assert found.attribution.path == "full"
    assert result.record.status == "ok"
    x, detector = photo("bus.jpg", 320)[None], explainer.plan.network
    assert detector is not None
    with torch.no_grad():
        scores = copy.deepcopy(module)(x)[1]["scores"][0].T
        pins = [Pin(0, Target(a, level, "class", 3)) for a, level in ((41, 0), (1650, 1), (2050, 2))]
        torch.testing.assert_close(detector.values(x, pins), scores[[41, 1650, 2050], 3], atol=1e-3, rtol=1e-3)


class _Sometimes:
    """A black box that breaks on dark pictures: `broken` gets its honest predictions."""

    def __init__(self, honest: Any, broken: Callable[[Candidates], dict[str, Any]]) -> None:
        self.honest, self.broken, self.info = honest, broken, honest.info

    def predict(self, x: Tensor) -> list[Candidates]:
        found = self.honest.predict(x)
        return found if float(x.mean()) > 0.3 else [dataclasses.replace(f, **self.broken(f)) for f in found]

    def scores(self, x: Tensor, classes: Any) -> tuple[Tensor, Tensor]:
        return scores_of(self.predict(x), classes)


@pytest.mark.parametrize(
    ("broken", "code"),
    [
        (lambda f: {"scores": f.scores * torch.nan}, "not_finite"),
        (lambda f: {"logits": f.logits.index_fill(0, torch.tensor([7]), torch.inf)}, "not_finite"),
        (lambda f: {"boxes": f.boxes * torch.nan}, "not_finite"),
        (lambda f: {"scores": f.scores + 1}, "impossible"),
        (lambda f: {"scores": f.scores * 0 + 0.9, "boxes": f.boxes.flip(1)}, "impossible"),
    ],
)
def test_a_model_that_breaks_on_one_image_fails_that_image(v8: Case, tmp_path: Path, broken: Any, code: str) -> None:
    for name, value in (("bright.png", 200), ("dark.png", 10)):
        Image.new("RGB", (90, 60), (value,) * 3).save(tmp_path / name)
    settings = {"method": "drise", "max_evaluations": 2, "evidence": "none"}
    config = RunConfig.model_validate({"attribution": settings, "detection": {"imgsz": 128, "max_det": 1}})
    explainer = Explainer(config, detector=_Sometimes(v8.detector, broken))
    results = {r.ref.path: r for r in explainer.explain_sources(tmp_path)}
    assert results["bright.png"].record.status == "ok"
    failed = results["dark.png"]
    assert (failed.record.status, failed.bug) == ("failed", None)
    assert failed.record.error is not None
    assert failed.record.error.code == code
    assert failed.record.image.sha256


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_python_api_takes_gradients_whatever_the_mode(v8: Case, tmp_path: Path, mode: Any) -> None:
    Image.open(ASSETS / "bus.jpg").save(tmp_path / "bus.png")
    settings = {"max_evaluations": 2, "evidence": "none"}
    detection = {"imgsz": 128, "max_det": 1, "candidates": 0.0, "conf": 0.9}
    config = RunConfig.model_validate({"attribution": settings, "detection": detection})
    with mode():
        for result in Explainer(config, checkpoint=checkpoint(v8.network)).explain_sources(tmp_path):
            assert not torch.is_grad_enabled()
            assert result.explanations[0].attribution.map.any()


# -- which head -------------------------------------------------------------------------------------


def reported_head(module: Any) -> str:
    """The head that ultralytics' own `predict` reports with, asked of its own predictor."""
    predictor = DetectionPredictor(overrides={"imgsz": 128, "device": "cpu"})
    predictor.setup_model(module, verbose=False)
    return "one2one" if predictor.model.end2end else "one2many"


@pytest.mark.parametrize("name", [pytest.param("v10", marks=pytest.mark.slow), "26"])
def test_the_head_that_made_the_detection_and_the_other_on_request(name: str) -> None:
    module = network(FAMILIES[name])
    x = photo("bus.jpg", 128)[None]
    for end2end in (True, False):
        module.model[-1].end2end = end2end
        assert build(checkpoint(module)).info.head == reported_head(module)
        for branch in ("one2one", "one2many"):
            detector = build(checkpoint(module), branch)
            with torch.no_grad():
                found = detector.predict(x)[0]
                scores = module(x)[1][branch]["scores"][0].T
            assert (detector.info.head, found.end_to_end) == (branch, branch == "one2one")
            torch.testing.assert_close(found.logits, scores, atol=1e-3, rtol=1e-3)
    with pytest.raises(ModelError, match="no one2one branch"):
        build(checkpoint(network(FAMILIES["v8"])), "one2one")
    with pytest.raises(ModelError, match="no sideways branch"):
        build(checkpoint(module), "sideways")


@pytest.mark.slow
def test_a_model_that_ultralytics_fused_still_reports() -> None:
    """Fusing an end-to-end model removes the branch that is not its own."""
    for name, left, gone in (("26", "one2one", "one2many"), ("v10", "one2one", "one2many")):
        module = network(FAMILIES[name]).fuse(verbose=False)
        x = photo("bus.jpg", 128)[None]
        with torch.no_grad():
            rows = module(x)[0][0]
            found = build(checkpoint(module)).predict(x)[0]
        best = reported(found, conf=0.0, iou=0.5, max_det=300)
        mine = torch.stack([found.scores[a, c] for a, c in best])
        torch.testing.assert_close(mine, rows[: len(mine), 4], atol=1e-4, rtol=0)
        assert build(checkpoint(module)).info.head == left
        with pytest.raises(ModelError, match=f"no {gone} branch"):
            build(checkpoint(module), gone)


def test_end_to_end_limits_come_after_the_classes() -> None:
    scores = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.7, 0.6], [0.0, 0.05]])
    found = Candidates(
        torch.zeros(4, 4), scores, scores.logit(eps=1e-6), torch.zeros(4, dtype=torch.int64), end_to_end=True
    )
    assert reported(found, conf=0.5, iou=0.5, max_det=9) == [(0, 0), (1, 1), (2, 0), (2, 1)]
    assert reported(found, conf=0.5, iou=0.5, max_det=2) == [(0, 0), (1, 1)]
    assert reported(found, conf=0.5, iou=0.5, max_det=1, classes=[1]) == [(1, 1)]


def test_heads_that_are_not_explained_say_so() -> None:
    classifier = tasks.ClassificationModel("yolov8n-cls.yaml", nc=3, verbose=False)
    with pytest.raises(ModelError, match="Classify head") as caught:
        build(checkpoint(classifier))
    assert "Supported: Detect" in caught.value.hint
    wordless = tasks.YOLOEModel("yoloe-v8n.yaml", nc=3, verbose=False)
    with pytest.raises(ModelError, match="no classes"):
        build(checkpoint(wordless))
    broken = network(FAMILIES["v8"])
    broken.model[-1].stride = None
    with pytest.raises(ModelError, match="not built as expected"):
        build(checkpoint(broken))
    with pytest.raises(ModelError, match="no one2one branch"):
        build(checkpoint(network(FAMILIES["rtdetr-v8"])), "one2one")


def test_the_selection_of_rtdetr_is_frozen() -> None:
    module = network(FAMILIES["rtdetr-v8"])
    detector = build(checkpoint(module))
    x = photo("bus.jpg", 128)[None]
    with torch.no_grad():
        found = detector.predict(x)[0]
        other = detector.predict(0.3 * x)[0]
        assert not torch.equal(found.context, other.context)  # elsewhere on the path, query i is another cell
        pins = [Pin(0, Target(q, 0, "class", 2, context=found.context)) for q in range(24)]
        torch.testing.assert_close(detector.values(x, pins), found.logits[:, 2], atol=1e-4, rtol=0)
        back = {int(cell): q for q, cell in enumerate(other.context)}
        moved = detector.values(0.3 * x, pins)
        kept = [(q, back[int(cell)]) for q, cell in enumerate(found.context) if int(cell) in back]
    assert moved.isfinite().all()
    assert any(q != there for q, there in kept)
    with pytest.raises(ValueError, match="selection"):
        detector.values(x, [Pin(0, Target(0, 0, "class", 2))])
