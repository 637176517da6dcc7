"""What a network may cost the first time that it runs: small weights can ask for maps without end.

Every operation is measured before it is done, by its shapes alone, and refused where it goes beyond what the largest
published detectors need. Those make, of each pixel of a picture (`python scripts/checks/costs.py`): maps of up to 96
numbers (YOLOv9e), 3,800 numbers in all (YOLO12x at 1280 pixels), 390,000 multiplications (YOLOv8x-p2).
"""

from __future__ import annotations

import math
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from detxai.errors import ModelError

#: Numbers of the largest map, bytes that live at a time, numbers in all and multiplications, of each pixel.
LARGEST_MAP, LIVE_BYTES, NUMBERS, MULTIPLICATIONS = 256, 2048, 5000, 1 << 20
#: Operations in all; and bytes that live at a time whatever the size, unless the user asked for it.
OPERATIONS, MOST_BYTES = 50_000, 3 << 29
#: Pixels that are counted at least, and at most: a file that says it was trained at more is believed if the user is.
FEWEST, MOST = 640**2, 1280**2
#: Smaller results are not watched while they live.
SMALL = 1 << 14

_ops = torch.ops.aten
_BROADCAST = {_ops.add.Tensor, _ops.div.Tensor, _ops.mul.Tensor, _ops.sub.Tensor}
_POOLINGS = {_ops.avg_pool2d.default, _ops.max_pool2d_with_indices.default}
_PRODUCTS = {_ops.addmm.default: 1, _ops.baddbmm.default: 1, _ops.bmm.default: 0, _ops.mm.default: 0}


class Bounds(TorchDispatchMode):
    """While entered, operations on pictures of `pixels` pixels cost no more than any detector that is known.

    `asked`: the user gave that size, the file did not. Raises ModelError from within the operation that goes beyond.
    """

    def __init__(self, name: str, pixels: int, *, asked: bool = False) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.name, self.asked = name, asked
        counted = max(pixels, FEWEST) if asked else min(max(pixels, FEWEST), MOST)
        self.largest, self.left = LARGEST_MAP * counted, OPERATIONS
        self.numbers, self.work = NUMBERS * counted, MULTIPLICATIONS * counted
        self.bytes = LIVE_BYTES * counted if asked else min(LIVE_BYTES * counted, MOST_BYTES)
        self.living: list[tuple[StorageWeakRef, int]] = []
        self.live = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else torch imports its compiler, which takes longer than all that is measured here

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.is_view:
            return func(*args, **(kwargs or {}))
        more = _made(func, args)
        work = _multiplications(func, args, more)
        if self.left < 1 or more > min(self.largest, self.numbers) or work > self.work or not self._room(4 * more):
            raise self._refusal()
        made = func(*args, **(kwargs or {}))
        self.left, self.work = self.left - 1, self.work - work
        for one in made if isinstance(made, (list, tuple)) else (made,):
            if isinstance(one, Tensor):
                self.numbers -= one.numel()
                if one.numel() > SMALL:
                    self.live += one.nbytes
                    self.living.append((StorageWeakRef(one.untyped_storage()), one.nbytes))
        return made

    def _room(self, size: int) -> bool:
        """Whether so many bytes may live beside those that do."""
        if self.live + size > self.bytes:
            self.living = [(storage, own) for storage, own in self.living if not storage.expired()]
            self.live = sum(own for _, own in self.living)
        return self.live + size <= self.bytes

    def _refusal(self) -> ModelError:
        return ModelError(
            f"{self.name} would compute more than any detector that is known: its file is damaged, or made to harm.",
            "Give a smaller --imgsz." if self.asked else
            "If it is your own, and as large as that, give its size: --imgsz PIXELS.",
        )  # fmt: skip


def _made(func: Any, args: Any) -> Any:
    """How many numbers `func` will make of `args`, for all that can make many out of few; 0 for others."""
    x: Any = args[0] if args else None
    if func in _BROADCAST:
        both = zip_longest(reversed(x.shape), reversed(getattr(args[1], "shape", ())), fillvalue=1)
        return math.prod(max(pair) for pair in both)
    if func in (_ops.cat.default, _ops.stack.default):
        return sum(one.numel() for one in x)
    if func is _ops.convolution.default:
        return len(x) * _convolved(*args)
    if func in _POOLINGS:
        kernel, stride, padding = _pairs(*args[1:4])
        return math.prod(x.shape[:-2]) * _area(x, kernel, stride, padding, (1, 1))
    if func in _PRODUCTS:
        left, right = args[_PRODUCTS[func] :][:2]
        return left.numel() // max(left.shape[-1], 1) * right.shape[-1]
    if func is _ops.new_zeros.default:
        return math.prod(args[1])
    if func is _ops.repeat.default:
        return x.numel() * math.prod(args[1])
    name: str = func.overloadpacket.__name__
    if name in ("_adaptive_avg_pool2d", "adaptive_max_pool2d"):
        return math.prod((*x.shape[:-2], *args[1]))
    if name.startswith("upsample_"):
        sides: Any = args[1] or [n * factor for n, factor in zip(x.shape[2:], args[-1], strict=True)]
        return math.prod((*x.shape[:2], *(int(side) for side in sides)))
    if name in ("constant_pad_nd", "reflection_pad2d", "replication_pad2d"):
        shape = [*reversed(x.shape)]
        for i, more in enumerate(args[1]):
            shape[i // 2] += more
        return math.prod(shape)
    return 0


def _convolved(x: Tensor, weight: Tensor, _: Any, stride: Any, padding: Any, dilation: Any, *rest: Any) -> Any:
    transposed, more, groups = rest
    if not transposed:
        return len(weight) * _area(x, weight.shape[2:], stride, padding, dilation)
    sides = zip(x.shape[2:], weight.shape[2:], stride, padding, dilation, more, strict=True)
    return weight.shape[1] * groups * math.prod((n - 1) * s - 2 * p + d * (k - 1) + m + 1 for n, k, s, p, d, m in sides)


def _pairs(kernel: Any, stride: Any = (), padding: Any = (0,)) -> list[Any]:
    return [list(one) * (3 - len(one)) for one in (kernel, stride or kernel, padding)]


def _area(x: Tensor, kernel: Any, stride: Any, padding: Any, dilation: Any) -> Any:
    """Cells of the map that a window of this kind makes of x, with those that a pooling may add at its end."""
    sides = zip(x.shape[-2:], kernel, stride, padding, dilation, strict=True)
    return math.prod(-(-max(0, n + 2 * p - d * (k - 1) - 1) // s) + 1 for n, k, s, p, d in sides)


def _multiplications(func: Any, args: Any, numbers: int) -> Any:
    """How many multiplications, or comparisons of a pooling, `func` takes to make so many numbers."""
    if func is _ops.convolution.default:
        return (args[0].numel() if args[6] else numbers) * math.prod(args[1].shape[1:])
    if func in _POOLINGS:
        return numbers * math.prod(_pairs(args[1])[0])
    return numbers * args[_PRODUCTS[func]].shape[-1] if func in _PRODUCTS else 0
