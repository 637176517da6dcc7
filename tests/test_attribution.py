"""Axioms of integrated gradients, on functions whose answer is known and on a real seeded network."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SIDE, pixels, seeded_network
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from detxai.attribution import baselines
from detxai.attribution.engine import Engine, solve
from detxai.attribution.integral import AT_ONCE, integrated_gradients
from detxai.attribution.memory import Room
from detxai.attribution.points import Ask, Ran, Row, Segment, TargetMap
from detxai.attribution.quadrature import CROWDED, SQUARE, Mesh, Rule, cubic
from detxai.attribution.rules import clenshaw_curtis, gauss_legendre, newton_cotes
from detxai.models.detector import Detector, Pin
from detxai.models.detectors import build
from detxai.values import Checkpoint, Letterbox, Target

RULES = {
    "trapezoid": newton_cotes(2, panels=4),
    "simpson": newton_cotes(3, panels=2),
    "simpson in sqrt": newton_cotes(3, curve=SQUARE, panels=4),
    "cubic": cubic(),
    "cubic in sqrt": cubic(curve=SQUARE, panels=3),
    "boole": newton_cotes(5),
    "gauss": gauss_legendre(5),
    "gauss in sqrt": gauss_legendre(5, curve=SQUARE, panels=2),
    "clenshaw-curtis": clenshaw_curtis(8),
}
SIZE = 6
ONE = Target(0, 0)
#: A tolerance that the first nodes meet: nothing is refined.
ANY = 1e9
Function = Callable[[Tensor], Tensor]
Scene = tuple[Tensor, list[Target]]


def integral(f: Function, x: Tensor, b: Tensor, **options: Any) -> TargetMap:
    """Integrated gradients of f (batch, 3, size, size) -> (batch,), through the engine."""

    def field(batch: Tensor, pins: Sequence[tuple[int, Target]]) -> Tensor:
        return f(batch)[[row for row, _ in pins]]

    return solve(field, integrated_gradients(Segment(x, b), [ONE], **options))[0]


@pytest.fixture
def pair() -> tuple[Tensor, Tensor, Tensor]:
    """(x, b, w), each (3, size, size)."""
    generator = torch.Generator().manual_seed(3)
    x, b, w = torch.rand(3, 3, SIZE, SIZE, generator=generator)
    return x, b, w - 0.5


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_weights_sum_to_one(rule: Rule) -> None:
    mesh = Mesh(rule)
    for _ in range(3):
        # Each of these rules integrates the density of its curve exactly.
        assert math.fsum(mesh.weights().values()) == pytest.approx(1, abs=1e-12)
        mesh.panels = [p for a, b in mesh.panels for p in ((a, (a + b) / 2), ((a + b) / 2, b))]


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_linear_functions_are_exact(rule: Rule, pair: tuple[Tensor, Tensor, Tensor]) -> None:
    x, b, w = pair
    found = integral(lambda z: (z * w).sum((1, 2, 3)), x, b, rule=rule, tolerance=ANY)
    torch.testing.assert_close(found.map, (w * (x - b)).sum(0).double(), atol=1e-6, rtol=1e-5)
    assert found.error_bound == pytest.approx(0, abs=1e-5)


#: Those that integrate a polynomial of the third degree in v exactly: α dα/dv with all curves but that of `CROWDED`.
QUADRATIC = {n: r for n, r in RULES.items() if n != "trapezoid" and r.curve != CROWDED}


@pytest.mark.parametrize("rule", QUADRATIC.values(), ids=QUADRATIC)
def test_quadratic_functions_are_exact(rule: Rule, pair: tuple[Tensor, Tensor, Tensor]) -> None:
    x, b, w = pair
    found = integral(lambda z: (w * z * z).sum((1, 2, 3)), x, b, rule=rule, tolerance=ANY)
    torch.testing.assert_close(found.map, (w * (x * x - b * b)).sum(0).double(), atol=1e-6, rtol=1e-5)
    assert found.completeness_error == pytest.approx(0, abs=1e-5)


def test_the_trapezoid_rule_is_exact_for_quadratics_in_alpha(pair: tuple[Tensor, Tensor, Tensor]) -> None:
    x, b, w = pair
    found = integral(lambda z: (w * z * z).sum((1, 2, 3)), x, b, rule=newton_cotes(2), tolerance=ANY)
    torch.testing.assert_close(found.map, (w * (x * x - b * b)).sum(0).double(), atol=1e-6, rtol=1e-5)
    assert found.evaluations == 2


def test_nothing_where_input_and_baseline_are_equal(pair: tuple[Tensor, Tensor, Tensor]) -> None:
    x, b, w = pair
    b[:, 2:4] = x[:, 2:4]
    found = integral(lambda z: torch.tanh((w * z).sum((1, 2, 3)) * 9), x, b)
    assert not found.map[2:4].any()
    assert found.map[:2].any()
    same = integral(lambda z: torch.tanh((w * z).sum((1, 2, 3)) * 9), x, x.clone())
    assert not same.map.any()
    assert same.converged


def test_a_pixel_that_does_not_matter_gets_nothing(pair: tuple[Tensor, Tensor, Tensor]) -> None:
    x, b, w = pair
    w[:, :, 0] = 0
    found = integral(lambda z: torch.tanh((w * z).sum((1, 2, 3)) * 9), x, b)
    assert not found.map[:, 0].any()


def test_completeness_at_a_step_that_uniform_nodes_miss(pair: tuple[Tensor, Tensor, Tensor]) -> None:
    """A logit that jumps in the first per cent of the path, as detectors' do."""
    x, b, _ = pair
    x, b = torch.ones_like(x), torch.zeros_like(b)

    def jump(z: Tensor) -> Tensor:
        return 10 * torch.tanh(200 * (z.mean((1, 2, 3)) - 0.01))

    found = integral(jump, x, b, tolerance=0.02)
    assert found.converged
    assert found.completeness_error is not None
    assert found.error_bound is not None
    assert found.completeness_error <= found.error_bound + 1e-9 <= 0.02
    delta = found.value_at_input - (found.value_at_baseline or 0.0)
    assert float(found.map.sum()) == pytest.approx(delta, rel=0.02)
    short = integral(jump, x, b, tolerance=0.02, max_evaluations=12)
    assert short.converged is False
    assert short.evaluations <= 12


