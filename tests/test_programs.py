"""Programs of a fixed shape: the same maps as shared packs, nothing in them that waits, and one look a round."""

from __future__ import annotations

import contextlib
import copy
import gc
import json
import time
import weakref
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from conftest import FAST, SIDE, explain, pixels, seeded_network
from test_families import FAMILIES, detector_of, network
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from detxai.attribution.clock import DeviceClock
from detxai.attribution.devices import AHEAD, PROGRAM_ROWS
from detxai.attribution.engine import Engine
from detxai.attribution.integral import integrated_gradients
from detxai.attribution.methods import METHODS, Settings
from detxai.attribution.points import Ask, Entered, Segment, TargetMap
from detxai.attribution.programs import WARM_UP, Captured, Programs
from detxai.attribution.shared import Shared
from detxai.attribution.sums import Sums
from detxai.config.settings import RunConfig
from detxai.errors import ImageError
from detxai.models.detector import Candidates, Differentiable
from detxai.models.detectors import build, contrasting
from detxai.output import records
from detxai.run import doctor
from detxai.run.engine import Beside
from detxai.run.engine import engine as run_engine
from detxai.run.pipeline import Explainer
from detxai.run.plan import make_plan
from detxai.run.publish import Publisher
from detxai.run.results import MapGroup, PublishedGroup
from detxai.values import Checkpoint, Target

CPU = torch.device("cpu")
ROWS = 8


@pytest.fixture(scope="module")
def detector() -> Any:
    network = seeded_network("yolov8n.yaml")
    return build(Checkpoint("yolov8n.yaml", "", "ultralytics", network, "yolo", network.names, SIDE))


@pytest.fixture(scope="module")
def x() -> Tensor:
    return torch.from_numpy(pixels("bag-03.jpg", (SIDE, SIDE)).copy()).permute(2, 0, 1).float() / 255


def strongest(detector: Differentiable, x: Tensor) -> list[Target]:
    """Of each level the strongest prediction: its class, what tells it from another class, and an edge of its box."""
    with torch.no_grad():
        found = detector.predict(x[None])[0]
    targets = []
    for level in range(int(found.levels.max()) + 1):
        scores = found.scores.masked_fill((found.levels != level)[:, None], -1)
        anchor, class_id = divmod(int(scores.argmax()), scores.shape[1])
        one = {"anchor": anchor, "level": level, "class_id": class_id, "context": found.context}
        targets += [Target(**one), Target(**one, kind="contrast", other=(class_id + 1) % scores.shape[1])]
        targets += [Target(**one, kind="left", scale=1.5, offset=-2.0)]
    return targets


def engines(detector: Any, rows: int = ROWS) -> tuple[Engine, Engine]:
    """One with shared packs, one with programs."""
    values, entered = (contrasting(f) for f in (detector.values, detector.entered))
    programs = Programs({torch.float32: detector}, CPU, rows)
    return tuple(Engine(values, CPU, entered=entered, programs=p) for p in (None, programs))  # type: ignore[return-value]


def run(engine: Engine, asks: Sequence[Ask]) -> list[list[TargetMap]]:
    done = dict(engine.run(list(enumerate(asks)), len(asks)))
    return [done[k] for k in range(len(asks))]


def near(a: TargetMap, b: TargetMap) -> float:
    return float((a.map - b.map).norm() / a.map.norm())


@pytest.mark.parametrize(
    "method",
    [
        "ig",
        *(pytest.param(m, marks=pytest.mark.slow) for m in ("expected", "idgi", "grad", "inputxgrad", "smoothgrad")),
    ],
)
def test_programs_make_the_maps_of_shared_packs(detector: Any, x: Tensor, method: str) -> None:
    paths = [Segment(x, torch.ones_like(x)), Segment(x, torch.zeros_like(x))]
    targets = strongest(detector, x)
    settings = Settings(max_evaluations=16, stem=detector.trunk.stem)
    (shared,), (programs,) = (run(e, [METHODS[method](paths, targets, settings)]) for e in engines(detector))
    for one, other in zip(shared, programs, strict=True):
        assert near(one, other) <= 1e-5
        assert one.evaluations == other.evaluations
        assert other.value_at_input == pytest.approx(one.value_at_input, abs=1e-4)


