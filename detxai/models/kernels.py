"""Kernels for a GPU that waits for its memory, not for its arithmetic: one pass where torch makes several.

A convolution's bias, SiLU and the addition of what a block began with are one pass over its output; what is split
behind them comes in parts that no convolution has to copy; of a pooled map the place of each maximum is kept in a byte,
and its gradient fetched by the cells that it goes to, in the same order each time. Numbers are rounded where torch
rounds them. Written in Triton, which comes with torch where there is CUDA.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # a build of torch for the CPU
    triton = None

#: Whether there are any.
KNOWN = triton is not None
#: Numbers that a program of a kernel works at, and channels of them at most.
BLOCK, WIDEST = 1024, 64

if KNOWN:

    @triton.jit
    def _at(row, c, stride):
        return row.to(tl.int64)[:, None] * stride + c[None, :]

    @triton.jit
    def _block(rows, channels, R: tl.constexpr, C: tl.constexpr):
        """The rows and channels that a program works at, and where there are any."""
        row, c = tl.program_id(0) * R + tl.arange(0, R), tl.program_id(1) * C + tl.arange(0, C)
        return row, c, (row < rows)[:, None] & (c < channels)[None, :]

    @triton.jit
    def _neighbour(row, dy, dx, height, width):
        """The cell so far from that of each row, and whether there is one in the map."""
        across, down = row % width + dx, (row // width) % height + dy
        return row + dy * width + dx, ((down >= 0) & (down < height) & (across >= 0) & (across < width))[:, None]

    @triton.jit
    def _biased(y, bias, row, c, stride, inside, channels):
        x = tl.load(y + _at(row, c, stride), inside, 0.0).to(tl.float32)
        x += tl.load(bias + c, c < channels, 0.0).to(tl.float32)[None, :]
        return x.to(y.dtype.element_ty).to(tl.float32)

    @triton.jit
    def _silu(out, y, residual, to, of, by, bias, rows, channels, ADD: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
        """out = silu(y + bias) + residual; `to`, `of` and `by`: how far their rows are apart."""
        row, c, inside = _block(rows, channels, R, C)
        x = _biased(y, bias, row, c, of, inside, channels)
        s = x / (1 + tl.exp(-x))
        if ADD:
            s = s.to(y.dtype.element_ty).to(tl.float32)
            s += tl.load(residual + _at(row, c, by), inside, 0.0).to(tl.float32)
        tl.store(out + _at(row, c, to), s.to(out.dtype.element_ty), inside)

    @triton.jit
    def _silu_backward(out, y, gradient, to, of, by, bias, rows, channels, R: tl.constexpr, C: tl.constexpr):
        """out = the gradient in y of silu(y + bias)."""
        row, c, inside = _block(rows, channels, R, C)
        x = _biased(y, bias, row, c, of, inside, channels)
        g = tl.load(gradient + _at(row, c, by), inside, 0.0).to(tl.float32)
        s = 1 / (1 + tl.exp(-x))
        tl.store(out + _at(row, c, to), (g * s * (1 + x * (1 - s))).to(out.dtype.element_ty), inside)

    @triton.jit
    def _pool(
        out, where, x, to, at, of, height, width, rows, channels, K: tl.constexpr, R: tl.constexpr, C: tl.constexpr
    ):
        """out = the maxima of K × K windows around each cell, `where`: the number of the first in its window."""
        row, c, inside = _block(rows, channels, R, C)
        most, number = tl.full((R, C), float("-inf"), tl.float32), tl.full((R, C), 0, tl.int8)
        for k in tl.static_range(K * K):
            there, known = _neighbour(row, k // K - K // 2, k % K - K // 2, height, width)
            own = inside & known
            here = tl.load(x + _at(there, c, of), own, float("-inf")).to(tl.float32)
            larger = own & ((here > most) | (here != here))
            most, number = tl.where(larger, here, most), tl.where(larger, k, number).to(tl.int8)
        tl.store(out + _at(row, c, to), most.to(out.dtype.element_ty), inside)
        tl.store(where + _at(row, c, at), number, inside)

    @triton.jit
    def _pool_backward(
        out,
        where,
        gradient,
        to,
        at,
        by,
        height,
        width,
        rows,
        channels,
        K: tl.constexpr,
        R: tl.constexpr,
        C: tl.constexpr,
    ):
        """out = of every cell the sum of the gradients of the windows whose maximum it is."""
        row, c, inside = _block(rows, channels, R, C)
        total = tl.full((R, C), 0.0, tl.float32)
        for k in tl.static_range(K * K):
            there, known = _neighbour(row, K // 2 - k // K, K // 2 - k % K, height, width)
            own = inside & known
            number = tl.load(where + _at(there, c, at), own, -1)
            g = tl.load(gradient + _at(there, c, by), own, 0.0).to(tl.float32)
            total += tl.where(number == k, g, 0.0)
        tl.store(out + _at(row, c, to), total.to(out.dtype.element_ty), inside)


def _run(kernel: Any, maps: tuple[Tensor, Tensor, Tensor], *of: Any, **constants: Any) -> None:
    """`kernel` over all cells of three `maps` (n, channels, height, width); those that it writes are channels last."""
    tables = [_rows(x) for x in maps]
    rows, channels = tables[0].shape
    width = min(WIDEST, channels & -channels) if channels % 16 == 0 else 16
    grid = (triton.cdiv(rows, BLOCK // width), triton.cdiv(channels, width))
    kernel[grid](*tables, *(t.stride(0) for t in tables), *of, rows, channels, **constants, R=BLOCK // width, C=width)


def _rows(x: Tensor) -> Tensor:
    """(n height width, channels) of x (n, channels, height, width): a view where channels lie side by side."""
    rows = x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _empty(like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Channels last, dense: what `_rows` of it writes is in it."""
    return torch.empty_like(like, dtype=dtype, memory_format=torch.channels_last)


