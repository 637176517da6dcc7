"""Evidence: maps with known numbers, laws of the measures, verdicts, trials on a real network, the gate."""

from __future__ import annotations

import hashlib
import json
import math
import shlex
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import recompute
import torch
from conftest import FAST, ROOT, SHARED, explain, needs
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from detxai.attribution.ablation import TOP_SHARE, Case, top_part, trials, within
from detxai.attribution.engine import solve
from detxai.cli.app import run
from detxai.errors import UsageError
from detxai.evidence import measures, neighbours
from detxai.evidence.calibration import FEATURES, EvidenceCalibration, calibration_error
from detxai.evidence.calibration import read as read_calibration
from detxai.evidence.fitting import LabelledDetection, auroc, fit, gain, logistic, thresholds
from detxai.evidence.groups import FEWEST
from detxai.evidence.maps import map_sums, near_edge
from detxai.evidence.model import Evidence
from detxai.evidence.typicality import typicality
from detxai.evidence.verdict import DEFAULTS, RULES, verdict
from detxai.models import checkpoints, detectors
from detxai.output import records
from detxai.run.groups import GroupTally
from detxai.statistics import Moments, rank_correlation
from detxai.values import Attribution, Detection, Target

SAMPLE_MODEL = checkpoints.BUNDLED
HEIGHT, WIDTH = 24, 32
BOX = (8.0, 4.0, 24.0, 20.0)


def attribution(values: Any, **more: Any) -> Attribution:
    return Attribution(
        "ig", Target(0, 0), "black", "fp32", "full", np.asarray(values, np.float32), float(np.sum(values)), 0.0,
        1.0, 0.0, 9, **more,
    )  # fmt: skip


def of_map(a: Attribution, box: Any = BOX, ground: Any = None) -> dict[str, Any]:
    """The measures of a map by name."""
    return vars(measures.of_map(a, map_sums(a, box), ground))


def blank() -> Any:
    return np.zeros((HEIGHT, WIDTH))


def test_a_map_with_known_numbers() -> None:
    values = blank()
    values[4, 8], values[6, 8], values[19, 23] = 3.0, -1.0, 2.0  # three cells of the grid, 2 x 2 pixels each
    values[0, 0], values[23, 31] = 4.0, -2.0
    found = of_map(attribution(values, padding_mass=12.0), BOX, None)
    assert found == pytest.approx(
        {
            "net_inside": 4, "positive_inside": 5, "negative_inside": -1,
            "net_outside": 2, "positive_outside": 4, "negative_outside": -2,
            "one_sidedness": 4 / 6, "outside_share": 2 / 6, "coherence": 1.0,
            "area_share": 1 / 3, "lift": 5 / 9 * 3, "concentration": 1.0,
            "ground_share": None, "padding_share": 0.5, "completeness_error": None,
        }
    )  # fmt: skip


def test_parts_that_cancel_are_not_coherent() -> None:
    values = blank()
    values[4, 8:10] = 3.0, -3.0  # within one cell
    values[10, 10] = 1.0
    found = of_map(attribution(values), BOX, None)
    assert found["coherence"] == pytest.approx(1 / 7)
    assert found["one_sidedness"] == 1.0


def test_evidence_spread_evenly_has_lift_one() -> None:
    found = of_map(attribution(blank() + 0.5), BOX, None)
    assert found["lift"] == pytest.approx(1)
    assert found["concentration"] == pytest.approx(13 / 256)
    assert found["outside_share"] == pytest.approx(2 / 3)


def test_nothing_is_no_number() -> None:
    found = of_map(attribution(blank()), BOX, np.ones((HEIGHT, WIDTH), bool))
    for name in ("one_sidedness", "outside_share", "coherence", "lift", "concentration", "ground_share"):
        assert found[name] is None
    assert found["padding_share"] == 0
    assert verdict(found | {"trials": ()}, True)[0] == "unknown"


@given(
    arrays(np.float32, (HEIGHT, WIDTH), elements=st.floats(-2, 2, width=32)),
    st.tuples(*(st.floats(-5, 40) for _ in range(4))),
)
def test_inside_and_outside_are_the_picture(values: Any, corners: tuple[float, ...]) -> None:
    x, y = sorted(corners[::2]), sorted(corners[1::2])
    found = of_map(attribution(values), (x[0], y[0], x[1], y[1]), None)
    for part, whole in (("net", values), ("positive", np.maximum(values, 0)), ("negative", np.minimum(values, 0))):
        total = float(whole.sum(dtype=np.float64))
        assert found[f"{part}_inside"] + found[f"{part}_outside"] == pytest.approx(total, abs=1e-4)
    for name in ("outside_share", "coherence", "area_share", "concentration", "padding_share"):
        assert found[name] is None or -1e-6 <= found[name] <= 1 + 1e-6, name
    assert found["one_sidedness"] is None or -1 - 1e-6 <= found["one_sidedness"] <= 1 + 1e-6


