"""The figures of the studies, on numbers small enough to check by hand."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import study_evidence
import study_gain
import study_tools as tools
import torch
from conftest import SAMPLES
from PIL import Image
from torchvision.ops import box_iou

from detxai.inputs import sources
from detxai.models import checkpoints, detectors

pytestmark = pytest.mark.slow


def test_auroc_counts_pairs_and_halves_ties() -> None:
    assert tools.auroc([1, 0, 1, 0], [0.9, 0.1, 0.8, 0.2]) == 1.0
    assert tools.auroc([1, 0], [0.3, 0.7]) == 0.0
    assert tools.auroc([1, 1, 0, 0], [3, 1, 2, 1]) == pytest.approx((1 + 1 + 0 + 0.5) / 4)


def test_average_precision_by_hand() -> None:
    # ImageSource at ranks 1 and 3: precision 1 and 2/3.
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
    checkpoints = tools.resampled(["a", "b", "a", "c"], times=50)
    assert (checkpoints[:, 0] == checkpoints[:, 2]).all()
    assert (checkpoints[:, [0, 1, 3]].sum(1) == 3).all()
    assert checkpoints[:, 1].std() > 0


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


def test_a_few_labels_that_nothing_tells_are_told_by_chance_alone() -> None:
    pytest.importorskip("sklearn")
    rng = np.random.default_rng(0)
    y = np.arange(80) % 5 > 0
    noise, groups = rng.normal(size=(80, 3)), rng.permutation(80).tolist()
    plain, centred = (tools.cross_validated(noise, y, groups, repeats=2, centred=c) for c in (False, True))
    assert tools.auroc(y, plain) < 0.4, "parts with few wrong ones are left by parts with many"
    assert 0.4 < tools.auroc(y, centred) < 0.6


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


FAIR = "a fair score, evidence that knows nothing"

# -- evidence beyond the score -------------------------------------------------------------------


def detections(informative: bool) -> list[study_evidence.Seen]:
    """120 detections of 40 photos whose score says something, and whose evidence says more or nothing."""
    rng = np.random.default_rng(2)
    pattern = rng.normal(size=(2, 64))
    made = []
    for i in range(120):
        right = bool(rng.random() < 0.5)
        forwards = {"score": 0.7 * right + rng.normal(), "margin": rng.normal()}
        evidence = {"lift": 2 * right * informative + rng.normal()}
        grid = pattern[i % 2] * right + rng.normal(size=64)
        kind = "clean" if i % 4 else "own"
        made.append(study_evidence.Seen(f"{i}.jpg", f"{i % 40}", kind, right, i % 2, forwards, evidence, grid, "weak"))
    return made


def test_evidence_adds_only_where_it_knows_more() -> None:
    pytest.importorskip("sklearn")
    gains = {}
    for informative in (True, False):
        figures = study_evidence.study(detections(informative), repeats=1)
        rows = {row["what"]: row for row in figures["together"]}
        gains[informative] = rows["two forwards + evidence"]["auroc difference"]
        assert rows["two forwards"]["auroc difference"] == {"value": 0, "low": 0, "high": 0}
        assert rows["two forwards + typicality"]["auroc difference"]["low"] > 0
        assert "two forwards + evidence" in study_evidence.report(figures)
        assert {v["verdict"]: v["detections"] for v in figures["verdicts"]}["weak"] == 120
    assert gains[True]["low"] > 0
    assert gains[False]["low"] < 0.01


def test_no_photo_teaches_its_own_typicality() -> None:
    rows = detections(True)
    typical = study_evidence.Typicality(rows)
    train = np.array([i for i, d in enumerate(rows) if d.photo != "7"])
    before = typical(train)
    for i, d in enumerate(rows):
        if d.photo == "7":
            typical.grids[i] = rows[0].grid
    after = typical(train)
    others = [i for i, d in enumerate(rows) if d.photo != "7"]
    np.testing.assert_array_equal(before[others], after[others])
    lonely = study_evidence.Typicality(rows[:1])(np.array([0]))
    assert np.isnan(lonely).all()


def test_records_are_held_against_labels(tmp_path: Path) -> None:
    """Real records of two sample bags: one labelled as it is, one with the class of its label changed."""
    for stem in ("bag-01", "bag-02"):
        (tmp_path / "images").mkdir(exist_ok=True)
        shutil.copy(SAMPLES / f"{stem}.jpg", tmp_path / "images")
    labels = tmp_path / "labels"
    shutil.copytree(SAMPLES.parent / "labels", labels)
    args = argparse.Namespace(
        images=tmp_path / "images", labels=labels, model=None, conf=0.25, imgsz=None, classes=None, baseline="auto",
        evidence="basic", against="wrong-class", sources=None, below=1.0, method="ig", chosen=study_evidence.counting,
    )  # fmt: skip
    right = study_evidence.collected(args, tmp_path / "tree")
    assert right
    assert {d.right for d in right} == {True}
    assert {"one_sidedness", "sufficiency", "only box, baseline: lead", "inside_share"} <= set(right[0].evidence)
    assert not {"score", "margin", "area_share", "trust"} & set(right[0].evidence)
    assert set(right[0].forwards) == {"score", "logit", "F(b)", "area", "margin"}
    args.below = max(d.forwards["score"] for d in right) - 1e-6
    assert 0 < len(study_evidence.collected(args, tmp_path / "tree")) < len(right)
    args.below = 1.0
    for file in labels.glob("bag*.txt"):
        lines = [line.split() for line in file.read_text().splitlines()]
        file.write_text("".join(f"{(int(c) + 1) % 5} {' '.join(box)}\n" for c, *box in lines))
    sources_file = tmp_path / "sources.json"
    sources_file.write_text(json.dumps([{"picture": "bag-01.jpg", "photo": "one", "kind": "other"}]))
    args.sources = sources_file
    wrong = study_evidence.collected(args, tmp_path / "tree")
    assert {(d.right, d.photo, d.kind) for d in wrong} == {(False, "one", "other"), (False, "bag-02.jpg", "picture")}


def test_the_interval_of_a_gain_holds_the_truth() -> None:
    """Of generated scores; Student's t over images alone held it in 80 %."""
    truth, _, low, high = np.array(list(study_gain.trials(study_gain.LAWS[FAIR], 50, 60))).T
    held = tools.wilson(int(((low <= truth) & (truth <= high)).sum()), len(truth))
    assert held.high > 0.95
    assert ((low > 0) & (truth <= 0)).mean() < 0.05, "nothing to gain, and nothing claimed"


