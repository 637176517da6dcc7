"""A network below its head by kernels of our own, where they make of it what torch makes of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from detxai.models import kernels
from detxai.models.kernels import bias_silu, max_pool
from detxai.models.trunk import Trunk

#: Windows of pools, whose cells have numbers of a byte.
SIZES = (3, 5, 7, 9)
#: Rows and columns of a noise picture on which a network is compared with itself, and by how much it may differ.
NOISE, CLOSE = 128, 0.1


@torch.no_grad()
def fuse_kernels(trunk: Trunk, like: Tensor) -> str:
    """Let what can of a frozen, fused `trunk` run by kernels of our own, in place; `like` a tensor of its parameters'.

    Returns why it goes on as it was, if so: no Triton, nothing that compiles for it, other numbers than torch's.
    """
    if not kernels.KNOWN:
        return "there is no Triton"
    noise = torch.rand(1, trunk.channels, NOISE, NOISE, generator=torch.Generator().manual_seed(0)).to(like)
    noise, last = noise.contiguous(memory_format=torch.channels_last), len(trunk.layers) - 1
    changed: list[tuple[Any, Any]] = []
    try:
        _check(like)
        before = trunk(noise, [last])[last]
        for part, forward in _own_kernels(trunk.layers):
            changed.append((part, part.__dict__.get("forward")))
            part.forward = forward
        if (trunk(noise, [last])[last] - before).norm() <= CLOSE * before.norm():  # so that NaN differs
            return ""
        refused = "the network says something else with them"
    except Exception as error:  # noqa: BLE001  (no C compiler, a cache that is read-only, an old driver)
        refused = f"{type(error).__name__}: {(str(error) or 'no more was said').splitlines()[0]:.200}"
    for part, forward in changed:
        part.__dict__.pop("forward")
        if forward is not None:
            part.forward = forward
    return refused


def _own_kernels(layers: Iterable[nn.Module]) -> list[tuple[Any, Callable[..., Tensor]]]:
    """The parts that can run by these kernels, and how."""
    from ultralytics.nn.modules.block import Bottleneck, C2f

    parts: list[tuple[Any, Callable[..., Tensor]]] = []
    part: Any
    for part in (part for layer in layers for part in layer.modules()):
        if _is_fusible(part):
            parts.append((part, partial(_convolved, part)))
        elif type(part) is Bottleneck and part.add and _is_fusible(part.cv2):
            parts.append((part, partial(_shortcut, part)))
        elif type(part).forward is C2f.forward and _is_fusible(part.cv1):
            parts.append((part, partial(_split, part)))
        elif isinstance(part, nn.MaxPool2d) and part.kernel_size in SIZES and _same(part):
            parts.append((part, partial(max_pool, size=part.kernel_size)))
    return parts


def _is_fusible(part: Any) -> bool:
    """Whether `part` is a convolution with a bias and SiLU, and nothing else."""
    from ultralytics.nn.modules.conv import Conv

    whole = isinstance(part, Conv) and not hasattr(part, "bn")
    plain = whole and part.conv.bias is not None and part.conv.padding_mode == "zeros"
    return plain and type(part.act) is nn.SiLU


def _same(pool: Any) -> bool:
    """Whether a map and its pooled one are of one size, a window around each cell."""
    return (pool.stride, pool.padding, pool.dilation, pool.ceil_mode) == (1, pool.kernel_size // 2, 1, False)


def _activated(part: Any, x: Tensor, residual: Tensor | None = None, parts: int = 1) -> tuple[Tensor, ...]:
    c = part.conv
    y = nn.functional.conv2d(x, c.weight, None, c.stride, c.padding, c.dilation, c.groups)
    return bias_silu(y, c.bias, residual, parts)


def _convolved(part: Any, x: Tensor) -> Tensor:
    return _activated(part, x)[0]


def _shortcut(block: Any, x: Tensor) -> Tensor:
    return _activated(block.cv2, block.cv1(x), x)[0]


def _split(block: Any, x: Tensor) -> Tensor:
    parts = list(_activated(block.cv1, x, parts=2))
    for inner in block.m:
        parts.append(inner(parts[-1]))
    return block.cv2(torch.cat(parts, 1))  # type: ignore[no-any-return]


def _check(like: Tensor) -> None:
    """See that values and gradients are torch's in float32 but for rounding. Raises ValueError, or what Triton does."""
    for channels in (16, 24, 32, 64):
        seeded = torch.Generator().manual_seed(channels)
        y, wide, wider = (
            torch.randn(2, k * channels, 9, 7, generator=seeded).to(like).contiguous(memory_format=torch.channels_last)
            for k in (1, 2, 3)
        )
        given = y, wide[:, channels:], torch.randn(channels, generator=seeded).to(like)
        gradient = wider[:, channels : 2 * channels]
        ours, torchs = (
            _answers(work, [x.to(dtype) for x in given], gradient.to(dtype))
            for work, dtype in ((_by_kernels, like.dtype), (_by_torch, torch.float32))
        )
        for a, b in zip(ours, torchs, strict=True):
            if not (a - b).abs().max() <= 16 * torch.finfo(like.dtype).eps * b.abs().max():  # so that NaN differs
                raise ValueError(f"wrong numbers with {channels} channels")


@torch.enable_grad()
def _answers(work: Callable[..., Tensor], given: Sequence[Tensor], gradient: Tensor) -> list[Tensor]:
    """What `work` makes of y, residual and bias, and its gradients in y and residual."""
    y, residual, bias = given
    leaves = [x.detach().requires_grad_() for x in (y, residual)]
    out = work(*leaves, bias)
    return [out.detach(), *torch.autograd.grad(out, leaves, gradient)]


def _by_kernels(y: Tensor, residual: Tensor, bias: Tensor) -> Tensor:
    split, whole = torch.cat(bias_silu(y, bias, parts=2), 1), bias_silu(y, bias, residual)[0]
    return split + whole + max_pool(residual, 5)


def _by_torch(y: Tensor, residual: Tensor, bias: Tensor) -> Tensor:
    return 2 * nn.functional.silu(y + bias[:, None, None]) + residual + nn.functional.max_pool2d(residual, 5, 1, 2)