def test_many_targets_share_their_points(pair: tuple[Tensor, Tensor, Tensor]) -> None:
    """Each map is what it would be alone, whoever needs more nodes."""
    x, b, w = pair

    def field(batch: Tensor, pins: Sequence[tuple[int, Target]]) -> Tensor:
        inner = (batch * w).sum((1, 2, 3))
        return torch.stack([torch.sin(inner[row] * 3 * (1 + target.class_id)) for row, target in pins])

    targets = [Target(0, 0, class_id=k) for k in range(4)]
    together = solve(field, integrated_gradients(Segment(x, b), targets, tolerance=1e-4))
    for target, found in zip(targets, together, strict=True):
        (alone,) = solve(field, integrated_gradients(Segment(x, b), [target], tolerance=1e-4))
        assert alone.evaluations == found.evaluations
        torch.testing.assert_close(found.map, alone.map, atol=1e-7, rtol=1e-6)
    assert len({found.evaluations for found in together}) > 1


@given(
    steepness=st.floats(0.5, 60),
    centre=st.floats(0, 1),
    tolerance=st.floats(1e-3, 0.2),
    most=st.integers(2, 200),
    rule=st.sampled_from(sorted(RULES)),
)
@settings(max_examples=60, deadline=None)
def test_refinement(steepness: float, centre: float, tolerance: float, most: int, rule: str) -> None:
    """Nested nodes, honest bounds, never more evaluations than allowed, and no verdict but by the bound."""

    def value(alpha: float) -> float:
        return 5 * math.tanh(steepness * (alpha - centre))

    def slope(alpha: float) -> float:
        return 5 * steepness / math.cosh(steepness * (alpha - centre)) ** 2

    mesh = Mesh(RULES[rule].within(most))
    seen: set[float] = set()
    while True:
        for v, gradient in mesh.missing().items():
            alpha = mesh.rule.alpha(v)
            mesh.value[v] = value(alpha)
            if gradient:
                assert v not in mesh.slope, "a node is paid for once"
                mesh.slope[v] = slope(alpha)
        if mesh.rule.name.startswith(("newton-cotes", "cubic")):
            assert seen <= set(mesh.weights()) | {0.0}, "nodes are nested"
        seen = set(mesh.weights())
        bound = mesh.bound()
        total = sum(w * mesh.slope[v] for v, w in mesh.weights().items())
        assert abs(total - mesh.delta) / mesh.scale <= bound + 1e-12
        if bound <= tolerance or len(mesh.slope) > most:
            break
        panels = len(mesh.panels)
        mesh.refine(tolerance)
        assert len(mesh.panels) > panels, "refining refines"
    assert [a for a, _ in mesh.panels][1:] == [b for _, b in mesh.panels][:-1]
    assert (mesh.panels[0][0], mesh.panels[-1][1]) == (0.0, 1.0)


