"""The last layers of a network, run on windows around pinned cells only: the same numbers for next to nothing.

A prediction reads a few cells of its feature map, these read a few more of the maps before, and so on, until the
windows are as large as the maps: down to there, layers run as a whole. Windows lie within their maps, so that what a
layer adds beyond a map's border is added at that border only; at its other sides a window is larger than what is read
from it by the reach of the layer, so that what a layer adds there is never read.

How far a layer reaches is not assumed but measured, by what a NaN at one cell of its input makes a NaN of.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from detxai.errors import memory_refused

#: Cells of a probed output, more where a layer reaches to the border of fewer; and inputs that are probed side by side:
#: strides up to as many are seen.
PROBES, OFFSETS = (16, 32), 4
#: Above this share of its map a window saves too little to be worth its cutting.
MOST_SHARE = 0.4
#: Packages whose layers compute each cell from its surroundings alone, wherever it lies, unless a probe tells more.
KNOWN = ("torch.nn.", "ultralytics.nn.", "detxai.")
#: The head, as a consumer of layers.
HEAD = math.inf

Ends = tuple[NDArray[np.int64], NDArray[np.int64]]
#: Channels, height and width of a layer's map.
MapShape = tuple[int, int, int]


@dataclass(frozen=True)
class Reach:
    """Output cell o of a layer reads its inputs from floor(o `scale`) + `low` to floor(o `scale`) + `high`."""

    scale: Fraction
    low: int
    high: int

    @property
    def unit(self) -> int:
        """Windows of the output begin and end at multiples of this: where a cell of the input does."""
        return max(1, int(1 / self.scale))

    @property
    def before(self) -> int:
        """Output cells at the beginning of a window that are not what they would be in the whole map."""
        return math.ceil(max(-self.low, 0) / self.scale)

    @property
    def after(self) -> int:
        """The same at its end."""
        return math.ceil(max(self.high - max(math.ceil(self.scale) - 1, 0), 0) / self.scale)


@torch.no_grad()
def reach(
    layer: Callable[[Any], Any], inputs: Sequence[tuple[int, Fraction]], like: Tensor, *, many: bool = False
) -> Reach | None:
    """How far `layer` reaches, over all its `inputs` (channels, cells an output cell), `many` of them in a list.

    None where that is without bound (attention, pooling of the whole map), differs in scale from input to input, or
    is nobody's to know: layers of other packages may follow the data or the place (deformable convolutions, position
    codes), and compiled code that reads addresses from its input must not meet a NaN. Such layers run whole.
    Tensors are made `like` one of the network's.
    """
    parts = layer.modules() if isinstance(layer, nn.Module) else ()
    if not all(type(part).__module__.startswith(KNOWN) for part in parts):
        return None
    scales = {scale for _, scale in inputs}
    if len(scales) > 1:
        return None
    widths, scale = [channels for channels, _ in inputs], min(scales)
    probed = (_probed(layer, widths, scale, like, cells, many=many) for cells in PROBES)
    return next((reached for reached in probed if reached is not None), None)


def _probed(
    layer: Callable[[Any], Any], inputs: Sequence[int], scale: Fraction, like: Tensor, cells: int, *, many: bool
) -> Reach | None:
    """`reach` as seen on an output of so many `cells` a side, None where it is not; `inputs`: their channels."""
    side = cells * scale
    if side.denominator > 1 or (scale > 1 and scale.denominator > 1):
        return None
    low, high = 0, 0
    for probed in range(len(inputs)):
        maps = [like.new_ones(OFFSETS, channels, int(side), int(side)) for channels in inputs]
        places = [(int(side) - OFFSETS) // 2 + k for k in range(OFFSETS)]
        for k, place in enumerate(places):
            maps[probed][k, :, place, place] = torch.nan
        try:
            output = layer(maps if many else maps[0])
        except (RuntimeError, ValueError, IndexError, AssertionError) as error:
            if memory_refused(error):
                raise
            return None
        if not isinstance(output, Tensor) or output.shape[2:] != (cells, cells):
            return None
        hit = output.isnan().any(1)
        for k, place in enumerate(places):
            for axis in (0, 1):
                marked = hit[k].any(axis).nonzero()[:, 0].tolist()
                if marked and (marked[0] == 0 or marked[-1] == cells - 1):
                    return None
                away = [place - math.floor(scale * cell) for cell in marked]
                low, high = min([low, *away]), max([high, *away])
    return Reach(scale, low, high)


@dataclass(frozen=True, eq=False)
class Step:
    """One layer on windows: its output's begin at `starts` of the pinned cell and are `size` (rows, columns) cells.

    `starts`: (cells of the longer side, 2): the row for a pin in each row, the column for one in each column.
    `sources`: what it reads, by number, `many` in a list; its input's windows are the output's times `scale`.
    """

    number: float
    layer: Any
    many: bool
    sources: tuple[int, ...]
    scale: Fraction
    starts: Tensor
    size: tuple[int, int]


@dataclass(frozen=True, eq=False)
class Windows:
    """A head, with the layers below it that can, on windows around cells of the map that it reads.

    `steps` in order, the head last; `wanted`: the layers whose whole outputs they read.
    """

    steps: tuple[Step, ...]
    wanted: frozenset[int] = field(init=False)

    def __post_init__(self) -> None:
        made = {step.number for step in self.steps}
        object.__setattr__(self, "wanted", frozenset(j for step in self.steps for j in step.sources if j not in made))

    def __call__(self, outputs: Mapping[int, Tensor], rows: list[int], cells: list[tuple[int, int]]) -> Tensor:
        """(n, channels) of the head at `cells` (row, column) of batch items `rows`; `outputs`: what is `wanted`.

        Cells are taken in groups of the batch size, the last one filled up: fixed shapes give every cell the same
        bits whatever it shares a batch with. Without gradients a cell that is asked for again costs nothing.
        """
        if not torch.is_grad_enabled():
            places = list(dict.fromkeys(zip(rows, cells, strict=True)))
            if len(places) < len(rows):
                known = {place: i for i, place in enumerate(places)}
                values = self(outputs, [row for row, _ in places], [cell for _, cell in places])
                return values[[known[place] for place in zip(rows, cells, strict=True)]]
        group = len(next(iter(outputs.values())))
        spare = -len(rows) % group
        rows, cells = [*rows, *rows[:1] * spare], [*cells, *cells[:1] * spare]
        device = next(iter(outputs.values())).device
        at, batch = torch.tensor(cells, device=device), torch.tensor(rows, device=device)
        parts = [self.at(outputs, at[i : i + group], batch[i : i + group]) for i in range(0, len(rows), group)]
        return torch.cat(parts)[: len(rows) - spare]

    def at(self, outputs: Mapping[int, Tensor], at: Tensor, batch: Tensor | None = None) -> Tensor:
        """(n, channels) of the head at the cells `at` (n, 2) of batch items `batch` (n,); None: of item i the cell i.

        Shapes are those of the tensors given, whatever is in them, and nothing waits for the device.
        """
        device = at.device
        own = torch.arange(len(at), device=device)
        made: dict[float, tuple[Tensor, Tensor]] = {}
        for step in self.steps:
            starts = step.starts.gather(0, at)
            parts = []
            for j in step.sources:
                corner = _times(starts, step.scale)
                whole, row = outputs.get(j), batch
                if j in made:
                    (whole, begin), row = made[j], None if batch is None else own
                    corner = corner - begin
                assert whole is not None
                height, width = (int(cells * step.scale) for cells in step.size)
                parts.append(_cut(whole, row, corner, height, width))
            if step.number == HEAD:  # it is cheap, and logits are its differences
                with torch.autocast(device.type, enabled=False):
                    output: Tensor = step.layer(parts[0].float())
                y, x = (at - starts).unbind(1)
                if batch is None:
                    where = (y * output.shape[3] + x)[:, None, None].expand(-1, output.shape[1], 1)
                    return output.flatten(2).gather(2, where)[..., 0]
                return output[own, :, y, x]
            made[step.number] = step.layer(parts if step.many else parts[0]), starts
        raise AssertionError("the last step is the head")


class _Taken(torch.autograd.Function):
    """x.gather(1, cells) of x (n, cells, channels), none of which comes twice: so gradients are put back, not added."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cells: Tensor) -> Tensor:
        ctx.shape = x.shape
        ctx.save_for_backward(cells)
        return x.gather(1, cells)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (cells,) = ctx.saved_tensors
        return gradients[0].new_zeros(ctx.shape).scatter_(1, cells, gradients[0]), None


