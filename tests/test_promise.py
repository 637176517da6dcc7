"""A list with a promise keeps it on pictures that chose nothing, and says what it needs where it cannot."""

from __future__ import annotations

import numpy as np
import pytest

from detxai.errors import UsageError
from detxai.evidence.promise import pictures_needed, threshold


def bags(count: int, rng: np.random.Generator) -> list[list[float]]:
    """Scores of right boxes on the 1 to 4 items of each bag: items of one bag are alike, and few have no box."""
    sizes = rng.integers(1, 5, size=count)
    scores = rng.beta(np.repeat(1 + 3 * rng.random(count), sizes), 1.5)
    scores *= rng.random(len(scores)) > 0.01
    return [own.tolist() for own in np.split(scores, np.cumsum(sizes)[:-1])]


@pytest.mark.parametrize(("recall", "count"), [(0.9, 12), (0.8, 60), (0.5, 1)])
def test_it_keeps_what_it_promises_on_bags_that_chose_nothing(recall: float, count: int) -> None:
    rng = np.random.default_rng(7)
    fresh = bags(2000, rng)
    scores = np.concatenate(fresh)
    shares = np.concatenate([np.full(len(own), 1 / len(own)) for own in fresh]) / len(fresh)
    held = []
    for _ in range(300):
        try:
            held.append(float(shares[scores > threshold(bags(count, rng), recall)].sum()))
        except UsageError:  # few pictures, and one without a box on its item: it promises nothing
            held.append(1.0)
    error = np.std(held) / np.sqrt(len(held))
    assert np.mean(held) > recall - 3 * error
    if count >= 50:
        assert np.mean(held) < recall + 2 / count + 3 * error, "no more is listed than the promise takes"


def test_by_hand() -> None:
    items = [[0.9], [0.8, 0.3], [0.7], [0.6]]
    # Of (Σ lost shares + 1) / 5 half may go: 1.5 in all. 0.3 and 0.6 make that up, 0.7 would be too much.
    assert threshold(items, 0.5) == 0.6999
    assert threshold(items, 0.8) == 0.2999
    assert threshold([[0.5], [0.5], [0.5]], 0.5) == 0.4999, "what ties with the limit is listed"


def test_what_cannot_be_promised() -> None:
    assert pictures_needed(0.95) == 19 and pictures_needed(0.9) == 9 and pictures_needed(0.99) == 99
    threshold([[0.9]] * 19, 0.95)
    with pytest.raises(UsageError, match="needs 19 labelled pictures with an item, and there are 18") as few:
        threshold([[0.9]] * 18, 0.95)
    assert few.value.hint == "Give more of them, or --recall 0.94 at most."
    threshold([[0.9]] * 18, 0.94)
    with pytest.raises(UsageError, match="2 of 22 have no box") as blind:
        threshold([[0.9]] * 20 + [[0.0]] * 2, 0.95)
    assert blind.value.hint == "Give --recall 0.86 at most."
    threshold([[0.9]] * 20 + [[0.0]] * 2, 0.86)
    for recall in (0, 1, 1.5):
        with pytest.raises(UsageError, match="between 0 and 1"):
            threshold([[0.9]], recall)
