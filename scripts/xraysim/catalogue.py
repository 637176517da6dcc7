"""Which classes of items a study packs, and the names of their parts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .geometry import Item, Shape, ellipse
from .items import gun, knife, pliers, scissors, wrench

Builder = Callable[[np.random.Generator], Item]


@dataclass(frozen=True)
class Kind:
    """A class of items: how to build one and the names of its parts, in part-map order."""

    build: Builder
    parts: tuple[str, ...]


STANDARD: dict[str, Kind] = {
    "gun": Kind(gun, ("barrel", "grip", "trigger-guard", "frame")),
    "knife": Kind(knife, ("blade", "handle")),
    "pliers": Kind(pliers, ("jaws", "pivot", "handles")),
    "scissors": Kind(scissors, ("blades", "pivot", "finger-rings")),
    "wrench": Kind(wrench, ("head", "shaft")),
}
"""Class name -> kind; the order is the order of the class ids."""


def tagged(kind: Kind, radius: float = 0.05) -> Kind:
    """The same kind with a dense lead-like tag stuck on it, as a part of its own named "tag"."""

    def build(rng: np.random.Generator) -> Item:
        item = kind.build(rng)
        spot = ellipse(rng.uniform(-0.2, 0.2), 0.0, radius)
        return Item([*item.pieces, [Shape(spot, "metal", 3.0, part="tag")]])

    return Kind(build, (*kind.parts, "tag"))


TAGGED: dict[str, Kind] = {
    "plain": STANDARD["wrench"],
    "tagged": tagged(STANDARD["wrench"]),
}
"""Two classes of one shape: only the tag tells them apart, so a detector has to look at it."""

CATALOGUES: dict[str, dict[str, Kind]] = {"standard": STANDARD, "tagged": TAGGED}