class Waits(TorchDispatchMode):
    """Counts what would make the host wait for a device, and every operation."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()
        self.launched = self.views = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.launched += 1
        self.views += func.is_view
        if name in ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select"):
            self.waits[name] += 1
        return func(*args, **(kwargs or {}))


def test_nothing_waits_inside_a_pack(detector: Any, x: Tensor) -> None:
    """Neither while rows are filled in nor while they run: what is found is looked at once a round."""
    (_, engine), targets = engines(detector), strongest(detector, x)
    path = Entered(Segment(x, torch.ones_like(x)), detector.trunk.stem)

    def ask() -> Ask:
        return integrated_gradients(path, targets, max_evaluations=16, map_tolerance=1e-6)

    run(engine, [ask()])  # made, and windows measured
    landed, launched = engine._landed, engine._launch
    rounds, counts = 0, []

    def counted(kinds: Any) -> Any:
        nonlocal rounds
        before = engine.points
        rounds += bool(kinds)
        with Waits() as found:
            done = launched(kinds)
        assert not found.waits
        if engine.points > before:
            counts.append(found.launched / (engine.points - before))
        return done

    engine._launch = counted  # type: ignore[method-assign]
    looks = 0

    def looked(flight: Any) -> Any:
        nonlocal looks
        looks += 1
        return landed(flight)

    engine._landed = looked  # type: ignore[method-assign]
    with Waits() as found:
        run(engine, [ask()])
    assert rounds == looks >= 2
    assert found.waits["_local_scalar_dense"] == 0, found.waits
    print(f"{rounds} rounds, {sum(counts) / len(counts):.0f} operations a row")


def test_a_row_of_a_program_has_the_same_bits_whatever_shares_its_pack(detector: Any, x: Tensor) -> None:
    targets = strongest(detector, x)
    others = [Segment(x.flip(-1), torch.zeros_like(x)), Segment(x.flip(1) * 0.8, torch.ones_like(x))]

    def maps(order: Sequence[int]) -> dict[int, list[TargetMap]]:
        paths = [Segment(x, torch.ones_like(x)), *others]
        engine = engines(detector)[1]
        jobs = [(k, integrated_gradients(paths[k], targets, max_evaluations=12)) for k in order]
        return dict(engine.run(jobs, 3))

    alone, together = maps([0]), maps([2, 1, 0])
    assert all(torch.equal(a.map, b.map) for a, b in zip(alone[0], together[0], strict=True))


def test_maps_of_many_targets_are_made_together(detector: Any, x: Tensor) -> None:
    """The same bits whatever shares a pack of sums, those of a single one but for rounding, at few operations each."""
    pictures = [x, x.flip(-1), x.flip(1) * 0.8]
    targets, before = strongest(detector, x), torch.ones_like(x)

    def maps(order: Sequence[int], rows: int) -> tuple[dict[int, list[TargetMap]], float]:
        engine = engines(detector)[1]
        engine.sums = Sums(rows)
        paths = [Entered(Segment(picture, before), detector.trunk.stem) for picture in pictures]
        run_as, launched = engine.sums.run, 0

        def counted(*pack: Any) -> Any:
            nonlocal launched
            with Waits() as found:
                ran = run_as(*pack)
            assert not found.waits
            launched += found.launched - found.views
            return ran

        engine.sums.run = counted  # type: ignore[method-assign]
        jobs = [(k, integrated_gradients(paths[k], targets, max_evaluations=10)) for k in order]
        return dict(engine.run(jobs, len(pictures))), launched / len(targets) / len(order)

    one_by_one, many = maps([0, 1, 2], 1), maps([0, 1, 2], 16)
    for order in ([2, 1, 0], [1]):
        others, _ = maps(order, 16)
        for k in order:
            assert all(torch.equal(a.map, b.map) for a, b in zip(many[0][k], others[k], strict=True))
            assert all(near(a, b) < 1e-6 for a, b in zip(one_by_one[0][k], others[k], strict=True))
            assert [m.map_error for m in one_by_one[0][k]] == pytest.approx([m.map_error for m in others[k]], rel=1e-5)
    assert many[1] < one_by_one[1] / 3


def test_sums_halve_where_memory_runs_out(detector: Any, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Entered.maps

    def small(paths: Sequence[Segment], totals: Tensor) -> Tensor:
        if len(totals) > 2:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate too much")
        return made(paths, totals)

    path, targets = Entered(Segment(x, torch.ones_like(x)), detector.trunk.stem), strongest(detector, x)
    exact, halved = engines(detector)
    halved.sums = Sums(8)
    (one,) = run(exact, [integrated_gradients(path, targets, max_evaluations=8)])
    monkeypatch.setattr(Entered, "maps", staticmethod(small))
    (other,) = run(halved, [integrated_gradients(path, targets, max_evaluations=8)])
    assert (halved.halved, halved.sums.rows) == (2, 2)
    assert all(near(a, b) < 1e-5 for a, b in zip(one, other, strict=True))


def test_programs_are_made_again_with_half_the_rows_where_memory_runs_out(
    detector: Any, x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    pinned = type(detector).pinned

    def small(self: Any, z: Tensor, *more: Any, **options: Any) -> Tensor:
        if len(z) > 4:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate too much")
        return pinned(self, z, *more, **options)  # type: ignore[no-any-return]

    monkeypatch.setattr(type(detector), "pinned", small)
    shared, programs = engines(detector)
    path, targets = Segment(x, torch.ones_like(x)), strongest(detector, x)[:1]
    (one,), (other,) = (run(e, [integrated_gradients(path, targets, max_evaluations=8)])[0] for e in (shared, programs))
    assert programs.programs is not None
    assert (programs.halved, programs.programs.rows) == (1, 4)
    assert near(one, other) <= 1e-5


def without_windows(detector: Any, family: str) -> Any:
    """A detector whose whole network runs for every row."""
    if family == "yolov8n":
        whole = copy.copy(detector)
        whole.info = replace(detector.info, sparse=False)
        return whole
    module = network(FAMILIES[family])
    return build(Checkpoint(family, "", "ultralytics", module, "rtdetr", module.names, SIDE))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["yolov8n", "rtdetr-v8"])
def test_whole_networks_halve_too(detector: Any, x: Tensor, monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    """Families without windows run all of it for every row; memory that runs out at any pack changes no map."""
    whole = without_windows(detector, family)
    targets, path = strongest(whole, x)[:2], Segment(x, torch.ones_like(x))
    pinned, calls, at = type(whole).pinned, 0, 0

    def refusing(self: Any, z: Tensor, *more: Any, **options: Any) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == at:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate too much")
        return pinned(self, z, *more, **options)  # type: ignore[no-any-return]

    monkeypatch.setattr(type(whole), "pinned", refusing)
    made = []
    for at in (0, 1, 2, 4):
        calls, engine = 0, Engine(whole.values, CPU, programs=Programs({torch.float32: whole}, CPU, 4))
        made.append(run(engine, [integrated_gradients(path, targets, max_evaluations=8)])[0])
        assert engine.programs is not None
        assert (engine.halved, engine.programs.rows) == ((1, 2) if at else (0, 4))
        assert calls > at
    for maps in made[1:]:
        assert all(near(one, other) <= 1e-5 for one, other in zip(made[0], maps, strict=True))


def test_what_was_made_is_freed(detector: Any, x: Tensor) -> None:
    """Before a second model, size or precision makes its own."""
    engine = engines(detector)[1]
    run(engine, [integrated_gradients(Segment(x, torch.ones_like(x)), strongest(detector, x), max_evaluations=8)])
    assert engine.programs is not None
    made = [weakref.ref(program) for program in engine.programs.made.values()]
    assert len(made) == 2 * len({kind for target in strongest(detector, x) for kind in [(target.level, target.kind)]})
    engine.programs.forget(ROWS)
    gc.collect()
    assert not any(program() for program in made)


@pytest.mark.slow
def test_the_whole_command_with_programs(
    tiny: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU: rows of programs, two rounds ahead. Records say the same, maps are the same to rounding."""
    options = (*FAST, "--maps", "npz", "--target", "class,contrast,left", "--method", "ig,grad")
    for name in ("shared", "programs"):
        assert explain(pictures / "a.png", pictures / "b.png", "-m", tiny, "-o", tmp_path / name, *options) == 0
        monkeypatch.setitem(PROGRAM_ROWS, "cpu", 8)
        monkeypatch.setitem(AHEAD, "cpu", 2)
    one, other = (json.loads((tmp_path / name / "a.png.json").read_bytes()) for name in ("shared", "programs"))
    pairs = [
        (a, b)
        for d, e in zip(one["detections"], other["detections"], strict=True)
        for a, b in zip(d["attributions"], e["attributions"], strict=True)
    ]
    assert len(pairs) >= 6
    for a, b in pairs:
        assert (a["method"], a["target"], a["evaluations"]) == (b["method"], b["target"], b["evaluations"])
        assert b["value_at_input"] == pytest.approx(a["value_at_input"], abs=1e-3)
        first, second = (np.load(tmp_path / n / r["map"])["map"] for n, r in (("shared", a), ("programs", b)))
        assert float(np.linalg.norm(first - second)) <= 1e-4 * float(np.linalg.norm(first))
    assert [d["evidence"]["verdict"] for d in one["detections"]] == [
        d["evidence"]["verdict"] for d in other["detections"]
    ]