class _BiasSiLU(torch.autograd.Function):
    """See `bias_silu`."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, bias: Tensor, residual: Tensor | None, parts: int) -> tuple[Tensor, ...]:
        made = []
        for own, its in zip(y.chunk(parts, 1), bias.chunk(parts), strict=True):
            made.append(_empty(own))
            _run(_silu, (made[-1], own, own if residual is None else residual), its, ADD=residual is not None)
        ctx.save_for_backward(y, bias)
        return tuple(made)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        y, bias = ctx.saved_tensors
        out, parts = _empty(y), len(gradients)
        for to, own, g, its in zip(out.chunk(parts, 1), y.chunk(parts, 1), gradients, bias.chunk(parts), strict=True):
            _run(_silu_backward, (to, own, g), its)
        return out, None, gradients[0] if ctx.needs_input_grad[2] else None, None


class _MaxPool(torch.autograd.Function):
    """See `max_pool`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, size: int) -> Tensor:
        out, where = _empty(x), _empty(x, torch.int8)
        _run(_pool, (out, where, x), *x.shape[2:], K=size)
        ctx.save_for_backward(where)
        ctx.size = size
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (where,) = ctx.saved_tensors
        out = _empty(where, gradients[0].dtype)
        _run(_pool_backward, (out, where, gradients[0]), *where.shape[2:], K=ctx.size)
        return out, None


def bias_silu(y: Tensor, bias: Tensor, residual: Tensor | None = None, parts: int = 1) -> tuple[Tensor, ...]:
    """silu(y + bias) + residual in `parts` by channels, for y and residual (n, c, h, w), bias (c,), of one dtype.

    Differentiable in y and residual, which is for one part alone.
    """
    return _BiasSiLU.apply(y, bias, residual, parts)  # type: ignore[no-any-return]


def max_pool(x: Tensor, size: int) -> Tensor:
    """The maxima of x (n, c, h, w) in size × size windows around each of its cells, differentiable; `size` is odd."""
    return _MaxPool.apply(x, size)  # type: ignore[no-any-return]
