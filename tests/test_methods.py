"""Methods beside ig on a function whose gradients are known; every method with every target, or why not."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path as File
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_darknet import NETWORKS, saved
from torch import Tensor

from detxai import vocabulary
from detxai.attribution import activation
from detxai.attribution.drise import drise
from detxai.attribution.engine import solve
from detxai.attribution.methods import METHODS, Settings
from detxai.attribution.points import Segment, TargetMap
from detxai.config.settings import RunConfig
from detxai.errors import UsageError
from detxai.run.pipeline import Explainer
from detxai.values import Target
from detxai.vocabulary import EDGES

SIZE = 8
TARGETS = [Target(0, 0), Target(1, 0)]


def f(x: Tensor, pins: Sequence[tuple[int, Target]]) -> Tensor:
    """Σ w x² for anchor 0 and Σ w x for anchor 1, with w from 0 to 1 over the square."""
    w = torch.linspace(0, 1, SIZE * SIZE).view(SIZE, SIZE)
    return torch.stack([(w * x[row] ** (2 - target.anchor)).sum() for row, target in pins])


def paths() -> list[Segment]:
    x = torch.rand(3, SIZE, SIZE, generator=torch.Generator().manual_seed(3))
    return [Segment(x, torch.zeros_like(x)), Segment(x, torch.ones_like(x))]


def run(name: str, **settings: int) -> list[TargetMap]:
    return solve(f, METHODS[name](paths(), TARGETS, Settings(**settings)))


def test_the_config_names_every_method() -> None:
    assert set(vocabulary.METHODS) == set(METHODS)


def test_every_method_has_its_paper() -> None:
    """In its docstring, by arXiv number or DOI."""
    maps = {
        "gradcam": activation.gradcam,
        "gradcam++": activation.gradcam_plus,
        "layercam": activation.layercam,
        "odam": activation.odam,
    }
    assert set(maps) == set(vocabulary.LAYER_METHODS)
    texts = {
        name: method.__doc__ for name, method in ({n: METHODS[n] for n in vocabulary.GRADIENT_METHODS} | maps).items()
    } | {"drise": drise.__doc__}
    assert set(texts) == set(METHODS)
    for name, text in texts.items():
        assert re.search(r"arXiv:\d{4}\.\d{4,5}|doi:10\.\d+/\S+", text or ""), name


@pytest.mark.parametrize("name", vocabulary.GRADIENT_METHODS)
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


def test_expected_shares_its_evaluations_among_the_baselines() -> None:
    for found in run("expected", max_evaluations=10):
        assert found.evaluations <= 10
    rough, exact = solve(f, METHODS["ig"](paths()[:1], TARGETS, Settings(max_evaluations=2)))
    assert rough.error_bound is not None and exact.error_bound is not None
    assert exact.error_bound < 1e-4  # a linear function


def test_smoothgrad_repeats_its_seed_and_no_other() -> None:
    first, again, other = (run("smoothgrad", seed=seed)[0].map for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


WIDE = 64
PATCH = (slice(16, 32), slice(24, 48))


def patch(x: Tensor, pins: Sequence[tuple[int, Target]]) -> Tensor:
    """How much of a patch is there."""
    return torch.stack([x[row, 0][PATCH].mean() for row, _ in pins])


def wide() -> Segment:
    return Segment(torch.ones(3, WIDE, WIDE), torch.zeros(3, WIDE, WIDE))


def test_drise_finds_the_patch_and_stops_when_it_has_settled() -> None:
    (found,) = solve(patch, drise(wide(), [Target(0, 0)]))
    assert found.evaluations < 1024
    assert found.notes == ()
    inside = torch.zeros(WIDE, WIDE, dtype=torch.bool)
    inside[PATCH] = True
    assert bool(inside.flatten()[found.map.argmax()])
    assert float(found.map[inside].mean()) > 5 * float(found.map[~inside].abs().mean())
    assert found.value_at_input == 1
    assert found.completeness_error is None
    (again,), (other,) = (solve(patch, drise(wide(), [Target(0, 0)], seed=seed)) for seed in (0, 1))
    assert torch.equal(found.map, again.map)
    assert not torch.equal(found.map, other.map)


def test_drise_does_not_settle_on_noise() -> None:
    generator = torch.Generator().manual_seed(2)

    def noise(x: Tensor, pins: Sequence[tuple[int, Target]]) -> Tensor:
        return torch.rand(len(pins), generator=generator)

    (found,) = solve(noise, drise(wide(), [Target(0, 0)], max_masks=600))
    assert found.evaluations == 600
    assert found.notes == ("not settled after 600 masks",)


def explains(method: str, target: str) -> bool:
    """What a user may ask for, as the README says it."""
    if method == "drise":
        return target == "class"
    return method not in ("gradcam++", "layercam") or target in ("class", "contrast", "objectness")


def asked(methods: Sequence[str], target: str, model: File) -> Explainer:
    attribution = {"method": methods, "target": target, "max_evaluations": 4, "evidence": "none"}
    detection = {"max_det": 1, "conf": 0.001}
    settings = {"model": {"path": str(model)}, "attribution": attribution, "detection": detection}
    return Explainer(RunConfig.model_validate(settings))


def check(target: str, model: File, picture: File) -> None:
    """Every method gives a map of `target`, or a reason why not before anything is done."""
    methods = [name for name in METHODS if explains(name, target)]
    for refused in set(METHODS) - set(methods):
        with pytest.raises(UsageError, match=rf"--method {re.escape(refused)} "):
            asked([refused], target, model)
    (result,) = asked(methods, target, model).explain_sources(picture)
    found = [item.attribution for item in result.explanations]
    kinds = {"box": EDGES}.get(target, (target,))
    assert [(a.method, a.target.kind) for a in found] == [(name, kind) for name in methods for kind in kinds]
    for a in found:
        assert bool(np.isfinite(a.map).all())
        assert bool(a.map.any()) or a.notes
        assert (a.completeness_error is None) == (a.method not in ("ig", "expected"))


@pytest.mark.parametrize("target", ["class", "contrast", "left", pytest.param("box", marks=pytest.mark.slow)])
def test_every_method_with_every_target(target: str, tiny: File, pictures: File) -> None:
    check(target, tiny, pictures / "a.png")


@pytest.fixture(scope="module")
def anchored(tmp_path_factory: pytest.TempPathFactory) -> File:
    """A small Darknet network: its head has an objectness."""
    return saved(tmp_path_factory.mktemp("darknet"), "csp", NETWORKS["yolov4-csp"]().text, 64)


@pytest.mark.parametrize("target", ["class", "objectness", "right"])
def test_every_method_with_an_objectness(target: str, anchored: File, pictures: File) -> None:
    check(target, anchored, pictures / "a.png")


def test_a_head_without_an_objectness_is_a_reason(tiny: File) -> None:
    with pytest.raises(UsageError, match="objectness"):
        asked(["grad"], "objectness", tiny)


@pytest.mark.slow
def test_a_folder_of_baselines(tiny: File, pictures: File, tmp_path: File) -> None:
    folder = tmp_path / "empties"
    folder.mkdir()
    shades = range(0, 250, 20)
    for shade in shades:
        Image.new("RGB", (40, 30), (shade,) * 3).save(folder / f"{shade:03d}.png")
    (folder / "readme.txt").write_text("no picture")

    def explained(method: str = "expected") -> Any:
        attribution = {"method": method, "baseline": str(folder), "evidence": "none", "max_evaluations": 40}
        settings = {"model": {"path": str(tiny)}, "attribution": attribution, "detection": {"max_det": 1}}
        return next(iter(Explainer(RunConfig.model_validate(settings)).explain_sources(pictures / "a.png")))

    first, again = explained(), explained()
    names = first.explanations[0].attribution.baseline.split("+")
    assert len(names) == 8
    assert set(names) < {f"{shade:03d}.png" for shade in shades}
    assert first.explanations[0].attribution.evaluations <= 40
    assert first.record == again.record
    changed = folder / names[0]
    Image.new("RGB", (40, 30), (255, 0, 0)).save(changed)
    assert explained().record.fingerprint != first.record.fingerprint
    for method in ("ig", "ig,expected"):
        with pytest.raises(UsageError, match="only --method expected"):
            explained(method)
    for file in folder.glob("*.png"):
        file.unlink()
    with pytest.raises(UsageError, match="no image"):
        explained()