@pytest.mark.parametrize("family", ["", *(pytest.param(f, marks=pytest.mark.slow) for f in ("yolov8n", "rtdetr-v8"))])
def test_half_weights_below_the_head(detector: Any, x: Tensor, family: str) -> None:
    """bfloat16 is what every CPU computes in: as near the exact map as torch's own casts of its eight bits come."""
    own = without_windows(detector, family) if family else detector
    half = own.in_precision(torch.bfloat16, (SIDE, SIDE))
    assert {p.dtype for layer in half.trunk.layers for p in layer.parameters()} == {torch.bfloat16}
    assert all(torch.equal(a, b) for a, b in zip(half.head.parameters(), own.head.parameters(), strict=True))
    kinds = {torch.float32: own, torch.bfloat16: half}
    path, targets = Segment(x, torch.ones_like(x)), strongest(own, x)[:1]

    def made(dtype: torch.dtype, programs: Programs | None) -> TargetMap:
        engine = Engine(own.values, CPU, entered=own.entered, programs=programs)
        ask = integrated_gradients(path, targets, tolerance=1.0, max_evaluations=8, dtype=dtype)
        return run(engine, [ask])[0][0]

    exact, rough = (made(dtype, Programs(kinds, CPU, ROWS)) for dtype in kinds)
    assert 1e-4 < near(exact, rough) < 1.1 * near(exact, made(torch.bfloat16, None))
    assert rough.dtype == torch.bfloat16