# -- confusions ----------------------------------------------------------------------------------


def test_a_push_stays_within_its_bounds_and_reaches_its_class(tmp_path: Path) -> None:
    import make_confusions

    ref = next(iter(sources.find([str(SAMPLES / "bag-02.jpg")]).refs))
    detector = detectors.build(checkpoints.load(None))
    drawn = make_confusions.labels.Folder(SAMPLES.parent / "labels", detector.info.names)
    picture = make_confusions.photo(ref, drawn, detector.info.imgsz)
    right = make_confusions.rightly_reported(detector, picture)
    index, (anchor, logit, margin) = next((i, found) for i, found in right.items() if picture.labels[i][0] == 0)
    true, wanted = 0, 4
    push = make_confusions.Push(index, anchor, true, wanted, logit, min(margin, 2.0))
    done = make_confusions.pushed(detector, picture, push, epsilon=8)
    assert done is not None
    pixels, steps = done
    change = np.abs(pixels.astype(int) - picture.pixels)
    assert 0 < change.max() <= 8
    assert steps >= make_confusions.PUSH
    for folder in ("images", "labels"):
        (tmp_path / folder).mkdir()
    make_confusions.save(tmp_path, "pushed", pixels, picture, [index])
    kept = np.asarray(Image.open(tmp_path / "images" / "pushed.png"))
    np.testing.assert_array_equal(kept, pixels[picture.inner])
    again = make_confusions.photo(
        next(iter(sources.find([str(tmp_path / "images")]).refs)),
        make_confusions.labels.Folder(tmp_path / "labels", detector.info.names),
        detector.info.imgsz,
    )
    assert again.labels[0][1] == pytest.approx(picture.labels[index][1], abs=0.01)
    (place,) = (torch.tensor([box]) for _, box in again.labels)
    reported = {
        class_id
        for _, class_id, box, _ in make_confusions.reports(detector, again.pixels)
        if float(box_iou(box[None], place)) >= make_confusions.SAME_PLACE
    }
    assert wanted in reported
    assert true not in reported
