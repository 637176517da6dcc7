"""Maps of finished targets, many at once: held gradients added up by weight, and brought back to the picture.

A target's bits do not depend on its neighbours: its gradients are added in their own order, one of every target at a
time, and all that follows has one fixed shape, filled up with nothing.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from detxai.attribution.devices import sent
from detxai.attribution.memory import Room
from detxai.attribution.points import Ran, Row, Sum


@dataclass
class Sums:
    """Runs sums as packs of `rows` of a kind, and tells of each the L2 norms of its last sum and of its first."""

    rows: int = 1

    def split(self, asked: Sum) -> list[Row]:
        """One row; who has most gradients comes first in a pack."""
        return [Row(asked, tuple(range(len(asked.held))))]

    def kind(self, row: Row) -> Hashable:
        """What all of a pack have in common."""
        one: Sum = row.asked
        return type(one.path), one.path.x.shape, one.held[0].gradient.shape, len(one.weights[0]), one.mapped

    def rows_of(self, row: Row) -> int:
        """Rows of a pack: always the same."""
        return self.rows

    def prepare(self, row: Row) -> None:
        """Nothing to prepare."""

    def halve(self) -> None:
        """Go on with half the rows."""
        self.rows //= 2

    def run(self, pack: Sequence[Row], room: Room) -> Ran:
        """The sums of a `pack`, or the maps of them, as what is held; they are made of gradients and take no room."""
        sums: list[Sum] = [row.asked for row in pack]
        total, paths = self._added(sums), [one.path for one in sums]
        if sums[0].mapped:
            total = paths[0].maps(paths + paths[:1] * (self.rows - len(paths)), total)
        norms = torch.linalg.vector_norm(total.flatten(2), dim=2, dtype=torch.float64)[: len(sums)].T
        return Ran(norms[-1:], norms[:1], [list(Room().kept(total)[: len(sums)])])

    def _added(self, sums: Sequence[Sum]) -> Tensor:
        """(rows, sums, ...): the weighted gradients of each; what fills up is zero."""
        gradient, most, nothing = sums[0].held[0].gradient, len(sums[0].held), (0.0,) * len(sums[0].weights[0])
        table = torch.tensor([[*one.weights, *[nothing] * (most - len(one.weights))] for one in sums])
        weights = sent(table, gradient.device).view(*table.shape, *[1] * gradient.dim())
        total = gradient.new_zeros(self.rows, len(nothing), *gradient.shape)
        for i, one in enumerate(sums):
            if one.before is not None:
                total[i] = one.before
        for j in range(most):
            rows = [one.held[j].gradient for one in sums if j < len(one.held)]
            here = rows[0][None] if len(rows) == 1 else torch.stack(rows)
            total[: len(rows)].addcmul_(here[:, None], weights[: len(rows), j])
        return total
