"""ParchGrad against a slow reference written from its formulas, one sample and one channel group at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path as FilePath
from typing import Any

import families
import numpy as np
import pytest
import test_darknet as darknets
import torch
from conftest import FAST, SAMPLES, SIDE, Command, explain, files, pixels, seeded_network
from scipy.stats import norm, shapiro, ttest_ind
from torch import Tensor, nn

from detxai.attribution.engine import Engine, solve
from detxai.attribution.methods import METHODS, Settings
from detxai.attribution.points import Segment
from detxai.cli.app import run
from detxai.errors import UsageError
from detxai.models import checkpoints
from detxai.models.detector import Detector
from detxai.models.detectors import build
from detxai.models.trunk import convolutions
from detxai.output import records
from detxai.parchgrad import channels
from detxai.parchgrad import statistics as stored
from detxai.parchgrad.gradient import ParchGrad, modified, with_channels
from detxai.values import Checkpoint, Target
from detxai.vocabulary import GRADIENT_METHODS

GAMMAS = (1.0, 2.0, 0.3, math.inf)
VARIANCES: Any = ("on", "off", "exact")
Array = np.ndarray[Any, Any]


# -- the reference -----------------------------------------------------------------------------


def measure(sums: Array) -> float:
    """Variance over positions; for a 1×1 map the absolute value."""
    return abs(float(sums.item())) if sums.size == 1 else float(np.mean((sums - np.mean(sums)) ** 2))


def literal(gradient: Array, kept: Array, gamma: float, variance: str) -> Array:
    """One sample: gradient (channels, h, w) float64, kept (channels,) bool."""
    high = [c for c in range(len(kept)) if kept[c]]
    low = [c for c in range(len(kept)) if not kept[c]]
    if not high:
        return gradient
    total = sum(gradient[c] for c in range(len(kept)))
    m = measure(sum(gradient[c] for c in high))
    n = measure(sum((gradient[c] for c in low), np.zeros_like(total)))
    if m == 0 or (n == 0 and gamma != math.inf):
        return gradient
    if gamma == math.inf:
        times, beta = 1.0, math.sqrt((m + n) / m)
        others = 0.0
    else:
        times = gamma * math.sqrt(n / m)
        beta = math.sqrt((m + n) / (m * times**2 + n))
        others = 1.0
    if variance != "on":
        beta = 1.0
    new = np.stack([gradient[c] * (times if kept[c] else others) * beta for c in range(len(kept))])
    if variance == "exact":
        before, after = measure(total), measure(sum(new[c] for c in range(len(kept))))
        new = new * (before / after if total.size == 1 else math.sqrt(before / after))
    return new


class Literal(torch.autograd.Function):
    """The identity, with the reference as its backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kept: Tensor, gamma: float, variance: str) -> Tensor:
        ctx.settings = kept, gamma, variance
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        kept, gamma, variance = ctx.settings
        rows = [literal(g, k, gamma, variance) for g, k in zip(gradient.double().numpy(), kept.numpy(), strict=True)]
        return torch.from_numpy(np.stack(rows)).to(gradient.dtype), None, None, None


def close(found: Tensor, wanted: Tensor, tolerance: float = 1e-4) -> None:
    """Relative L2 distance below `tolerance`."""
    found, wanted = found.double(), wanted.double()
    assert float(wanted.norm()) > 0
    assert float((found - wanted).norm() / wanted.norm()) < tolerance


# -- one convolution ---------------------------------------------------------------------------


@pytest.fixture
def example() -> tuple[Tensor, Tensor]:
    """Gradients of four samples (4, 7, 5, 6) of very different size, and what each keeps; the last one nothing."""
    generator = torch.Generator().manual_seed(11)
    gradient = torch.randn(4, 7, 5, 6, generator=generator) * torch.tensor([1.0, 1e-25, 1e6, 1.0]).view(4, 1, 1, 1)
    kept = torch.rand(4, 7, generator=generator) < 0.4
    kept[3] = False
    assert bool(kept[:3].any(1).all())
    return gradient, kept


@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("gamma", GAMMAS)
def test_one_convolution_is_as_written(example: tuple[Tensor, Tensor], gamma: float, variance: Any) -> None:
    for gradient in (example[0], example[0][..., :1, :1]):
        found = modified(gradient, example[1], gamma, variance)
        for row in range(4):
            wanted = literal(gradient[row].double().numpy(), example[1][row].numpy(), gamma, variance)
            close(found[row], torch.from_numpy(wanted), 1e-5)