def _times(starts: Tensor, scale: Fraction) -> Tensor:
    return starts * scale.numerator // scale.denominator


def _cut(whole: Tensor, rows: Tensor | None, corner: Tensor, height: int, width: int) -> Tensor:
    """(n, channels, height, width) of `whole` (batch, channels, h, w): from `corner` (n, 2) of the items `rows` (n,).

    None: of every item one. Then no cell comes twice, and the backward pass neither sorts nor adds.
    """
    span = torch.arange(max(height, width), device=corner.device)
    ys, xs = corner[:, :1] + span[:height], corner[:, 1:] + span[:width]
    if rows is None:
        n, channels, _, across = whole.shape
        cells = (ys[:, :, None] * across + xs[:, None, :]).view(n, -1, 1).expand(-1, -1, channels)
        flat: Tensor = _Taken.apply(whole.permute(0, 2, 3, 1).flatten(1, 2), cells)
        return flat.view(n, height, width, channels).permute(0, 3, 1, 2)
    return whole.permute(0, 2, 3, 1)[rows[:, None, None], ys[:, :, None], xs[:, None, :]].permute(0, 3, 1, 2)


def placed(wanted: Ends, reach: Reach, side: int) -> tuple[NDArray[np.int64], int]:
    """(starts, size) of the windows in a layer's output, `side` cells long, from which `wanted` can be read."""
    unit = reach.unit
    starts = (wanted[0] - reach.before) // unit * unit
    ends = -((-wanted[1] - reach.after) // unit) * unit
    size = min(int((ends - starts).max()), side)
    return np.clip(starts, 0, side - size), size


def around(trunk: Any, feed: int, head: nn.Module, maps: Mapping[int, MapShape], like: Tensor) -> Windows | None:
    """The windows of `head` over the layer `feed` of a `trunk`, and of the layers that need not run as a whole.

    `maps`: the shape of every layer's. None where the head's reach has no bound.
    """
    channels, *sides = maps[feed]
    one = Fraction(1)
    reached = trunk.reach_of_head(head, channels, like)
    if reached is None or reached.scale != 1:
        return None
    cells = [np.arange(side, dtype=np.int64) for side in sides]
    places = [placed((own, own + 1), reached, side) for own, side in zip(cells, sides, strict=True)]
    steps = [_step(HEAD, head, (feed,), one, places, like.device, many=False)]
    wanted = {feed: [(starts, starts + size) for starts, size in places]}
    users = {i: {k for k in trunk.ancestors[feed] if i in trunk.sources[k]} for i in trunk.ancestors[feed]}
    users[feed].add(HEAD)
    for i in sorted(users, reverse=True):
        known = trunk.reach_of(i, maps, like) if users[i] <= {step.number for step in steps} else None
        if known is None:
            continue
        _, *sides = maps[i]
        places = [placed(ends, known, side) for ends, side in zip(wanted[i], sides, strict=True)]
        if math.prod(size for _, size in places) > MOST_SHARE * math.prod(sides):
            continue
        if any(side % known.unit for side in sides):
            continue
        layer, sources = trunk.layers[i], trunk.sources[i]
        steps.append(_step(i, layer, sources, known.scale, places, like.device, many=not isinstance(layer.f, int)))
        read = [
            tuple(ends * known.scale.numerator // known.scale.denominator for ends in (starts, starts + size))
            for starts, size in places
        ]
        for j in sources:
            wanted[j] = [
                (np.minimum(low, begin), np.maximum(high, end))
                for (low, high), (begin, end) in zip(wanted.get(j, read), read, strict=True)
            ]
    return Windows(tuple(reversed(steps)))


def _step(
    number: float,
    layer: Any,
    sources: tuple[int, ...],
    scale: Fraction,
    places: Sequence[tuple[NDArray[np.int64], int]],
    device: torch.device,
    *,
    many: bool,
) -> Step:
    """The step of a layer whose windows are `placed` so, by rows and by columns."""
    longest = max(len(starts) for starts, _ in places)
    starts = np.stack([np.pad(starts, (0, longest - len(starts))) for starts, _ in places], 1)
    (_, height), (_, width) = places
    return Step(number, layer, many, sources, scale, torch.from_numpy(starts).to(device), (height, width))
