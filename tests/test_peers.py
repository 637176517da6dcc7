"""Other people's implementations of the same methods, on the same network and prediction: maps agree to 1e-4."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path as File
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SIDE, pixels
from families import FAMILIES, network
from torch import Tensor, nn

from detxai.attribution.engine import solve
from detxai.attribution.methods import METHODS, SAMPLES, SMOOTHGRAD_SIGMA, Settings
from detxai.attribution.points import Segment
from detxai.models import checkpoints, detectors
from detxai.models.detector import Detector
from detxai.values import Checkpoint, Target

#: Relative distance in L2 below which two maps are the same.
SAME = 1e-4


class Pinned(nn.Module):
    """What the peers explain: the pinned scalar of every row, (batch, 1), through the whole network."""

    def __init__(self, detector: Detector, target: Target) -> None:
        super().__init__()
        self.detector, self.network, self.target = detector, detector.module, target

    def forward(self, x: Tensor) -> Tensor:
        return self.detector.full_values(x, [(row, self.target) for row in range(len(x))])[:, None]


def picture(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.from_numpy(pixels("bag-01.jpg", (SIDE, SIDE)).copy()).permute(2, 0, 1).to(dtype) / 255


def strongest(detector: Detector, level: int, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> Target:
    with torch.no_grad():
        found = detector.predict(picture(dtype)[None])[0]
    score = found.logits.masked_fill((found.levels != level)[:, None], -math.inf)
    anchor, class_id = divmod(int(score.argmax()), score.shape[1])
    left, top, right, bottom = found.boxes[anchor].tolist()
    return Target(anchor, level, "class", class_id, scale=scale, box=(left, top, right, bottom))


def ours(
    detector: Detector,
    name: str,
    target: Target,
    settings: Settings | None = None,
    dtype: torch.dtype = torch.float32,
) -> np.ndarray[Any, Any]:
    x = picture(dtype)
    (found,) = solve(
        detector.values, METHODS[name]([Segment(x, x)], [target], settings or Settings()), detector.trunk.tap
    )
    return np.asarray(found.map)


def distance(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


@pytest.fixture(scope="module")
def detector(tiny: File) -> Detector:
    return detectors.build(checkpoints.load(str(tiny)))


@pytest.fixture(scope="module")
def doubled(tiny: File) -> Detector:
    """The same in float64.

    A gradient jumps where two cells under a maximum are equal. In float32 rounding decides between them, once in some
    noisy pictures and differently in batches of another size; in float64 we and a peer see the same one win.
    """
    found: Any = detectors.build(checkpoints.load(str(tiny)))
    found.module.double()
    for part in (*found.class_heads, *found.box_heads):  # they are given float32
        part.register_forward_pre_hook(lambda _, inputs: (inputs[0].double(),))
    return found


@pytest.mark.parametrize("level", [0, 1, 2])
@pytest.mark.parametrize("name", ["grad", "inputxgrad", "smoothgrad"])
def test_captum(doubled: Detector, name: str, level: int, monkeypatch: pytest.MonkeyPatch) -> None:
    attr = pytest.importorskip("captum.attr")
    target = strongest(doubled, level, dtype=torch.float64)
    model, x = Pinned(doubled, target), picture(torch.float64)[None].requires_grad_(True)
    if name == "grad":
        theirs = attr.Saliency(model).attribute(x, abs=False)
    elif name == "inputxgrad":
        theirs = attr.InputXGradient(model).attribute(x)
    else:
        generator = torch.Generator().manual_seed(7)  # the same noise, drawn as we draw it
        noise = torch.stack([torch.randn(x.shape[1:], generator=generator) for _ in range(SAMPLES)])
        monkeypatch.setattr(torch, "normal", lambda mean, std: mean + std * noise)
        tunnel = attr.NoiseTunnel(attr.Saliency(model))
        theirs = tunnel.attribute(x, nt_type="smoothgrad", nt_samples=SAMPLES, stdevs=SMOOTHGRAD_SIGMA, abs=False)
    found = ours(doubled, name, target, Settings(seed=7), torch.float64)
    assert distance(found, theirs[0].sum(0).detach().numpy()) < SAME


@pytest.fixture(scope="module")
def rectified() -> Detector:
    """A YOLOv6, whose activations are ReLU's."""
    module = network(FAMILIES["v6"])
    return detectors.build(Checkpoint("v6", "0" * 64, "ultralytics", module, "v6", module.names, SIDE))


@pytest.fixture
def grad_cam(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Detector, Target, int], np.ndarray[Any, Any]]:
    """pytorch-grad-cam's map of a layer, enlarged as it does, but not stretched to [0, 1]."""
    package = pytest.importorskip("pytorch_grad_cam")
    import cv2

    def enlarged(cams: np.ndarray[Any, Any], size: tuple[int, int] | None = None) -> np.ndarray[Any, Any]:
        return cams if size is None else np.stack([cv2.resize(np.float32(cam), size) for cam in cams])

    monkeypatch.setattr(package.base_cam, "scale_cam_image", enlarged)

    def run(name: str, detector: Detector, target: Target, layer: int) -> np.ndarray[Any, Any]:
        with getattr(package, name)(Pinned(detector, target), [detector.trunk.layers[layer]]) as cam:
            found = cam(picture()[None].requires_grad_(True), targets=[lambda row: row[0]])[0]
        with torch.no_grad(), detector.trunk.tap(layer) as outputs:
            detector.predict(picture()[None])
        return np.asarray(found) * (outputs[0][0, 0].numel() / SIDE**2)  # ours keeps the sum of the cells

    return run


@pytest.mark.parametrize("layer", [None, 4, 9])
@pytest.mark.parametrize("level", [0, 1, 2])
@pytest.mark.parametrize(("name", "theirs"), [("gradcam", "GradCAM"), ("layercam", "LayerCAM")])
def test_pytorch_grad_cam(
    detector: Detector, name: str, theirs: str, level: int, layer: int | None, grad_cam: Callable[..., Any]
) -> None:
    target = strongest(detector, level)
    at = detector.layer_of(target) if layer is None else layer
    expected = grad_cam(theirs, detector, target, at)
    found = ours(detector, name, target, Settings(layer_of=lambda _: at))
    assert expected.any()
    assert distance(found, expected) < SAME


@pytest.mark.parametrize("level", [0, 1, 2])
def test_pytorch_grad_cam_plus_plus(rectified: Detector, level: int, grad_cam: Callable[..., Any]) -> None:
    """Where activations are not negative, as the paper assumes, and gradients not as small as the peer's 1e-6.

    Of SiLU's negative activations the peer takes the sum, and so may divide by zero; we rectify them.
    """
    target = strongest(rectified, level, scale=1000.0)
    layer = rectified.layer_of(target)
    expected = grad_cam("GradCAMPlusPlus", rectified, target, layer)
    found = ours(rectified, "gradcam++", target, Settings(layer_of=lambda _: layer))
    assert expected.any()
    assert distance(found, expected) < SAME