@given(most=st.integers(2, 60), steep=st.floats(0.1, 300), tolerance=st.floats(1e-6, 0.5))
@settings(max_examples=40, deadline=None)
def test_the_budget_is_kept_and_what_missed_it_says_so(most: int, steep: float, tolerance: float) -> None:
    x, b = torch.ones(3, 2, 2), torch.zeros(3, 2, 2)
    found = integral(
        lambda z: torch.tanh(steep * (z.mean((1, 2, 3)) - 0.3)), x, b, tolerance=tolerance, max_evaluations=most
    )
    assert found.error_bound is not None
    assert found.evaluations <= max(most, 3)  # one panel is the least there is
    assert found.converged == (found.error_bound <= tolerance)


def test_a_cubic_rule_weighs_even_nodes_alike() -> None:
    mesh = Mesh(cubic(panels=8))
    weights = {v: w / mesh.rule.density(v) * 16 for v, w in mesh.weights().items()}
    assert [weights[k / 16] for k in range(4, 13)] == pytest.approx([1.0] * 9)
    mesh.panels[:1] = [(0.0, 1 / 16), (1 / 16, 1 / 8)]
    total = sum(w * mesh.rule.alpha(v) for v, w in mesh.weights().items())
    assert total == pytest.approx(0.5, abs=1e-5), "uneven nodes are weighed by the distances of their neighbours"


def test_the_bound_falls_on_smooth_functions() -> None:
    mesh = Mesh(cubic())
    bounds = []
    for _ in range(5):
        for v in mesh.missing():
            alpha = mesh.rule.alpha(v)
            mesh.value[v], mesh.slope[v] = 3 * math.sin(4 * alpha), 12 * math.cos(4 * alpha)
        bounds.append(mesh.bound())
        mesh.panels = [p for a, b in mesh.panels for p in ((a, (a + b) / 2), ((a + b) / 2, b))]
    assert all(later < earlier / 4 for earlier, later in zip(bounds, bounds[1:], strict=False)), bounds


def _later(value: object) -> Any:
    """A case that the quick suite leaves to CI."""
    return pytest.param(value, marks=pytest.mark.slow)


@pytest.fixture(scope="module", params=["yolov8n.yaml", _later("yolov5n.yaml"), _later("yolo11n.yaml")])
def detector(request: pytest.FixtureRequest) -> Detector:
    network = seeded_network(request.param)
    return build(Checkpoint(request.param, "", "ultralytics", network, "yolo", network.names, SIDE))


@pytest.fixture(scope="module")
def scene(detector: Detector) -> Scene:
    """A sample, and the strongest prediction of each level."""
    x = torch.from_numpy(pixels("bag-03.jpg", (SIDE, SIDE)).copy()).permute(2, 0, 1).float() / 255
    with torch.no_grad():
        found = detector.predict(x[None])[0]
    targets = []
    for level in range(3):
        scores = found.scores.masked_fill((found.levels != level)[:, None], -1)
        anchor, class_id = divmod(int(scores.argmax()), scores.shape[1])
        targets.append(Target(anchor, level, "class", class_id))
    return x, targets


