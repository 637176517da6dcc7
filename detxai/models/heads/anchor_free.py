"""Ultralytics' `Detect` and its kin: v3u, v5u, v6, v8, v9, 11, 12 (one2many), v10, 26 (one2one), OBB."""

from __future__ import annotations

import copy
import inspect
import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from detxai.errors import ModelError
from detxai.models.bounds import Bounds
from detxai.models.detector import Address, Candidates, DetectorInfo, Pin, at_pins, levels_of, scaled
from detxai.models.trunk import Trunk, freeze, fuse, return_pages
from detxai.models.windows import Windows
from detxai.values import Checkpoint, InputShape, Target
from detxai.vocabulary import EDGES

#: Cells of the coarsest map on which it is seen whether a head is sparse: a few, so that all layers run.
SPARE_CELLS = 4


def _own(head: Any) -> str:
    """The branch that `predict` of the installed ultralytics reports with where it is not told otherwise.

    Since 8.4.142 that is one2many with NMS, unless fusing has left one2one alone; before, what the file says.
    """
    from ultralytics.nn.autobackend import AutoBackend

    chosen = "end2end" in inspect.signature(AutoBackend.__init__).parameters
    one2one = getattr(head, "end2end", False) and not (chosen and getattr(head, "cv2", None) is not None)
    return "one2one" if one2one else "one2many"


