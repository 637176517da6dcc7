"""`--engine ray`: the same bytes as locally, and whatever dies, nothing is lost."""

from __future__ import annotations

import itertools
import json
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import FAST, SAMPLES, Command, Inside, explain, files
from PIL import Image

from detxai.config import settings
from detxai.output import records
from detxai.output.store import Store
from detxai.run.board import END, Board, Given
from detxai.run.ledger import PooledExplainer, in_groups
from detxai.run.worker import Worker
from detxai.values import ImageRef

needs_ray = pytest.mark.skipif(find_spec("ray") is None, reason="needs ray, which is not here")
RAY = ("--engine", "ray", "--ray-cpus", "1", "--ray-workers", "2")
#: Seconds in which a run ends after Ctrl-C.
LEAVES = 10


def test_without_ray_the_way_to_it_is_named(inside: Inside, tiny: Path, pictures: Path) -> None:
    inside.patch.setitem(sys.modules, "ray", None)
    inside.patch.delitem(sys.modules, "detxai.run.ray_engine", raising=False)
    outcome = inside("explain", pictures, "-m", tiny, "-o", "tree", "--engine", "ray")
    assert outcome.code == 2
    assert "pip install 'detxai[ray]'" in outcome.err
    assert not (inside.cwd / "tree").exists()


class InProcess:
    """A pool of one worker in this process, whose rows come all at once and then end."""

    workers = 1

    def __init__(self, settings: dict[str, Any]) -> None:
        self.board = Board()
        self.worker = Worker(settings, str(Path.cwd()), self.ask)

    def ask(self, what: str, *arguments: object) -> Any:
        return getattr(self.board, what)(*arguments)

    tell = ask

    def rows(self) -> Iterator[Any]:
        made: list[Any] = []
        for number in itertools.count():
            while (group := self.board.group(number)) is None:
                time.sleep(0.01)
            if group == END:
                yield from made
                return
            made += self.worker.rows(number, pickle.loads(group))

    def leave(self) -> None:
        """It ends with the process."""


def test_a_stream_that_ends_with_its_last_row_is_no_bug(tiny: Path, pictures: Path, tmp_path: Path) -> None:
    config = settings.load(options={"model": str(tiny), "output": str(tmp_path), "conf": 0.99, "max_det": 1})
    refs = [ImageRef(f"{number:02d}.png", pictures / "a.png") for number in range(10)]
    with Store(tmp_path) as tree:
        explained = list(PooledExplainer(InProcess(config.plain())).explain(refs, tree, lambda: False))
    assert [r.ref.path for r in explained] == [ref.path for ref in refs]
    assert {r.record.status for r in explained} == {"ok"}


def test_a_pool_ends_when_nobody_reads_its_rows(tiny: Path, pictures: Path, tmp_path: Path) -> None:
    """Ray ended the process in silence where its rows were still read, as they are for long after many groups."""
    config = settings.load(options={"model": str(tiny), "output": str(tmp_path), "conf": 0.99, "max_det": 1})
    read_to_the_end: list[bool] = []

    class Slow(InProcess):
        read = False

        def rows(self) -> Iterator[Any]:
            yield from super().rows()
            time.sleep(0.5)
            self.read = True

        def leave(self) -> None:
            read_to_the_end.append(self.read)

    with Store(tmp_path) as tree:
        pool = PooledExplainer(Slow(config.plain()))
        (one,) = pool.explain([ImageRef("a.png", pictures / "a.png")], tree, lambda: False)
        pool.close()
    assert one.record.status == "ok" and read_to_the_end == [True]


class Telling:
    """A board that says a group was begun before, as after a worker's death."""

    def __init__(self) -> None:
        self.board = Board()

    def __call__(self, what: str, *arguments: object) -> object:
        return getattr(self.board, what)(*arguments)


def at_work(tiny: Path, refs: list[ImageRef], tree: Path, ask: Telling) -> tuple[Worker, list[tuple[int, Given]]]:
    """A worker, and a group of images for it."""
    tree.mkdir()
    config = settings.load(options={"model": str(tiny), "output": str(tree), "max_det": 1, "tolerance": 0.5})
    images = [(n, Given(ref, 0, ((), ()), None, "")) for n, ref in enumerate(refs)]
    return Worker(config.plain(), str(Path.cwd()), ask), images


