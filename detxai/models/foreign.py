"""Layers of the original YOLOv3, v5, v7 and v9 repositories: which of ultralytics' compute the same, and our own.

Their checkpoints name classes of `models.common`, `models.yolo` and `models.experimental`. None of that code is needed:
most of these classes live on in ultralytics under the same name; the few others are written here.
"""

from __future__ import annotations

import re
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

_ROOM = re.compile(r"(?:yolov\d\.)?(?:models\.(?:common|yolo|experimental)|utils\.activations)\.(\w+)")
#: What is the same in ultralytics: the name there, where it is another.
_SAME = {
    "block": "ADown AConv Bottleneck BottleneckCSP C3 C3Ghost C3SPP:C3 C3TR C3x:C3 CBFuse CBLinear DFL ELAN1 "
    "GhostBottleneck RepNBottleneck:RepBottleneck RepNCSP:RepCSP RepNCSPELAN4 SPP SPPELAN SPPF",
    "conv": "Concat Conv DWConv DWConvTranspose2d Focus GhostConv RepConvN:RepConv",
    "transformer": "TransformerBlock TransformerLayer",
}
_TORCH = {"Hardswish": "Hardswish", "MemoryEfficientMish": "Mish", "MemoryEfficientSwish": "SiLU", "Mish": "Mish",
          "SiLU": "SiLU", "Silence": "Identity", "Swish": "SiLU"}  # fmt: skip


def layer_class(name: str) -> type[nn.Module] | None:
    """The class that does what the foreign class of this full name does; None where there is none."""
    match = _ROOM.fullmatch(name)
    if not match:
        return None
    if match[1] in _TORCH:
        return getattr(nn, _TORCH[match[1]])  # type: ignore[no-any-return]
    for room, items in _SAME.items():
        same = dict((item.split(":") * 2)[:2] for item in items.split())
        if match[1] in same:
            return getattr(import_module(f"ultralytics.nn.modules.{room}"), same[match[1]], None)
    return OWN.get(match[1])


class CrossConv(nn.Module):
    """Two convolutions, one along each side, with a shortcut where `add`."""

    cv1: nn.Module
    cv2: nn.Module
    add: bool

    def forward(self, x: Tensor) -> Tensor:
        y = self.cv2(self.cv1(x))
        return x + y if self.add else y  # type: ignore[no-any-return]


class Pool(nn.Module):
    """A pooling layer in a wrapper of its own (MP, SP)."""

    m: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        return self.m(x)  # type: ignore[no-any-return]


class ReOrg(nn.Module):
    """Each 2×2 block of pixels as channels: (B, C, H, W) -> (B, 4C, H/2, W/2)."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x[..., row::2, column::2] for column in (0, 1) for row in (0, 1)], 1)


class DownC(nn.Module):
    """Halves a map twice over: by convolutions, and by pooling."""

    cv1: nn.Module
    cv2: nn.Module
    cv3: nn.Module
    mp: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.cv2(self.cv1(x)), self.cv3(self.mp(x))], 1)


class SPPCSPC(nn.Module):
    """Poolings of several sizes on one of two branches (YOLOv7)."""

    cv1: nn.Module
    cv2: nn.Module
    cv3: nn.Module
    cv4: nn.Module
    cv5: nn.Module
    cv6: nn.Module
    cv7: nn.Module
    m: nn.ModuleList

    def forward(self, x: Tensor) -> Tensor:
        inner = self.cv4(self.cv3(self.cv1(x)))
        pooled = self.cv6(self.cv5(torch.cat([inner, *(pool(inner) for pool in self.m)], 1)))
        return self.cv7(torch.cat([pooled, self.cv2(x)], 1))  # type: ignore[no-any-return]


class RepConv(nn.Module):
    """The sum of a 3×3, a 1×1 and an identity branch with their norms, or the one convolution they became."""

    act: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        if hasattr(self, "rbr_reparam"):
            return self.act(self.rbr_reparam(x))  # type: ignore[no-any-return,operator]
        same: Any = getattr(self, "rbr_identity", None)
        branches: list[Any] = [self.rbr_dense, self.rbr_1x1, *([same] if same is not None else [])]
        return self.act(sum(branch(x) for branch in branches))  # type: ignore[no-any-return]


class Shortcut(nn.Module):
    """The sum of two layers."""

    def forward(self, x: list[Tensor]) -> Tensor:
        return x[0] + x[1]


OWN: dict[str, type[nn.Module]] = {
    "CrossConv": CrossConv, "DownC": DownC, "MP": Pool, "ReOrg": ReOrg, "RepConv": RepConv, "SP": Pool,
    "SPPCSPC": SPPCSPC, "Shortcut": Shortcut,
}  # fmt: skip
