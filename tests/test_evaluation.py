"""The judge of attribution methods: its numbers against numbers worked out by hand, and the command as it is used."""

from __future__ import annotations

import csv
import json
import shutil
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT, SAMPLES, SHARED, Inside, needs, pixels
from PIL import Image
from torch import Tensor

from detxai.cli.app import run
from detxai.config import settings
from detxai.errors import UsageError
from detxai.evaluation import disturbed, metrics, priors, tables
from detxai.evaluation.compare import Judge
from detxai.evaluation.options import Options
from detxai.evaluation.perturbation import PixelOrder, Scene, curves, ranking, shares
from detxai.evaluation.subjects import Opened, Subject
from detxai.inputs import decode
from detxai.inputs.letterbox import letterboxed
from detxai.inputs.sources import find
from detxai.models import checkpoints, detectors
from detxai.models.heads.whole_image import layercam
from detxai.models.predictions import closeness, similarity
from detxai.values import Letterbox, Target

BOX = (1.0, 1.0, 3.0, 3.0)
#: Options for runs in which the figures only have to be real.
QUICK = ("--max-det", "1", "--steps", "3", "--tolerance", "0.3", "--max-evaluations", "16")


def test_area_under_known_curves() -> None:
    assert metrics.area_under([0, 0.5, 1], [1, 1, 1]) == 1
    assert metrics.area_under([0, 0.5, 1], [1, 0, 0]) == pytest.approx(0.25)
    assert metrics.area_under([0, 0.1, 1], [0, 1, 1]) == pytest.approx(0.05 + 0.9)
    assert metrics.area_under(shares(16), shares(16)) == pytest.approx(0.5)


def test_shares_of_area_begin_small() -> None:
    assert shares(4).tolist() == [0, 1 / 16, 1 / 4, 9 / 16, 1]


def test_pointing_asks_where_the_greatest_value_is() -> None:
    values = np.zeros((4, 4), np.float32)
    values[2, 1], values[0, 0] = 2, 1
    assert metrics.pointing(values, BOX) == 1
    assert metrics.pointing(values, (2.0, 0.0, 4.0, 4.0)) == 0
    values[0, 0] = 2
    assert metrics.pointing(values, BOX) == 0.5, "one of two equals"
    assert metrics.pointing(-values, BOX) is None, "nothing speaks for it"


def test_energy_counts_the_positive_part_and_pieces_of_pixels() -> None:
    values = np.zeros((4, 4), np.float32)
    values[1, 1], values[0, 3], values[3, 3] = 3, 1, -100
    assert metrics.energy(values, BOX) == pytest.approx(0.75)
    assert metrics.energy(values, (1.5, 1.0, 3.0, 3.0)) == pytest.approx(1.5 / 4)
    assert metrics.energy(-np.abs(values), BOX) is None
    shifted = values - 200
    assert metrics.energy(shifted, BOX) is None, "not min-max scaled: shifting a map is not harmless"


def test_gini_of_known_distributions() -> None:
    assert metrics.gini(np.ones(10)) == pytest.approx(0)
    assert metrics.gini([0, 0, 0, -1]) == pytest.approx(0.75), "(n - 1) / n where one has all"
    assert metrics.gini([1, 3]) == pytest.approx(0.25)
    assert metrics.gini(np.zeros(5)) is None


def test_parts_are_compared_with_their_area() -> None:
    values, parts = np.zeros((4, 4), np.float32), np.zeros((4, 4), np.uint8)
    parts[1, 1:3], parts[2, 1], parts[0, 0] = 1, 2, 3
    values[1, 1], values[2, 1], values[2, 2], values[1, 2], values[0, 0] = 2, 1, 1, -5, 50
    assert metrics.part_shares(values, parts, BOX) == {1: (0.5, 0.5), 2: (0.25, 0.25)}, "part 3 lies outside"
    assert metrics.part_shares(-np.abs(values), parts, BOX) is None