@pytest.mark.parametrize("nodes", [8, 50])
def test_captum_agrees_at_equal_nodes(detector: Detector, scene: Scene, nodes: int) -> None:
    captum = pytest.importorskip("captum.attr")
    x, targets = scene
    b = torch.zeros_like(x)
    asked = integrated_gradients(Segment(x, b), targets, rule=gauss_legendre(nodes), tolerance=ANY, max_evaluations=999)
    for target, ours in zip(targets, solve(detector.values, asked), strict=True):

        def scalar(batch: Tensor, target: Target = target) -> Tensor:
            return detector.full_values(batch, [Pin(row, target) for row in range(len(batch))])

        theirs = captum.IntegratedGradients(scalar).attribute(
            x[None], b[None], method="gausslegendre", n_steps=nodes, internal_batch_size=8
        )
        theirs = theirs[0].sum(0).double()
        assert ours.evaluations == nodes
        assert float(theirs.norm()) > 0.1, "a map of nothing agrees with anything"
        assert float((ours.map - theirs).norm() / theirs.norm()) <= 1e-4


def test_sparse_gradients_equal_those_of_the_whole_network(detector: Detector, scene: Scene) -> None:
    x, targets = scene
    targets += [Target(t.anchor, t.level, edge, t.class_id) for t in targets for edge in ("left", "bottom")]
    asked = [integrated_gradients(Segment(x, torch.ones_like(x)), targets, tolerance=ANY) for _ in range(2)]
    for sparse, full in zip(solve(detector.values, asked[0]), solve(detector.full_values, asked[1]), strict=True):
        assert float(full.map.norm()) > 0.01
        assert float((sparse.map - full.map).norm() / full.map.norm()) <= 1e-4
        assert sparse.value_at_input == pytest.approx(full.value_at_input, abs=1e-3)


def test_a_map_has_the_same_bits_whatever_shares_its_pack(detector: Detector, scene: Scene) -> None:
    """Resumed, sharded and shuffled runs put other images and other levels beside a point."""
    x, targets = scene
    others = [Segment(x.flip(-1), torch.zeros_like(x)), Segment(x.flip(1) * 0.8, torch.ones_like(x))]

    def maps(order: list[int]) -> dict[int, list[TargetMap]]:
        paths = [Segment(x, torch.ones_like(x)), *others]
        asks = [integrated_gradients(path, targets, max_evaluations=20) for path in paths]
        engine = Engine(detector.values, torch.device("cpu"))
        return dict(engine.run([(k, asks[k]) for k in order], 3))

    alone, first, last = maps([0]), maps([0, 1, 2]), maps([2, 1, 0])
    for mine, one, other in zip(alone[0], first[0], last[0], strict=True):
        assert torch.equal(mine.map, one.map)
        assert torch.equal(mine.map, other.map)
        assert mine.evaluations == one.evaluations == other.evaluations


@pytest.mark.parametrize("name", ["black", "white", "gray", "mean", "blur", "auto"])
def test_baselines_keep_the_padding(name: str) -> None:
    canvas = np.full((SIDE, SIDE, 3), 114, np.uint8)
    canvas[8:-8] = pixels("bag-02.jpg", (SIDE, SIDE - 16))
    box = Letterbox((SIDE, SIDE), SIDE, SIDE - 16, 1.0, 0, 8, SIDE, SIDE - 16)
    label = baselines.resolved(name, canvas, box)
    found = baselines.baseline(label, baselines.picture(canvas), box)
    assert found.shape == (3, SIDE, SIDE)
    assert bool((found[:, :8] == np.float32(114 / 255)).all())
    inner = found[:, 8:-8]
    expected = {"black": 0.0, "white": 1.0, "gray": 114 / 255}
    if name in expected:
        assert float(inner.min()) == float(inner.max()) == pytest.approx(expected[name])
    elif name == "auto":
        assert label.startswith("auto:#")
        assert float(inner.min()) > 0.8, "the ground of a scan is nearly white"
    elif name == "mean":
        assert float(inner.mean()) == pytest.approx(canvas[8:-8].mean() / 255, abs=1e-3)
        assert float(inner.flatten(1).std(1).max()) < 1e-3
    else:
        assert 0 < float(inner.std()) < float(np.std(canvas[8:-8] / 255))


