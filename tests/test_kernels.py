"""Kernels of our own give what torch gives: by Triton's interpreter, which needs no GPU, and compiled for one."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from test_families import FAMILIES, detector_of, network
from torch import Tensor, nn

from detxai.models import fused, kernels
from detxai.models.windows import _Taken

SIDE = 64
triton = pytest.importorskip("triton", reason="comes with torch where there is CUDA")


@pytest.fixture
def interpreted() -> Iterator[ModuleType]:
    """The kernels as Triton interprets them on a CPU, in every place that has them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        for module in (kernels, fused):
            importlib.reload(module)
        yield kernels
    for module in (kernels, fused):
        importlib.reload(module)


def some(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    made = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return made.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else made


@pytest.mark.parametrize("shape", [(2, 16, 9, 7), (1, 24, 5, 5), (3, 80, 1, 1), (1, 64, 33, 40)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_bias_silu_and_what_is_added_are_those_of_torch(
    interpreted: Any, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    """In values and gradients, whatever larger map what is added and the gradient are slices of."""
    n, channels, *size = shape
    y, bias = some(*shape, dtype=dtype).requires_grad_(), some(channels, dtype=dtype)
    residual = some(n, 2 * channels, *size, dtype=dtype, seed=1)[:, channels:].requires_grad_()
    weights = some(n, 3 * channels, *size, dtype=dtype, seed=2)[:, channels : 2 * channels]
    (ours,), torchs = interpreted.bias_silu(y, bias, residual), nn.functional.silu(y + bias[:, None, None]) + residual
    assert ours.dtype == dtype and ours.is_contiguous(memory_format=torch.channels_last)
    near = {"rtol": 2 * torch.finfo(dtype).eps, "atol": 4 * torch.finfo(dtype).eps}
    torch.testing.assert_close(ours, torchs, **near)
    made = (torch.autograd.grad(out, [y, residual], weights) for out in (ours, torchs))
    for own, other in zip(*made, strict=True):
        torch.testing.assert_close(own, other, **near)


def test_parts_are_dense_and_have_one_gradient(interpreted: Any) -> None:
    y, bias, weights = some(2, 48, 6, 5).requires_grad_(), some(48), some(2, 48, 6, 5, seed=1)
    first, second = interpreted.bias_silu(y, bias, parts=2)
    torchs = nn.functional.silu(y + bias[:, None, None])
    assert first.is_contiguous(memory_format=torch.channels_last), "so that a convolution behind it copies nothing"
    torch.testing.assert_close(torch.cat((first, second), 1), torchs)
    (own,) = torch.autograd.grad(torch.cat((first, second), 1), [y], weights)
    torch.testing.assert_close(own, torch.autograd.grad(torchs, [y], weights)[0])
    (alone,) = torch.autograd.grad(interpreted.bias_silu(y, bias, parts=2)[1].sum(), y)
    assert not alone[:, :24].any() and alone[:, 24:].any()


@pytest.mark.parametrize(("size", "shape"), [(3, (2, 16, 11, 6)), (5, (1, 24, 7, 5)), (9, (1, 24, 2, 3))])
@pytest.mark.parametrize("steps", [1, 1000])
def test_pools_are_those_of_torch(interpreted: Any, size: int, shape: tuple[int, ...], steps: int) -> None:
    """With many maxima in a window too, of which the first counts, and where a window is larger than the map."""
    x = ((some(*shape) * steps).round() / steps).requires_grad_()
    weights = some(*shape, seed=1)
    ours, torchs = interpreted.max_pool(x, size), nn.functional.max_pool2d(x, size, 1, size // 2)
    assert torch.equal(ours, torchs)
    torch.testing.assert_close(torch.autograd.grad(ours, [x], weights)[0], torch.autograd.grad(torchs, [x], weights)[0])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # of NumPy, for a SiLU of -100: it is 0
@pytest.mark.parametrize("family", ["v5u", "v8", "v10", "11"])
def test_a_network_by_our_kernels_is_the_network(interpreted: Any, family: str) -> None:
    detector: Any = detector_of(family, FAMILIES[family], network(FAMILIES[family]))
    plain, ours = (detector.in_precision(torch.float32, (SIDE, SIDE)).trunk for _ in range(2))
    assert fused.fuse_kernels(ours, torch.empty(0)) == ""
    if family == "v8":
        assert len(fused._own_kernels(ours.layers)) == 60, "45 convolutions, 8 splits, 6 shortcuts, a pool"
    x, wanted = torch.rand(2, detector.info.channels, SIDE, SIDE).requires_grad_(), detector.feeds
    answers = []
    for trunk in (plain, ours):
        outputs = [trunk(x, wanted)[i] for i in wanted]
        answers.append([*outputs, torch.autograd.grad(sum(out.square().mean() for out in outputs), x)[0]])
    for a, b in zip(*answers, strict=True):
        assert (a - b).norm() <= 1e-2 * a.norm()  # random weights make much of a rounding; a wrong layer differs by 1


def test_where_they_cannot_run_all_is_as_it_was() -> None:
    detector: Any = detector_of("v8", FAMILIES["v8"], network(FAMILIES["v8"]))
    x, trunk = torch.rand(1, 3, SIDE, SIDE), detector.trunk
    before = trunk(x, [21])[21]
    assert "driver" in fused.fuse_kernels(trunk, torch.empty(0)), "no GPU, no driver"
    assert torch.equal(trunk(x, [21])[21], before)


def test_a_layer_that_says_something_else_by_them_is_seen(interpreted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of another release of its package: the network is left as it was."""
    detector: Any = detector_of("v8", FAMILIES["v8"], network(FAMILIES["v8"]))
    x, trunk = torch.rand(1, 3, SIDE, SIDE), detector.trunk
    before, known = trunk(x, [21])[21], {id(part): part.__dict__.get("forward") for part in detector.module.modules()}
    monkeypatch.setattr(fused, "_shortcut", lambda block, x: block.cv2(block.cv1(x)))
    assert fused.fuse_kernels(trunk, torch.empty(0)) == "the network says something else with them"
    assert known == {id(part): part.__dict__.get("forward") for part in detector.module.modules()}
    assert torch.equal(trunk(x, [21])[21], before)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["_silu", "_silu_backward", "_pool", "_pool_backward"])
@pytest.mark.parametrize("capability", [75, 90])
def test_kernels_compile_for_gpus(name: str, capability: int) -> None:
    """For a T4 and an H100, on a machine that has neither."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(kernels, name)
    constants = {k: v for k, v in {"R": 16, "C": 64, "ADD": True, "K": 5}.items() if k in kernel.arg_names}
    halves = {*kernel.arg_names[:3], "bias"} - {"where"}
    kinds = {a: "*fp16" if a in halves else "*i8" if a == "where" else "i32" for a in kernel.arg_names}
    signature = kinds | dict.fromkeys(constants, "constexpr")
    made = triton.compile(ASTSource(kernel, signature, constants), target=GPUTarget("cuda", capability, 32))
    assert len(made.asm["cubin"]) > 1000


def test_what_is_taken_of_a_map_is_put_back() -> None:
    x, cells = (
        some(2, 30, 4).double().requires_grad_(),
        torch.tensor([[3, 7, 1], [0, 29, 5]])[:, :, None].expand(-1, -1, 4),
    )
    weights = some(2, 3, 4, seed=1).double()
    ours, torchs = _Taken.apply(x, cells), x.gather(1, cells)
    assert torch.equal(ours, torchs)
    assert torch.equal(*(torch.autograd.grad(out, x, weights)[0] for out in (ours, torchs)))
