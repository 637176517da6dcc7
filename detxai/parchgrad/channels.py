"""Which channels ParchGrad keeps: by class, or because this picture moves them, against statistics of a calibration.

A channel is measured by its global average pool (GAP): the mean of the rectified output of its convolution over a box.
Statistics are those of `detxai calibrate parchgrad`; convolutions stand one after the other in all (…, channels).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn

from detxai.values import InputShape

#: Samples of a class, and of the rest, below which there is nothing to test.
FEWEST = 3
#: The narrowest box that is pooled over, in cells of a feature map.
NARROWEST = 1e-3


@dataclass(frozen=True, eq=False)
class Statistics:
    """What a calibration knows of the GAPs over one kind of box, float32 but for `count`.

    count: (classes,) int64 samples of each class; welch_t, welch_p: (classes, channels) one-sided Welch test that a
    channel's GAP is larger for the class than for the rest (0 and 1 where there is nothing to test); shapiro_p:
    (channels,) Shapiro–Wilk test that the GAP is normally distributed; mean, std: (channels,).
    """

    count: Tensor
    welch_t: Tensor
    welch_p: Tensor
    shapiro_p: Tensor
    mean: Tensor
    std: Tensor

    def to(self, device: torch.device) -> Statistics:
        """The same on `device`."""
        return Statistics(*(getattr(self, f.name).to(device) for f in fields(self)))

    def upper(self, start: int) -> Statistics:
        """The same without the first `start` channels."""
        return Statistics(self.count, *(getattr(self, f.name)[..., start:] for f in fields(self)[1:]))


@dataclass(frozen=True)
class Choice:
    """How channels are chosen: tests at the level `alpha`, or, if given, the top `quantile` of each convolution.

    `normality`: Shapiro–Wilk p below which a channel counts as not normally distributed.
    """

    alpha: float = 0.05
    quantile: float | None = None
    normality: float = 0.05

    def of_class(self, statistics: Statistics, class_id: int, widths: Sequence[int]) -> Tensor:
        """(channels,) bool: those with larger GAPs for the class that are not normally distributed.

        `widths`: channels of each convolution. All False for a class without enough samples.
        """
        t, p = statistics.welch_t[class_id], statistics.welch_p[class_id]
        passed = p <= self.alpha if self.quantile is None else _top(t, self.quantile, widths)
        return passed & (p < 1) & (statistics.shapiro_p < self.normality)

    def of_instance(self, statistics: Statistics, gap: Tensor, widths: Sequence[int]) -> Tensor:
        """(channels,) bool: those whose `gap` (channels,) is above the calibration's, by a one-sided z-test."""
        spread = statistics.std > 0
        z = (gap - statistics.mean) / torch.where(spread, statistics.std, 1.0)
        z = torch.where(spread, z, -torch.inf)
        level = float(torch.special.ndtri(torch.tensor(1 - self.alpha, dtype=torch.float64)))
        passed = z.double() >= level if self.quantile is None else _top(z, self.quantile, widths)
        return passed & spread


def _top(values: Tensor, share: float, widths: Sequence[int]) -> Tensor:
    """(channels,) bool: in each convolution the `share` of channels with the largest values, one at least."""
    parts = []
    for part in values.split(list(widths)):
        lowest = part.topk(max(1, round(share * len(part)))).values[-1]
        parts.append(part >= lowest)
    return torch.cat(parts)


def first(count: int, ratio: float) -> int:
    """The index of the first of `count` convolutions in their upper `ratio`; one is always in it."""
    return count - max(1, round(ratio * count))


def in_order(convolutions: Mapping[str, nn.Conv2d], run: Callable[[], object]) -> dict[str, nn.Conv2d]:
    """Those of `convolutions` that `run` runs, in the order it does."""
    names = list(convolutions)
    with outputs(list(convolutions.values())) as seen:
        run()
    return {names[i]: convolutions[names[i]] for i in seen if seen[i].dim() == 4}


@contextlib.contextmanager
def outputs(convolutions: Sequence[nn.Conv2d]) -> Iterator[dict[int, Tensor]]:
    """What `convolutions` put out while entered, by index and in the order they ran: (batch, channels, h, w)."""
    seen: dict[int, Tensor] = {}

    def keep(index: int, output: Tensor) -> None:
        seen[index] = output.detach()

    handles = [
        conv.register_forward_hook(lambda _conv, _inputs, output, i=i: keep(i, output))
        for i, conv in enumerate(convolutions)
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def gap(features: Sequence[Tensor], boxes: Tensor, shape: InputShape) -> Tensor:
    """(n, total channels) float32: means of rectified `features` (each (channels, h, w)) over `boxes`.

    boxes: (n, 4) xyxy pixels of the input of `shape` (rows, columns); a cell that a border cuts counts by its area.
    """
    pooled = []
    for feature in features:
        height, width = feature.shape[-2:]
        down, across = height / shape[0], width / shape[1]
        rows = _weights(boxes[:, 1] * down, boxes[:, 3] * down, height)
        cols = _weights(boxes[:, 0] * across, boxes[:, 2] * across, width)
        pooled.append(torch.einsum("chw,nh,nw->nc", feature.float().relu(), rows, cols))
    return torch.cat(pooled, 1)


def _weights(start: Tensor, end: Tensor, count: int) -> Tensor:
    """(n, count): the share of the interval [start, end] in each of `count` cells of length 1; rows sum to 1."""
    start = start.clamp(0, count - NARROWEST)
    end = torch.maximum(end.clamp(max=count), start + NARROWEST)
    cells = torch.arange(count, device=start.device, dtype=start.dtype)
    shared = torch.minimum(end[:, None], cells + 1) - torch.maximum(start[:, None], cells)
    shared = shared.clamp(min=0)
    return shared / shared.sum(1, keepdim=True)
