"""What rivals measure of a report, and the pictures and reports on which evidence is asked about confusions."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import make_compositions
import numpy as np
import pytest
import rival_measures as rivals
import study_confusions
import study_rivals
import torch
from conftest import SAMPLES
from PIL import Image

from detxai.inputs import decode, labels
from detxai.inputs.letterbox import letterboxed
from detxai.inputs.sources import find
from detxai.models import checkpoints, detectors

pytestmark = pytest.mark.slow
BAG = SAMPLES / "bag-01.jpg"


@pytest.fixture(scope="module")
def detector() -> Any:
    return detectors.build(checkpoints.load(None))


@pytest.fixture(scope="module")
def x(detector: Any) -> torch.Tensor:
    square, _ = letterboxed(decode.load(next(iter(find([str(BAG)]).refs))).pixels, detector.info.own_shape)
    return rivals.tensor(square)[None]


def best(candidates: Any) -> tuple[int, int]:
    """Anchor and class of the highest score."""
    return divmod(int(candidates.scores.argmax()), candidates.scores.shape[1])


def test_what_is_caught_by_hand() -> None:
    right = np.array([True, False, True, False, True, False])
    trust = np.array([5.0, 0.0, 3.0, 2.0, 1.0, 4.0])  # upwards: wrong, right, wrong, right, wrong, right
    ones = np.ones((1, 6))
    assert study_rivals.caught(right, trust, ones, 0.0) == pytest.approx(1 / 3)
    assert study_rivals.caught(right, trust, ones, 0.4) == pytest.approx(2 / 3)
    assert study_rivals.caught(right, trust, ones, 0.7) == pytest.approx(1)


def test_equal_trust_catches_by_chance_whatever_its_order() -> None:
    right = np.array([True, True, False, False])
    for order in ([0, 1, 2, 3], [2, 3, 0, 1]):
        assert study_rivals.caught(right[order], np.zeros(4), np.ones((1, 4)), 0.1) == pytest.approx(0.1)


def test_a_feature_gives_the_logits_of_its_cell(detector: Any, x: torch.Tensor) -> None:
    with torch.no_grad():
        candidates = detector.predict(x)[0]
        maps = rivals.class_maps(detector, x)
    for at in (best(candidates)[0], 0, len(candidates.scores) - 1):
        feature = rivals.feature_at(maps, candidates, at)
        last = detector.class_heads[feature.level][-1]
        logits = last.weight[:, :, 0, 0].double().numpy() @ feature.values + last.bias.double().numpy()
        np.testing.assert_allclose(logits, candidates.logits[at], atol=1e-3)


def test_gradient_norms_by_hand(detector: Any, x: torch.Tensor) -> None:
    """In the last layer of a class branch the gradient of cross-entropy is (score − truth) ⊗ what enters there."""
    ends = rivals.ends(detector)
    with ends.differentiated():
        candidates = detector.predict(x)[0]
        at, class_id = best(candidates)
        box = candidates.boxes[at].detach()
        figures = rivals.gradient_norms(candidates, box, class_id, ends)
    assert not any(w.requires_grad for w in detector.module.parameters())
    with torch.no_grad():
        maps = rivals.class_maps(detector, x)
        near = (rivals.overlaps(candidates.boxes, box) >= rivals.BESIDE) & (
            candidates.scores[:, class_id] >= rivals.FAINTEST
        )
    wanted: dict[int, Any] = {}
    for n in near.nonzero()[:, 0].tolist():
        feature = rivals.feature_at(maps, candidates, n)
        wrong = candidates.scores[n].detach().double().numpy() - np.eye(5)[class_id]
        wanted[feature.level] = wanted.get(feature.level, 0) + np.outer(wrong, [*feature.values, 1])
    flat = np.concatenate([part.ravel() for part in wanted.values()])
    assert figures["class, last layer: L2"] == pytest.approx(np.linalg.norm(flat), rel=1e-3)
    assert figures["class, last layer: largest"] == pytest.approx(np.abs(flat).max(), rel=1e-3)
    assert figures["box, last layer: L1"] > 0
    assert figures["class, before layer: L2"] > 0


def test_a_distance_is_learned_from_right_reports_of_other_photos() -> None:
    pytest.importorskip("sklearn")
    rng = np.random.default_rng(0)
    means = rng.normal(size=(2, 6)) * 4
    classes = np.tile([0, 1], 60)
    right = np.arange(120) % 3 > 0
    shown = np.where(right, classes, 1 - classes)  # a wrong report looks like the other class
    features = [rivals.Feature(0, means[c] + rng.normal(size=6)) for c in shown]
    photos = [str(i // 2) for i in range(120)]
    distance = rivals.Distance(features, classes.tolist(), right.tolist(), photos)
    columns = distance(np.arange(80))
    assert (columns[right].mean(0) < columns[~right].mean(0)).all()
    assert (columns[80:][right[80:], 3] < 0).mean() > 0.9
    features[100] = rivals.Feature(0, np.full(6, 1e3))  # of no photo that teaches
    np.testing.assert_array_equal(distance(np.arange(80))[:80], columns[:80])
    assert np.isnan(distance(np.arange(10))).all(), "too few right ones to learn from"


def test_a_confusion_meets_right_reports_of_its_score(monkeypatch: pytest.MonkeyPatch) -> None:
    def report(name: str, score: float, status: str, label: int) -> tuple[dict[str, Any], Any]:
        entry = {"file_name": name, "category_id": 0, "score": score}
        return entry, argparse.Namespace(status=status, label=label)

    rows = [
        report("a", 0.9, "true", 0), report("a", 0.3, "wrong-class", 0), report("b", 0.32, "true", 0),
        report("b", 0.5, "wrong-class", 1), report("c", 0.52, "true", 0), report("c", 0.1, "background", -1),
    ]  # fmt: skip
    monkeypatch.setattr(study_confusions.study, "reports", lambda *_: rows)
    args = argparse.Namespace(against="wrong-class", per=1, most=10, sources=None)
    kept = study_confusions.chosen(args, None)  # type: ignore[arg-type]  # the reports are given
    assert [(e["score"], e.get("alone")) for e in kept] == [(0.5, True), (0.52, None), (0.3, False), (0.32, None)]
    kept[1]["score"] = 0.6  # too far: neither counts
    assert list(study_confusions.near(kept)) == kept[2:]


def test_compositions_keep_labels_on_their_objects(tmp_path: Path) -> None:
    for name in ("bag-01", "bag-02"):
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / "in" / f"{name}.jpg").write_bytes((SAMPLES / f"{name}.jpg").read_bytes())
    given = ["--images", tmp_path / "in", "--labels", SAMPLES.parent / "labels", "--out", tmp_path / "out"]
    make_compositions.main([str(word) for word in given])
    names = detectors.build(checkpoints.load(None)).info.names
    drawn, before = (labels.Folder(f, names) for f in (tmp_path / "out" / "labels", SAMPLES.parent / "labels"))
    refs = {ref.path: ref for ref in find([str(tmp_path / "out" / "images")]).refs}
    assert {Path(p).suffixes[0] for p in refs} == {f".{kind}" for kind in make_compositions.KINDS}
    for path, ref in refs.items():
        stem, kind = path.split(".")[:2]
        was = next(iter(find([str(SAMPLES / f"{stem}.jpg")]).refs))
        new, old = np.asarray(Image.open(tmp_path / "out" / "images" / path)), decode.load(was).pixels
        assert new.shape != old.shape if kind == "cut" else (new.shape == old.shape and (new != old).any())
        after, placed = drawn.read(ref), before.read(was)
        assert after is not None and placed is not None
        boxes, whole = (m.at(p.shape[1], p.shape[0]) for m, p in ((after, new), (placed, old)))
        assert 0 < len(boxes) <= len(whole)
        if kind == "cut":
            shift = old.shape[1] - new.shape[1] if (new[:, -1] == old[:, -1]).all() else 0
            for box in boxes:  # each is a part of a label of its class
                parts = [w.box for w in whole if w.class_id == box.class_id]
                assert any(
                    w[0] - 1 <= box.box[0] + shift and box.box[2] + shift <= w[2] + 1 and abs(w[1] - box.box[1]) < 1
                    for w in parts
                )
        else:
            np.testing.assert_allclose([b.box for b in boxes], [w.box for w in whole], atol=0.01)


def test_rivals_that_need_no_map(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn")
    given = ["--images", SAMPLES, "--labels", SAMPLES.parent / "labels", "--conf", 0.05, "--repeats", 1, "--no-maps"]
    study_rivals.main([str(word) for word in given])
    said = capsys.readouterr().out
    assert "20 right and 8 wrong boxes on 12 pictures" in said
    assert {name for name in study_rivals.PRICES if f"| {name} |" in said} == set(study_rivals.competitors(maps=False))
    assert "evidence" not in said