@pytest.mark.parametrize("gamma", GAMMAS)
def test_variance_is_conserved(example: tuple[Tensor, Tensor], gamma: float) -> None:
    gradient, kept = example[0][[0, 2, 3]].double(), example[1][[0, 2, 3]]
    exact = modified(gradient, kept, gamma, "exact")
    torch.testing.assert_close(exact.sum(1).var((1, 2)), gradient.sum(1).var((1, 2)), rtol=1e-5, atol=0)
    parts = []
    for g in (gradient, modified(gradient, kept, gamma, "on")):
        high, low = ((g * part[:, :, None, None]).sum(1).var((1, 2)) for part in (kept, ~kept))
        parts.append(high + low)
    torch.testing.assert_close(parts[1], parts[0], rtol=1e-5, atol=0)
    lost = modified(gradient, kept, gamma, "off").sum(1).var((1, 2))
    assert not torch.allclose(lost, gradient.sum(1).var((1, 2)), rtol=1e-2)


@pytest.mark.parametrize("gamma", [0.5, 1.0, 3.0])
def test_the_ratio_of_the_deviations_is_gamma(example: tuple[Tensor, Tensor], gamma: float) -> None:
    gradient, kept = example[0][:3], example[1][:3]
    for variance in VARIANCES:
        g = modified(gradient, kept, gamma, variance).double()
        scale = g.abs().amax((1, 2, 3), keepdim=True)
        high, low = (((g / scale) * part[:, :, None, None]).sum(1).std((1, 2)) for part in (kept, ~kept))
        torch.testing.assert_close(high / low, torch.full((3,), gamma, dtype=torch.float64), rtol=1e-5, atol=0)


