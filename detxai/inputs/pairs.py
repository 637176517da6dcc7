"""Two files that belong together, by what their paths differ: two views of one bag; both energies of one picture."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from detxai.values import ImageRef, Pair, View


def paired(refs: Iterable[ImageRef], low: str, high: str, colors: str) -> Iterator[ImageRef]:
    """`refs` with two files as one image, named after the one of low energy; without a `high`, each file holds both.

    The last `low` or `high` in a file's path tells which it is, and `low` there against `high` names the other. One
    without its other half stays, and its reading says so; one with neither is refused.
    """
    if not high:
        yield from (ref if ref.problem else replace(ref, pair=Pair(ref.file, ref.path, colors)) for ref in refs)
        return
    for ref in refs:
        file = str(ref.file)
        at_low, at_high = file.rfind(low), file.rfind(high)
        if ref.problem is not None or at_low == at_high:
            yield ref if ref.problem else replace(ref, problem=f"its name has neither {low} nor {high} (--pair)")
            continue
        own, other = (low, high) if at_low > at_high else (high, low)
        half = Path(_swapped(file, own, other))
        if own == low or not half.is_file():
            name = _swapped(ref.path, own, other) if own in ref.path else half.name
            yield replace(ref, pair=Pair(half, name, colors))


def viewed(refs: Iterable[ImageRef], names: tuple[str, str]) -> Iterator[ImageRef]:
    """`refs` with the view that the last of two `names` in their path tells; those with neither are as they were."""
    for ref in refs:
        name = max(names, key=ref.path.rfind)
        if name in ref.path and ref.problem is None:
            ref = replace(ref, view=View(_swapped(ref.path, name, ""), name))
        yield ref


def _swapped(text: str, own: str, other: str) -> str:
    before, _, after = text.rpartition(own)
    return before + other + after
