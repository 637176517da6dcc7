"""Activation methods against their formulas, written out, on gradients taken by hooks; and where they make no sense."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path as File
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SIDE, explain, pixels
from torch import Tensor

from detxai.attribution import activation
from detxai.attribution.engine import Engine, solve
from detxai.attribution.methods import METHODS, Settings
from detxai.attribution.points import Segment, TargetMap
from detxai.models import checkpoints, detectors
from detxai.models.detector import Detector
from detxai.values import Target
from detxai.vocabulary import LAYER_METHODS

#: Layers of the tiny YOLOv8n: the three that feed its head, and where they are made in the backbone.
FEEDS, BACKBONE = (15, 18, 21), (4, 6, 9)


@pytest.fixture(scope="module")
def detector(tiny: File) -> Detector:
    return detectors.build(checkpoints.load(str(tiny)))


def picture(name: str = "bag-01.jpg") -> Tensor:
    return torch.from_numpy(pixels(name, (SIDE, SIDE)).copy()).permute(2, 0, 1).float() / 255


def targets(detector: Detector, *kinds: str) -> list[Target]:
    """The strongest prediction of every level, as each of `kinds`."""
    with torch.no_grad():
        found = detector.predict(picture()[None])[0]
    chosen = []
    for level in range(3):
        score = found.logits.masked_fill((found.levels != level)[:, None], -math.inf)
        anchor, class_id = divmod(int(score.argmax()), score.shape[1])
        box: Any = tuple(found.boxes[anchor].tolist())
        chosen += [Target(anchor, level, kind, class_id, box=box) for kind in kinds]
    return chosen


def chosen(detector: Detector) -> Settings:
    """Layers as they are chosen without --layer."""
    with torch.no_grad():
        return Settings(layer_of=detector.layer_of, early=detector.trunk.early(picture()[None]))


def run(
    detector: Detector, name: str, wanted: list[Target], layer_of: Callable[[Target], int] | None = None
) -> list[TargetMap]:
    x = picture()
    settings = chosen(detector) if layer_of is None else Settings(layer_of=layer_of)
    return solve(detector.values, METHODS[name]([Segment(x, x)], wanted, settings), detector.trunk.tap)


def hooked(detector: Any, target: Target, layer: int) -> tuple[np.ndarray, np.ndarray]:
    """Gradient and output (c, h, w) at a layer, from a backward pass through the whole network."""
    kept: list[Tensor] = []
    handle = detector.trunk.layers[layer].register_forward_hook(lambda *a: kept.append(a[2]))
    x = picture()[None].requires_grad_(True)
    value = detector.full_values(x, [(0, target)])[0]
    handle.remove()
    (gradient,) = torch.autograd.grad(value, kept[0])
    return gradient[0].double().numpy(), kept[0][0].detach().double().numpy()


def gradcam(g: np.ndarray, a: np.ndarray, target: Target, stride: float) -> np.ndarray:
    return sum(gk.mean() * ak for gk, ak in zip(g, a, strict=True))


def gradcam_plus(g: np.ndarray, a: np.ndarray, target: Target, stride: float) -> np.ndarray:
    """Equation 19 of the paper for every cell, on rectified activations."""
    a = np.maximum(a, 0)
    result = np.zeros(a.shape[1:])
    for gk, ak in zip(g, a, strict=True):
        alpha = [gi**2 / (2 * gi**2 + ak.sum() * gi**3) if gi else 0.0 for gi in gk.flat]
        result += sum(w * max(gi, 0.0) for w, gi in zip(alpha, gk.flat, strict=True)) * ak
    return result


def layercam(g: np.ndarray, a: np.ndarray, target: Target, stride: float) -> np.ndarray:
    return sum(np.maximum(gk, 0) * ak for gk, ak in zip(g, a, strict=True))


def odam(g: np.ndarray, a: np.ndarray, target: Target, stride: float) -> np.ndarray:
    left, top, right, bottom = target.box or (0.0,) * 4
    _, height, width = g.shape
    smooth = np.zeros_like(g)
    for y, x in np.ndindex(height, width):
        far_y, far_x = (np.arange(height) - y) * stride, (np.arange(width) - x) * stride
        down, across = np.exp(-18 * (far_y / (bottom - top)) ** 2), np.exp(-18 * (far_x / (right - left)) ** 2)
        kernel = np.outer(down, across)
        smooth[:, y, x] = (g * kernel).sum((1, 2)) / kernel.sum()
    return (smooth * a).sum(0)


LITERAL = {"gradcam": gradcam, "gradcam++": gradcam_plus, "layercam": layercam, "odam": odam}


def cells(found: TargetMap, count: int) -> np.ndarray:
    """The sums of `found` over the layer's cells, (count, count)."""
    return found.map.numpy().reshape(count, SIDE // count, count, SIDE // count).sum((1, 3))


def enlarged(values: np.ndarray) -> np.ndarray:
    """`values` (h, h) bilinearly on (SIDE, SIDE), written out; the same sum."""
    count = len(values)
    at = np.clip((np.arange(SIDE) + 0.5) * count / SIDE - 0.5, 0, count - 1)
    low = np.minimum(np.floor(at).astype(int), max(count - 2, 0))
    high, share = np.minimum(low + 1, count - 1), at - low
    rows = values[low] * (1 - share)[:, None] + values[high] * share[:, None]
    both = rows[:, low] * (1 - share) + rows[:, high] * share
    return both * (count / SIDE) ** 2


@pytest.mark.parametrize("name", LAYER_METHODS)
@pytest.mark.parametrize("layer", [None, 7])
def test_maps_are_their_formulas(detector: Detector, name: str, layer: int | None) -> None:
    wanted = targets(detector, "class")
    found = run(detector, name, wanted, layer and (lambda _: layer))
    assert [m.layer for m in found] == ([layer] * 3 if layer else list(BACKBONE if name == "layercam" else FEEDS))
    for target, ours in zip(wanted, found, strict=True):
        assert ours.layer is not None
        g, a = hooked(detector, target, ours.layer)
        assert np.abs(g).max() > 0
        theirs = enlarged(np.maximum(LITERAL[name](g, a, target, SIDE / a.shape[-1]), 0))
        assert np.linalg.norm(ours.map.numpy() - theirs) <= 1e-4 * np.linalg.norm(theirs)
        with torch.no_grad():
            value = detector.full_values(picture()[None], [(0, target)])
        assert ours.value_at_input == pytest.approx(float(value), abs=1e-4)
        assert ours.completeness_error is None and ours.value_at_baseline is None
        assert ours.evaluations == 1


def test_some_maps_say_something(detector: Detector) -> None:
    """Else the comparison above would be one of zeros."""
    for name in LAYER_METHODS:
        assert sum(float(m.map.sum()) > 0 for m in run(detector, name, targets(detector, "class"))) >= 2


@pytest.mark.parametrize("name", ["gradcam", "odam"])
def test_edges_keep_their_sign(detector: Detector, name: str) -> None:
    wanted = targets(detector, "left", "bottom")
    found = run(detector, name, wanted)
    for target, ours in zip(wanted, found, strict=True):
        assert ours.layer is not None
        g, a = hooked(detector, target, ours.layer)
        theirs = enlarged(LITERAL[name](g, a, target, SIDE / a.shape[-1]))
        assert np.linalg.norm(ours.map.numpy() - theirs) <= 1e-4 * np.linalg.norm(theirs)
    assert any(float(m.map.min()) < 0 < float(m.map.max()) for m in found)


def test_enlarging_keeps_the_sum(detector: Detector) -> None:
    for m in run(detector, "gradcam", targets(detector, "left")):
        assert m.layer is not None
        g, a = hooked(detector, m.target, m.layer)
        assert float(m.map.sum()) == pytest.approx(gradcam(g, a, m.target, 1.0).sum(), rel=1e-4)


def test_a_layer_that_the_prediction_does_not_read_gives_nothing_and_says_so(detector: Detector) -> None:
    fine, middle, coarse = run(detector, "layercam", targets(detector, "class"), lambda _: FEEDS[-1])
    for m in (fine, middle):
        assert not m.map.any()
        assert m.notes == (f"nothing at layer {FEEDS[-1]} speaks for it",)
    assert coarse.map.any() and not coarse.notes


def test_what_lies_below_the_layer_is_not_differentiated(detector: Detector) -> None:
    target = targets(detector, "class")[0]
    with detector.trunk.tap(FEEDS[0]) as tapped:
        value = detector.values(picture()[None], [(0, target)])
    assert len(tapped) == 1
    assert tapped[0].is_leaf and tapped[0].requires_grad
    assert value.requires_grad
    with detector.trunk.tap(99) as tapped, torch.no_grad():
        detector.predict(picture()[None])
    assert not tapped
    assert not detector.values(picture()[None], [(0, target)]).requires_grad


def test_neighbours_do_not_change_a_map(detector: Detector) -> None:
    wanted = targets(detector, "class")
    jobs = []
    for name in ("bag-01.jpg", "bag-02.jpg", "bag-03.jpg"):
        x = picture(name)
        for method in LAYER_METHODS:
            jobs.append((name + method, METHODS[method]([Segment(x, x)], wanted, chosen(detector))))
    together = dict(Engine(detector.values, torch.device("cpu"), tap=detector.trunk.tap).run(iter(jobs), 6))
    for method in LAYER_METHODS:
        alone = run(detector, method, wanted)
        for a, b in zip(alone, together["bag-01.jpg" + method], strict=True):
            assert torch.equal(a.map, b.map)
            assert a.value_at_input == b.value_at_input


def test_grad_cam_plus_stays_finite_where_activations_sum_to_its_pole() -> None:
    silent = torch.full((1, 4, 4), -0.125)  # a channel that SiLU leaves silent
    gradient = torch.ones(1, 4, 4)  # 2 + g Σ A = 0
    assert activation.gradcam_plus(gradient, silent, Target(0, 0), 8.0).tolist() == [[0.0] * 4] * 4


def explained(out: File) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in (out / "records.jsonl").read_text().splitlines()]
    return [a for r in records for d in r["detections"] for a in d["attributions"]]


