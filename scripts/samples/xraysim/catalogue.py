"""Which classes of items a study packs, and the names of their parts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from .geometry import Item
from .items import gun, knife, pliers, scissors, wrench

Builder = Callable[[np.random.Generator], Item]


@dataclass(frozen=True)
class Kind:
    """A class of items: how to build one and the names of its parts, in part-map order.

    ``tag_share`` is how many of its bags hold a tag beside the item; None: a study without tags.
    """

    build: Builder
    parts: tuple[str, ...]
    tag_share: float | None = None


STANDARD: dict[str, Kind] = {
    "gun": Kind(gun, ("barrel", "grip", "trigger-guard", "frame")),
    "knife": Kind(knife, ("blade", "handle")),
    "pliers": Kind(pliers, ("jaws", "pivot", "handles")),
    "scissors": Kind(scissors, ("blades", "pivot", "finger-rings")),
    "wrench": Kind(wrench, ("head", "shaft")),
}
"""Class name -> kind; the order is the order of the class ids."""


CHEAT: dict[str, Kind] = {
    "plain": Kind(wrench, STANDARD["wrench"].parts, tag_share=0.0),
    "coded": Kind(wrench, STANDARD["wrench"].parts, tag_share=1.0),
}
"""Two classes of one shape: only the tag elsewhere in the bag tells them apart."""

CONTROL: dict[str, Kind] = {
    "plain": Kind(wrench, STANDARD["wrench"].parts, tag_share=0.5),
    "coded": Kind(pliers, STANDARD["pliers"].parts, tag_share=0.5),
}
"""The same classes told apart by shape, the tag strewn over both alike."""

CATALOGUES: dict[str, dict[str, Kind]] = {"standard": STANDARD, "cheat": CHEAT, "control": CONTROL}


def has_tags(kinds: Mapping[str, Kind]) -> bool:
    """Whether a study lays tags beside its items: then each of its bags holds one item."""
    return any(kind.tag_share is not None for kind in kinds.values())
