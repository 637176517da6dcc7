"""Networks that were tampered with: a map that does not mind shows something else than the network.

Adebayo et al. 2018 ("Sanity checks for saliency maps", arXiv:1810.03292): with weights randomised from the output
down, and for another class, an attribution must change; under a little noise it must not.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from detxai.models.detector import Detector, Differentiable
from detxai.values import InputShape

#: Shares of the layers below the head that are randomised with it, counted from the head.
CASCADE = (0.0, 0.25, 0.5, 0.75, 1.0)
#: Standard deviation of the noise of a stability test, in units of the full range [0, 1]: two and a half grey levels.
NOISE = 0.01


def randomised(detector: Differentiable, share: float, seed: int) -> Differentiable:
    """A copy of `detector` with shuffled weights in its head and in the last `share` of the layers below.

    Shuffled within each tensor, not drawn anew: the network keeps the scale of its activations, and loses what it
    learned.
    """
    result = copy.deepcopy(detector)
    weighted = [m for m in result.module.modules() if any(True for _ in m.parameters(recurse=False))]
    trunk = {id(m) for layer in result.trunk.layers for m in layer.modules()}
    below = [m for m in weighted if id(m) in trunk]
    head = [m for m in weighted if id(m) not in trunk]
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in [*below[len(below) - math.ceil(share * len(below)) :], *head]:
            for weights in layer.parameters(recurse=False):
                order = torch.randperm(weights.numel(), generator=generator).to(weights.device)
                weights.copy_(weights.flatten()[order].view_as(weights))
    return result


def noisy(detector: Differentiable, shape: InputShape, seed: int) -> Differentiable:
    """A copy of `detector` that sees seeded noise on top of every picture of `shape` (rows, columns)."""
    result = copy.deepcopy(detector)
    first = next(m for m in result.module.modules() if isinstance(m, nn.Conv2d))
    noise = NOISE * torch.randn(detector.info.channels, *shape, generator=torch.Generator().manual_seed(seed))

    def add(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return inputs[0] + noise.to(inputs[0]), *inputs[1:]

    first.register_forward_pre_hook(add)
    return result


class Reporting:
    """The network `other`, which reports the predictions of the `original`: the same ones are explained."""

    def __init__(self, other: Differentiable, original: Detector) -> None:
        self.info, self.module, self.trunk = other.info, other.module, other.trunk
        self.values, self.entered, self.full_values = other.values, other.entered, other.full_values
        self.scores, self.layer_of, self.in_precision = other.scores, other.layer_of, other.in_precision
        self.address, self.pinned = other.address, other.pinned
        self.predict = original.predict


def cascade(detector: Differentiable, seed: int) -> Iterator[tuple[float, Differentiable]]:
    """(share of the layers below the head, detector randomised so far), from the head alone to the whole network."""
    for share in CASCADE:
        yield share, randomised(detector, share, seed)