def test_bootstrap_intervals_cover() -> None:
    """95 % intervals hold the truth about as often as they say."""
    generator = np.random.default_rng(0)
    held = 0
    for trial in range(200):
        found = metrics.bootstrap(generator.normal(0.3, 1.0, 40).tolist(), seed=trial)
        assert found is not None
        held += found[1] <= 0.3 <= found[2]
    assert 180 <= held <= 198
    assert metrics.bootstrap([1, 2, 3], seed=4) == metrics.bootstrap([1, 2, 3], seed=4)
    assert metrics.bootstrap([2.0], seed=0) == (2.0, 2.0, 2.0)
    assert metrics.bootstrap([]) is None


def test_pairs_are_compared_image_by_image() -> None:
    """Images differ much, methods by little: only the paired difference can see it."""
    levels = [0.1, 0.9, 0.4, 0.7, 0.2, 0.6]
    figures = [
        {"detections": [{"methods": {"a": {"margin": v + 0.01}, "b": {"margin": v}, "c": {"margin": None}}}]}
        for v in levels
    ]
    names = {"a": False, "b": True, "c": True}
    rows = {(r["method"], r["against"]): r for r in tables.paired(figures, names, ["b"], 0)}
    assert rows["a", "b"]["mean"] == pytest.approx(0.01)
    assert rows["a", "b"]["above"]
    assert ("c", "b") not in rows, "nothing to compare"
    alone = {n: tables.interval(tables.by_image(figures, n, "margin"), 0) for n in "ab"}
    assert alone["a"] and alone["b"] and alone["a"]["low"] < alone["b"]["high"]


# -- deletion and insertion -------------------------------------------------------------------------

SIZE, PLACE = 64, slice(20, 36)
SQUARE = Letterbox((SIZE, SIZE), SIZE, SIZE, 1.0, 0, 0, SIZE, SIZE)
HERE = Target(0, 0, box=(20.0, 20.0, 36.0, 36.0))


def brightness(x: Tensor, pins: Sequence[tuple[int, Target]]) -> Tensor:
    """A detector whose score is how much light is left in a square."""
    return torch.stack([x[row, :, PLACE, PLACE].mean() for row, _ in pins])


def scene() -> Scene:
    return Scene.of(np.full((SIZE, SIZE, 3), 255, np.uint8), SQUARE, torch.device("cpu"))


def margins(values: np.ndarray[Any, Any], steps: int = 16) -> tuple[float, float]:
    """Deletion and insertion under the black fill."""
    rank = ranking(values.astype(np.float32), SQUARE, priors.random_map(SIZE, SIZE, 7))
    (found,) = curves(brightness, scene(), [PixelOrder(rank, (HERE,))], steps, rows=5)
    at = shares(steps)
    return tuple(metrics.area_under(at, found["black", mode][:, 0]) for mode in ("deletion", "insertion"))  # type: ignore[return-value]


def test_a_perfect_map_beats_random_and_its_opposite() -> None:
    perfect = np.zeros((SIZE, SIZE))
    perfect[PLACE, PLACE] = 1
    deletion, insertion = margins(perfect)
    assert deletion < 0.05 and insertion > 0.95
    by_chance = margins(priors.random_map(SIZE, SIZE, 0))
    assert by_chance[1] - by_chance[0] < 0.5 * (insertion - deletion)
    worst = margins(-perfect)
    last = (1 - (15 / 16) ** 2) / 2
    assert worst == pytest.approx((1 - last, last)), "the square, a sixteenth of the area, goes and comes last"


