"""What differs by device, in one place: how much runs at once, how far the host runs ahead, how numbers get there."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from detxai.values import InputShape

#: Rows in a pack by device, for inputs up to 640 pixels; a run out of memory goes on with half.
ROWS = {"cpu": 8, "mps": 8, "cuda": 32}
#: Rows of a program by device. On a CPU the targets of an image share a forward pass instead, which costs most there;
#: a GPU waits for Python, and does many rows in the time of few.
PROGRAM_ROWS = {"cuda": 128}
#: Maps of finished targets that are made together: on a GPU each operation costs the host the same for many.
SUMS = {"cpu": 1, "mps": 1, "cuda": 16}
#: Rounds of packs queued before the host looks at the first, by device: one is worked at while the host thinks.
AHEAD = {"cuda": 2}


def rows_for(device: torch.device, shape: InputShape, table: Mapping[str, int] = ROWS) -> int:
    """Rows in a pack of pictures of `shape`, by their area: a table, never the free memory, so that bytes repeat."""
    rows, size = table.get(device.type, 8), math.isqrt(math.prod(shape))
    while size > 640 and rows > 1:
        size, rows = size * 5 // 7, rows // 2
    return rows


def sent(table: Tensor, device: torch.device) -> Tensor:
    """`table` on `device`; the host waits for nothing."""
    if device.type != "cuda":
        return table.to(device)
    return table.pin_memory().to(device, non_blocking=True)