def test_ground_is_what_has_its_colour() -> None:
    pixels = np.full((HEIGHT, WIDTH, 3), 250, np.uint8)
    pixels[:, 16:] = 250 - measures.GROUND_NEAR - 1
    empty = measures.ground_mask(pixels, (250, 250, 250))
    assert empty is not None and empty[:, :16].all() and not empty[:, 16:].any()
    values = blank()
    values[0, 0], values[0, 20] = -1.0, 3.0
    assert of_map(attribution(values), BOX, empty)["ground_share"] == pytest.approx(0.25)
    assert measures.ground_mask(pixels, None) is None


def test_what_lies_near_an_edge() -> None:
    values = blank()
    values[5, 8:12], values[5, 20:24] = -2.0, 1.0  # in the top third, left and right of the middle
    found = {edge: near_edge(values, BOX, edge) for edge in ("left", "top", "right", "bottom")}
    assert found == pytest.approx({"left": 2 / 3, "top": 1, "right": 1 / 3, "bottom": 0})
    assert near_edge(blank() + 1, BOX, "left") == pytest.approx(1 / 3)
    assert near_edge(blank(), BOX, "left") is None


def test_trials_in_numbers() -> None:
    rows = [
        ("without box", "black", {0: -4.0, 1: 0.0}), ("without box", "blur", {0: -3.0, 1: -9.0}),
        ("only box", "black", {0: 1.0, 1: 3.0}), ("only box", "blur", {0: 5.0, 1: 4.0}),
        ("without top", "black", {0: 2.0, 1: 0.0}), ("without top", "blur", {0: 0.0, 1: 0.0}),
        ("softened", "gaussian", {0: 1.5, 1: 1.0}), ("quarter of the way", "black", {0: -1.0, 1: 0.0}),
        ("half of the way", "black", {0: 5.0, 1: 0.0}), ("quarter of the way", "blur", {0: 1.0, 1: 0.0}),
        ("half of the way", "blur", {0: 3.0, 1: 0.0}),
    ]  # fmt: skip
    found = measures.of_trials(0, [1], 2.0, -10.0, rows)

    def score(logit: float) -> float:
        return 1 / (1 + math.exp(-logit))

    assert found.necessity == pytest.approx(1 - (score(-4) + score(-3)) / 2 / score(2))
    assert found.necessity_top == pytest.approx(1 - (score(2) + score(0)) / 2 / score(2))
    assert found.sufficiency == pytest.approx((score(1) / score(2) + 1) / 2), "more than before counts as all"
    assert (found.lead_only_box, found.lead_softened) == (-0.5, 0.5)
    assert (found.early_share, found.half_share) == (9 / 12, 15 / 12)
    assert found.lead_faded == 2.0
    assert [row.other for row in found.rows] == [1] * 11
    assert found.rival == 1
    alone = measures.of_trials(0, [], 2.0, None, rows)
    assert alone.lead_only_box is alone.early_share is alone.rows[0].lead is None


def test_scores_too_small_to_divide() -> None:
    rows = [(what, "black", {0: -900.0}) for what in ("without box", "only box", "without top")]
    found = measures.of_trials(0, [], -899.0, -950.0, rows)
    assert found.sufficiency == pytest.approx(math.exp(-1))


def test_rank_correlation_is_spearmans() -> None:
    a = np.array([1.0, 5, 2, 8])
    assert rank_correlation(a, a**3) == pytest.approx(1)
    assert rank_correlation(a, -a) == pytest.approx(-1)
    assert rank_correlation(a, np.array([1.0, 1, 2, 2])) == pytest.approx(1 / math.sqrt(5))
    assert rank_correlation([1, 2, 2, 4], [1, 3, 2, 4]) == pytest.approx(0.9486833)
    assert rank_correlation(a, a * 0) is None


# -- verdicts -------------------------------------------------------------------------------------

GOOD: dict[str, Any] = {
    "positive_inside": 9.0, "negative_inside": -1.0, "positive_outside": 1.0, "lead_only_box": 5.0,
    "lead_softened": 4.0, "outside_share": 0.0, "one_sidedness": 0.8, "sufficiency": 0.9, "necessity": 1.0,
    "lift": 6.0, "ground_share": 0.0, "padding_share": 0.0, "coherence": 0.5, "typicality": 0.9,
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(DEFAULTS))
def test_each_rule_has_its_say(name: str) -> None:
    weak, bad = DEFAULTS[name]
    step = 0.01 if next(rule.high for rule in RULES if rule.measure == name) else -0.01
    assert verdict(GOOD, True)[0] == "supported"
    assert verdict(GOOD | {name: weak}, True)[0] == "supported", "a threshold itself is good enough"
    for limit, word in ((weak, "weak"), (bad, "unsupported")):
        found, (reason,) = verdict(GOOD | {name: limit + step * max(abs(limit), 0.01)}, True, "gun")
        assert found == word
        assert f"{word} {'above' if step > 0 else 'below'} {limit:.2g}" in reason
    assert verdict(GOOD | {name: None}, True)[0] == "supported"