def test_curves_are_exact() -> None:
    """A quarter of the picture's area at a time is known to the pixel."""
    falling = -np.arange(SIZE * SIZE, dtype=np.float32).reshape(SIZE, SIZE)
    rank = ranking(falling, SQUARE, falling)
    assert rank.ravel().tolist() == list(range(SIZE * SIZE))
    (found,) = curves(brightness, scene(), [PixelOrder(rank, (HERE,))], 4, rows=3)
    # After 1/16, 1/4 and 9/16 of the rows (4, 16, 36): none, none, all of the square's rows 20 to 35 are gone.
    assert found["black", "deletion"][:, 0] == pytest.approx([1, 1, 1, 0, 0])
    assert found["black", "insertion"][:, 0] == pytest.approx([0, 0, 0, 1, 1])
    assert found["blur", "deletion"][:, 0] == pytest.approx([1] * 5, abs=1e-5), "a blurred white picture is white"


def test_equal_orders_and_ends_are_scored_once() -> None:
    seen = []

    def counted(x: Tensor, pins: Sequence[tuple[int, Target]]) -> Tensor:
        seen.append(len(x))
        return brightness(x, pins)

    rank = ranking(priors.random_map(SIZE, SIZE, 0), SQUARE, priors.random_map(SIZE, SIZE, 1))
    other = Target(1, 0, box=(0.0, 0.0, 8.0, 8.0))
    cases = [PixelOrder(rank, (HERE,)), PixelOrder(rank, (other,)), PixelOrder(rank, (HERE,))]
    found = curves(counted, scene(), cases, 4, rows=8)
    assert sum(seen) == 3 + 2 * 2 * 3, "the picture and two fills; two fills, two modes and three steps"
    assert all(np.array_equal(found[0][key], found[2][key]) for key in found[0])