def test_the_record_names_the_layer(tiny: File, pictures: File, tmp_path: File) -> None:
    common = (pictures / "a.png", "-m", tiny, "-o", tmp_path, "--max-det", 1, "--evidence", "none")
    assert explain(*common, "--method", ",".join(LAYER_METHODS)) == 0
    found = explained(tmp_path)
    assert [a["method"] for a in found] == list(LAYER_METHODS)
    for a in found:
        assert a["path"] in {f"layer {layer}" for layer in (BACKBONE if a["method"] == "layercam" else FEEDS)}
        assert a["baseline"] == "none"
        assert a["error_bound"] is a["converged"] is a["completeness_error"] is a["value_at_baseline"] is None
        assert (tmp_path / a["overlay"]).stat().st_size > 0
    assert found[1]["overlay"] == "a.png.d00.gradcam++.png"
    assert explain(*common, "--method", "odam", "--layer", 7) == 0
    assert [a["path"] for a in explained(tmp_path)] == ["layer 7"]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("--method", "layercam", "--target", "class,left"), "an edge has no up"),
        (("--method", "gradcam++", "--target", "box"), "an edge has no up"),
        (("--method", "odam", "--layer", 22), "no such layer"),
        (("--method", "odam", "--layer", "-1"), "greater than or equal to 0"),
    ],
)
def test_what_makes_no_sense_is_refused(
    tiny: File,
    pictures: File,
    tmp_path: File,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[object, ...],
    reason: str,
) -> None:
    assert explain(pictures, "-m", tiny, "-o", tmp_path / "out", *arguments) == 2
    assert reason in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out" / "records.jsonl").exists()
