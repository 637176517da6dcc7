"""Packs as programs of a fixed shape: made once a run, filled and run again and again.

A row is (place on a path, target). Its tensors are static: places, addresses of targets and their units are filled in,
then the program runs, and nothing in it depends on what they hold. So a GPU can replay it as one graph, which takes the
Python around its hundreds of kernels away; elsewhere the same function is called.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from detxai.attribution.memory import Held, Room
from detxai.attribution.points import Point, Ran, Row, Segment
from detxai.values import InputShape, Target

#: Calls before a graph is captured: libraries choose and allocate in them.
WARM_UP = 3
#: Path ends that a bank begins with.
FEWEST_ENDS = 16
#: Shapes of places whose programs are kept; each holds memory of its own. Pictures of one shape have two, that of the
#: picture and that behind the first convolution.
MOST_PLACES = 8


class Network(Protocol):
    """Scalars of a network by the numbers of their address, see `models.detector.Differentiable`."""

    def address(self, target: Target, shape: InputShape, /) -> tuple[Any, tuple[int, ...]]: ...
    def pinned(self, x: Tensor, kind: Any, index: Tensor, /, *, entered: bool = False) -> Tensor: ...


class Captured:
    """A function of static tensors: as a CUDA graph where there is CUDA, else called as it is.

    Calls return the same tensors each time. `refused`: why there is no graph on a CUDA device, if so.
    """

    def __init__(self, run: Callable[[], tuple[Tensor, ...]], device: torch.device, pool: Any = None) -> None:
        self.run: Callable[[], tuple[Tensor, ...]] | None = run
        self.graph, self.refused = None, ""
        self.outputs: tuple[Tensor, ...] = ()
        if device.type != "cuda":
            return
        stream, own = torch.cuda.Stream(device), torch.cuda.current_stream(device)
        stream.wait_stream(own)
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                run()
        own.wait_stream(stream)
        torch.cuda.synchronize(device)
        graph = torch.cuda.CUDAGraph()
        try:
            # Other threads copy finished maps meanwhile, which must not end the capture.
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                self.outputs = run()
        except RuntimeError as error:
            torch.cuda.set_stream(own)  # a capture that fails leaves its own in place
            torch.cuda.synchronize(device)
            cause = error.__context__ or error  # what ended the capture, not that it has ended
            if isinstance(cause, torch.OutOfMemoryError):
                raise cause from None
            self.refused = str(cause).splitlines()[0]
        else:
            self.graph, self.run = graph, None

    def __call__(self) -> tuple[Tensor, ...]:
        if self.run is not None:
            return self.run()
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


class Program:
    """F, and its gradient, at `rows` static places `x` of the static addresses `index`, in units (scale, offset)."""

    def __init__(self, network: Network, shape: Shape, rows: int, device: torch.device, pool: Any) -> None:
        self.network, self.shape = network, shape
        x = torch.zeros(rows, *shape.place, dtype=shape.dtype, device=device)
        self.x = x.contiguous(memory_format=torch.channels_last)
        self.index = torch.zeros(rows, shape.columns, dtype=torch.int64, device=device)
        self.unit = torch.ones(rows, 2, device=device)
        self._run = Captured(self.run, device, pool)
        self.refused = self._run.refused

    def run(self) -> tuple[Tensor, ...]:
        shape = self.shape
        with torch.set_grad_enabled(shape.gradient):
            x = self.x.detach().requires_grad_(shape.gradient)
            values = self.network.pinned(x, shape.kind, self.index, entered=shape.field == "entered").float()
            values = values * self.unit[:, 0] + self.unit[:, 1]
            if not shape.gradient:
                return (values,)
            return values.detach(), torch.autograd.grad(values.sum(), x)[0]

    def __call__(self) -> tuple[Tensor, ...]:
        return self._run()


class Ends:
    """The ends of all paths in flight, (paths, c, height, width) each: places are made of them without a copy a row."""

    def __init__(self) -> None:
        self.x = self.b = torch.empty(0)
        self._slots: weakref.WeakKeyDictionary[Segment, int] = weakref.WeakKeyDictionary()
        self._free: list[int] = []

    def slot(self, path: Segment) -> int:
        """Where the ends of `path` lie, as long as it lives."""
        slot = self._slots.get(path)
        if slot is None:
            if not self._free:
                self._grow(path.x)
            slot = self._slots[path] = self._free.pop()
            self.x[slot], self.b[slot] = path.x, path.b
            weakref.finalize(path, self._free.append, slot)
        return slot

    def _grow(self, like: Tensor) -> None:
        old = len(self.x)
        more = max(FEWEST_ENDS, old)
        added = like.new_zeros(more, *like.shape).contiguous(memory_format=torch.channels_last)
        self.x, self.b = (torch.cat([e, added]) if old else added.clone() for e in (self.x, self.b))
        self._free += range(old, old + more)

    def places(self, slots: Tensor, alpha: Tensor) -> Tensor:
        """b + α (x − b) of each row."""
        return torch.lerp(self.b[slots], self.x[slots], alpha[:, None, None, None])

    def differences(self, slots: Tensor) -> Tensor:
        """x − b of each row."""
        return self.x[slots] - self.b[slots]


@dataclass
class Programs:
    """Runs rows of points as programs of `rows` rows. `network_of`: the network in an arithmetic, if it has one."""

    network_of: Callable[[torch.dtype], Network | None]
    device: torch.device
    rows: int
    made: dict[Shape, Program] = field(default_factory=dict)
    _ends: dict[torch.Size, Ends] = field(default_factory=dict)
    _pool: Any = None

    def takes(self, point: Point) -> bool:
        """Whether rows of `point` can be those of a program."""
        plain = point.layer is None and point.channels is None and point.hidden is None
        return plain and point.field in ("value", "entered") and self.network_of(point.dtype) is not None

    def split(self, point: Point) -> list[Row]:
        """A row a target."""
        return [Row(point, (k,)) for k in range(len(point.targets))]

    def kind(self, row: Row) -> Hashable:
        """What all rows of a pack have in common."""
        return self._shape(row), row.point.combine is None, row.point.picture is None

    def rows_of(self, row: Row) -> int:
        """Rows of a pack: always the same."""
        return self.rows

    def _shape(self, row: Row) -> Shape:
        """The program that `row` goes into."""
        point, network = row.point, self._network(row.point.dtype)
        kind, index = network.address(point.targets[row.ks[0]], point.path.shape)
        return Shape(point.field, kind, len(index), point.gradient, point.dtype, point.path.x.shape)

    def _network(self, dtype: torch.dtype) -> Network:
        network = self.network_of(dtype)
        assert network is not None
        return network

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
        """Make the program that `row` goes into, unless it has been."""
        shape = self._shape(row)
        if self._pool is None and self.device.type == "cuda":
            self._pool = torch.cuda.graph_pool_handle()
        if shape not in self.made:
            self._make_room(shape.place)
            self.made[shape] = Program(self._network(shape.dtype), shape, self.rows, self.device, self._pool)

    def run(self, pack: Sequence[Row], room: Room) -> Ran:
        """Values, slopes and gradients of a `pack`, all for one program that has been made, on their way."""
        shape, first = self._shape(pack[0]), pack[0].point
        ends = self._ends.setdefault(shape.place, Ends())
        values, gradients, slots = self._launched(self.made[shape], ends, pack)
        slopes = torch.zeros_like(values, dtype=torch.float64)
        held: list[Held | None] = [None] * len(pack)
        if gradients is not None:
            gradients = gradients.float()
            if first.combine is None:
                differences = ends.differences(slots)
                kept: Any = first.path.products(gradients, differences)
                slopes = first.path.slopes(kept, differences)
            else:
                kept = [row.point.kept(one) for row, one in zip(pack, gradients, strict=False)]
            held = [room.hold(one, needed=row.point.needed) for one, row in zip(kept, pack, strict=False)]
        return Ran(values[None, : len(pack)], slopes[None, : len(pack)], [held])

    def _launched(self, program: Program, ends: Ends, pack: Sequence[Row]) -> tuple[Tensor, Tensor | None, Tensor]:
        """(rows,) values, gradients (rows, …), which hold until the program runs again, and path ends (rows,)."""
        full = [*pack, *[pack[0]] * (self.rows - len(pack))]
        points, targets = [row.point for row in full], [row.point.targets[row.ks[0]] for row in full]
        numbers = [
            (ends.slot(point.path), *program.network.address(target, point.path.shape)[1])
            for point, target in zip(points, targets, strict=True)
        ]
        reals = [(point.alpha, target.scale, target.offset) for point, target in zip(points, targets, strict=True)]
        whole, parts = self._sent(torch.tensor(numbers)), self._sent(torch.tensor(reals, dtype=torch.float32))
        slots = whole[:, 0]
        if any(point.picture is not None for point in points):
            program.x.copy_(torch.stack([point.place() for point in points]))
        else:
            program.x.copy_(ends.places(slots, parts[:, 0]))
        program.index.copy_(whole[:, 1:])
        program.unit.copy_(parts[:, 1:])
        values, *gradients = program()
        return values.clone(), gradients[0] if gradients else None, slots

    def _make_room(self, place: torch.Size) -> None:
        """Free the programs whose place was new longest ago, where there are MOST_PLACES other than `place`."""
        others = list(dict.fromkeys(known.place for known in self.made if known.place != place))
        for old in others[: max(0, len(others) + 1 - MOST_PLACES)]:
            for known in [known for known in self.made if known.place == old]:
                del self.made[known]

    def _sent(self, table: Tensor) -> Tensor:
        if self.device.type != "cuda":
            return table.to(self.device)
        return table.pin_memory().to(self.device, non_blocking=True)