@pytest.mark.parametrize("steps", [5, 16])
def test_flat_parts_of_a_curve_are_not_asked_for(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def counted(x: Tensor, pins: Sequence[tuple[int, Target]]) -> Tensor:
        seen.append(len(x))
        return brightness(x, pins)

    falling = -np.arange(SIZE * SIZE, dtype=np.float32).reshape(SIZE, SIZE)
    cases = [PixelOrder(ranking(falling, SQUARE, falling), (HERE,))]
    (few,) = curves(counted, scene(), cases, steps, rows=8)
    spent = sum(seen)
    monkeypatch.setattr("detxai.evaluation.perturbation.FLAT", -1)
    (all_,) = curves(counted, scene(), cases, steps, rows=8)
    assert sum(seen) - spent == 3 + 2 * 2 * (steps - 1)
    assert spent < 0.7 * (3 + 2 * 2 * (steps - 1)) or steps < 8
    for key, values in all_.items():
        assert few[key][:, 0] == pytest.approx(values[:, 0], abs=0.01)


def test_ties_are_broken_by_what_knows_nothing() -> None:
    flat, ties = np.zeros((SIZE, SIZE), np.float32), priors.random_map(SIZE, SIZE, 3)
    assert np.array_equal(ranking(flat, SQUARE, ties), ranking(ties, SQUARE, flat))


def test_ranking_finds_the_place_in_the_letterbox() -> None:
    """A map of the source lands on the pixels the network sees, padding left out."""
    picture = pixels("bag-01.jpg", (120, 60))
    _, box = letterboxed(picture, (SIZE, SIZE))
    values = np.zeros((60, 120), np.float32)
    values[30:60, :60] = 1  # the lower left quarter
    rank = ranking(values, box, priors.random_map(60, 120, 0))
    assert rank.shape == (32, 64)
    assert (rank[17:, :31] < 16 * 32).all()
    smooth = ranking(values, box, priors.random_map(60, 120, 0), sigma=3)
    assert smooth[31, 0] < smooth[17, 0] < smooth[17, 40], "blurred, the middle of the quarter comes first"


def test_an_absolute_order_takes_what_speaks_against_first_too() -> None:
    picture = decode.load(next(iter(find([str(SAMPLES / "bag-03.jpg")]).refs)), "auto", 10**8)
    canvas, box = letterboxed(picture.pixels, (SIZE, SIZE))
    subject = Subject(0, 0, "knife", 0.9, (8.0, 8.0, 90.0, 90.0), HERE)
    values = np.zeros((picture.height, picture.width), np.float32)
    opened = Opened(picture, canvas, box, [subject], [None], 0, priors.random_map(*values.shape, 0))
    values[:90, :90], values[-90:, -90:] = 1, -2
    signed, absolute = (
        opened.read(subject, values, None, Options(smooth=0, order=order)).rank for order in ("signed", "absolute")
    )
    middle = signed.shape[0] // 2, signed.shape[1] // 2
    assert signed[0, 0] < signed[middle] < signed[-1, -1]
    assert absolute[-1, -1] < absolute[0, 0] < absolute[middle]


def test_priors_look_as_they_are_called() -> None:
    prior = priors.box_map(60, 100, (20.0, 10.0, 60.0, 50.0))
    inside = np.zeros(prior.shape, bool)
    inside[10:50, 20:60] = True
    assert (prior[inside] > 0).all() and (prior[~inside] < 0).all()
    assert metrics.energy(prior, (20.0, 10.0, 60.0, 50.0)) == pytest.approx(1)
    first, again, other = (priors.random_map(60, 100, seed) for seed in (1, 1, 2))
    assert np.array_equal(first, again) and not np.array_equal(first, other)
    assert abs(float(first.mean())) < float(first.std())


# -- networks -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def detector(tiny: Path) -> Any:
    return detectors.build(checkpoints.load(str(tiny)))


def seen(name: str = "bag-01.jpg", side: int = SIZE) -> Tensor:
    return torch.from_numpy(pixels(name, (side, side)).copy()).permute(2, 0, 1)[None].float() / 255


def test_closeness_is_similarity(detector: Any) -> None:
    x = torch.cat([seen("bag-01.jpg"), seen("bag-02.jpg")])
    pins = [(row, Target(0, 0, class_id=c, box=(8.0, 8.0, 40.0, 50.0))) for row in (0, 1) for c in (2, 0)]
    with torch.no_grad():
        expected = similarity(detector.predict(x), pins)
        found = closeness(detector, x, pins)
    assert torch.allclose(found, expected, atol=1e-6)
    assert float(expected.max()) > 0


@needs(SHARED / "weights" / "yolov5n_coco.pt")
def test_closeness_of_a_model_with_objectness() -> None:
    legacy = detectors.build(checkpoints.load(str(SHARED / "weights" / "yolov5n_coco.pt")))
    x, pins = seen(side=192), [(0, Target(0, 0, class_id=c, box=(20.0, 20.0, 150.0, 100.0))) for c in (79, 0, 24)]
    with torch.no_grad():
        expected = similarity(legacy.predict(x), pins)
        assert torch.allclose(closeness(legacy, x, pins), expected, atol=1e-6)


def test_layercam_is_the_one_ultralytics_draws(detector: Any, tiny: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """Their function on their module, the map caught where it is coloured."""
    from ultralytics.utils import plotting

    if not hasattr(plotting, "class_activation_map"):
        pytest.skip("this ultralytics draws no LayerCAM")
    drawn: list[np.ndarray[Any, Any]] = []

    def caught(cam: np.ndarray[Any, Any], _: int) -> np.ndarray[Any, Any]:
        drawn.append(cam)
        return np.zeros((*cam.shape, 3), np.uint8)

    monkeypatch.setattr(plotting.cv2, "applyColorMap", caught)
    network = checkpoints.load(str(tiny)).module.eval()
    for parameter in network.parameters():
        parameter.requires_grad_(False)

    class Backend:
        model = network

        def __call__(self, im: Tensor) -> Any:
            return network(im)

    x = seen()
    plotting.class_activation_map(Backend(), x, ["a.png"], tmp_path, conf=0.25)
    found, passes = layercam(detector, x, 0.25)
    assert passes >= 1
    assert np.abs(found.numpy() * 255 - drawn[0]).max() < 1.5, "theirs is rounded down to bytes"
    assert float(found.max()) == pytest.approx(1)


@pytest.mark.slow
def test_shuffled_weights_change_the_maps_and_not_the_predictions(detector: Any) -> None:
    x = seen()
    before = detector.predict(x)[0]
    anchor = int(before.scores.amax(1).argmax())
    pin = (0, Target(anchor, int(before.levels[anchor]), class_id=0))
    value = float(detector.values(x, [pin])[0])
    layers = sum(1 for m in detector.module.modules() if any(True for _ in m.parameters(recurse=False)))
    changed = []
    for share, other in disturbed.cascade(detector, seed=1):
        assert not torch.equal(other.predict(x)[0].scores, before.scores)
        pinned = disturbed.Reporting(other, detector)
        assert torch.equal(pinned.predict(x)[0].scores, before.scores), "they are pinned as the original made them"
        assert not torch.equal(pinned.scores(x, [0])[1], before.scores[None, :, :1]), "as it sees masked pictures"
        assert float(other.values(x, [pin])[0]) != pytest.approx(value, abs=1e-4), share
        pairs = list(zip(other.module.parameters(), detector.module.parameters(), strict=True))
        changed.append(sum(not torch.equal(a, b) for a, b in pairs))
        assert all(
            torch.equal(a.sort().values, b.sort().values) for a, b in ((p.flatten(), q.flatten()) for p, q in pairs)
        ), "shuffled, not drawn anew"
    assert changed == sorted(changed) and changed[0] < changed[-1] and changed[-1] > layers / 2
    assert float(detector.values(x, [pin])[0]) == value, "the original is left alone"


def test_noise_is_small_and_seeded(detector: Any) -> None:
    x = seen()
    anchor = int(detector.predict(x)[0].scores.amax(1).argmax())
    pin = (0, Target(anchor, int(detector.predict(x)[0].levels[anchor]), class_id=0))
    plain, one, again, two = (
        float(d.values(x, [pin])[0])
        for d in (detector, *(disturbed.noisy(detector, (SIZE, SIZE), seed) for seed in (1, 1, 2)))
    )
    assert one == again
    assert len({plain, one, two}) == 3
    assert abs(one - plain) < 1


@pytest.mark.slow
def test_sanity_of_the_bundled_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without what the network learned its maps lose their likeness; another class has another; noise costs less."""
    monkeypatch.setattr(disturbed, "CASCADE", (0.0, 0.5, 1.0))
    chosen = settings.load(options={"method": ["grad"], "max_det": 1})
    judge = Judge(chosen, Options(steps=2, sanity=1, stability=1, baselines=False))
    (judged,) = judge.judge([next(iter(find([str(SAMPLES / "bag-03.jpg")]).refs))], stability=True, sanity=True)
    assert judged.figures is not None
    figures = judged.figures
    cascade = [stage["correlation"]["grad"][0] for stage in figures["cascade"]]
    assert len(cascade) == len(disturbed.CASCADE)
    assert all(abs(value) < 0.5 for value in cascade), cascade
    assert figures["stability"]["grad"][0] > 0.8
    assert figures["other_class"]["grad"][0] < 0.8


def test_options_that_make_no_sense() -> None:
    numbers = {"steps": 1, "limit": 0, "stability": -1, "smooth": 2.0}
    for wrong in (*({k: v} for k, v in numbers.items()), {"score_precision": "fp8"}, {"order": "best"}):
        with pytest.raises(UsageError, match=next(iter(wrong)).replace("_", "-")):
            Options(**wrong)  # type: ignore[arg-type]


# -- the command ----------------------------------------------------------------------------------------


@pytest.fixture
def machine(inside: Inside, tiny: Path) -> Inside:
    """The command beside the tiny model, three samples, their labels and part masks, and things that are wrong."""
    here = inside.cwd
    (here / "tiny.safetensors").symlink_to(tiny)
    for name in ("images", "labels", "parts"):
        (here / name).mkdir()
    for stem in ("bag-01", "bag-03"):
        shutil.copy(SAMPLES / f"{stem}.jpg", here / "images")
        shutil.copy(ROOT / "samples" / "labels" / f"{stem}.txt", here / "labels")
        for mask in (ROOT / "samples" / "parts").glob(f"{stem}.*.png"):
            shutil.copy(mask, here / "parts")
    shutil.copy(ROOT / "samples" / "parts" / "parts.json", here / "parts")
    shutil.copy(ROOT / "samples" / "labels" / "classes.txt", here / "labels")
    (here / "file").write_text("in the way")
    (here / "empty").mkdir()
    return inside


@pytest.mark.slow
def test_the_whole_command_and_again(machine: Inside, monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures, tables and pictures of the bundled model; a second run does no work twice."""
    asked = ("--labels", "labels", "--masks", "parts", "--method", "ig,layercam", "--imgsz", "192")
    line = ("evaluate", "images", *asked, *QUICK)
    first = machine(*line)
    assert first.code == 0, first.err
    assert first.out == ""
    assert "2 images judged, 0 already done" in first.err
    tree = machine.cwd / "runs" / "evaluate"
    found = json.loads((tree / "evaluate.json").read_text())
    names = ["ig", "layercam", "grad", "random", "box", "ultralytics"]
    assert list(found["methods"]) == names
    assert [m["baseline"] for m in found["methods"].values()] == [False, False, True, True, True, True]
    rows = list(csv.DictReader((tree / "detections.csv").read_text().splitlines()))
    assert len(rows) == 2 * len(names)
    assert {r["method"] for r in rows} == set(names)
    for row in rows:
        own = found["methods"][row["method"]]
        insertion, deletion, margin = (float(row[f"{k}_black"]) for k in ("insertion", "deletion", "margin"))
        assert insertion - deletion == pytest.approx(margin, abs=1e-5)
        assert own["metrics"]["margin"]["low"] <= own["metrics"]["margin"]["mean"] <= own["metrics"]["margin"]["high"]
    mean = np.mean([float(r["margin"]) for r in rows if r["method"] == "ig"])
    assert found["methods"]["ig"]["metrics"]["margin"]["mean"] == pytest.approx(mean, rel=1e-4)
    assert {r["against"] for r in found["paired"]} == {"random", "grad", "ig"}
    assert found["methods"]["box"]["metrics"]["energy"]["mean"] == pytest.approx(1, abs=1e-3)
    assert found["parts"], "labelled items were found, and their parts"
    for name in ("curves.png", "contact.png"):
        with Image.open(tree / name) as picture:
            assert min(picture.size) > 300
    before = {file: file.stat().st_mtime_ns for file in tree.rglob("*.json") if file.parent.name == "images"}
    again = machine(*line)
    assert again.code == 0
    assert "0 images judged, 2 already done" in again.err
    assert {file: file.stat().st_mtime_ns for file in before} == before
    repeated = json.loads((tree / "evaluate.json").read_text())
    assert repeated == found
    (tree / "images" / sorted(f.name for f in before)[0]).write_text("{ cut")
    monkeypatch.chdir(machine.cwd)
    for more, said in (((), "1 images judged, 1 already done"), (("--seed", "1", "--no-baselines"), "2 images judged")):
        assert run([*line, *more]) == 0
        assert said in machine.captured.readouterr().err


@pytest.mark.slow
def test_no_baselines_and_nothing_detected(machine: Inside, monkeypatch: pytest.MonkeyPatch) -> None:
    common = ("evaluate", "images", "--limit", "1", "--steps", "2", "-o", "out")
    plain = ("-m", "tiny.safetensors", "--method", "grad,inputxgrad", "--no-baselines", "--max-det", "1")
    monkeypatch.chdir(machine.cwd)
    assert run([*common, *plain, "-q"]) == 0
    found = json.loads((machine.cwd / "out" / "evaluate.json").read_text())
    assert list(found["methods"]) == ["grad", "inputxgrad"]
    assert not any(m["baseline"] for m in found["methods"].values())
    assert run(["evaluate", "images", "--conf", "1", "-m", "tiny.safetensors", "-o", "none", "-q"]) == 0
    assert json.loads((machine.cwd / "none" / "evaluate.json").read_text())["detections"] == 0


#: Arguments, exit code, words on stderr.
REFUSED: dict[str, tuple[str, int, list[str]]] = {
    "no source": ("evaluate", 2, ["SOURCE"]),
    "not there": ("evaluate nowhere", 2, ["nowhere"]),
    "no image": ("evaluate empty", 4, ["No image"]),
    "unknown method": ("evaluate images --method igg", 2, ["igg", "did you mean 'ig'"]),
    "too few steps": ("evaluate images --steps 1", 2, ["--steps 1", "at least 2"]),
    "no masks": ("evaluate images --masks nowhere", 2, ["--masks nowhere"]),
    "no labels": ("evaluate images --labels nowhere", 2, ["--labels", "nowhere"]),
    "wrong precision": ("evaluate images --score-precision fp8", 2, ["--score-precision", "fp32 or bf16"]),
    "no model": ("evaluate images -m none.pt", 5, ["No model at none.pt"]),
    "file in the way": ("evaluate images -m tiny.safetensors -o file", 6, ["file is in the way", "-o"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_nonsense_has_its_exit_code_and_one_clear_line(
    machine: Inside, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    line, code, words = REFUSED[case]
    monkeypatch.chdir(machine.cwd)
    assert run(line.split()) == code
    said = machine.captured.readouterr().err
    assert all(word in said for word in words), said
    assert said.lower().count("error: ") == 1


def test_without_matplotlib_it_says_so_before_any_work(machine: Inside, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(machine.cwd)
    monkeypatch.setattr("detxai.evaluation.run.find_spec", lambda name: None)
    assert run(["evaluate", "images"]) == 2
    assert "pip install matplotlib" in machine.captured.readouterr().err
    assert not (machine.cwd / "runs").exists()


def test_a_damaged_image_is_one_failure(machine: Inside, monkeypatch: pytest.MonkeyPatch) -> None:
    (machine.cwd / "images" / "cut.jpg").write_bytes((SAMPLES / "bag-05.jpg").read_bytes()[:3000])
    monkeypatch.chdir(machine.cwd)
    assert run(["evaluate", "images", "-m", "tiny.safetensors", "--method", "grad", *QUICK]) == 3
    said = machine.captured.readouterr().err
    assert "cut.jpg" in said and "truncated" in said
    assert json.loads((machine.cwd / "runs" / "evaluate" / "evaluate.json").read_text())["failed"] == 1


@pytest.mark.slow
def test_an_interrupted_run_goes_on(machine: Inside) -> None:
    for number in range(14):
        picture = pixels("bag-01.jpg", (90 + number, 80))
        Image.fromarray(picture).save(machine.cwd / "images" / f"{number:02d}.png")
    line = ("evaluate", "images", "-m", "tiny.safetensors", "--method", "grad", "--no-baselines", *QUICK)
    running = machine.start(*line)
    folder = machine.cwd / "runs" / "evaluate" / "images"
    while running.poll() is None and len(list(folder.glob("*.json"))) < 2:
        pass
    running.send_signal(signal.SIGINT)
    _, err = running.communicate()
    assert running.returncode == 130, err
    assert b"run the same command again" in err and b"Traceback" not in err
    done = len(list(folder.glob("*.json")))
    assert 2 <= done < 16
    again = machine(*line)
    assert again.code == 0, again.err
    assert f"{16 - done} images judged, {done} already done" in again.err
