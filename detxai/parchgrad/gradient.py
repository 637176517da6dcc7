"""ParchGrad: a backward pass in which the channels that matter are not swamped by the many that do not.

Park, Jeon & Choi (2023), "ParchGrad: Controlled Internal Gradients for Reliable Saliency Map". At the output of a
convolution the channels of the gradient are split into H (kept) and L (pruned) and rescaled, so that what they send on
stands in a wanted ratio γ. M and N are the variances over positions of the gradient's sum over H and over L:

    ĝ = γ sqrt(N / M),  β = sqrt((M + N) / (M ĝ² + N)),  H times ĝ β, L times β

or, written out, H times a sqrt((M + N) / M) and L times b sqrt((M + N) / N) with a = γ b, b = 1 / sqrt(γ² + 1); for
γ = ∞ that is a = 1, b = 0. What comes of it is no derivative of F: its integral promises no completeness.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import accumulate, pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn

from detxai.attribution.points import Ask, Asked, Point, Reply, TargetMap
from detxai.values import Target

#: `on`: M + N stays. `off`: ĝ without β. `exact`: the variance of the sum over all channels stays, the covariance of H
#: and L included.
Variance = Literal["on", "off", "exact"]


def modified(gradient: Tensor, kept: Tensor, gamma: float = math.inf, variance: Variance = "on") -> Tensor:
    """ParchGrad's gradient at the output of a convolution, in shape and dtype of `gradient` (batch, channels, h, w).

    `kept` (batch, channels) bool: H of each sample. A sample keeps its gradient where H is empty, or where M (for a
    finite γ: or N) is zero, so that there is no ratio to set. All samples at once, without a branch on their values.
    """
    groups = torch.stack([kept, ~kept], -1).float()
    flat = gradient.permute(0, 2, 3, 1).flatten(1, 2).float()
    high, low = torch.bmm(flat, groups).unbind(-1)
    # Squares of small gradients would underflow, and only ratios count.
    largest = torch.maximum(high.abs().amax(1), low.abs().amax(1)).clamp_min(torch.finfo(torch.float32).tiny)
    high, low = high / largest[:, None], low / largest[:, None]
    m, n = _spread(high), _spread(low)
    up, down = _factors(m, n, gamma, conserve=variance != "off")
    if variance == "exact":
        now = high * up[:, None] + low * down[:, None]
        balance = _ratio(_spread(high + low), _spread(now))
        balance = balance if high.shape[1] == 1 else balance.sqrt()
        up, down = up * balance, down * balance
    usable = kept.any(1) & (m > 0) & (math.isinf(gamma) | (n > 0))
    factors = torch.where(kept, up[:, None], down[:, None])
    factors = torch.where(usable[:, None], factors, 1.0)
    return (gradient * factors[:, :, None, None]).to(gradient.dtype)


def _factors(m: Tensor, n: Tensor, gamma: float, *, conserve: bool) -> tuple[Tensor, Tensor]:
    """What H and L are multiplied by, (batch,) each."""
    if not conserve:
        ratio = torch.ones_like(m) if math.isinf(gamma) else gamma * _ratio(n, m).sqrt()
        return ratio, torch.full_like(n, 0.0 if math.isinf(gamma) else 1.0)
    share = 0.0 if math.isinf(gamma) else 1 / math.hypot(gamma, 1)
    high, low = (1.0, 0.0) if math.isinf(gamma) else (gamma * share, share)
    return high * _ratio(m + n, m).sqrt(), low * _ratio(m + n, n).sqrt()


def _spread(sums: Tensor) -> Tensor:
    """(batch,) variance of sums (batch, positions); of a single position the absolute value."""
    return sums.abs().squeeze(1) if sums.shape[1] == 1 else sums.var(1, correction=0)


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    """a / b; 1 where b is zero, for samples that do not use it."""
    return torch.where(b > 0, a / torch.where(b > 0, b, 1.0), 1.0)


class ParchGrad:
    """Turns the backward pass of a batch into ParchGrad's at the outputs of `convolutions`.

    `keep` before each backward pass says which channels of all convolutions, one after the other, are kept. While
    `whole` is open they run on their whole maps, over which variances are taken.
    """

    def __init__(
        self,
        convolutions: Sequence[nn.Conv2d],
        gamma: float = math.inf,
        variance: Variance = "on",
        whole: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
    ) -> None:
        self.convolutions, self.gamma, self.variance, self.whole = tuple(convolutions), gamma, variance, whole
        ends = accumulate((conv.out_channels for conv in self.convolutions), initial=0)
        self.spans = [slice(a, b) for a, b in pairwise(ends)]
        self._kept: Tensor | None = None

    def keep(self, channels: Sequence[Tensor]) -> None:
        """`channels`: for each row of the batch (total channels,) bool."""
        self._kept = torch.stack(list(channels))

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Forward passes in here have their backward passes modified."""
        handles = [
            conv.register_forward_hook(partial(self._attach, span))
            for conv, span in zip(self.convolutions, self.spans, strict=True)
        ]
        try:
            with self.whole():
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _attach(self, span: slice, _conv: nn.Module, _inputs: Any, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(partial(self._modify, span))

    def _modify(self, span: slice, gradient: Tensor) -> Tensor:
        assert self._kept is not None
        return modified(gradient, self._kept[:, span], self.gamma, self.variance)


def with_channels(ask: Ask, kept: Mapping[Target, Tensor]) -> Ask:
    """The coroutine `ask` with ParchGrad's gradients in place of its own; `kept`: target -> its channels."""
    try:
        asked = next(ask)
        while True:
            told: Asked = [_with_channels(p, kept) if isinstance(p, Point) else p for p in asked]
            replies: list[Reply] = yield told
            asked = ask.send(replies)
    except StopIteration as stop:
        maps: list[TargetMap] = stop.value
        return maps


def _with_channels(point: Point, kept: Mapping[Target, Tensor]) -> Point:
    return replace(point, channels=tuple(kept[t] for t in point.targets)) if point.gradient else point