def test_what_the_verdict_must_not_look_at() -> None:
    """The sum of a map restates the score: a verdict that looked at one of these would, too."""
    forbidden = {"score", "logit", "value_at_input", "value_at_baseline", "sum", "net_inside", "margin", "trust"}
    assert not forbidden & {rule.measure for rule in RULES}
    assert {rule.measure for rule in RULES} <= set(Evidence.model_fields)
    assert {rule.measure for rule in RULES} >= set(DEFAULTS)


def test_no_verdict_without_an_integral() -> None:
    assert verdict(GOOD, None)[0] == verdict(GOOD, False)[0] == "unknown"
    assert "converge" in verdict(GOOD, False)[1][0]


# -- trials on a real network ---------------------------------------------------------------------


def test_pixels_of_a_box() -> None:
    like = torch.empty(8, 8)
    mask = within((1.5, 2.0, 3.0, 4.1), like)
    assert torch.nonzero(mask).tolist() == [[y, x] for y in (2, 3, 4) for x in (1, 2)]
    for box in ((-9.0, -9.0, -8.0, -8.0), (20.0, 20.0, 30.0, 30.0), (3.2, 3.2, 3.3, 3.3)):
        assert within(box, like).sum() == 1


def test_the_top_part_is_a_fifth_of_the_box_where_the_map_is_strongest() -> None:
    box = (8.0, 8.0, 28.0, 28.0)
    inside = within(box, torch.empty(32, 32))
    values = torch.zeros(32, 32, dtype=torch.float64)
    values[10:14, 10:14] = 1.0
    values[0:4] = 100.0  # outside the box
    part = top_part(values, box)
    assert part.sum() == round(TOP_SHARE * 400)
    assert not (part & ~inside).any()
    assert part[10:14, 10:14].all()


