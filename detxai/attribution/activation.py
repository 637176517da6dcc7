"""Activation maps: the channels of one layer, weighted by the gradient of the target at that layer.

What lies below the layer is never differentiated: one forward, and a short backward a target. The map of (h, w) cells
is enlarged to the letterbox with its sum kept. It is not signed (but for box edges, which have no "against"), promises
no sum, and shows where the layer responds, as sharply as its cells allow.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from detxai.attribution.points import Ask, Point, Segment, TargetMap
from detxai.values import Target
from detxai.vocabulary import EDGES

#: Gradient and activation (c, h, w) of a target -> weighted activation, summed over channels (h, w).
Weighing = Callable[[Tensor, Tensor, Target, float], Tensor]
#: Standard deviations of ODAM's Gaussian across the box.
ODAM_SPAN = 6.0


def gradcam(gradient: Tensor, activation: Tensor, target: Target, stride: float) -> Tensor:
    """Grad-CAM (Selvaraju et al. 2017, arXiv:1610.02391): a channel's weight is its mean gradient."""
    return (gradient.mean((1, 2), keepdim=True) * activation).sum(0)


def gradcam_plus(gradient: Tensor, activation: Tensor, target: Target, stride: float) -> Tensor:
    """Grad-CAM++ (Chattopadhay et al. 2018, arXiv:1710.11063): a cell's gradient g > 0 counts with 1 / (2 + g Σ A).

    The formula takes a ReLU's activation A ≥ 0. With SiLU's it would pass through its pole, so negative ones are cut.
    """
    activation = activation.clamp(min=0)
    share = 1 / (2 + gradient * activation.sum((1, 2), keepdim=True))
    weight = (share * gradient.clamp(min=0)).sum((1, 2), keepdim=True)
    return (weight * activation).sum(0)


def layercam(gradient: Tensor, activation: Tensor, target: Target, stride: float) -> Tensor:
    """LayerCAM (Jiang et al. 2021, doi:10.1109/TIP.2021.3089943): every cell counts with its own positive gradient."""
    return (gradient.clamp(min=0) * activation).sum(0)


def odam(gradient: Tensor, activation: Tensor, target: Target, stride: float) -> Tensor:
    """ODAM (Zhao & Chan 2023, arXiv:2304.06354): gradient ⊙ activation, the gradient smoothed to the object's size.

    The Gaussian is as wide as the target's box, `ODAM_SPAN` standard deviations from edge to edge.
    """
    if target.box is None:
        raise ValueError("odam needs the box of its target.")
    left, top, right, bottom = target.box
    across = _gaussian(gradient.shape[2], (right - left) / stride / ODAM_SPAN).to(gradient)
    down = _gaussian(gradient.shape[1], (bottom - top) / stride / ODAM_SPAN).to(gradient)
    return ((down @ gradient @ across.T) * activation).sum(0)


def _gaussian(cells: int, sigma: float) -> Tensor:
    """(cells, cells): the rows weigh all cells by their distance; sum 1, so borders lose nothing."""
    at = torch.arange(cells, dtype=torch.float64)
    return torch.softmax(-((at[:, None] - at) ** 2) / (2 * max(sigma, 1e-3) ** 2), 1)


def activation_maps(
    path: Segment,
    targets: Sequence[Target],
    weigh: Weighing,
    layers: Sequence[int],
    dtype: torch.dtype = torch.float32,
) -> Ask:
    """Coroutine: maps of `targets`, each at its own of `layers`; targets that share one share the forward."""
    rows, columns = path.shape

    def combine(gradient: Tensor, activation: Tensor, target: Target) -> Tensor:
        cells = weigh(gradient, activation, target, columns / activation.shape[-1])
        if target.kind not in EDGES:
            cells = cells.clamp(min=0)
        large = interpolate(cells[None, None], size=(rows, columns), mode="bilinear", align_corners=False)
        return large[0, 0] * (cells.numel() / (rows * columns))

    groups = {layer: [k for k, own in enumerate(layers) if own == layer] for layer in layers}
    replies = yield [
        Point(path, 1.0, tuple(targets[k] for k in ks), dtype=dtype, layer=layer, combine=combine)
        for layer, ks in groups.items()
    ]
    told = {
        k: (reply.product(row), reply.values[row])
        for ks, reply in zip(groups.values(), replies, strict=True)
        for row, k in enumerate(ks)
    }
    speaks = dict(zip(told, torch.stack([product.any() for product, _ in told.values()]).tolist(), strict=True))
    return [
        TargetMap(
            target,
            told[k][0].double(),
            told[k][1],
            None,
            1,
            dtype=dtype,
            layer=layers[k],
            notes=() if speaks[k] else (f"nothing at layer {layers[k]} speaks for it",),
        )
        for k, target in enumerate(targets)
    ]
