"""The study of the cheating detector: what counts as cheating, and its figures."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("cv2")

pytestmark = pytest.mark.slow


def test_a_class_that_goes_with_the_tag_cheats_and_a_lost_item_does_not() -> None:
    from study_cheat import Case

    assert Case("a", "plain", "coded", "plain").cheats
    assert not Case("a", "plain", "coded", "coded").cheats
    assert not Case("a", "plain", "coded", None).cheats


def test_right_is_the_tag_for_the_cheat_and_the_shape_for_the_control() -> None:
    from study_cheat import Case, behaviour

    cases = [Case("a", "plain", "coded", "plain"), Case("b", "coded", "coded", "coded"), Case("c", "coded")]
    cheat, control = behaviour(cases, truth_is_tag=True), behaviour(cases, truth_is_tag=False)
    assert (cheat["class right, where found"]["hits"], cheat["class right, where found"]["of"]) == (3, 4)
    assert control["class right, where found"]["hits"] == 3
    assert cheat["found with the tag"]["value"] == pytest.approx(2 / 3)
    assert cheat["class goes with the tag"]["value"] == 0.5


def test_shares_count_the_positive_part_only() -> None:
    from study_cheat import shares

    signed = np.zeros((10, 10), np.float32)
    signed[2, 2], signed[8, 8], signed[0, 9], signed[3, 3] = 6.0, 3.0, 1.0, -5.0
    tag = np.zeros((10, 10), bool)
    tag[7:, 7:] = True
    found = shares(signed, (1, 1, 5, 5), tag)
    assert found["positive outside the box"] == pytest.approx(0.4)
    assert found["positive on the tag"] == pytest.approx(0.3)


def test_verdicts_and_measures_tell_apart() -> None:
    from study_cheat import Case, behaviour, markdown, told_apart

    objects = {"lead_only_box": -2.0, "outside_share": 0.1}
    cheats = [
        Case(str(i), "plain", "coded", "plain", v, measures={"share": 0.5 + i / 100, **(objects if i < 7 else {})})
        for i, v in enumerate(["unsupported"] * 8 + ["weak", "supported"])
    ]
    honest = [Case(str(i), "plain", "plain", "plain", "supported", measures={"share": 0.1}) for i in range(10)]
    apart = told_apart(cheats, honest)
    assert apart["cheat not supported"]["hits"] == 9
    assert apart["told apart"]["value"] == 0.95
    assert {kind: s["hits"] for kind, s in apart["objected to by"].items()} == {"forwards": 7, "the map": 0}
    assert apart["measures"]["share"]["auroc"]["value"] == 1.0
    report = {
        "cheat": behaviour(cheats, True),
        "control": behaviour(honest, False),
        "apart": apart,
        "tag painted out": {"supported": 10},
        "added": {"difference": {"value": 0.3, "low": 0.2, "high": 0.4}},
    }
    assert "Told apart: 95.0 % (76.4 to 99.1), 19 of 20." in markdown(report)


def test_evidence_adds_where_the_score_is_blind() -> None:
    pytest.importorskip("sklearn")
    from study_cheat import Case, added

    rng = np.random.default_rng(4)
    cases = [
        Case(str(i), "plain", "coded", "plain" if i % 2 else "coded",
             measures={"score": rng.normal(), "margin": rng.normal(), "area_share": rng.normal(),
                       "positive on the tag": float(i % 2), "sufficiency": rng.normal() - 3 * (i % 2)})
        for i in range(60)
    ]  # fmt: skip
    found = added(cases)
    assert found["difference"]["low"] > 0.2
    assert found["two forwards"]["value"] < 0.75
