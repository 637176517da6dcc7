"""What a method asks of the engine and what it is told: places on a path, and values and gradients there."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.grad import conv2d_input

from detxai.attribution.memory import Held
from detxai.values import InputShape, Target

#: What a map is off at most, as a share of its distance to that of every other node: for nine in ten of those that
#: scripts/bench/map_error.py has compared with dense references.
DOUBT = 0.6


@dataclass(frozen=True, eq=False)
class Segment:
    """The straight path from baseline b to image x, both (3, rows, columns) float32 in [0, 1]."""

    x: Tensor
    b: Tensor
    #: Which of the engine's functions takes its points.
    field: ClassVar[str] = "value"

    @cached_property
    def shape(self) -> InputShape:
        """Rows and columns of the pictures."""
        return self.x.shape[-2], self.x.shape[-1]

    def at(self, alpha: float) -> Tensor:
        """The point b + α (x − b); exactly b and x at the ends."""
        return torch.lerp(self.b, self.x, alpha)

    @cached_property
    def difference(self) -> Tensor:
        """x − b."""
        return self.x - self.b

    def product(self, gradient: Tensor) -> Tensor:
        """What is kept of ∇F: (x − b) ⊙ ∇F summed over colour, (rows, columns)."""
        return self.products(gradient[None], self.difference[None])[0]

    def slope(self, product: Tensor) -> Tensor:
        """f(α) = ∇F · (x − b) of a `product`, () float64."""
        return self.slopes(product[None], self.difference[None])[0]

    @staticmethod
    def products(gradients: Tensor, differences: Tensor) -> Tensor:
        """`product` of many rows at once, of their ∇F and their x − b, both (rows, 3, height, width)."""
        return (differences * gradients).sum(1)

    @staticmethod
    def slopes(products: Tensor, differences: Tensor) -> Tensor:
        """`slope` of many rows at once, (rows,) float64."""
        return products.flatten(1).sum(1, dtype=torch.float64)

    @staticmethod
    def maps(paths: Sequence[Segment], totals: Tensor) -> Tensor:
        """(n, sums, rows, columns) of sums of products, (n, sums, ...), those of each of n paths."""
        return totals


class Entered(Segment):
    """The path behind a first convolution: z = Lx + c is straight where x is, and ∇F · (x − b) = ∂F/∂z · (z(x) − z(b)).

    So that convolution runs twice a path, and its adjoint once a map: (x − b) ⊙ Lᵀ ∫ ∂F/∂z dα. `outer` is the path of
    the pictures. Gradients are kept as they come, (height, width, channels).
    """

    field: ClassVar[str] = "entered"

    def __init__(self, outer: Segment, conv: nn.Conv2d) -> None:
        with torch.no_grad():
            x, b = (conv(end[None].contiguous(memory_format=torch.channels_last))[0] for end in (outer.x, outer.b))
        super().__init__(x, b)
        self.outer, self.conv = outer, conv

    @cached_property
    def shape(self) -> InputShape:
        return self.outer.shape

    @staticmethod
    def products(gradients: Tensor, differences: Tensor) -> Tensor:
        return gradients.permute(0, 2, 3, 1)

    @staticmethod
    def slopes(products: Tensor, differences: Tensor) -> Tensor:
        return (products * differences.permute(0, 2, 3, 1)).flatten(1).sum(1, dtype=torch.float64)

    @staticmethod
    def maps(paths: Sequence[Segment], totals: Tensor) -> Tensor:
        assert all(isinstance(path, Entered) for path in paths)
        conv, outer = paths[0].conv, [path.outer for path in paths]  # type: ignore[attr-defined]
        flat = totals.flatten(0, 1).permute(0, 3, 1, 2)
        shape = (len(flat), *outer[0].x.shape)
        back = conv2d_input(shape, conv.weight, flat, conv.stride, conv.padding, conv.dilation, conv.groups)
        differences = torch.stack([path.difference for path in outer])
        product: Tensor = back.unflatten(0, totals.shape[:2]) * differences[:, None]
        return product.sum(2)


@dataclass(frozen=True, eq=False)
class Point:
    """One row of a batch: the place `alpha` on `path`, the targets wanted there, and whether their gradients are.

    `picture` (3, rows, columns) takes the place of the path's point; where `hidden` (rows, columns) holds, the baseline
    shows; `combine` makes a (rows, columns) map of a gradient (default: the path's product). `field`: which scalar of a
    target, its pinned `value` (in a `trial`, one of many, or of what has `entered` the network) or its `similarity` to
    what is detected. `dtype` is the arithmetic of the network below the head. `channels`: for each target those that
    ParchGrad keeps, (total channels,) bool; None for the plain gradient. At a `layer` the gradient is that at its
    output, and `combine` gets it, the output, both (c, h, w), and the target. `needed`: its maps are kept even where
    there is no room for them.
    """

    path: Segment
    alpha: float
    targets: tuple[Target, ...]
    gradient: bool = True
    dtype: torch.dtype = torch.float32
    picture: Tensor | None = None
    combine: Callable[..., Tensor] | None = None
    field: str = "value"
    layer: int | None = None
    hidden: Tensor | None = None
    channels: tuple[Tensor, ...] | None = None
    needed: bool = True

    def place(self) -> Tensor:
        """The picture at this point, (3, rows, columns)."""
        shown = self.path.at(self.alpha) if self.picture is None else self.picture
        return shown if self.hidden is None else torch.where(self.hidden, self.path.b, shown)

    def kept(self, gradient: Tensor, *more: Any) -> Tensor:
        """What is kept of a gradient (3, rows, columns), or of one at a layer with `more` of what is there."""
        return (self.combine or self.path.product)(gradient, *more)

    def slope(self, product: Tensor) -> Tensor:
        """f(α) of what is kept of a gradient, () float64; zero where that is no product with the path."""
        return self.path.slope(product) if self.combine is None else product.new_zeros((), dtype=torch.float64)


class Sum(NamedTuple):
    """What a job asks for once the weights of its gradients are known: sums of what is `held` of them, in their order.

    `weights`: those of one gradient, one a sum. `before`: (sums, ...), which they are added to. `mapped`: whether maps
    of letterbox pixels are wanted, (sums, rows, columns), instead of sums of products. The reply holds them as what is
    kept of the only target; its value is the L2 norm of the last of them, its slope that of the first.
    """

    path: Segment
    held: Sequence[Held]
    weights: Sequence[tuple[float, ...]]
    before: Tensor | None
    mapped: bool


class Row(NamedTuple):
    """What is `asked` of one place: a point, and which of its targets, by number, are computed together; or a sum."""

    asked: Any
    ks: tuple[int, ...]


class Ran(NamedTuple):
    """What a pack of rows gives, their targets in turn: F and f, (targets, rows), and what is held of ∇F."""

    values: Tensor
    slopes: Tensor
    held: list[list[Held | None]]


@dataclass(frozen=True, eq=False)
class Reply:
    """What came of a point, target by target: F and, where wanted, f and what is kept of ∇F (None: had no room)."""

    values: list[float]
    slopes: list[float] = field(default_factory=list)
    held: list[Held | None] = field(default_factory=list)

    @classmethod
    def to(cls, asked: Point | Sum) -> Reply:
        """A reply in which nothing stands yet."""
        count, wanted = (1, True) if isinstance(asked, Sum) else (len(asked.targets), asked.gradient)
        return cls([0.0] * count, *([[0.0] * count, [None] * count] if wanted else ()))

    def tell(self, k: int, value: float, slope: float, held: Held | None) -> None:
        """What was found at target `k`."""
        self.values[k] = value
        if self.slopes:
            self.slopes[k], self.held[k] = slope, held

    def kept(self, k: int) -> Held:
        """What is held of ∇F of target `k`, of a point that needs it."""
        held = self.held[k]
        assert held is not None, "kept where it is needed"
        return held

    def product(self, k: int) -> Tensor:
        """What is kept of ∇F of target `k`, of a point that needs it."""
        return self.kept(k).gradient


@dataclass(frozen=True, eq=False)
class TargetMap:
    """What a method makes of one target: `map` (rows, columns) float64, letterbox pixels, summed over colour.

    The completeness fields are None for methods that promise nothing about the sum of their map. `layer`: where an
    activation map was taken. `doubt`: the L2 distance of the map to that of every other node; `size`: its own L2 norm,
    where it is known.
    """

    target: Target
    map: Tensor
    value_at_input: float
    value_at_baseline: float | None
    evaluations: int
    error_bound: float | None = None
    converged: bool | None = None
    dtype: torch.dtype = torch.float32
    notes: tuple[str, ...] = ()
    layer: int | None = None
    doubt: float | None = None
    size: float | None = None

    def brought(self) -> TargetMap:
        """This in the memory of the host: who wants many figures of it waits for the device here, and no more."""
        return replace(self, map=self.map.cpu())

    @cached_property
    def map_error(self) -> float | None:
        """The relative L2 error that the map itself may have: a cautious estimate."""
        if self.doubt is None:
            return None
        size = float(self.map.norm()) if self.size is None else self.size
        return DOUBT * self.doubt / size if size else 0.0

    @cached_property
    def completeness_error(self) -> float | None:
        """|Σ map − Δ| / max(|Δ|, 1). It looks at the map, and so waits for the device."""
        if self.error_bound is None or self.value_at_baseline is None:
            return None
        delta = self.value_at_input - self.value_at_baseline
        return abs(float(self.map.sum()) - delta) / max(abs(delta), 1.0)


Asked = Sequence[Point | Sum]
Ask = Generator[Asked, list[Reply], list[TargetMap]]
