"""Packs as programs of a fixed shape: made once a run, filled and run again and again.

A row is (place on a path, target). Its tensors are static: places, addresses of targets and their units are filled in,
then the program runs, and nothing in it depends on what they hold. So a GPU can replay it as one graph, which takes the
Python around its hundreds of kernels away; elsewhere the same function is called.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from detxai.attribution.devices import sent
from detxai.attribution.memory import Held, Room
from detxai.attribution.points import Point, Ran, Row
from detxai.values import InputShape, Target

T = TypeVar("T")

#: Calls before a graph is captured: libraries choose and allocate in them.
WARM_UP = 3
#: Shapes of places whose programs are kept; pictures of one shape have two, before and behind the first convolution.
MOST_PLACES = 8


class Network(Protocol):
    """Scalars of a network by the numbers of their address, see `models.detector.Differentiable`."""

    def address(self, target: Target, shape: InputShape, /) -> tuple[Any, tuple[int, ...]]: ...
    def pinned(self, x: Tensor, kind: Any, index: Tensor, /, *, entered: bool = False) -> Tensor: ...


class Captured(Generic[T]):
    """A function of static tensors: as a CUDA graph where there is CUDA, else called as it is.

    Calls return the same tensors each time. `refused`: why there is no graph on a CUDA device, if so.
    """

    outputs: T

    def __init__(self, function: Callable[[], T], device: torch.device, pool: Any = None) -> None:
        self.function: Callable[[], T] | None = function
        self.graph, self.refused = None, ""
        if device.type != "cuda":
            return
        stream, own = torch.cuda.Stream(device), torch.cuda.current_stream(device)
        stream.wait_stream(own)
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                function()
        own.wait_stream(stream)
        torch.cuda.synchronize(device)
        graph = torch.cuda.CUDAGraph()
        try:
            # Other threads copy finished maps meanwhile, which must not end the capture.
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                self.outputs = function()
        except RuntimeError as error:
            torch.cuda.set_stream(own)  # a capture that fails leaves its own in place
            torch.cuda.synchronize(device)
            cause = error.__context__ or error  # what ended the capture, not that it has ended
            if isinstance(cause, torch.OutOfMemoryError):
                raise cause from None
            self.refused = str(cause).splitlines()[0]
        else:
            self.graph, self.function = graph, None

    def __call__(self) -> T:
        if self.function is not None:
            return self.function()
        assert self.graph is not None
        self.graph.replay()
        return self.outputs


@dataclass(frozen=True)
class Shape:
    """What all rows of a program have in common. `kind`: see `Network.address`."""

    field: str
    kind: Hashable
    columns: int
    gradient: bool
    dtype: torch.dtype
    place: torch.Size


class Program(Captured[tuple[Tensor, ...]]):
    """F, and its gradient, at `rows` static places `x` of the static addresses `index`, in units (scale, offset)."""

    def __init__(self, network: Network, shape: Shape, rows: int, device: torch.device, pool: Any) -> None:
        self.network, self.shape = network, shape
        self.x = torch.zeros(rows, *shape.place, dtype=shape.dtype, device=device).to(memory_format=torch.channels_last)
        self.index = torch.zeros(rows, shape.columns, dtype=torch.int64, device=device)
        self.unit = torch.ones(rows, 2, device=device)
        super().__init__(self.evaluated, device, pool)

    def evaluated(self) -> tuple[Tensor, ...]:
        shape = self.shape
        with torch.set_grad_enabled(shape.gradient):
            x = self.x.detach().requires_grad_(shape.gradient)
            values = self.network.pinned(x, shape.kind, self.index, entered=shape.field == "entered").float()
            values = values * self.unit[:, 0] + self.unit[:, 1]
            if not shape.gradient:
                return (values,)
            return values.detach(), torch.autograd.grad(values.sum(), x)[0]


@dataclass
class Programs:
    """Runs rows of points as programs of `rows` rows. `networks`: the network in each arithmetic that it has."""

    networks: Mapping[torch.dtype, Network]
    device: torch.device
    rows: int
    made: dict[Shape, Program] = field(default_factory=dict)
    _pool: Any = None

    def takes(self, point: Point) -> bool:
        """Whether rows of `point` can be those of a program."""
        plain = point.layer is None and point.channels is None and point.hidden is None
        return plain and point.field in ("value", "entered") and point.dtype in self.networks

    def split(self, point: Point) -> list[Row]:
        """A row a target."""
        return [Row(point, (k,)) for k in range(len(point.targets))]

    def kind(self, row: Row) -> Hashable:
        """What all rows of a pack have in common."""
        return self._shape(row), row.asked.combine is None, row.asked.picture is None

    def rows_of(self, row: Row) -> int:
        """Rows of a pack: always the same."""
        return self.rows

    def _shape(self, row: Row) -> Shape:
        """The program that `row` goes into."""
        point = row.asked
        kind, index = self.networks[point.dtype].address(point.targets[row.ks[0]], point.path.shape)
        return Shape(point.field, kind, len(index), point.gradient, point.dtype, point.path.x.shape)

    def halve(self) -> None:
        """Go on with half the rows."""
        self.forget(self.rows // 2)

    def forget(self, rows: int) -> None:
        """Free all programs, and make the next ones with `rows` rows."""
        self.made.clear()
        self._pool, self.rows = None, rows

    def refused(self) -> list[str]:
        """Why programs could not be captured as graphs, on a device that has them."""
        return [program.refused for program in self.made.values() if program.refused]

    def prepare(self, row: Row) -> None:
        """Make the program that `row` goes into, unless it has been; of too many places, the oldest loses its own."""
        shape = self._shape(row)
        if shape in self.made:
            return
        others = list(dict.fromkeys(known.place for known in self.made if known.place != shape.place))
        if len(others) >= MOST_PLACES:
            self.made = {known: program for known, program in self.made.items() if known.place != others[0]}
        if self._pool is None and self.device.type == "cuda":
            self._pool = torch.cuda.graph_pool_handle()
        self.made[shape] = Program(self.networks[shape.dtype], shape, self.rows, self.device, self._pool)

    def run(self, pack: Sequence[Row], room: Room) -> Ran:
        """Values, slopes and gradients of a `pack`, all for one program that has been made, on their way."""
        first, program = pack[0].asked, self.made[self._shape(pack[0])]
        x, b, own = self._fill(program, [*pack, *[pack[0]] * (self.rows - len(pack))])
        values, *gradients = program()
        values = values.clone()  # the program's own until it runs again
        slopes = torch.zeros_like(values, dtype=torch.float64)
        held: list[Held | None] = [None] * len(pack)
        for gradient in gradients:
            if first.combine is None:
                differences = (x - b)[own]
                kept = first.path.products(gradient.float(), differences)
                slopes = first.path.slopes(kept, differences)
            else:
                kept = torch.stack([row.asked.kept(one.float()) for row, one in zip(pack, gradient, strict=False)])
            held = room.hold(kept[: len(pack)], [row.asked.needed for row in pack])
        return Ran(values[None, : len(pack)], slopes[None, : len(pack)], [held])

    def _fill(self, program: Program, rows: Sequence[Row]) -> tuple[Tensor, Tensor, Tensor]:
        """Fill `rows` into `program`; the ends x, b of their paths, (paths, c, height, width), and each row's own path.

        A pack has few paths: their ends are stacked, and all places made of them at once.
        """
        points, targets = [row.asked for row in rows], [row.asked.targets[row.ks[0]] for row in rows]
        paths = {path: n for n, path in enumerate(dict.fromkeys(point.path for point in points))}
        x, b = (
            torch.stack(ends).contiguous(memory_format=torch.channels_last)
            for ends in zip(*((path.x, path.b) for path in paths), strict=True)
        )
        numbers, reals = [], []
        for point, target in zip(points, targets, strict=True):
            numbers.append((paths[point.path], *program.network.address(target, point.path.shape)[1]))
            reals.append((point.alpha, target.scale, target.offset))
        whole, parts = (sent(t, self.device) for t in (torch.tensor(numbers), torch.tensor(reals, dtype=torch.float32)))
        own, alpha = whole[:, 0], parts[:, 0, None, None, None]
        if points[0].picture is None:
            program.x.copy_(torch.lerp(b[own], x[own], alpha))
        else:
            program.x.copy_(torch.stack([point.place() for point in points]))
        program.index.copy_(whole[:, 1:])
        program.unit.copy_(parts[:, 1:])
        return x, b, own