def test_a_worker_goes_on_while_nobody_takes_its_rows(tiny: Path, pictures: Path, tmp_path: Path) -> None:
    names = [f"{number:02d}.png" for number in range(16)]  # more than are on the device at a time
    worker, images = at_work(tiny, [ImageRef(name, pictures / "a.png") for name in names], tmp_path / "tree", Telling())
    rows = worker.rows(0, images)
    first = next(rows)
    end = time.monotonic() + 60
    while not (tmp_path / "tree" / f"{names[-1]}.json").exists():
        assert time.monotonic() < end, "it waits until its first row was taken"
        time.sleep(0.02)
    assert [first[0], *(row[0] for row in rows)] == list(range(16))
    assert not any(worker._tree.known(name) != ((), ()) for name in names), "a worker has no room for millions"


def test_only_the_image_that_a_worker_dies_over_is_blamed(tiny: Path, pictures: Path, tmp_path: Path) -> None:
    ask = Telling()
    refs = [ImageRef(name, pictures / name) for name in ("a.png", "b.png")]
    worker, images = at_work(tiny, refs, tmp_path / "tree", ask)
    ask("begin", 0)
    for _ in range(4):  # it dies after a.png, four times
        told = next(worker.rows(0, images))[1]
        assert told is not None and records.load(told[0]).status == "ok"
    for _ in range(3):  # and over b.png, three times
        ask("begin", "b.png")
    a, b = [row[1] for row in worker.rows(0, images)]
    assert a is not None and a[1], "done already"
    assert b is not None and records.load(b[0]).error.code == "worker_died"  # type: ignore[union-attr]


@pytest.mark.parametrize("count", [0, 5, 12, 13, 60, 500, 5000])
def test_groups_are_small_at_first_and_at_last(count: int) -> None:
    read, given = 0, 0

    def listed() -> Iterator[ImageRef]:
        nonlocal read
        while read < count:
            read += 1
            yield ImageRef(str(read), Path(str(read)))

    groups = []
    for group in in_groups(listed(), 2, 6):
        groups.append(group)
        given += len(group)
        assert read <= given + 4 * 96, "what is listed is not waited for"
    assert [ref.path for group in groups for ref in group] == [str(n + 1) for n in range(count)]
    sizes = [len(group) for group in groups]
    assert sizes[:1] == [min(12, count)][:count]
    assert all(size <= 12 for size in sizes[-2:])
    assert max(sizes, default=0) == (96 if count >= 500 else min(12, count))
    assert len(sizes) <= count / 96 + 14


@needs_ray
@pytest.mark.slow
def test_local_shards_and_ray_give_the_same_bytes(detxai: Command, tmp_path: Path) -> None:
    line = [*sorted(SAMPLES.iterdir())[:4], "--imgsz", 320, "--max-evaluations", 9, "--tolerance", 0.5, "--maps", "npz"]
    assert explain(*line, "-o", tmp_path / "local") == 0
    for n in range(1, 5):
        assert explain(*line, "-o", tmp_path / f"part-{n}", "--shard", f"{n}/4") == 0
    parts = [tmp_path / f"part-{n}" for n in range(1, 5)]
    assert detxai("merge", *parts, "-o", tmp_path / "merged").code == 0
    outcome = detxai("explain", *line, "-o", tmp_path / "pooled", *RAY, "--json")
    assert outcome.code == 0, outcome.err
    assert files(tmp_path / "pooled") == files(tmp_path / "local") == files(tmp_path / "merged")
    *lines, summary = map(json.loads, outcome.out.splitlines())
    assert {line["image"]["path"] for line in lines} == {f"bag-{n:02d}.jpg" for n in range(1, 5)}
    local = json.loads((tmp_path / "local" / "summary.json").read_bytes())
    same = ("images", "detections", "attributions", "evaluations", "model", "failures", "exit_code", "device")
    assert {key: summary[key] for key in same} == {key: local[key] for key in same}
    said = [line for line in outcome.err.lower().splitlines() if str(tmp_path) not in line]
    assert "ray" not in "\n".join(said), "Ray itself keeps quiet"