def test_trials_show_what_they_say(tiny: Path) -> None:
    detector = detectors.build(checkpoints.load(str(tiny)))
    x, b, soft = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    found = detector.predict(x[None])[0]
    anchor = int(found.scores.amax(1).argmax())
    targets = tuple(Target(anchor, int(found.levels[anchor]), "class", i) for i in range(3))
    inside = within((16.0, 16.0, 40.0, 48.0), x)
    values = torch.rand(64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    case = Case((16.0, 16.0, 40.0, 48.0), targets, (values,))
    ask = trials(x, {"noise": b}, soft, [case])
    with torch.no_grad():
        (rows,) = solve(detector.values, ask)
        shown = {
            "without box": torch.where(inside, b, x), "only box": torch.where(inside, x, b),
            "without top": torch.where(top_part(values, case.box), b, x), "softened": soft,
            "quarter of the way": b + 0.25 * (x - b), "half of the way": (b + x) / 2,
        }  # fmt: skip
        assert [row.what for row in rows] == list(shown)
        (all_fills,) = solve(detector.values, trials(x, {"noise": b, "soft": soft}, soft, [case], thorough=2))
        assert [row.what for row in all_fills].count("without top") == 2
        for row in rows:
            logits = detector.predict(shown[row.what][None])[0].logits[anchor]
            assert list(row.logits.values()) == pytest.approx(logits.tolist(), abs=1e-3), row.what


def test_a_contrast_is_the_difference_of_two_logits(tiny: Path) -> None:
    detector = detectors.build(checkpoints.load(str(tiny)))
    values = detectors.contrasting(detector.values)
    x = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
    one, other = (Target(70, 1, "class", i) for i in (2, 0))
    against = Target(70, 1, "contrast", 2, other=0)
    found = values(x, [(0, one), (1, against), (1, one), (1, other)])
    assert found[1].item() == pytest.approx((found[2] - found[3]).item(), abs=1e-6)
    (whole,) = torch.autograd.grad(found[1], x, retain_graph=True)
    parts = [torch.autograd.grad(found[i], x, retain_graph=True)[0] for i in (2, 3)]
    assert whole.norm() > 0
    assert (whole - (parts[0] - parts[1])).norm() < 1e-5 * whole.norm()


# -- the command ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def full(tiny: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    tree = tmp_path_factory.mktemp("full") / "tree"
    more = ("--evidence", "full", "--as-class", "thing 1", *FAST)
    assert explain(pictures, "-m", tiny, "-o", tree, *more) == 0
    return tree


def read(tree: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (tree / "records.jsonl").read_bytes().splitlines()]


def test_records_hold_evidence_of_every_class_asked_for(full: Path) -> None:
    seen = 0
    for record in read(full):
        for d in record["detections"]:
            assert d["evidence"]["verdict"] in ("supported", "weak", "unsupported", "unknown")
            assert d["evidence"]["reasons"] and not d["evidence"]["calibrated"]
            for a in d["attributions"]:
                assert (a["evidence"] is not None) == a["as_class"]
            own = d["attributions"][0]
            assert d["evidence"]["net_inside"] == own["net_inside"]
            whole = d["evidence"]["positive_inside"] + d["evidence"]["positive_outside"]
            assert d["evidence"]["positive_inside"] / whole == pytest.approx(own["inside_share"], rel=1e-4)
            assert len(d["evidence"]["trials"]) == 11
            seen += 1
    assert seen >= 4


def test_full_evidence_holds_contrasts_and_a_second_baseline(full: Path) -> None:
    for record in read(full):
        for d in record["detections"]:
            others = [c["class_id"] for c in d["evidence"]["contrasts"]]
            assert others[0] == d["evidence"]["runner_up"]["class_id"]
            assert set(others) == {others[0], 1} - {d["class_id"]}
            maps = [a for a in d["attributions"] if a["target"] == "contrast"]
            assert [a["against"]["class_id"] for a in maps] == others
            assert len({a["overlay"] for a in d["attributions"]}) == len(d["attributions"])
            assert maps[0]["overlay"].endswith(f"d{d['id']:02d}.ig.contrast.png")
            for c, a in zip(d["evidence"]["contrasts"], maps, strict=True):
                assert c["net_inside"] == a["net_inside"]
                logits = {t["class_id"]: t["logit"] for t in d["top_classes"]}
                difference = logits[d["class_id"]] - logits[c["class_id"]]
                assert a["value_at_input"] == pytest.approx(difference, abs=1e-3)
            assert d["evidence"]["second_baseline"] == "blur"
            assert -1 <= d["evidence"]["baseline_agreement"] <= 1


def test_a_group_whose_evidence_lies_outside_is_named_in_the_summary(full: Path) -> None:
    d = next(d for r in read(full) for d in records.load(json.dumps(r).encode()).detections or ())
    grid = np.maximum(np.array(d.attributions[0].grid.values), 0) + 0.01

    def box(number: int, outside: float) -> records.DetectionRecord:
        values = tuple(map(tuple, (grid * (1 + number % 5)).tolist()))
        own = d.attributions[0].model_copy(
            update={"grid": d.attributions[0].grid.model_copy(update={"values": values})}
        )
        evidence = d.evidence.model_copy(update={"net_outside": outside * float(grid.sum()) * (1 + number % 5)})
        return d.model_copy(update={"id": number, "attributions": (own,), "evidence": evidence})

    tally = GroupTally()
    for number in range(FEWEST - 1):
        tally.add("honest.jpg", box(number, 0.0))
    assert tally.records() is None, "too few"
    for number in range(FEWEST - 1, 30):
        tally.add("honest.jpg", box(number, 0.0))
    assert [g.finding for g in tally.records() or ()] == [None], "one kind, and nothing to look into"
    for number in range(10):
        tally.add("tagged.jpg", box(number, 4.0))
    honest, tagged = tally.records() or ()
    assert (honest.boxes, honest.finding, tagged.boxes, tagged.share) == (30, None, 10, 0.25)
    assert tagged.finding and tagged.outside == pytest.approx(0.8, abs=0.01)
    assert tagged.typical and all(name.startswith("tagged.jpg#") for name in tagged.typical)


def test_who_is_a_neighbour_and_whom_a_report_rests_on() -> None:
    boxes = [
        (100, 100, 200, 200),
        (190, 120, 290, 220),
        (240, 240, 300, 300),
        (260, 100, 300, 200),
        (104, 100, 200, 204),
    ]
    others = [(180.0 - k, 0.0, 190.0, 60.0) for k in range(5)]
    assert neighbours.near(0, boxes, range(5)) == [1, 2], "overlapping, near; not the far one, not the object itself"
    assert neighbours.near(0, boxes, (2,)) == [2] and neighbours.near(3, boxes, range(5)) == [1, 2]
    assert neighbours.near(0, [boxes[0], *others], range(6)) == [5, 4, 3, 2], "four, the largest first"
    scissors = Detection(0, 0, 1, "scissors", 0.9, 2.2, (0, 0, 1, 1), (), "detection")
    rows = neighbours.of_neighbours(1.0, {3: 2.0, 7: -2.0}, [scissors] * 8)
    assert [row.detection for row in rows] == [7, 3] and rows[1].kept > 1 > rows[0].kept
    said = neighbours.rests_on(rows)
    assert said == "it rests on the scissors beside it: without that box (7) 16% of its score stays"
    assert neighbours.rests_on(rows[1:]) is None and neighbours.rests_on(()) is None


def test_every_number_can_be_had_again(full: Path, tiny: Path, pictures: Path, capsys: Any) -> None:
    files = [full / f"{record['image']['path']}.json" for record in read(full) if record["detections"]]
    arguments = [*map(str, files[:3]), "--images", str(pictures), "--model", str(tiny)]
    assert recompute.main([*arguments, "--tolerance", "0.2", "--max-evaluations", "24"]) == 0
    said = capsys.readouterr().out
    assert "verdicts follow" in said
    for name in ("lead_only_box", "one_sidedness", "outside_share", "trials", "neighbours"):
        assert name in said


def test_the_summary_shows_how_a_class_usually_looks(full: Path) -> None:
    summary = json.loads((full / "summary.json").read_bytes())
    for c in summary["classes"]:
        own = [d for r in read(full) for d in r["detections"] if d["class_id"] == c["class_id"]]
        grids = np.array([d["attributions"][0]["grid"]["values"] for d in own])
        assert np.allclose(c["mean_grid"], grids.mean(0), atol=1e-5)
        if len(own) > 1:
            assert np.allclose(c["grid_spread"], grids.std(0, ddof=1), atol=1e-5)
        assert sum(c["verdicts"].values()) == len(own)


def test_typicality_is_a_cosine() -> None:
    rng = np.random.default_rng(0)
    grid = rng.normal(size=(8, 8))
    assert typicality(grid, (3 * grid).tolist()) == pytest.approx(1)
    assert typicality(-grid, grid.tolist()) == pytest.approx(-1)
    assert typicality(grid * 0, grid.tolist()) is None
    sums = Moments((8, 8))
    for other in (grid, grid * 2):
        sums.add(other)
    assert np.allclose(sums.mean, 1.5 * grid)
    assert np.allclose(sums.std, np.abs(grid) * math.sqrt(0.5))


def test_the_gate_holds_for_fresh_and_for_resumed_images(tiny: Path, pictures: Path, tmp_path: Path) -> None:
    arguments = (pictures, "-m", tiny, "-o", tmp_path / "out", "--no-overlays", *FAST)
    assert explain(*arguments) == 0
    words = {d["evidence"]["verdict"] for record in read(tmp_path / "out") for d in record["detections"]}
    for absent in {"supported", "weak", "unsupported", "unknown"} - words:
        assert explain(*arguments, "--fail-on", absent) == 0
    for word in words:
        assert explain(*arguments, "--fail-on", word) == 10, "all images are done already"
    assert explain(*arguments, "--fail-on", ",".join(words), "--force") == 10
    # A failed image weighs more than the gate.
    (tmp_path / "bad.jpg").write_bytes(b"no picture")
    assert explain(tmp_path / "bad.jpg", *arguments, "--fail-on", ",".join(words)) == 3


def test_a_gate_without_verdicts_is_a_usage_error(tiny: Path, pictures: Path, tmp_path: Path, capsys: Any) -> None:
    for more in (("--evidence", "none"), ("--target", "left")):
        assert explain(pictures, "-m", tiny, "-o", tmp_path, "--fail-on", "weak", *more) == 2
        assert "--fail-on" in capsys.readouterr().err


def test_without_evidence_there_is_none(tiny: Path, pictures: Path, tmp_path: Path) -> None:
    assert explain(pictures, "-m", tiny, "-o", tmp_path, "--no-overlays", "--evidence", "none", *FAST) == 0
    for record in read(tmp_path):
        assert all(d["evidence"] is None for d in record["detections"])


# -- calibration ----------------------------------------------------------------------------------


def synthetic(count: int, seed: int = 0) -> list[LabelledDetection]:
    """Detections whose score knows a little, whose lead more, and whose grid tells the class."""
    rng = np.random.default_rng(seed)
    shape = rng.normal(size=(8, 8))
    rows = []
    for n in range(count):
        right = bool(rng.random() < 0.5)
        measured = {name: float(rng.normal()) for name in FEATURES if name not in ("logit", "typicality")}
        measured |= {"lead_only_box": rng.normal(2 * right), "area_share": 0.1, "lift": 3.0, "necessity": None}
        grid = (shape if right else 0) + rng.normal(size=(8, 8))
        logit = float(rng.normal(right))
        rows.append(
            LabelledDetection(f"{n // 4}.jpg", 0, "gun", logit, measured, tuple(map(tuple, grid.tolist())), right)
        )
    return rows


def made(rows: list[LabelledDetection]) -> EvidenceCalibration:
    known = {"model": "m.pt", "model_sha256": "0" * 64, "imgsz": 64, "method": "ig", "baseline": "auto"}
    return EvidenceCalibration(**known, **vars(fit(rows, 50)))


def test_trust_is_what_was_fitted(tmp_path: Path) -> None:
    rows = synthetic(800)
    calibration = made(rows)
    assert calibration.quality.auroc > calibration.quality.auroc_score + 0.05
    assert calibration.quality.calibration_error < 0.1
    (tmp_path / "m.evidence.json").write_bytes(calibration.packed())
    again = read_calibration(tmp_path / "m.evidence.json")
    assert again == calibration and again.packed() == calibration.packed()
    fresh = synthetic(200, seed=1)
    trust = []
    for row in fresh:
        likeness = again.typicality(0, row.grid)
        assert likeness is not None and -1 <= likeness <= 1
        trust.append(again.trust({**row.evidence, "typicality": likeness}, row.logit))
    assert all(0 <= t <= 1 for t in trust)
    right = np.array([row.right for row in fresh])
    assert auroc(right, np.array(trust)) > 0.75, "the same kind of detections, other noise"
    assert again.typicality(7, rows[0].grid) is None
    assert again.trust({}, 0.0) == pytest.approx(0.5, abs=0.3), "what is missing counts as the mean"


def test_the_regression_is_scikit_learns() -> None:
    linear_model = pytest.importorskip("sklearn.linear_model")
    rng = np.random.default_rng(3)
    x = np.column_stack([np.ones(300), rng.normal(size=(300, 4))])
    y = rng.random(300) < 1 / (1 + np.exp(-x @ [0.5, 1, -2, 0, 0.3]))
    own = logistic(x, y, np.zeros(5), np.array([0, 10.0, 10, 10, 10]))
    reference = linear_model.LogisticRegression(C=0.1, tol=1e-8, max_iter=1000).fit(x[:, 1:], y)
    assert own == pytest.approx([*reference.intercept_, *reference.coef_[0]], abs=1e-4)
    mean = np.array([0.5, 1, -2, 0, 0.3])
    assert logistic(x, y, mean, np.full(5, 1e9)) == pytest.approx(mean, abs=1e-5), "a strong prior stays where it is"


def test_few_labels_move_little_and_many_much() -> None:
    few, many = made(synthetic(16)), made(synthetic(800))
    logit = {"logit": 1.3}
    blind = LabelledDetection("x.jpg", 0, "gun", 1.3, {}, ((0.0,) * 8,) * 8, True)
    assert few.trust({}, blind.logit) == pytest.approx(1 / (1 + math.exp(-logit["logit"])), abs=0.15), "the score"
    for name in ("lead_only_box", "outside_share"):
        for limit, own, other in zip(DEFAULTS[name], few.thresholds[name], many.thresholds[name], strict=True):
            assert abs(own - limit) < abs(other - limit) / 2, name
    assert few.thresholds["coherence"][0] < -0.1 > many.thresholds["coherence"][0], "below 0: from no limit at all"
    with pytest.raises(UsageError, match="2 images"):
        fit(synthetic(8), 2)


def test_what_a_calibration_says_of_itself() -> None:
    quality = made(synthetic(400)).quality
    assert quality.gain is not None and quality.reliability is not None
    assert quality.gain.low < quality.gain.value < quality.gain.high and quality.gain.low > 0
    assert sum(b.detections for b in quality.reliability) == 400
    error = sum(b.detections * abs(b.right - b.trust) for b in quality.reliability) / 400
    assert error == pytest.approx(quality.calibration_error, abs=1e-4)
    # Student's interval, by hand: three images of one detection each, in three parts, of which two make the variance.
    one = gain(np.array([1.0, 2.0, 3.0]), np.array(["a", "b", "c"]))
    assert (one.value, one.high) == (2.0, pytest.approx(2 + 12.7062 * math.sqrt((1 + 3 / 2) / 3), abs=1e-4))
    # Two detections of one image say hardly more than one.
    assert gain(np.repeat([1.0, 2, 3], 2), np.repeat(["a", "b", "c"], 2)).high == pytest.approx(one.high)
    # One image in twenty that makes all of the variance leaves one degree of freedom.
    far = gain(np.array([1.0] + [0.0] * 19), np.arange(20))
    spread = math.sqrt((1 + 10 / 9) * 20 / 19 * 0.95) / 20
    assert far.high - far.value > 12 * spread
    assert gain(np.ones(5), np.arange(5)).high == 1


def test_thresholds_keep_their_promise() -> None:
    rng = np.random.default_rng(0)
    names = [rule.measure for rule in RULES if rule.fitted]
    right = [GOOD | {name: float(rng.normal()) for name in names} for _ in range(2000)]
    limits = thresholds(right, boxes=0)
    words = [verdict(row, True, thresholds=limits)[0] for row in right]
    assert 0.02 <= 1 - words.count("supported") / 2000 <= 0.05
    assert 0.002 <= words.count("unsupported") / 2000 <= 0.01
    assert limits["lift"] == DEFAULTS["lift"], "what means the same everywhere is not fitted"


def test_calibration_error_by_hand() -> None:
    assert calibration_error([True, False, True, True], [0.95, 0.05, 0.65, 0.62]) == pytest.approx(
        (0.05 + 0.05 + 2 - 1.27) / 4
    )


@pytest.fixture(scope="module")
def labelled(tiny: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The tiny model in a folder of its own, and labels under half of what it reports."""
    folder = tmp_path_factory.mktemp("labelled")
    model = Path(shutil.copy(tiny, folder))
    more = ("--conf", 0.05, "--max-det", "8", "--no-overlays", "--evidence", "none", *FAST[2:])
    assert explain(pictures, "-m", model, "-o", folder / "tree", *more) == 0
    for record in read(folder / "tree"):
        if record["status"] == "ok":
            file = (folder / "labels" / record["image"]["path"]).with_suffix(".txt")
            file.parent.mkdir(parents=True, exist_ok=True)
            lines = []
            for d in record["detections"][::2]:
                size = np.array([record["image"]["width"], record["image"]["height"]])
                low, high = np.array(d["box"]).reshape(2, 2) / size
                lines.append(f"{d['class_id']} {' '.join(map(str, [*((low + high) / 2), *(high - low)]))}\n")
            file.write_text("".join(lines))
    return model, folder / "labels"


@pytest.fixture(scope="module")
def calibrated(labelled: tuple[Path, Path], pictures: Path) -> tuple[list[str], Path]:
    """The command line that made a calibration with a promise beside the model, and that file."""
    model, labels = labelled
    fast = ("--set", "detection.max_det=8", "--set", "attribution.tolerance=0.5", "--recall", 0.7)
    line = list(map(str, ["calibrate", "evidence", pictures, "--labels", labels, "-m", model, *fast, "-q"]))
    assert run(line) == 0
    return line, model.with_name("tiny.evidence.json")


@pytest.mark.slow
def test_a_list_with_a_promise(
    labelled: tuple[Path, Path], calibrated: tuple[list[str], Path], pictures: Path, tmp_path: Path, capsys: Any
) -> None:
    (model, _), (_, file), out = labelled, calibrated, tmp_path / "out"
    promise = read_calibration(file).promise
    assert promise is not None and promise.recall == 0.7
    boxes = ("--max-det", 8, "--candidates", promise.threshold)
    quick = ("-m", model, "--tolerance", 0.5, "--no-overlays")
    assert explain(pictures / "b.png", "-o", out, *boxes, *quick) == 0
    (record,) = read(out)
    listed = [d["score"] > promise.threshold for d in record["detections"]]
    assert [d["listed"] for d in record["detections"]] == listed
    assert record["promise"] == {"recall": 0.7, "threshold": promise.threshold}
    assert json.loads((out / "summary.json").read_bytes())["listed"] == sum(listed) > 0
    capsys.readouterr()
    assert run(["list", str(out), "--promise", "--json"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == sum(listed)
    assert run(["list", str(out), "--promise", "--kind", "detection"]) == 2
    assert "less than it promises" in capsys.readouterr().err
    # A run that looks at fewer boxes cannot keep it: it says so, and its tree is not taken for one that does.
    assert explain(pictures / "b.png", "-o", tmp_path / "less", "--max-det", 1, *quick) == 0
    assert "--max-det 8" in json.loads((tmp_path / "less" / "summary.json").read_bytes())["warnings"][0]
    assert all("promise" not in one for one in read(tmp_path / "less"))
    assert run(["list", str(tmp_path / "less"), "--promise"]) == 2
    assert "without a promise" in capsys.readouterr().err


@pytest.mark.slow
def test_a_calibration_and_its_promise_hold_for_the_shape_that_they_were_made_at(
    labelled: tuple[Path, Path], calibrated: tuple[list[str], Path], pictures: Path, tmp_path: Path, capsys: Any
) -> None:
    (model, _), (line, file), rect = labelled, calibrated, tmp_path / "rect.json"
    assert run([*line, "--recall", "0.5", "--rect", "-o", str(rect)]) == 0
    square, made = read_calibration(file), read_calibration(rect)
    assert (square.rect, made.rect, square.imgsz) == (None, True, made.imgsz)
    assert b'"rect"' not in file.read_bytes() and made.promise is not None

    def explained(name: str, *more: object) -> int:
        quick = ("--max-det", 8, "--candidates", 0.001, "--tolerance", 0.5, "--no-overlays")
        return explain(pictures / "b.png", "-m", model, "-o", tmp_path / name, *quick, *more)

    size = f"{square.imgsz} px"
    assert explained("beside", "--rect") == 0, "what lies beside the model is not used"
    (warning,) = json.loads((tmp_path / "beside" / "summary.json").read_bytes())["warnings"]
    assert f"made at {size}, and this run is at {size} with --rect. It is not used" in warning
    (record,) = read(tmp_path / "beside")
    assert "promise" not in record and not any(d["evidence"]["calibrated"] for d in record["detections"])
    capsys.readouterr()
    for file_given, more, words in (
        (file, ["--rect"], f"made at {size}, and this run is at {size} with --rect"),
        (rect, [], f"made at {size} with --rect, and this run is at {size}."),
        (file, ["--imgsz", "64,96"], f"made at {size}, and this run is at 64x96 px"),
    ):
        assert explained("refused", "--calibration", file_given, *more) == 2
        assert words in capsys.readouterr().err
    assert explained("own", "--rect", "--calibration", rect) == 0
    (record,) = read(tmp_path / "own")
    assert record["promise"]["recall"] == 0.5 and record["model"]["rect"] == [square.imgsz] * 2


@pytest.mark.slow
def test_calibrated_on_labels_and_found_beside_the_model(
    labelled: tuple[Path, Path],
    calibrated: tuple[list[str], Path],
    pictures: Path,
    tmp_path: Path,
    capsys: Any,
) -> None:
    (model, _), (line, file) = labelled, calibrated
    found = read_calibration(file)
    assert found.quality.right >= 10 and found.quality.wrong >= 10
    assert found.model_sha256 == hashlib.sha256(model.read_bytes()).hexdigest()
    # A second run starts from the same place: what lies beside the model does not count.
    assert run([*line, "-o", str(tmp_path / "again.json")]) == 0
    assert (tmp_path / "again.json").read_bytes() == file.read_bytes()

    more = ("--no-overlays", *FAST)
    assert explain(pictures, "-m", model, "-o", tmp_path / "out", *more) == 0
    first = read(tmp_path / "out")
    for record in first:
        for d in record["detections"]:
            e, own = d["evidence"], d["attributions"][0]
            assert e["calibrated"] and 0 <= e["trust"] <= 1
            assert e["trust"] == pytest.approx(found.trust(e, own["value_at_input"]), abs=1e-4)
            assert e["typicality"] == pytest.approx(found.typicality(d["class_id"], own["grid"]["values"]), abs=1e-4)
    # Another calibration is a reason to do the images again, none is not calibrated.
    file.rename(tmp_path / "away.json")
    assert explain(pictures, "-m", model, "-o", tmp_path / "out", *more) == 0
    assert not any(d["evidence"]["calibrated"] for record in read(tmp_path / "out") for d in record["detections"])
    assert explain(pictures, "-m", model, "-o", tmp_path / "out", "--calibration", tmp_path / "away.json", *more) == 0
    assert [r["detections"] for r in read(tmp_path / "out")] == [r["detections"] for r in first]
    # That of another model is refused where it was asked for, and not used where it just lies there.
    capsys.readouterr()
    bundled = (pictures / "b.jpg", "-o", tmp_path / "bundled", "--max-det", 1, "--no-overlays")
    assert explain(*bundled, "--calibration", tmp_path / "away.json") == 2
    assert "another model" in capsys.readouterr().err
    shutil.copy(SAMPLE_MODEL, tmp_path / "other.safetensors")
    (tmp_path / "away.json").rename(tmp_path / "other.evidence.json")
    assert run(["explain", *map(str, bundled), "-m", str(tmp_path / "other.safetensors")]) == 0
    assert "not calibrated" in capsys.readouterr().err


@pytest.mark.slow
def test_what_cannot_be_calibrated(tiny: Path, pictures: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels" / "b.txt").touch()
    line = ["calibrate", "evidence", str(pictures / "b.png"), "-m", str(tiny), "-o", str(tmp_path / "x.json"), "-q"]
    for more, code, said in (
        ((), 2, "--labels"),
        (("--labels", str(tmp_path / "labels"), "--conf", "0.9"), 2, "too few"),
        (("--labels", str(tmp_path)), 4, "label file"),
        (("--labels", str(tmp_path / "labels"), "--plot", "trust.gif"), 2, ".svg"),
        (("--labels", str(tmp_path / "labels"), "--recall", "1.5"), 2, "--recall 0.95"),
    ):
        assert run([*line, *more]) == code
        assert said in capsys.readouterr().err
    (tmp_path / "not.json").write_text("{}")
    assert explain(pictures, "-m", tiny, "-o", tmp_path / "o", "--calibration", tmp_path / "not.json") == 2


@pytest.mark.slow
def test_the_walk_through_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the README shows a newcomer, and the diagram."""
    text = (ROOT / "detxai" / "evidence" / "README.md").read_text(encoding="utf-8")
    block = text.partition("<!-- walk-through -->")[2].partition("```sh\n")[2].partition("```")[0]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "samples").symlink_to(ROOT / "samples")
    first, second = (shlex.split(line)[1:] for line in block.splitlines())
    assert run([*first, "--plot", "trust.svg"]) == 0
    made = read_calibration(tmp_path / "bags.evidence.json")
    assert (made.quality.right, made.quality.wrong) == (20, 8), "as it says"
    assert b"<svg" in (tmp_path / "trust.svg").read_bytes()
    assert run([*second, "--no-overlays"]) == 0
    assert all(d["evidence"]["calibrated"] for record in read(tmp_path / "bags") for d in record["detections"])


# -- the article's own picture --------------------------------------------------------------------

GIRAFFE = SHARED / "data" / "natural-dev" / "darknet" / "giraffe.jpg"
YOLOV5N = SHARED / "weights" / "yolov5n_coco.pt"


@needs(GIRAFFE, YOLOV5N)
@pytest.mark.slow
def test_the_zebra_is_no_giraffe(tmp_path: Path) -> None:
    """Each animal is supported as itself, and unsupported as the other."""
    assert explain(GIRAFFE, "-m", YOLOV5N, "-o", tmp_path, "--as-class", "giraffe,zebra") == 0
    record = records.load((tmp_path / "giraffe.jpg.json").read_bytes())
    assert record.detections is not None
    assert {d.class_name for d in record.detections} == {"giraffe", "zebra"}
    for d in record.detections:
        assert d.evidence is not None and d.evidence.verdict == "supported"
        (other,) = (a for a in d.attributions if a.as_class)
        assert other.evidence is not None and other.evidence.verdict == "unsupported"
        assert d.class_name in other.evidence.reasons[0]
