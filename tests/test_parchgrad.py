"""ParchGrad against a slow reference written from its formulas, one sample and one channel group at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SIDE, pixels, seeded_network
from torch import Tensor, nn

from detxai.attribution import channels
from detxai.attribution.engine import Engine
from detxai.attribution.methods import GRADIENT, Settings
from detxai.attribution.parchgrad import ParchGrad, modified, with_channels
from detxai.attribution.path import Path
from detxai.data import Checkpoint, Target
from detxai.detectors import Detector, build, convolutions

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


def through_engine(f: Any, parchgrad: ParchGrad, name: str, path: Path, kept: dict[Target, Tensor]) -> list[Any]:
    """The maps of the method `name` for all targets at once."""
    settings = Settings(modified=True)
    ask = with_channels(GRADIENT[name]([path], list(kept), settings), {id(t): m for t, m in kept.items()})
    engine = Engine(f, torch.device("cpu"), 4, parchgrad=parchgrad)
    return next(iter(engine.run([(None, ask)], 1)))[1]


@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("gamma", [1.0, 2.0, math.inf])
def test_a_small_network_agrees_with_the_reference(gamma: float, variance: Any) -> None:
    """Several targets of one picture, each with channels of its own, one without any."""
    network = Small().requires_grad_(False)
    generator = torch.Generator().manual_seed(8)
    path = Path(torch.rand(3, 9, 9, generator=generator), torch.zeros(3, 9, 9))
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
    found = channels.in_order(convolutions(detector), lambda: detector.predict(x[None]))
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
    found = through_engine(
        tiny_detector.values, ParchGrad(hooked, gamma, variance), "grad", Path(x, torch.zeros_like(x)), kept
    )
    for (target, mask), one in zip(kept.items(), found, strict=True):
        wanted = by_reference(tiny_detector.full_values, hooked, x, target, mask, gamma, variance)
        close(one.map.float(), wanted.sum(0), 1e-3)
