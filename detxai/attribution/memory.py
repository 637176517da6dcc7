"""The memory that gradients may take, and what a network needs beside them.

A map is a weighted sum of gradients whose weights are known last. So gradients are held, as long as there is room;
those without are computed again once their weights are known. A row of a pack has the same bits whenever it is
computed, so that maps do not depend on the room.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn


def out_of_memory(error: RuntimeError) -> bool:
    """Whether torch says that a device or the machine has no memory left."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


class Room:
    """How many bytes of gradients may be held at a time; by default any number."""

    def __init__(self, size: float = math.inf) -> None:
        self.size, self.taken, self.refused = size, 0, 0

    def hold(self, gradient: Tensor, *, needed: bool = False) -> Held | None:
        """A copy of `gradient` that takes room until nobody holds it; None without room, unless `needed`."""
        if not needed and self.taken + gradient.nbytes > self.size:
            self.refused += 1
            return None
        return Held(self, gradient.clone(memory_format=torch.contiguous_format))


class Held:
    """A `gradient` in a room."""

    def __init__(self, room: Room, gradient: Tensor) -> None:
        self.gradient, self._room = gradient, room
        room.taken += gradient.nbytes

    def __del__(self) -> None:
        self._room.taken -= self.gradient.nbytes


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
