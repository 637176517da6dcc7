"""D-RISE (Petsiuk et al. 2021, arXiv:2006.03204): random masks, and how alike the detections stay.

Each mask leaves parts of the image and replaces the others by the baseline; the similarity of a detection is
max over what is then detected of IoU × score of its class. Pixels whose presence goes with similarity matter.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from detxai.attribution.path import Ask, Path, Point, TargetMap
from detxai.data import Target

#: Cells of the coarse grid a side, and the share of it that is kept.
GRID, KEPT = 16, 0.5
#: Masks between two looks at the map, and the correlation of two looks at which it has settled.
ROUND, SETTLED = 64, 0.985


def masks(count: int, size: int, generator: torch.Generator) -> Tensor:
    """(count, 1, size, size) float32 in [0, 1]: coarse random cells, smoothly enlarged and randomly shifted."""
    cell = -(-size // GRID)
    coarse = (torch.rand(count, 1, GRID + 1, GRID + 1, generator=generator) < KEPT).float()
    large = interpolate(coarse, size=(GRID + 1) * cell, mode="bilinear", align_corners=False)
    shifts = torch.randint(0, cell, (count, 2), generator=generator).tolist()
    return torch.stack([m[:, y : y + size, x : x + size] for m, (y, x) in zip(large, shifts, strict=True)])


def drise(path: Path, targets: Sequence[Target], *, max_masks: int = 1024, seed: int = 0) -> Ask:
    """Coroutine: maps of `targets` (each with its `box`), centred so that what does not matter is near zero.

    Stops when the maps of all targets have settled, or after `max_masks`.
    """
    generator = torch.Generator().manual_seed(seed)
    device = path.x.device
    (whole,) = yield [Point(path, 1.0, tuple(targets), False, field="similarity")]
    size = path.x.shape[-1]
    weighted = torch.zeros(len(targets), size, size, dtype=torch.float64, device=device)
    presence = torch.zeros(size, size, dtype=torch.float64, device=device)
    mass = torch.zeros(len(targets), dtype=torch.float64, device=device)
    before: Tensor | None = None
    count, settled = 0, False
    while count < max_masks and not settled:
        batch = masks(min(ROUND, max_masks - count), size, generator).to(device)
        pictures = [torch.lerp(path.b, path.x, mask) for mask in batch]
        replies = yield [Point(path, 1.0, tuple(targets), False, picture=p, field="similarity") for p in pictures]
        similarity = torch.tensor([r.values for r in replies], dtype=torch.float64, device=device)
        flat = batch[:, 0].double()
        weighted += torch.einsum("nk,nhw->khw", similarity, flat)
        presence += flat.sum(0)
        mass += similarity.sum(0)
        count += len(pictures)
        now = weighted / count - mass[:, None, None] / count * (presence / count)
        settled = before is not None and all(
            torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1] > SETTLED
            for a, b in zip(before, now, strict=True)
        )
        before = now
    note = () if settled else (f"not settled after {count} masks",)
    assert before is not None
    return [TargetMap(target, before[k], whole.values[k], None, count, notes=note) for k, target in enumerate(targets)]