def test_no_ground_means_black() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), np.uint8)
    assert baselines.ground(noise) is None
    assert baselines.resolved("auto", noise, Letterbox((SIDE, SIDE), SIDE, SIDE, 1.0, 0, 0, SIDE, SIDE)) == "auto:black"


@pytest.mark.parametrize("share", [baselines.BLUR_SIGMA, baselines.SOFT_SIGMA])
def test_a_blur_in_bands_is_the_blur_of_the_whole(share: float) -> None:
    picture = torch.rand(3, 200, 333, generator=torch.Generator().manual_seed(0))
    rows, columns = (baselines._gaussian(length, share * 333, picture.device) for length in (200, 333))
    blurred = baselines._blurred(picture, share)
    assert blurred.std() < picture.std()
    torch.testing.assert_close(blurred, rows @ picture @ columns.T, atol=1e-6, rtol=0)


def test_gradients_without_room_are_computed_again_to_the_same_bits(detector: Detector, scene: Scene) -> None:
    x, targets = scene

    def maps(room: Room) -> list[TargetMap]:
        engine = Engine(detector.values, torch.device("cpu"), room=room)
        ask = integrated_gradients(Segment(x, torch.zeros_like(x)), targets, max_evaluations=40, tolerance=1e-3)
        ((_, found),) = engine.run([(None, ask)], 1)
        assert room.taken == 0, "what is done leaves no gradient behind"
        return found

    few = 5 * x[0].nbytes
    wide, narrow = Room(), Room(few)
    for kept, again in zip(maps(wide), maps(narrow), strict=True):
        assert torch.equal(kept.map, again.map)
        assert kept.evaluations == again.evaluations > 8
    assert wide.refused == 0
    assert narrow.refused > 20


def test_a_map_lets_go_of_its_gradients_before_the_next_is_made(detector: Detector, scene: Scene) -> None:
    x, targets = scene
    room = Room()
    engine, taken = Engine(detector.values, torch.device("cpu"), room=room), []
    made = engine.sums.run

    def watched(pack: Sequence[Row], of: Room) -> Ran:
        taken.append(room.taken)
        return made(pack, of)

    engine.sums.run = watched  # type: ignore[method-assign]
    path, wanted = Segment(x, torch.zeros_like(x)), [*targets, *targets]
    list(engine.run([(None, integrated_gradients(path, wanted, max_evaluations=8))], 1))
    assert len(taken) == len(wanted) >= 4
    assert taken[-1] <= 2 * taken[0] / len(wanted), "all were held until the last map was made"


def test_the_room_is_never_overdrawn_but_for_what_is_needed() -> None:
    x, b = torch.ones(3, 8, 8), torch.zeros(3, 8, 8)
    gradient = x[0].nbytes
    room, most = Room(3 * gradient), 0

    def steep(batch: Tensor, pins: Sequence[tuple[int, Target]]) -> Tensor:
        nonlocal most
        most = max(most, room.taken)
        return torch.tanh(200 * (batch.mean((1, 2, 3)) - 0.3))[[row for row, _ in pins]]

    engine = Engine(steep, torch.device("cpu"), room=room)
    ((_, (found,)),) = engine.run([(0, integrated_gradients(Segment(x, b), [ONE], tolerance=1e-4))], 1)
    assert found.converged
    assert found.evaluations > 40
    assert most <= 3 * gradient + AT_ONCE * gradient


