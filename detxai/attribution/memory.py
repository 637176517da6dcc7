"""The memory that gradients may take, and what a network needs beside them.

A map is a weighted sum of gradients whose weights are known last. So gradients are held, as long as there is room;
those without are computed again once their weights are known. A row of a pack has the same bits whenever it is
computed, so that maps do not depend on the room.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn


def out_of_memory(error: RuntimeError) -> bool:
    """Whether torch says that a device or the machine has no memory left."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


class Room:
    """How many bytes of gradients may be held at a time; by default any number."""

    def __init__(self, size: float = math.inf) -> None:
        self.size, self.taken, self.refused = size, 0, 0

    def hold(self, gradients: Tensor, needed: Sequence[bool]) -> list[Held | None]:
        """Copies of `gradients`, (rows, ...); None of what is not `needed` where there is no room for all."""
        fits = self.taken + gradients.nbytes <= self.size
        rows = [row for row, one in enumerate(needed) if fits or one]
        self.refused += len(needed) - len(rows)
        if not rows:
            return [None] * len(needed)
        copy = gradients.clone(memory_format=torch.contiguous_format) if fits else _few(gradients, rows)
        held = dict(zip(rows, self.kept(copy), strict=True))
        return [held.get(row) for row in range(len(needed))]

    def kept(self, gradients: Tensor) -> list[Held]:
        """`gradients` themselves, row by row."""
        slab = _Slab(self, gradients)
        return [Held(slab, row) for row in range(len(gradients))]


def _few(gradients: Tensor, rows: Sequence[int]) -> Tensor:
    """A copy of some rows, which no index is sent to a device for."""
    return torch.stack([gradients[row] for row in rows])


class _Slab:
    """Gradients of one pack, (rows, ...): they take room until none of them is held any more."""

    def __init__(self, room: Room, rows: Tensor) -> None:
        self.rows, self._room = rows, room
        room.taken += rows.nbytes

    def __del__(self) -> None:
        self._room.taken -= self.rows.nbytes


class Held(NamedTuple):
    """A gradient in a room."""

    slab: _Slab
    row: int

    @property
    def gradient(self) -> Tensor:
        """What is kept of ∇F."""
        return self.slab.rows[self.row]


@contextlib.contextmanager
def saved_bytes(module: nn.Module) -> Iterator[list[int]]:
    """The list gets the bytes that forward passes in here keep for their backward passes, weights of `module` aside."""
    weights = {tensor.untyped_storage().data_ptr() for tensor in (*module.parameters(), *module.buffers())}
    seen: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    sizes: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        yield sizes
    sizes.append(sum(seen.values()))
