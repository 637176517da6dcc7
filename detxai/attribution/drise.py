"""D-RISE (Petsiuk et al. 2021, arXiv:2006.03204): random masks, and how alike the detections stay.

Each mask leaves parts of the image and replaces the others by the baseline; the similarity of a detection is
max over what is then detected of IoU × score of its class. Pixels whose presence goes with similarity matter.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from detxai.attribution.points import Ask, Point, Segment, TargetMap
from detxai.values import InputShape, Target

#: Cells of the coarse grid a side, and the share of it that is kept.
GRID, KEPT = 16, 0.5
#: Masks between two looks at the map, and the correlation with the map of endless masks at which it has settled.
ROUND, SETTLED = 64, 0.8


def masks(count: int, shape: InputShape, generator: torch.Generator) -> Tensor:
    """(count, 1, rows, columns) float32 in [0, 1]: coarse random cells, smoothly enlarged and randomly shifted.

    The cells are square: there are `GRID` along the longer side.
    """
    rows, columns = shape
    cell = -(-max(shape) // GRID)
    down, across = (GRID + 1 if side == max(shape) else -(-side // cell) + 1 for side in shape)
    coarse = (torch.rand(count, 1, down, across, generator=generator) < KEPT).float()
    large = interpolate(coarse, size=(down * cell, across * cell), mode="bilinear", align_corners=False)
    shifts = torch.randint(0, cell, (count, 2), generator=generator).tolist()
    return torch.stack([m[:, y : y + rows, x : x + columns] for m, (y, x) in zip(large, shifts, strict=True)])


def drise(path: Segment, targets: Sequence[Target], *, max_masks: int = 1024, seed: int = 0) -> Ask:
    """Coroutine: D-RISE maps (arXiv:2006.03204) of `targets` (each with its `box`), what does not matter near zero.

    The class is compared by its own score, which every export has and which tells `as_class` targets apart; the paper
    takes the cosine of all scores. Stops when the maps of all targets have settled, or after `max_masks`.
    """
    generator = torch.Generator().manual_seed(seed)
    device, shape = path.x.device, path.shape
    (whole,) = yield [Point(path, 1.0, tuple(targets), False, field="similarity")]
    halves = [_Sums.empty(len(targets), shape, device) for _ in range(2)]
    count, settled = 0, False
    while count < max_masks and not settled:
        batch = masks(min(ROUND, max_masks - count), shape, generator).to(device)
        pictures = [torch.lerp(path.b, path.x, mask) for mask in batch]
        replies = yield [Point(path, 1.0, tuple(targets), False, picture=p, field="similarity") for p in pictures]
        similarity = torch.tensor([r.values for r in replies], dtype=torch.float64, device=device)
        for i, half in enumerate(halves):
            half.add(batch[i::2, 0].double(), similarity[i::2])
        count += len(pictures)
        settled = count > 1 and all(
            _reliability(a, b) > SETTLED for a, b in zip(halves[0].maps(), halves[1].maps(), strict=True)
        )
    note = () if settled else (f"not settled after {count} masks",)
    maps = (halves[0] + halves[1]).maps()
    return [TargetMap(target, maps[k], whole.values[k], None, count, notes=note) for k, target in enumerate(targets)]


@dataclass
class _Sums:
    """Over `count` masks: of the masks (rows, columns), of similarities (targets,), and of their products."""

    count: int
    presence: Tensor
    mass: Tensor
    weighted: Tensor

    @classmethod
    def empty(cls, targets: int, shape: InputShape, device: torch.device) -> _Sums:
        zeros = partial(torch.zeros, dtype=torch.float64, device=device)
        return cls(0, zeros(shape), zeros(targets), zeros(targets, *shape))

    def add(self, flat: Tensor, similarity: Tensor) -> None:
        """Count in masks `flat` (n, rows, columns) and what was similar under each, (n, targets)."""
        self.count += len(flat)
        self.presence += flat.sum(0)
        self.mass += similarity.sum(0)
        self.weighted += torch.einsum("nk,nhw->khw", similarity, flat)

    def __add__(self, other: _Sums) -> _Sums:
        return _Sums(
            self.count + other.count,
            self.presence + other.presence,
            self.mass + other.mass,
            self.weighted + other.weighted,
        )

    def maps(self) -> Tensor:
        """(targets, rows, columns): the covariance of every pixel's presence with similarity."""
        return self.weighted / self.count - (self.mass / self.count)[:, None, None] * (self.presence / self.count)


def _reliability(a: Tensor, b: Tensor) -> float:
    """The correlation with the map of endless masks, of one made of two independent halves (Spearman & Brown 1910)."""
    r = float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1])
    return math.sqrt(max(2 * r / (1 + r), 0.0)) if r > 0 else 0.0