def test_a_job_that_does_not_fit_fails_alone() -> None:
    x = torch.ones(3, 8, 8)

    def picky(batch: Tensor, pins: Sequence[tuple[int, Target]]) -> Tensor:
        if any(target.anchor == 1 for _, target in pins):
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:115] DefaultCPUAllocator: can't allocate memory")
        return batch.mean((1, 2, 3))[[row for row, _ in pins]]

    def job(anchor: int) -> Ask:
        try:
            return (yield from integrated_gradients(Segment(x, 0 * x), [Target(anchor, 0)]))
        except MemoryError:
            return []

    engine = Engine(picky, torch.device("cpu"))
    done = dict(engine.run(((k, job(k)) for k in (0, 1, 2)), 1))
    assert [len(done[k]) for k in (0, 1, 2)] == [1, 0, 1]
    assert engine.halved == 3


#: An integral farther off than this says nothing of its map either.
GOOD_BOUND = 0.5


@pytest.mark.slow
def test_the_map_error_follows_the_distance_to_a_dense_map(detector: Detector, scene: Scene) -> None:
    """Within a factor of ten on a real network where the integral is any good, and falling with it, at no gradient."""
    x, targets = scene
    path = Segment(x, torch.zeros_like(x))
    dense = solve(detector.values, integrated_gradients(path, targets, rule=cubic(panels=64), tolerance=ANY))
    for panels in (4, 16):
        found = solve(detector.values, integrated_gradients(path, targets, rule=cubic(panels=panels), tolerance=ANY))
        for one, exact in zip(found, dense, strict=True):
            assert one.map_error is not None and exact.map_error is not None
            true = float((one.map - exact.map).norm() / exact.map.norm())
            if one.error_bound is not None and one.error_bound < GOOD_BOUND:
                assert 0.1 * true < one.map_error < 30 * true
            assert exact.map_error < one.map_error
            assert one.evaluations == 2 * panels


def test_a_linear_function_leaves_no_doubt(pair: tuple[Tensor, Tensor, Tensor]) -> None:
    x, b, w = pair
    found = integral(lambda z: (z * w).sum((1, 2, 3)), x, b)
    assert found.map_error == pytest.approx(0, abs=1e-3)
    rules = (newton_cotes(3, panels=2), gauss_legendre(5))
    assert all(integral(lambda z: (z * w).sum((1, 2, 3)), x, b, rule=rule).map_error is None for rule in rules)


def test_a_map_goes_on_while_it_may_be_further_off_than_is_wanted(pair: tuple[Tensor, Tensor, Tensor]) -> None:
    """Two halves whose errors cancel in the sum: the completeness error sees nothing, `map_error` does."""
    x, _, w = pair
    x = torch.cat([x, x], 1)
    path, targets = Segment(x, torch.zeros_like(x)), [Target(0, 0), Target(1, 0)]

    def rough(batch: Tensor, pins: Sequence[tuple[int, Target]]) -> Tensor:
        upper, lower = batch.chunk(2, 2)
        jumps = torch.sigmoid(60 * (upper.mean((1, 2, 3)) - 0.3)) - torch.sigmoid(60 * (lower.mean((1, 2, 3)) - 0.3))
        both = torch.stack([40 * jumps, (batch * torch.cat([w, w], 1)).sum((1, 2, 3))], 1)
        return torch.stack([both[row, target.anchor] for row, target in pins])

    exact = solve(rough, integrated_gradients(path, targets, rule=cubic(panels=256)))[0]
    off = []
    for map_tolerance, most, spent in ((None, 256, 8), (0.1, 15, 8), (0.1, 256, 16), (5.0, 256, 8)):
        ask = integrated_gradients(path, targets, map_tolerance=map_tolerance, max_evaluations=most)
        hard, easy = solve(rough, ask)
        assert (hard.evaluations, easy.evaluations) == (spent, 8), "the easy one stops by itself"
        assert hard.converged and hard.error_bound == pytest.approx(0, abs=1e-3)
        assert hard.map_error is not None and (hard.map_error <= 0.1) == (spent == 16)
        off.append(float((hard.map - exact.map).norm() / exact.map.norm()))
    assert off[2] < 0.01 < off[0] == off[1] == off[3]
