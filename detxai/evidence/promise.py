"""A list with a promise: from which score on boxes are listed, so that few labelled items are left off.

Conformal risk control (Angelopoulos, Bates, Fisch, Lei, Schuster: Conformal Risk Control, ICLR 2024, theorem 1). The
loss of a picture is the share of its items that the list lacks; pictures without an item do not count. The score is
the model's own, so that the labels choose the threshold only and no part of them has to be kept apart.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate

from pydantic import Field

from detxai.errors import UsageError
from detxai.schema import Number, Part, Score, Text

#: Boxes with a lower score are not looked for.
FLOOR = 0.001
#: Thresholds are rounded down to one over this, so that one can be typed.
STEPS = 10_000


class Promise(Part):
    """What a list of all boxes above `threshold` holds, and on what pictures this rests."""

    recall: Score = Field(
        description="what is promised: the share of a picture's items that are on the list, in expectation over the"
        " labelled pictures and the next one, of the same kind, that holds an item"
    )
    threshold: Score = Field(description="boxes with a higher score are listed")
    pictures: int = Field(description="labelled pictures with an item")
    items: int = Field(description="labels on them, of classes that the model has")
    listed: int = Field(description="of these, those with a listed box of their class on them (IoU >= 0.5)")
    boxes: Number = Field(description="listed boxes a picture, on all labelled pictures")
    settings: dict[str, Text] = Field(description="of detection, all of which must be the same where it is used")


def threshold(items: Sequence[Sequence[float]], recall: float) -> float:
    """The highest score above which a list keeps `recall`, a multiple of 1 / STEPS.

    `items`: by picture with an item, the score of the right box on each of its items, 0 where there is none. Raises
    UsageError where there are too few pictures, or too many items without a box.
    """
    require_possible(recall)
    needed, count = pictures_needed(recall), len(items)
    if count < needed:
        raise UsageError(
            f"A list that holds {recall:.4g} of the items needs {needed} labelled pictures with an item, and there"
            f" are {count}.",
            f"Give more of them, or --recall {_most(count):.4g} at most." if count > 1 else "Give more of them.",
        )
    # The shares that may be lost in all: (their sum + 1) / (count + 1) is to be 1 − recall at most.
    pairs = sorted((score, 1 / len(own)) for own in items for score in own)
    lost = accumulate(share for _, share in pairs)
    allowed = (1 - recall) * (count + 1) - 1 + 1e-9
    score = next(score for (score, _), total in zip(pairs, lost, strict=True) if total > allowed)
    if score <= FLOOR:
        raise _unseen(items, recall)
    return (math.ceil(score * STEPS) - 1) / STEPS


def _unseen(items: Sequence[Sequence[float]], recall: float) -> UsageError:
    """Why no threshold will do: too many items have no box at all."""
    unseen = [sum(score <= FLOOR for score in own) for own in items]
    best = 1 - (sum(n / len(own) for n, own in zip(unseen, items, strict=True)) + 1) / (len(items) + 1)
    return UsageError(
        f"No list of this model's boxes holds {recall:.4g} of the items: {sum(unseen)} of {sum(map(len, items))} have"
        f" no box of their class on them, down to a score of {FLOOR:g}.",
        f"Give --recall {math.floor(100 * best) / 100:.4g} at most." if best > 0.01 else "Check the labels.",
    )


def require_possible(recall: float) -> None:
    """Raise UsageError for a recall that nothing can promise."""
    if not 0 < recall < 1:
        raise UsageError(f"--recall {recall:g} must lie between 0 and 1.", "Give a share, as --recall 0.95.")


def pictures_needed(recall: float) -> int:
    """How many labelled pictures with an item are the fewest for `recall`, were none of their items lost."""
    return math.ceil(1 / (1 - recall) - 1 - 1e-9)


def _most(count: int) -> float:
    """The highest recall, to a hundredth, that so many pictures can carry."""
    return math.floor(100 * (1 - 1 / (count + 1)) + 1e-9) / 100