@pytest.mark.slow
@pytest.mark.parametrize("methods", ["grad,odam,layercam", "drise"])
def test_shared_packs_wait_for_no_row(
    tiny: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, methods: str
) -> None:
    """Trials, methods of layers and D-RISE: a pack is looked at once, when all its rows are done."""
    shared, fields, waits = Shared.run, set(), Counter[str]()

    def counted(self: Shared, pack: Any, room: Any) -> Any:
        with Waits() as found:
            ran = shared(self, pack, room)
        fields.add((pack[0].asked.field, pack[0].asked.layer is None))
        waits.update(found.waits)
        return ran

    monkeypatch.setattr(Shared, "run", counted)
    options = (*FAST, "--method", methods, "--max-evaluations", "2", "--no-overlays")
    assert explain(pictures / "a.png", "-m", tiny, "-o", tmp_path / "out", *options) == 0
    wanted = {("similarity", True)} if methods == "drise" else {("trial", True), ("value", True), ("value", False)}
    assert fields >= wanted
    del waits["nonzero"]  # of windows, which are measured once a scale
    assert not waits


class OnDevice(Tensor):
    """A tensor that notes what is asked of it until it is brought to the host."""

    asked: ClassVar[list[str]] = []

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.asked.append(func.__name__)
        made = super().__torch_function__(func, types, args, kwargs)
        return made.as_subclass(Tensor) if func.__name__ == "cpu" else made


