"""Methods beside ig, on a function whose gradients are known."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from detxai import config
from detxai.attribution.engine import solve
from detxai.attribution.methods import GRADIENT, METHODS, Settings
from detxai.attribution.path import Path, TargetMap
from detxai.data import Target

SIZE = 8
TARGETS = [Target(0, 0), Target(1, 0)]


def f(x: Tensor, pins: Sequence[tuple[int, Target]]) -> Tensor:
    """Σ w x² for anchor 0 and Σ w x for anchor 1, with w from 0 to 1 over the square."""
    w = torch.linspace(0, 1, SIZE * SIZE).view(SIZE, SIZE)
    return torch.stack([(w * x[row] ** (2 - target.anchor)).sum() for row, target in pins])


def paths() -> list[Path]:
    x = torch.rand(3, SIZE, SIZE, generator=torch.Generator().manual_seed(3))
    return [Path(x, torch.zeros_like(x)), Path(x, torch.ones_like(x))]


def run(name: str, **settings: int) -> list[TargetMap]:
    return solve(f, METHODS[name](paths(), TARGETS, Settings(**settings)))


def test_the_config_names_every_method() -> None:
    assert set(config.METHODS) == set(METHODS)


@pytest.mark.parametrize("name", GRADIENT)
def test_every_gradient_method_sees_the_weights(name: str) -> None:
    for found in run(name):
        assert found.map.shape == (SIZE, SIZE)
        assert found.map.dtype == torch.float64
        assert bool(found.map.isfinite().all())
        assert float(found.map[0, 0]) == pytest.approx(0, abs=1e-6)
        assert float(found.map.abs().max()) > 0


def test_gradients_are_the_gradients() -> None:
    w = torch.linspace(0, 1, SIZE * SIZE).view(SIZE, SIZE)
    x = paths()[0].x
    square, linear = run("grad")
    assert torch.allclose(square.map.float(), (2 * w * x).sum(0), atol=1e-5)
    assert torch.allclose(linear.map.float(), 3 * w, atol=1e-5)
    square, linear = run("inputxgrad")
    assert torch.allclose(square.map.float(), (2 * w * x * x).sum(0), atol=1e-5)
    assert torch.allclose(linear.map.float(), (w * x).sum(0), atol=1e-5)


def test_idgi_shares_out_the_difference() -> None:
    for found in run("idgi"):
        assert found.value_at_baseline is not None
        assert float(found.map.sum()) == pytest.approx(found.value_at_input - found.value_at_baseline, rel=1e-4)
        assert found.completeness_error is None


def test_expected_is_the_mean_over_baselines() -> None:
    means = run("expected")
    parts = [solve(f, METHODS["ig"]([path], TARGETS, Settings())) for path in paths()]
    for k, found in enumerate(means):
        assert torch.allclose(found.map, (parts[0][k].map + parts[1][k].map) / 2)
        assert found.completeness_error is not None
        assert found.completeness_error < 1e-3
        assert found.converged


def test_smoothgrad_repeats_its_seed_and_no_other() -> None:
    first, again, other = (run("smoothgrad", seed=seed)[0].map for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