@pytest.fixture
def many(tmp_path: Path, pictures: Path) -> Path:
    """A hundred and fifty small pictures."""
    (folder := tmp_path / "many").mkdir()
    with Image.open(pictures / "b.png") as picture:
        for number in range(150):
            picture.crop((number % 30, number % 20, 90, 90)).save(folder / f"{number:03d}.png")
    return folder


def workers(run: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """The actors of a run that have a model."""
    inside = psutil.Process(run.pid).children(recursive=True)
    return [process for process in inside if "MapWorker" in "".join(process.cmdline())]


def alive(processes: list[psutil.Process]) -> list[psutil.Process]:
    """Those that are neither gone nor waiting for their parent to notice that they are."""
    return [p for p in processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


def until(what: object, run: subprocess.Popen[bytes], seconds: float = 120) -> None:
    """Wait until `what()` holds while the run goes on."""
    end = time.monotonic() + seconds
    while not what():  # type: ignore[operator]
        assert time.monotonic() < end and run.poll() is None, run.stderr and run.stderr.read()
        time.sleep(0.05)


def records_in(tree: Path) -> int:
    return len(list(tree.glob("*.png.json")))


@pytest.fixture
def local(tiny: Path, many: Path, tmp_path: Path) -> dict[str, bytes]:
    assert explain(many, "-m", tiny, "-o", tmp_path / "local", *FAST) == 0
    return files(tmp_path / "local")


@pytest.fixture
def nothing_stays() -> Iterator[None]:
    yield
    end = time.monotonic() + 120  # what a kill orphans is Ray's own, and notices it in its own time
    while left := _of_ray():
        assert time.monotonic() < end, left
        time.sleep(0.5)


def _of_ray() -> list[str]:
    names = [process.name() for process in psutil.process_iter() if process.ppid() == 1]
    return [name for name in names if "raylet" in name or "gcs_server" in name or name.startswith("ray::")]


@needs_ray
@pytest.mark.slow
def test_workers_that_are_killed_lose_nothing(
    detxai: Command, tiny: Path, many: Path, tmp_path: Path, local: dict[str, bytes], nothing_stays: None
) -> None:
    tree = tmp_path / "tree"
    run = detxai.start("explain", many, "-m", tiny, "-o", tree, *FAST, *RAY, "--json")
    for share in (10, 40, 70):
        until(lambda share=share: records_in(tree) >= share and len(workers(run)) == 2, run)
        for process in [psutil.Process(run.pid), *psutil.Process(run.pid).children(recursive=True)]:
            listens = [c.laddr.ip for c in process.net_connections("inet") if c.status == psutil.CONN_LISTEN]
            assert all(ip.removeprefix("::ffff:").startswith("127.") for ip in listens), (process, listens)
        workers(run)[0].kill()
    out, err = run.communicate()
    assert run.returncode == 0, err
    assert files(tree) == local
    *lines, summary = map(json.loads, out.splitlines())
    assert len({line["image"]["path"] for line in lines}) == len(lines) == 150
    assert (summary["images"]["ok"], summary["images"]["skipped"]) == (150, 0)


@needs_ray
@pytest.mark.slow
def test_a_driver_that_is_killed_leaves_the_rest_to_the_next(
    detxai: Command, tiny: Path, many: Path, tmp_path: Path, local: dict[str, bytes], nothing_stays: None
) -> None:
    tree = tmp_path / "tree"
    line = ("explain", many, "-m", tiny, "-o", tree, *FAST, *RAY)
    run = detxai.start(*line)
    until(lambda: records_in(tree) >= 20, run)
    writers = workers(run)
    run.kill()
    run.communicate()
    end = time.monotonic() + LEAVES
    while alive(writers) and time.monotonic() < end:
        time.sleep(0.1)
    assert not alive(writers)
    assert 20 <= records_in(tree) < 150
    outcome = detxai(*line)
    assert outcome.code == 0, outcome.err
    assert files(tree) == local
    images = json.loads((tree / "summary.json").read_bytes())["images"]
    assert images["ok"] + images["skipped"] == 150 and images["skipped"] >= 20


@needs_ray
@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_end_it_soon_and_leave_nobody_behind(
    detxai: Command, tiny: Path, many: Path, tmp_path: Path, number: int, code: int
) -> None:
    tree = tmp_path / "tree"
    run = detxai.start("explain", many, "-m", tiny, "-o", tree, *FAST, *RAY, "--json")
    until(lambda: records_in(tree) >= 10, run)
    others = psutil.Process(run.pid).children(recursive=True)
    sent = time.monotonic()
    run.send_signal(number)
    out, err = run.communicate()
    assert time.monotonic() - sent < LEAVES
    assert run.returncode == code, err
    assert not alive(others)
    *lines, summary = map(json.loads, out.splitlines())
    assert summary["exit_code"] == code
    assert summary["images"]["ok"] == len(lines) == records_in(tree), "what was written is told"
    assert not list(tree.rglob("*.tmp"))
    assert b"Traceback" not in err


@needs_ray
@pytest.mark.slow
def test_an_image_that_kills_its_worker_fails_and_the_others_do_not(
    detxai: Command, tiny: Path, many: Path, tmp_path: Path, local: dict[str, bytes]
) -> None:
    """Opening the poisoned file ends the process, as a decoder that crashes would."""
    (many / "030.png").rename(many / "poison.png")
    (hook := tmp_path / "hook").mkdir()
    (hook / "sitecustomize.py").write_text(
        "import os, sys\n"
        "sys.addaudithook(lambda e, a: e == 'open' and str(a[0]).endswith('poison.png') and os._exit(9))\n"
    )
    path = f"{hook}:{detxai.env.get('PYTHONPATH', '')}"
    line = ("explain", many, "-m", tiny, "-o", tmp_path / "tree", *FAST, *RAY, "--ray-tries", 2)
    outcome = detxai(*line, env={"PYTHONPATH": path})
    assert outcome.code == 3, outcome.err
    assert "poison.png" in outcome.err and "worker_died" in outcome.err
    made = files(tmp_path / "tree")
    del local["records.jsonl"], made["records.jsonl"]
    assert {name: made[name] for name in made if "poison" not in name} == {
        name: content for name, content in local.items() if not name.startswith("030.png")
    }
    assert json.loads(made["poison.png.json"])["error"]["code"] == "worker_died"


@needs_ray
@pytest.mark.slow
def test_time_failures_and_refusals_mean_the_same(detxai: Command, tiny: Path, many: Path, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    line = ("explain", many, "-m", tiny, "-o", tree, *FAST, *RAY)
    assert detxai(*line, "--max-seconds", 0.01).code == 8
    assert files(tree) == {"records.jsonl": b""}
    for file in list(many.iterdir())[:40]:
        file.write_bytes(b"no picture")
    outcome = detxai(*line, "--max-failures", 3)
    assert outcome.code == 3
    assert "3 images failed (--max-failures)" in outcome.err
    assert detxai(*line, "-m", "nowhere.pt").code == 5
    assert detxai(*line, "--device", "cuda:1").code == 2
    assert detxai(*line, "--ray-cpus", 1000).code == 2


@needs_ray
@pytest.mark.slow
def test_a_ray_that_does_not_start_is_no_bug(inside: Inside, tiny: Path, pictures: Path) -> None:
    import ray

    def late(*_: object, **__: object) -> None:
        raise Exception("The current node timed out during startup.\nMore of it.")

    inside.patch.setattr(ray, "init", late)
    outcome = inside("explain", pictures, "-m", tiny, "-o", "tree", *RAY)
    assert outcome.code == 7
    assert "Ray did not start: The current node timed out during startup. Run the same command again" in outcome.err


def test_rows_of_quick_images_come_back_together(tiny: Path, tmp_path: Path) -> None:
    """Each return costs a pool more than a row: half a second's rows at a time, as quick as images were of late."""
    config = settings.load(options={"model": str(tiny), "output": str(tmp_path)})
    explainer = PooledExplainer(InProcess(config.plain()))

    def pace(seconds: float, images: int) -> int:
        then, finished = time.monotonic() - seconds, explainer._finished
        explainer._looked, explainer._finished = (then, finished), finished + images
        return explainer._pace()

    assert pace(0, 0) == 1
    assert pace(10, 20_000) == pytest.approx(1000, rel=0.01)
    assert pace(0.2, 1) == pytest.approx(1000, rel=0.01), "too soon to tell"
    assert pace(10, 3) == 1