def test_a_writer_waits_for_a_map_once(
    tiny: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU every figure that is read waits for all packs that are queued."""
    group, maps = Publisher.group, 0

    def counted(self: Publisher, made: MapGroup) -> PublishedGroup:
        nonlocal maps
        for column in made.maps.values():
            maps += len(column)
            column[:] = [replace(m, map=m.map.as_subclass(OnDevice)) for m in column]
        return group(self, made)

    monkeypatch.setattr(Publisher, "group", counted)
    monkeypatch.setattr(OnDevice, "asked", [])
    assert explain(pictures / "a.png", "-m", tiny, "-o", tmp_path, *FAST, "--evidence", "none", "--no-overlays") == 0
    assert maps and OnDevice.asked == ["cpu"] * maps


class FakeEvent:
    """An event of a device that is as slow as the test says, in milliseconds since it began."""

    now, done = 0.0, 0.0

    def __init__(self, *, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = FakeEvent.now

    def query(self) -> bool:
        return self.at <= FakeEvent.done

    def elapsed_time(self, later: FakeEvent) -> float:
        return later.at - self.at


def test_a_device_is_timed_by_its_own_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading it waits for nothing: what the device has not done yet is counted at the next look."""
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    clock = DeviceClock(torch.device("cuda"))
    for begin, end in ((0, 250), (400, 1000)):
        FakeEvent.now = begin
        with clock.working():
            FakeEvent.now = end
    for FakeEvent.done, seconds in ((100, 0), (600, 0.25), (1000, 0.85)):
        clock.read()
        assert clock.seconds == pytest.approx(seconds)


def test_streams_side_by_side_are_not_timed_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """A detector at work while packs are, partly or altogether."""
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    clock, FakeEvent.done = DeviceClock(torch.device("cuda")), 2000.0
    for begin, end in ((0, 500), (100, 400), (300, 700), (900, 1000)):
        FakeEvent.now = begin
        with clock.working():
            FakeEvent.now = end
    clock.read()
    assert clock.seconds == pytest.approx(0.8)


def test_a_cpu_is_timed_by_the_host(detector: Any, x: Tensor) -> None:
    start = time.perf_counter()
    engine = engines(detector)[1]
    run(engine, [integrated_gradients(Segment(x, torch.ones_like(x)), strongest(detector, x)[:1], max_evaluations=8)])
    assert 0 < engine.clock.seconds <= time.perf_counter() - start


def test_a_detector_works_beside_the_packs_that_are_queued(
    tiny: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a stream of its own, on a picture of its own: what one stream has allocated another may not write over."""
    explainer, entered = Explainer(tiny, conf=0.0, max_det=2, max_evaluations=4), []

    @contextlib.contextmanager
    def stream(own: object) -> Iterator[None]:
        entered.append(own)
        yield

    plain = explainer(pictures / "a.png", pictures / "b.png")
    for name, fake in {"stream": stream, "Stream": FakeStream}.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    explainer._beside = beside = Beside(explainer.plan.detector, CPU)
    predict, seen = type(explainer.plan.detector).predict, []

    def watched(self: Any, x: Tensor) -> Any:
        seen.append(x)
        return predict(self, x)

    monkeypatch.setattr(type(explainer.plan.detector), "predict", watched)
    other = explainer(pictures / "a.png", pictures / "b.png")
    assert entered == [beside.stream] * 2
    assert len(seen) == 2 and seen[0] is seen[1], "one shape, one program, filled anew"
    assert [records.dump(one.record) for one in plain] == [records.dump(one.record) for one in other]
    monkeypatch.setattr("detxai.run.engine.MOST_SHAPES", 0)
    beside.forget()
    explainer(pictures / "a.png")
    assert len(seen) == 3 and seen[2] is not seen[1], "of too many shapes none is kept"


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=() if name == "v8" else pytest.mark.slow) for name in FAMILIES]
)
def test_nothing_in_predictions_depends_on_what_is_in_the_picture(family: str) -> None:
    """So that a graph of them can be replayed: they run where there is nothing to look at."""
    seen: Any = detector_of(family, FAMILIES[family], network(FAMILIES[family]))
    seen.module.to("meta")
    with torch.no_grad():
        (made,) = seen.predict(torch.rand(1, 3, SIDE, SIDE, device="meta"))
    assert made.boxes.device.type == "meta" and made.levels.device.type == "cpu"
    with pytest.raises((NotImplementedError, RuntimeError), match="meta"):
        made.brought()


class FarTensor(Tensor):
    """A tensor of the host that says it lies elsewhere, until it is brought."""

    device = torch.device("cuda")  # type: ignore[assignment]

    def cpu(self) -> Tensor:  # type: ignore[override]
        FarTensor.looks += 1
        return self.as_subclass(Tensor)

    looks = 0


@pytest.mark.parametrize("turned", [False, True])
def test_predictions_are_brought_together(turned: bool) -> None:
    boxes, scores, levels = torch.rand(7, 4), torch.rand(7, 3), torch.arange(7)
    near = [boxes, scores, scores.logit(), levels, *([torch.rand(7, 5)] if turned else [])]
    far = [part if part is levels else part.as_subclass(FarTensor) for part in near]
    far[1][0, 0] = torch.nan
    with pytest.raises(ImageError, match="1 of the model's 7 scores"):  # who has not looked has not been told
        Candidates(*far, end_to_end=True).brought()
    FarTensor.looks, far[1][0, 0] = 0, 0.5
    there = Candidates(*far, end_to_end=True).brought()
    assert FarTensor.looks == 1, "all numbers at once; the levels are here"
    parts = [there.boxes, there.scores, there.logits, there.levels, *([there.rotated] if turned else [])]
    assert all(type(b) is Tensor and torch.equal(a, b) for a, b in zip(near, parts, strict=True))
    assert there.end_to_end and (there.rotated is None) != turned


class FakeStream:
    """A CUDA stream that notes nothing, and is entered by nothing."""

    def __init__(self, *_: Any, priority: int = 0) -> None: ...
    def wait_stream(self, other: Any) -> None: ...


@pytest.mark.parametrize("cause", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("not permitted")])
def test_a_capture_that_fails_gives_its_stream_back(monkeypatch: pytest.MonkeyPatch, cause: RuntimeError) -> None:
    """torch ends a capture with an error of its own, and leaves the thread on the stream of the capture."""
    own, calls, streams = FakeStream(), 0, []

    @contextlib.contextmanager
    def captured(*_: Any, **options: Any) -> Iterator[None]:
        try:
            yield
        finally:
            raise RuntimeError("capture_end: operation failed due to a previous error during capture")

    fakes = {"Stream": FakeStream, "CUDAGraph": object, "graph": captured, "set_stream": streams.append}
    fakes |= {"stream": contextlib.nullcontext, "current_stream": lambda _: own, "synchronize": lambda _: None}
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)

    def program() -> tuple[Tensor, ...]:
        nonlocal calls
        calls += 1
        if calls == WARM_UP + 1:
            raise cause
        return (torch.ones(1),)

    if isinstance(cause, torch.OutOfMemoryError):
        with pytest.raises(torch.OutOfMemoryError, match="out of memory"):
            Captured(program, torch.device("cuda"))
    else:
        made = Captured(program, torch.device("cuda"))
        assert made.refused == "not permitted" and made.graph is None
        assert torch.equal(made()[0], torch.ones(1))
    assert streams == [own]


def test_a_run_frees_the_programs_of_another(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And keeps those of the run before with the same model; halved ones are made whole again."""
    monkeypatch.setitem(PROGRAM_ROWS, "cpu", 8)
    plan = make_plan(RunConfig.model_validate({"model": {"path": str(tiny)}, "run": {"device": "cpu"}}))
    first = run_engine(plan).programs
    assert first is not None
    first.made["kept"] = "program"  # type: ignore[index, assignment]
    assert run_engine(plan, first).programs is first and first.made
    first.forget(4)
    assert run_engine(plan, first).programs is first and first.rows == 8
    first.made["kept"] = "program"  # type: ignore[index, assignment]
    assert run_engine(plan).programs is not first
    assert not first.made


@pytest.mark.parametrize(
    ("refused", "said"),
    [
        ("", "replayed as CUDA graphs"),
        ("not permitted", "called one by one: no CUDA graph can be made (not permitted)"),
    ],
)
def test_doctor_says_what_no_graph_can_be_made_of(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, refused: str, said: str
) -> None:
    init = Captured.__init__

    def made(self: Any, *of: Any) -> None:
        init(self, *of)
        self.refused = refused

    monkeypatch.setitem(PROGRAM_ROWS, "cpu", 8)
    monkeypatch.setattr(Captured, "__init__", made)
    told = dict(doctor.model(str(tiny), "cpu"))
    assert told["packs"] == told["predictions"] == said
