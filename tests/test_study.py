"""The figures of the studies, on numbers small enough to check by hand."""

from __future__ import annotations

import numpy as np
import pytest
import study_tools as tools


def test_auroc_counts_pairs_and_halves_ties() -> None:
    assert tools.auroc([1, 0, 1, 0], [0.9, 0.1, 0.8, 0.2]) == 1.0
    assert tools.auroc([1, 0], [0.3, 0.7]) == 0.0
    assert tools.auroc([1, 1, 0, 0], [3, 1, 2, 1]) == pytest.approx((1 + 1 + 0 + 0.5) / 4)


def test_average_precision_by_hand() -> None:
    # Found at ranks 1 and 3: precision 1 and 2/3.
    assert tools.average_precision([1, 0, 1, 0], [4, 3, 2, 1]) == pytest.approx((1 + 2 / 3) / 2)
    # One threshold for all: its precision is the share of positives.
    assert tools.average_precision([1, 0, 0, 0], [7, 7, 7, 7]) == pytest.approx(1 / 4)


def test_figures_agree_with_scikit_learn() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(3)
    y, s = rng.random(200) < 0.3, rng.integers(0, 30, 200).astype(float)
    assert tools.auroc(y, s) == pytest.approx(metrics.roc_auc_score(y, s))
    assert tools.average_precision(y, s) == pytest.approx(metrics.average_precision_score(y, s))


def test_weights_are_repetitions() -> None:
    y, s, times = np.array([1, 0, 1, 0], bool), np.array([0.9, 0.8, 0.4, 0.1]), np.array([2, 1, 0, 3])
    for measure, plain in (
        (tools.weighted_auroc, tools.auroc),
        (tools.weighted_average_precision, tools.average_precision),
    ):
        assert measure(y, s, times[None].astype(float))[0] == pytest.approx(plain(y.repeat(times), s.repeat(times)))


def test_groups_are_drawn_whole() -> None:
    weights = tools.resampled(["a", "b", "a", "c"], times=50)
    assert (weights[:, 0] == weights[:, 2]).all()
    assert (weights[:, [0, 1, 3]].sum(1) == 3).all()
    assert weights[:, 1].std() > 0


def test_repeating_a_photo_adds_no_certainty() -> None:
    rng = np.random.default_rng(0)
    y = rng.random(60) < 0.5
    a, b, group = y + rng.normal(size=60), y * 0.2 + rng.normal(size=60), np.arange(60)
    once = tools.difference(y, a, b, group.tolist())
    often = tools.difference(np.tile(y, 9), np.tile(a, 9), np.tile(b, 9), np.tile(group, 9).tolist())
    assert (once.low, once.high) == pytest.approx((often.low, often.high))
    assert once.value == pytest.approx(tools.auroc(y, a) - tools.auroc(y, b))
    assert once.low < once.value < once.high
    as_if_apart = tools.difference(np.tile(y, 9), np.tile(a, 9), np.tile(b, 9), list(range(540)))
    assert as_if_apart.high - as_if_apart.low < (once.high - once.low) / 2


def test_wilson_by_hand() -> None:
    # 9 of 10: (0.9 + 0.19207 ± 1.96 √(0.009 + 0.0096036)) / 1.38415
    found = tools.wilson(9, 10)
    assert (found.low, found.high) == pytest.approx((0.59585, 0.98212), abs=1e-4)


def test_regression_is_judged_on_photos_it_did_not_see() -> None:
    pytest.importorskip("sklearn")
    rng = np.random.default_rng(1)
    groups = np.repeat(np.arange(30), 4)
    y = np.repeat(rng.random(30) < 0.5, 4)
    identity = np.eye(30)[groups]
    assert tools.auroc(y, tools.cross_validated(identity, y, groups.tolist(), repeats=1)) < 0.6
    useful = np.column_stack([y + rng.normal(scale=0.5, size=120), np.full(120, np.nan)])
    assert tools.auroc(y, tools.cross_validated(useful, y, groups.tolist(), repeats=1)) > 0.85


def test_learned_features_get_the_training_rows_only() -> None:
    pytest.importorskip("sklearn")
    groups = np.arange(40)
    y = groups % 2 == 0
    seen: list[set[int]] = []

    def features(train: np.ndarray, seed: int) -> np.ndarray:
        seen.append(set(train.tolist()))
        return np.random.default_rng(seed).normal(size=(40, 1))

    tools.cross_validated(features, y, groups.tolist(), repeats=1)
    assert len(seen) == tools.FOLDS
    assert set.intersection(*seen) == set()


def test_numbers_of_a_record() -> None:
    tree = {"a": 1, "b": {"c": 0.5, "d": None, "e": "x"}, "f": [1, 2], "g": True, "h": float("nan")}
    assert tools.numbers(tree) == {"a": 1.0, "b.c": 0.5, "g": 1.0}