class AnchorFree:
    """One class branch and one box branch a level, one prediction a cell.

    `branch`: `one2many` (needs NMS) or `one2one` (end to end); None takes the one the model itself reports with.
    """

    def __init__(self, checkpoint: Checkpoint, branch: str | None = None) -> None:
        self.module = freeze(fuse(self.prepared(checkpoint.module)))
        *layers, head = self.module.model  # type: ignore[misc]
        self.head: Any = head
        self.branch = branch or _own(head)
        heads = self._heads(self.branch)
        self.class_heads, self.box_heads, self.angle_heads = heads
        self.trunk = Trunk(layers)
        self.feeds: list[int] = list(head.f)
        self.strides = [int(s) for s in head.stride]
        self.parts: dict[str, Any] = {"class": heads[0], "box": heads[1], "angle": heads[2]}
        self.info = DetectorInfo.of(
            checkpoint,
            self.branch,
            ("class", *EDGES),
            sparse=self._sparse(checkpoint.name),
            stride=max(32, *self.strides),
            rotated=bool(self.angle_heads),
            channels=self.trunk.channels,
        )

    def _sparse(self, name: str) -> bool:
        """Whether all parts of the head can be evaluated on windows; `name` of the model."""
        side, like = max(self.strides) * SPARE_CELLS, torch.zeros(1)
        kinds = [kind for kind, part in self.parts.items() if part is not None]
        with self.trunk.whole(), Bounds(name, side**2):
            for kind, level in itertools.product(kinds, range(len(self.feeds))):
                if not self.trunk.around(self.feeds[level], self.parts[kind][level], (side, side), like):
                    return False
        return_pages()
        return True

    def _windows(self, kind: str, level: int, shape: InputShape, like: Tensor) -> Windows:
        windows = self.trunk.around(self.feeds[level], self.parts[kind][level], shape, like)
        assert windows is not None, "a sparse head reads a bounded part of its map"
        return windows

    @staticmethod
    def prepared(model: Any) -> nn.Module:
        """The model before it is fused: where a family needs another shape, this is the place."""
        return model  # type: ignore[no-any-return]

    def _heads(self, branch: str) -> tuple[nn.ModuleList, nn.ModuleList, nn.ModuleList | None]:
        prefix = "one2one_" if branch == "one2one" else ""
        parts = [getattr(self.head, f"{prefix}{name}", None) for name in ("cv3", "cv2")]
        if branch not in ("one2many", "one2one") or any(part is None for part in parts):
            raise ModelError(f"This {type(self.head).__name__} head has no {branch} branch.", "Leave --head out.")
        angle = getattr(self.head, f"{prefix}cv4", None) if hasattr(self.head, "ne") else None
        return parts[0], parts[1], angle  # type: ignore[return-value]

    # -- dense ----------------------------------------------------------------------------------

    def predict(self, x: Tensor) -> list[Candidates]:
        features = self._features(x, range(len(self.feeds)))
        shapes = [(f.shape[-2], f.shape[-1]) for f in features.values()]
        logits, edges, rotated = self._dense(features)
        levels = levels_of(shapes)
        return [
            Candidates(
                edges[row],
                logits[row].sigmoid(),
                logits[row],
                levels,
                None if rotated is None else rotated[row],
                end_to_end=self.branch == "one2one",
            )
            for row in range(len(x))
        ]

    def scores(self, x: Tensor, classes: Sequence[int]) -> tuple[Tensor, Tensor]:
        logits, edges, _ = self._dense(self._features(x, range(len(self.feeds))))
        return edges, logits[..., list(classes)].sigmoid()

    def features(self, x: Tensor) -> list[Tensor]:
        """The feature maps that enter the head, one a level: (batch, c, height, width)."""
        return list(self._features(x, range(len(self.feeds))).values())

    def logits(self, features: Sequence[Tensor]) -> Tensor:
        """(batch, A, classes) class logits of all cells from the head's `features`."""
        return self._dense(dict(enumerate(features)))[0]

    def _features(self, x: Tensor, levels: Sequence[int]) -> dict[int, Tensor]:
        outputs = self.trunk(x, {self.feeds[i] for i in levels})
        return {i: outputs[self.feeds[i]] for i in levels}

    def _dense(self, features: dict[int, Tensor]) -> tuple[Tensor, Tensor, Tensor | None]:
        """(B, A, classes) logits, (B, A, 4) boxes, (B, A, 5) rotated boxes or None, over all cells of all levels."""
        logits: list[Tensor] = []
        edges: list[Tensor] = []
        rotated: list[Tensor | None] = []
        for level, feature in features.items():
            flat: list[Any] = [
                None if heads is None else heads[level](feature.float()).flatten(2).transpose(1, 2).float()
                for heads in (self.class_heads, self.box_heads, self.angle_heads)
            ]
            height, width = feature.shape[-2:]
            cells = torch.cartesian_prod(*(torch.arange(n, device=feature.device) for n in (height, width)))
            box, turned = self._decode(flat[1], flat[2], cells, level)
            logits.append(flat[0])
            edges.append(box)
            rotated.append(turned)
        turned_all = torch.cat([r for r in rotated if r is not None], 1) if self.angle_heads else None
        return torch.cat(logits, 1), torch.cat(edges, 1), turned_all

    def _decode(
        self, raw: Tensor | None, angle: Tensor | None, cells: Tensor, level: int
    ) -> tuple[Tensor, Tensor | None]:
        """Boxes (…, 4) xyxy and rotated boxes (…, 5) in letterbox pixels from raw (…, 4 reg_max) at `cells` (…, 2)."""
        assert raw is not None
        bins = self.head.reg_max
        sides = raw.unflatten(-1, (4, bins))
        if bins > 1:
            sides = (sides.softmax(-1) * torch.arange(bins, device=raw.device, dtype=raw.dtype)).sum(-1)
        else:
            sides = sides.squeeze(-1)
        near, far = sides.split(2, -1)
        centre = cells.flip(-1).to(raw.dtype) + 0.5
        stride = self.strides[level]
        if angle is None:
            return torch.cat([centre - near, centre + far], -1) * stride, None
        theta = self._theta(angle)
        cos, sin = theta.cos(), theta.sin()
        dx, dy = ((far - near) / 2).split(1, -1)
        middle = centre + torch.cat([dx * cos - dy * sin, dx * sin + dy * cos], -1)
        size = near + far
        w, h = size.split(1, -1)
        half = torch.cat([w * cos.abs() + h * sin.abs(), w * sin.abs() + h * cos.abs()], -1) / 2
        hull = torch.cat([middle - half, middle + half], -1) * stride
        return hull, torch.cat([middle * stride, size * stride, theta], -1)

    def _theta(self, raw: Tensor) -> Tensor:
        from ultralytics.nn.modules import head as heads

        if isinstance(self.head, getattr(heads, "OBB26", ())):
            return raw
        return (raw.sigmoid() - 0.25) * torch.pi

    def layer_of(self, target: Target) -> int:
        return self.feeds[target.level]

    # -- pinned ---------------------------------------------------------------------------------

    def values(self, x: Tensor, pins: Sequence[tuple[int, Target]]) -> Tensor:
        return self._values(x, (x.shape[-2], x.shape[-1]), pins) if self.info.sparse else self.full_values(x, pins)

    def entered(self, z: Tensor, pins: Sequence[tuple[int, Target]]) -> Tensor:
        return self._values(z, self.trunk.shape_before(z), pins, entered=True)

    def _values(
        self, x: Tensor, shape: InputShape, pins: Sequence[tuple[int, Target]], *, entered: bool = False
    ) -> Tensor:
        wanted = [Pin(*pin) for pin in pins]
        groups: dict[tuple[int, str], list[int]] = {}
        for i, pin in enumerate(wanted):
            groups.setdefault((pin.target.level, "class" if pin.target.kind == "class" else "box"), []).append(i)
        turned = ("angle",) if self.angle_heads else ()
        windows = {
            (level, part): self._windows(part, level, shape, x)
            for level, kind in sorted(groups)
            for part in ((kind, *turned) if kind == "box" else (kind,))
        }
        outputs = self.trunk(x, frozenset().union(*(w.wanted for w in windows.values())), entered)
        result: list[Tensor | None] = [None] * len(wanted)
        for (level, kind), group in sorted(groups.items()):
            width, start = shape[1] // self.strides[level], self._start(level, shape)
            cells = [divmod(wanted[i].target.anchor - start, width) for i in group]
            rows = [wanted[i].row for i in group]
            raw = windows[level, kind](outputs, rows, cells).float()
            if kind == "class":
                scalars = raw[range(len(group)), [wanted[i].target.class_id for i in group]]
            else:
                angle = windows[level, "angle"](outputs, rows, cells).float() if turned else None
                edges, _ = self._decode(raw, angle, torch.tensor(cells, device=x.device), level)
                scalars = edges[range(len(group)), [EDGES.index(wanted[i].target.kind) for i in group]]
            for i, scalar in zip(group, scalars.unbind(), strict=True):
                result[i] = scalar
        return scaled(torch.stack(result), wanted)  # type: ignore[arg-type]

    def address(self, target: Target, shape: InputShape) -> Address:
        part = "box" if target.kind in EDGES else target.kind
        channel = EDGES.index(target.kind) if part == "box" else target.class_id
        if not self.info.sparse:
            return (0, part), (target.anchor, 0, channel, target.other or 0)
        width = shape[1] // self.strides[target.level]
        row, column = divmod(target.anchor - self._start(target.level, shape), width)
        return (target.level, part), (row, column, channel, target.other or 0)

    def pinned(self, x: Tensor, kind: tuple[int, str], index: Tensor, *, entered: bool = False) -> Tensor:
        level, part = kind
        own, (cells, channel, other) = torch.arange(len(x), device=x.device), index.split((2, 1, 1), 1)
        if not self.info.sparse:
            logits, edges, _ = self._dense(self._features(x, range(len(self.feeds))))
            pinned = (edges if part == "box" else logits)[own, cells[:, 0]]
        else:
            shape = self.trunk.shape_before(x) if entered else (x.shape[-2], x.shape[-1])
            names = ("box", *(("angle",) if self.angle_heads else ())) if part == "box" else ("class",)
            windows = [self._windows(name, level, shape, x) for name in names]
            outputs = self.trunk(x, frozenset().union(*(w.wanted for w in windows)), entered)
            raw = [w.at(outputs, cells).float() for w in windows]
            pinned = raw[0]
            if part == "box":
                pinned, _ = self._decode(raw[0], raw[1] if self.angle_heads else None, cells, level)
        values = pinned.gather(1, channel)[:, 0]
        return values - pinned.gather(1, other)[:, 0] if part == "contrast" else values

    def in_precision(self, dtype: torch.dtype, shape: InputShape) -> AnchorFree:
        twin = copy.deepcopy(self)
        if self.info.sparse:
            like = torch.zeros(1, device=next(self.module.parameters()).device)
            for kind in (kind for kind, part in self.parts.items() if part is not None):
                for level in range(len(self.feeds)):  # how far layers reach is seen in float32
                    twin._windows(kind, level, shape, like)
        twin.trunk.to(dtype)
        return twin

    def _start(self, level: int, shape: InputShape) -> int:
        return sum((shape[0] // stride) * (shape[1] // stride) for stride in self.strides[:level])

    def full_values(self, x: Tensor, pins: Sequence[tuple[int, Target]]) -> Tensor:
        wanted = [Pin(*pin) for pin in pins]
        logits, edges, _ = self._dense(self._features(x, range(len(self.feeds))))
        return at_pins(logits, edges, wanted)