@pytest.mark.parametrize("variance", VARIANCES)
def test_equal_groups_at_gamma_one_stay_as_they_are(variance: Any) -> None:
    half = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(5))
    gradient = torch.cat([half, half.flip(-1)], 1)  # the same variance, other positions
    kept = torch.tensor([[True] * 3 + [False] * 3] * 2)
    torch.testing.assert_close(modified(gradient, kept, 1.0, variance), gradient, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(modified(gradient, kept, 2.0, variance), gradient, rtol=1e-2)


@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("gamma", GAMMAS)
def test_nothing_to_compare_is_the_plain_gradient(gamma: float, variance: Any) -> None:
    gradient = torch.randn(3, 4, 3, 3, generator=torch.Generator().manual_seed(2))
    gradient[1, :2] = 0  # M is zero
    gradient[2] = 0
    kept = torch.tensor([[False] * 4, [True, True, False, False], [True, False, True, False]])
    assert torch.equal(modified(gradient, kept, gamma, variance), gradient)
    if not math.isinf(gamma):
        everything = torch.ones(3, 4, dtype=torch.bool)
        assert torch.equal(modified(gradient, everything, gamma, variance), gradient)


# -- networks ----------------------------------------------------------------------------------


class Small(nn.Module):
    """Two convolutions side by side, one above: branches are what the variance is conserved for."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.below = nn.Conv2d(3, 6, 3, padding=1)
        self.one, self.other = nn.Conv2d(6, 8, 3, padding=1), nn.Conv2d(6, 8, 1)
        self.above = nn.Conv2d(8, 5, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.below(x).relu()
        return self.above((self.one(y) + self.other(y)).relu()).tanh()  # type: ignore[no-any-return]

    def values(self, x: Tensor, pins: Sequence[tuple[int, Target]]) -> Tensor:
        """The sum over channels at the cell `anchor` of a 4×4 map, plus its square."""
        cells = self(x).sum(1).flatten(1)
        picked = torch.stack([cells[row, target.anchor] for row, target in pins])
        return picked + picked.square()


def by_reference(
    f: Callable[..., Tensor], convolutions: Sequence[nn.Module], x: Tensor, target: Target, kept: Tensor, *settings: Any
) -> Tensor:
    """(3, size, size): the input gradient of one sample with the reference at every convolution."""
    handles, start = [], 0
    for conv in convolutions:
        part = kept[None, start : start + conv.out_channels]
        start += conv.out_channels
        handles.append(conv.register_forward_hook(lambda _m, _x, y, part=part: Literal.apply(y, part, *settings)))
    try:
        x = x[None].clone().requires_grad_(True)
        return torch.autograd.grad(f(x, [(0, target)])[0], x)[0][0]
    finally:
        for handle in handles:
            handle.remove()


def through_engine(f: Any, parchgrad: ParchGrad, name: str, path: Segment, kept: dict[Target, Tensor]) -> list[Any]:
    """The maps of the method `name` for all targets at once."""
    settings = Settings(modified=True)
    ask = with_channels(METHODS[name]([path], list(kept), settings), kept)
    engine = Engine(f, torch.device("cpu"), 4, parchgrad=parchgrad)
    return next(iter(engine.run([(None, ask)], 1)))[1]


@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("gamma", [1.0, 2.0, math.inf])
def test_a_small_network_agrees_with_the_reference(gamma: float, variance: Any) -> None:
    """Several targets of one picture, each with channels of its own, one without any."""
    network = Small().requires_grad_(False)
    generator = torch.Generator().manual_seed(8)
    path = Segment(torch.rand(3, 9, 9, generator=generator), torch.zeros(3, 9, 9))
    convolutions = [network.one, network.other, network.above]
    kept = {Target(cell, 0): torch.rand(21, generator=generator) < 0.4 for cell in (5, 6, 15)}
    kept[Target(0, 0)] = torch.zeros(21, dtype=torch.bool)
    found = through_engine(network.values, ParchGrad(convolutions, gamma, variance), "grad", path, kept)
    for (target, mask), one in zip(kept.items(), found, strict=True):
        wanted = by_reference(network.values, convolutions, path.x, target, mask, gamma, variance)
        close(one.map.float(), wanted.sum(0))
        plain = by_reference(network.values, [], path.x, target, mask)
        assert torch.allclose(one.map.float(), plain.sum(0), atol=1e-6) != bool(mask.any())


@pytest.fixture(scope="module")
def tiny_detector() -> Detector:
    network = seeded_network("yolov8n.yaml")
    return build(Checkpoint("tiny.pt", "0" * 64, "ultralytics", network, "yolov8", network.names, SIDE))


def picture(name: str = "bag-03.jpg") -> Tensor:
    return torch.from_numpy(pixels(name, (SIDE, SIDE)).copy()).permute(2, 0, 1).float() / 255


def upper_half(detector: Detector, x: Tensor) -> list[nn.Conv2d]:
    found = channels.in_order(convolutions(detector.trunk), lambda: detector.predict(x[None]))
    return list(found.values())[channels.first(len(found), 0.5) :]


def best(detector: Detector, x: Tensor) -> list[Target]:
    """The strongest prediction of each level."""
    with torch.no_grad():
        found = detector.predict(x[None])[0]
    targets = []
    for level in found.levels.unique().tolist():
        logits = torch.where((found.levels == level)[:, None], found.logits, -torch.inf)
        anchor, class_id = divmod(int(logits.argmax()), logits.shape[1])
        targets.append(Target(anchor, level, "class", class_id))
    return targets


@pytest.mark.parametrize(("gamma", "variance"), [(math.inf, "on"), (2.0, "on"), (1.0, "exact"), (2.0, "off")])
def test_a_detector_agrees_with_the_reference(tiny_detector: Detector, gamma: float, variance: Any) -> None:
    """The sparse path with hooks against the full one with the reference: three levels in one batch."""
    x = picture()
    hooked = upper_half(tiny_detector, x)
    total = sum(conv.out_channels for conv in hooked)
    generator = torch.Generator().manual_seed(9)
    kept = {target: torch.rand(total, generator=generator) < 0.3 for target in best(tiny_detector, x)}
    hooks = ParchGrad(hooked, gamma, variance, tiny_detector.trunk.whole)
    found = through_engine(tiny_detector.values, hooks, "grad", Segment(x, torch.zeros_like(x)), kept)
    for (target, mask), one in zip(kept.items(), found, strict=True):
        wanted = by_reference(tiny_detector.full_values, hooked, x, target, mask, gamma, variance)
        close(one.map.float(), wanted.sum(0), 1e-3)


@pytest.mark.parametrize("name", ["26-obb", "world", "rtdetr-v8", "darknet"])
def test_every_kind_of_detector_agrees_with_the_reference(name: str, tmp_path: FilePath) -> None:
    if name == "darknet":
        cfg = darknets.NETWORKS["yolov3-tiny"]().text
        detector: Detector = build(checkpoints.load(str(darknets.saved(tmp_path, name, cfg, 128))))
    else:
        module = families.network(families.FAMILIES[name])
        detector = build(Checkpoint(name, "0" * 64, "ultralytics", module, name, module.names, 640))
    x = families.photo("bus.jpg", 128)
    with torch.no_grad():
        found = detector.predict(x[None])[0]
    anchor, class_id = divmod(int(found.logits.argmax()), found.logits.shape[1])
    target = Target(anchor, int(found.levels[anchor]), "class", class_id, context=found.context)
    hooked = upper_half(detector, x)
    assert len(hooked) >= 5
    total = sum(conv.out_channels for conv in hooked)
    kept = torch.rand(total, generator=torch.Generator().manual_seed(1)) < 0.5
    path = Segment(x, torch.zeros_like(x))
    hooks = ParchGrad(hooked, whole=detector.trunk.whole)
    (one,) = through_engine(detector.values, hooks, "grad", path, {target: kept})
    wanted = by_reference(detector.full_values, hooked, x, target, kept, math.inf, "on")
    close(one.map.float(), wanted.sum(0), 1e-3)


# -- methods -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GRADIENT_METHODS)
def test_no_method_claims_completeness(name: str, tiny_detector: Detector) -> None:
    """And with nothing kept every method gives its own map of the plain gradient."""
    x = picture()
    hooked = upper_half(tiny_detector, x)
    total = sum(conv.out_channels for conv in hooked)
    path = Segment(x, torch.ones_like(x))
    first, other = best(tiny_detector, x)[:2]
    kept = {first: torch.arange(total) % 3 == 0, other: torch.zeros(total, dtype=torch.bool)}
    found = through_engine(tiny_detector.values, ParchGrad(hooked, whole=tiny_detector.trunk.whole), name, path, kept)
    for one in found:
        assert (one.completeness_error, one.error_bound, one.converged) == (None, None, None)
        assert bool(one.map.isfinite().all())
    engine = Engine(tiny_detector.values, torch.device("cpu"), 4)
    plain = next(iter(engine.run([(None, METHODS[name]([path], list(kept), Settings(modified=True)))], 1)))[1]
    assert found[0].evaluations == plain[0].evaluations
    assert [one.value_at_input for one in found] == pytest.approx([one.value_at_input for one in plain], abs=1e-5)
    close(found[1].map, plain[1].map)
    assert float((found[0].map - plain[0].map).norm() / plain[0].map.norm()) > 0.05


def test_the_fixed_rule_integrates_what_it_is_given(tiny_detector: Detector) -> None:
    """Of the plain gradient the sum must be F(x) − F(b), on a path without surprises."""
    x = picture()
    target = best(tiny_detector, x)[0]
    settings = Settings(modified=True)
    (one,) = solve(tiny_detector.values, METHODS["ig"]([Segment(x, 0.9 * x)], [target], settings))
    assert one.value_at_baseline is not None
    delta = one.value_at_input - one.value_at_baseline
    assert abs(delta) > 0.05
    assert float(one.map.sum()) == pytest.approx(delta, rel=0.02)
    assert one.evaluations == 24
    (fewer,) = solve(
        tiny_detector.values,
        METHODS["ig"]([Segment(x, 0.9 * x)], [target], Settings(max_evaluations=9, modified=True)),
    )
    assert fewer.evaluations <= 9


# -- which channels ----------------------------------------------------------------------------


def test_a_gap_is_the_mean_of_the_rectified_map_over_the_box() -> None:
    generator = torch.Generator().manual_seed(6)
    maps = [torch.randn(3, 8, 8, generator=generator), torch.randn(2, 4, 4, generator=generator)]
    boxes = torch.tensor([[0.0, 0, 64, 64], [16, 8, 40, 24], [20, 4, 28, 12], [70, 70, 80, 80], [9, 9, 9, 9]])
    found = channels.gap(maps, boxes, (64, 64))
    assert found.shape == (5, 5)
    whole = torch.cat([m.relu().mean((1, 2)) for m in maps])
    torch.testing.assert_close(found[0], whole)
    torch.testing.assert_close(found[1, :3], maps[0].relu()[:, 1:3, 2:5].mean((1, 2)))
    fine = maps[0].relu().repeat_interleave(8, 1).repeat_interleave(8, 2)  # one value a pixel of the input
    torch.testing.assert_close(found[2, :3], fine[:, 4:12, 20:28].mean((1, 2)))
    torch.testing.assert_close(found[3, :3], maps[0].relu()[:, 7, 7], msg="outside: the nearest cell")
    torch.testing.assert_close(found[4, :3], maps[0].relu()[:, 1, 1], msg="no area: its cell")


def statistics(**parts: Any) -> channels.Statistics:
    """Of two classes and four channels."""
    known: dict[str, Any] = {
        "count": torch.tensor([9, 2]),
        "welch_t": torch.tensor([[3.0, 2.0, -1.0, 4.0], [0.0] * 4]),
        "welch_p": torch.tensor([[0.001, 0.04, 0.8, 0.0001], [1.0] * 4]),
        "shapiro_p": torch.tensor([0.01, 0.001, 0.001, 0.2]),
        "mean": torch.tensor([1.0, 2.0, 0.0, 1.0]),
        "std": torch.tensor([0.5, 1.0, 0.0, 1.0]),
    }
    return channels.Statistics(**(known | parts))


def test_channels_of_a_class_pass_both_tests() -> None:
    choice = channels.Choice(alpha=0.05, normality=0.05)
    assert choice.of_class(statistics(), 0, [4]).tolist() == [True, True, False, False]
    assert channels.Choice(alpha=0.01).of_class(statistics(), 0, [4]).tolist() == [True, False, False, False]
    assert channels.Choice(normality=0.5).of_class(statistics(), 0, [4]).tolist() == [True, True, False, True]
    assert channels.Choice(quantile=0.5, normality=0.5).of_class(statistics(), 0, [2, 2]).tolist() == [
        *(True, False),
        *(False, True),
    ]
    for choice in (channels.Choice(), channels.Choice(quantile=0.5)):
        assert not choice.of_class(statistics(), 1, [4]).any(), "too few samples: nothing is kept"


def test_channels_of_an_instance_are_those_above_the_calibration() -> None:
    gap = torch.tensor([1.9, 3.5, 9.0, 2.7])
    z = (gap - statistics().mean) / statistics().std
    for alpha in (0.2, 0.05, 0.04):
        wanted = [bool(s > 0 and norm.sf(v) <= alpha) for v, s in zip(z.tolist(), statistics().std, strict=True)]
        assert channels.Choice(alpha=alpha).of_instance(statistics(), gap, [4]).tolist() == wanted
    top = channels.Choice(quantile=0.25).of_instance(statistics(), gap, [2, 2])
    assert top.tolist() == [True, False, False, True]


def test_the_upper_share_has_one_convolution_at_least() -> None:
    assert [channels.first(9, ratio) for ratio in (1.0, 0.5, 0.3, 0.01)] == [0, 5, 6, 8]


# -- statistics --------------------------------------------------------------------------------


def samples() -> tuple[Array, list[tuple[int, ...]]]:
    """(60, 6) GAPs of boxes, and the classes that each shows: the third only twice."""
    chance = np.random.default_rng(3)
    rows = chance.gamma(2.0, 1.0, (60, 6)) * 10.0 ** np.arange(6) * 1e-3
    rows[:, 4] = 7.0  # constant
    shown = [(0,) if i % 3 == 0 else (1,) if i % 3 == 1 else (0, 1) for i in range(60)]
    shown[10] = shown[20] = (2,)
    rows[[0 in s for s in shown], 1] += 0.01
    return rows, shown


def test_streaming_equals_all_at_once() -> None:
    rows, shown = samples()
    gathering = stored.Gathering(4, 6)
    for row, ids in zip(rows, shown, strict=True):
        gathering.add(row, ids)
    found = gathering.statistics()
    np.testing.assert_allclose(found.mean, rows.mean(0), rtol=1e-6)
    np.testing.assert_allclose(found.std, rows.std(0, ddof=1), rtol=1e-6)
    assert found.count.tolist() == [sum(k in s for s in shown) for k in range(4)]
    for k in range(2):
        own = np.array([k in s for s in shown])
        varied = [0, 1, 2, 3, 5]
        wanted = ttest_ind(rows[own][:, varied], rows[~own][:, varied], equal_var=False, alternative="greater")
        np.testing.assert_allclose(found.welch_t[k, varied], wanted.statistic, rtol=1e-5)
        np.testing.assert_allclose(found.welch_p[k, varied], wanted.pvalue, rtol=1e-5)
        assert (float(found.welch_t[k, 4]), float(found.welch_p[k, 4])) == (0, 1)
    assert (found.welch_p[2:] == 1).all(), "two samples, and none, are no test"
    wanted_p = [shapiro(rows[:, c].astype(np.float32).astype(float)).pvalue if c != 4 else 1 for c in range(6)]
    np.testing.assert_allclose(found.shapiro_p, wanted_p, rtol=1e-5)


def test_memory_is_bounded_and_the_sample_is_fair(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored, "RESERVOIR", 50)
    gathering = stored.Gathering(1, 1)
    for i in range(1000):
        gathering.add(np.array([float(i)]), [])
    kept = np.stack(gathering.kept).ravel()
    assert len(kept) == len(set(kept)) == 50
    assert 350 < kept.mean() < 650
    assert gathering.all.count == 1000


def test_a_file_of_statistics_comes_back(tmp_path: FilePath) -> None:
    made = stored.ChannelCalibration(
        "ab" * 32, 64, (("0.conv", 3), ("1.conv", 1)), {0: "gun", 7: "knife"},
        {region: statistics() for region in stored.REGIONS}, 9, True, "note",
    )  # fmt: skip
    (file := tmp_path / "x.safetensors").write_bytes(made.packed())
    read = stored.read(file)
    assert (read.layers, read.names, read.imgsz, read.labelled, read.note) == (
        *(made.layers, made.names, 64, True, "note"),
    )
    assert torch.equal(read.statistics["whole"].welch_p, statistics().welch_p)
    assert made.packed() == made.packed() == file.read_bytes()
    for data in (b"", b"\xff" * 64, file.read_bytes()[:-9], file.read_bytes().replace(b"parchgrad/1", b"parchgrad/0")):
        file.write_bytes(data)
        with pytest.raises(UsageError, match="detxai calibrate parchgrad"):
            stored.read(file)


# -- the commands ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def calibrated(tiny: FilePath, tmp_path_factory: pytest.TempPathFactory) -> FilePath:
    """A folder with the tiny model and, beside it, its statistics from the samples."""
    folder = tmp_path_factory.mktemp("calibrated")
    (folder / "tiny.safetensors").write_bytes(tiny.read_bytes())
    machine = Command(folder / "machine")
    outcome = machine("calibrate", "parchgrad", SAMPLES, "-m", folder / "tiny.safetensors", "--conf", 0.2)
    assert outcome.code == 0, outcome.err
    assert "12 images" in outcome.err
    assert sorted(p.name for p in folder.iterdir()) == ["machine", "tiny.parchgrad.safetensors", "tiny.safetensors"]
    return folder


@pytest.mark.slow
def test_calibrate_counts_what_the_labels_say(tiny: FilePath, tmp_path: FilePath, capsys: Any) -> None:
    (drawn := tmp_path / "labels").mkdir()
    (drawn / "bag-01.txt").write_text("0 0.5 0.5 0.2 0.2\n1 0.3 0.3 0.1 0.1\n")
    (drawn / "bag-02.txt").write_text("1 0.5 0.5 0.5 0.5\n")
    (drawn / "bag-03.txt").write_text("")
    (tmp_path / "bag-04.jpg").write_bytes(b"no picture")
    (drawn / "bag-04.txt").write_text("")
    file = tmp_path / "own" / "s.parchgrad.safetensors"
    line = ["calibrate", "parchgrad", str(SAMPLES), str(tmp_path / "bag-04.jpg"), "--labels", str(drawn)]
    assert run([*line, "-m", str(tiny), "-o", str(file), "--note", "three bags"]) == 3, "one picture failed"
    err = capsys.readouterr().err
    assert "bag-04.jpg" in err
    assert "8 images without a label file" in err or "9 images without a label file" in err
    found = stored.read(file)
    assert (found.images, found.labelled, found.note) == (4 if "8 images" in err else 3, True, "three bags")
    assert found.statistics["whole"].count.tolist() == [1, 2, 0]
    assert found.statistics["detection"].count.tolist() == [1, 2, 0]
    before = file.read_bytes()
    assert run([*line[:3], "--labels", str(drawn), "-m", str(tiny), "-o", str(file), "--note", "three bags"]) == 0
    assert run([*line[:3], "--labels", str(drawn), "-m", str(tiny), "-o", str(file), "--limit", "1"]) == 0
    assert stored.read(file).images == 1
    assert before != file.read_bytes()


@pytest.mark.slow
def test_gradients_side_by_side(calibrated: FilePath, pictures: FilePath, tmp_path: FilePath) -> None:
    """One detection pass, every method with every gradient, names and records that say so."""
    line = (pictures / "b.jpg", "-m", calibrated / "tiny.safetensors", "--max-det", 1, "--maps", "npz")
    gradients = ("plain", "parchgrad-cls", "parchgrad-ins")
    settings = ("--parchgrad-quantile", 0.3, "--parchgrad-normality", 1, "--evidence", "none")
    assert explain(*line, "-o", tmp_path, "--method", "ig,grad", "--gradient", ",".join(gradients), *settings) == 0
    (detection,) = records.load((tmp_path / "b.jpg.json").read_bytes()).detections or ()
    found = {(a.method, a.gradient): a for a in detection.attributions}
    assert set(found) == {(m, g) for m in ("ig", "grad") for g in gradients}
    maps = {}
    for (method, gradient), a in found.items():
        middle = "" if gradient == "plain" else f".{gradient}"
        assert a.overlay == f"b.jpg.d00.{method}{middle}.png"
        assert a.map == f"b.jpg.d00.{method}{middle}.npz"
        assert (tmp_path / a.overlay).is_file()
        maps[method, gradient] = np.load(tmp_path / a.map)["map"]
        if gradient != "plain":
            assert (a.completeness_error, a.error_bound, a.converged) == (None, None, None)
            assert a.evaluations == (24 if method == "ig" else 1)
            assert np.abs(maps[method, gradient] - maps[method, "plain"]).max() > 0
    assert found["ig", "plain"].converged is not None
    fingerprint = records.load((tmp_path / "b.jpg.json").read_bytes()).fingerprint
    assert explain(*line, "-o", tmp_path, "--method", "ig", "--parchgrad-gamma", 7, "--evidence", "none") == 0
    plain = records.load((tmp_path / "b.jpg.json").read_bytes())
    assert plain.fingerprint != fingerprint
    assert not list(tmp_path.glob("*parchgrad*")), "superseded pictures are gone"


@pytest.mark.slow
def test_statistics_hold_for_the_shape_that_they_were_made_at(
    calibrated: FilePath, pictures: FilePath, tmp_path: FilePath, capsys: Any
) -> None:
    model, square, rect = (
        calibrated / "tiny.safetensors",
        calibrated / "tiny.parchgrad.safetensors",
        tmp_path / "r.safetensors",
    )
    assert run(["calibrate", "parchgrad", str(SAMPLES), "-m", str(model), "-o", str(rect), "--rect", "-q"]) == 0
    assert (stored.read(square).rect, stored.read(rect).rect) == (False, True)
    line = (pictures / "b.jpg", "-m", model, "-o", tmp_path / "out", "--max-det", 1, "--no-overlays", *FAST[2:])
    line = (*line, "--method", "grad", "--gradient", "parchgrad-cls")
    size = f"{stored.read(square).imgsz} px"
    for given, more, words in (
        ((), ("--rect",), f"made at {size}, this run is at {size} with --rect"),
        (("--calibration", rect), (), f"made at {size} with --rect, this run is at {size}."),
        (("--calibration", square), ("--imgsz", "64,96"), f"made at {size}, this run is at 64x96 px"),
    ):
        assert explain(*line, *given, *more) == 2
        assert words in capsys.readouterr().err
    assert explain(*line, "--calibration", rect, "--rect") == 0


def test_new_statistics_are_a_reason_to_run_again(calibrated: FilePath, pictures: FilePath, tmp_path: FilePath) -> None:
    line = (pictures / "b.jpg", "-m", calibrated / "tiny.safetensors", "-o", tmp_path / "out", "--max-det", 1)
    line = (*line, "--method", "grad", "--gradient", "parchgrad-ins", "--no-overlays", "--evidence", "none")
    prints = []
    (other := tmp_path / "other.safetensors").write_bytes(
        replace(stored.read(calibrated / "tiny.parchgrad.safetensors"), note="another").packed()
    )
    for more in ((), (), ("--parchgrad-gamma", 3), ("--calibration", other)):
        assert explain(*line, *more) == 0
        prints.append(records.load((tmp_path / "out" / "b.jpg.json").read_bytes()).fingerprint)
    assert prints[0] == prints[1]
    assert len(set(prints)) == 3


@pytest.mark.slow
def test_pack_mates_do_not_matter(calibrated: FilePath, pictures: FilePath, tmp_path: FilePath) -> None:
    """Bytes of a map are the same alone and among others, whose channels and scales differ."""
    options = ("-m", calibrated / "tiny.safetensors", "--max-det", 3, "--method", "grad,ig", "--maps", "npz")
    options = (*options, "--gradient", "plain,parchgrad-cls,parchgrad-ins", "--no-overlays", "--evidence", "none")
    assert explain(pictures, *options, "-o", tmp_path / "all") == 0
    assert explain(pictures / "b.jpg", *options, "-o", tmp_path / "one") == 0
    alone = files(tmp_path / "one")
    assert len(alone) > 12
    assert {name: files(tmp_path / "all")[name] for name in alone if name != "records.jsonl"} == {
        name: content for name, content in alone.items() if name != "records.jsonl"
    }


def test_too_few_samples_give_the_plain_gradient_and_say_so(
    tiny: FilePath, pictures: FilePath, tmp_path: FilePath
) -> None:
    file = tmp_path / "few.safetensors"
    line = ["calibrate", "parchgrad", str(pictures / "a.png"), "-m", str(tiny), "-o", str(file), "-q"]
    assert run([*line, "--conf", "0.99"]) == 0, "a picture without a box"
    options = (pictures / "b.jpg", "-m", tiny, "-o", tmp_path / "out", "--max-det", 1, "--maps", "npz", *FAST[2:])
    options = (*options, "--method", "grad", "--gradient", "plain,parchgrad-cls", "--calibration", file)
    assert explain(*options) == 0
    (detection,) = records.load((tmp_path / "out" / "b.jpg.json").read_bytes()).detections or ()
    plain, modified_ = detection.attributions
    assert plain.notes is None
    assert modified_.notes is not None
    assert "too few" in modified_.notes[0]
    one, other = (np.load(tmp_path / "out" / str(a.map))["map"] for a in (plain, modified_))
    np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-7)


def test_what_cannot_be_is_refused_with_a_way_on(
    tiny: FilePath, calibrated: FilePath, pictures: FilePath, tmp_path: FilePath, capsys: Any
) -> None:
    def refused(code: int, *words: str, line: tuple[object, ...]) -> None:
        assert run([*map(str, line), "-o", str(tmp_path / f"out{code}" / "x")]) == code
        said = capsys.readouterr().err
        assert all(word in said for word in words), said

    line = ("explain", pictures / "b.jpg", "--gradient", "parchgrad-cls")
    model, made = calibrated / "tiny.safetensors", calibrated / "tiny.parchgrad.safetensors"
    refused(2, f"detxai calibrate parchgrad SOURCE -m {tiny}", line=(*line, "-m", tiny))
    refused(2, "another model", "detxai calibrate parchgrad SOURCE", line=(*line, "--calibration", made))
    refused(2, "--imgsz 64", line=(*line, "-m", model, "--imgsz", 96))
    for method in ("drise", "gradcam"):
        refused(2, f"--method {method}", line=(*line, "-m", model, "--method", method))
    refused(2, "parchgrad.gamma", line=("explain", pictures, "-m", model, "--parchgrad-gamma", "-1"))
    refused(4, "--labels", line=("calibrate", "parchgrad", pictures, "-m", tiny, "--labels", pictures))
    (tmp_path / "out6").write_text("")
    refused(6, "out6", line=("calibrate", "parchgrad", pictures, "-m", tiny))


@pytest.mark.skipif(not checkpoints.BUNDLED.exists(), reason="the bundled model is not built yet")
def test_the_bundled_model_brings_its_statistics(tmp_path: FilePath) -> None:
    file = stored.beside(None)
    assert file.stat().st_size < 1_000_000
    found = stored.read(file)
    assert (found.model_sha256, found.imgsz, found.labelled) == (checkpoints.BUNDLED_SHA256, 320, True)
    assert found.images >= 300
    assert "scripts/make_xrays.py" in found.note
    line = (SAMPLES / "bag-01.jpg", "-o", tmp_path, "--max-det", 1, "--no-overlays", "--evidence", "none")
    assert explain(*line, "--method", "grad", "--gradient", "parchgrad-cls,parchgrad-ins") == 0
    (detection,) = records.load((tmp_path / "bag-01.jpg.json").read_bytes()).detections or ()
    assert [a.notes for a in detection.attributions] == [None, None]
