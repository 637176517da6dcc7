"""`--engine ray`: the same run by Ray Data, on all GPUs of a machine or a cluster. The only room that imports ray.

Groups of paths stream through a pool of actors. Each holds an `Explainer` and writes into the tree; records come back.
What is done stands in the tree, and what is missing in the driver's ledger: any actor may die at any time.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import shutil
import signal
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator
from functools import partial
from itertools import chain, count, islice
from typing import Any

import psutil
import pyarrow

# Read when it is imported: nothing is told outside, no cluster begins by itself, users hear only what ends a run.
os.environ["RAY_USAGE_STATS_ENABLED"] = os.environ["RAY_ENABLE_AUTO_CONNECT"] = "0"
os.environ["RAY_BACKEND_LOG_LEVEL"] = "fatal"

import ray
import ray.data
from ray.data.block import BlockMetadata
from ray.data.datasource import ReadTask
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from detxai.config.settings import RunConfig
from detxai.errors import DetxaiError, DeviceError, UsageError
from detxai.run.board import END, Board
from detxai.run.worker import Worker

#: CPUs of an actor without a GPU, where a machine has as many: its own threads, and those that decode and write.
CPUS = 4
#: Bytes of Ray's store of objects: only paths and records pass through it.
OBJECTS = 2**28
#: Seconds between looks at what is new; after which processes of a local Ray that are still there are killed.
LOOK_EVERY, PATIENCE = 0.1, 3.0
QUIET: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.CRITICAL}
logging.getLogger("ray.data").handlers = [logging.NullHandler()]
warnings.filterwarnings("ignore", module=r"ray\.")


class Actor:
    """A `Worker` as Ray Data calls it."""

    def __init__(self, settings: dict[str, Any], folder: str, board: Any, memory_share: float) -> None:
        self._worker = Worker(settings, folder, partial(_ask, board), memory_share)

    def __call__(self, batch: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """What came of the images in their order; what a repeated task says again is known by its place, cut alike."""
        images = pickle.loads(batch["images"][0])
        rows = self._worker.rows(int(batch["number"][0]), images)
        while some := list(islice(rows, images[0][1].together if images else 1)):
            yield {"rows": [pickle.dumps(some)]}


def _ask(board: Any, what: str, *arguments: Any) -> Any:
    return ray.get(getattr(board, what).remote(*arguments))


class RayPool:
    """The `Pool` of a Ray cluster: the one that is running, or one on this machine that ends with the run."""

    def __init__(self, config: RunConfig) -> None:
        if ":" in config.run.device:
            raise UsageError("--device: with --engine ray Ray chooses the GPU.", "Give --device cuda, cpu or auto.")
        self._config, address = config, config.ray.address or os.environ.get("RAY_ADDRESS")
        self._before, self._folder = set(psutil.Process().children(recursive=True)), ""
        with _undisturbed():
            self._join(address) if address else self._start()
        try:
            self.workers, self._each = _share(config)
            self._memory = _memory_share(self.workers, self._each)
            here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
            self._board = ray.remote(Board).options(num_cpus=0, scheduling_strategy=here).remote()
        except BaseException:
            self.leave()
            raise

    def _join(self, address: str) -> None:
        try:
            ray.init(address, **QUIET)
        except (ConnectionError, ValueError, RuntimeError) as error:
            said = str(error).strip().partition("\n")[0]
            raise UsageError(
                f"No Ray cluster answers at {address}: {said}",
                "Check RAY_ADDRESS, or unset it; where `ray start` spoke of a token, set RAY_AUTH_MODE=token.",
            ) from error

    def _start(self) -> None:
        """A Ray of our own, on loopback alone; its sockets need short names, so it is not below TMPDIR."""
        self._folder = tempfile.mkdtemp(prefix="detxai-ray-", dir="/tmp")
        try:
            ray.init(
                "local", include_dashboard=False, object_store_memory=OBJECTS, _node_ip_address="127.0.0.1",
                _temp_dir=self._folder, **QUIET,
            )  # fmt: skip
        except Exception as error:  # that it took too long on a busy machine is of no class of its own
            self.leave()
            said = str(error).strip().partition("\n")[0]
            raise DeviceError(f"Ray did not start: {said}", "Run the same command again, or --engine local.") from error

    def rows(self) -> Iterator[Any]:
        """See `Pool`. What an actor says ends the run is raised."""
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = context.print_on_execution_start = False
        context.target_max_block_size = 1  # a block a row: each is sent on as soon as it is there
        try:
            groups = ray.data.read_datasource(_Groups(self._board), override_num_blocks=1, num_cpus=0)
            told = groups.map_batches(
                Actor,
                batch_size=None,
                compute=ray.data.ActorPoolStrategy(size=self.workers, max_tasks_in_flight_per_actor=2),
                fn_constructor_args=(self._config.plain(), os.getcwd(), self._board, self._memory),
                **self._each,
            )
            for batch in told.iter_batches(batch_size=None, prefetch_batches=0):
                yield from chain.from_iterable(map(pickle.loads, batch["rows"]))
        except Exception as error:
            word = self.ask("said") if ray.is_initialized() else None
            raise (word if isinstance(word, DetxaiError) else _reason(error)) from error

    def tell(self, what: str, *arguments: Any) -> None:
        """See `Pool`."""
        getattr(self._board, what).remote(*arguments)

    def ask(self, what: str, *arguments: Any) -> Any:
        """See `Pool`."""
        return _ask(self._board, what, *arguments)

    def leave(self) -> None:
        """See `Pool`. A Ray that was started here leaves no process and no file behind."""
        ours = set(psutil.Process().children(recursive=True)) - self._before
        if ray.is_initialized():
            ray.shutdown()
        if self._folder:
            end = time.monotonic() + PATIENCE
            while (left := list(filter(_alive, ours))) and time.monotonic() < end:
                time.sleep(LOOK_EVERY)
            for process in left:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = ""


class _Groups(ray.data.Datasource):  # type: ignore[misc]
    """The groups on a board as a stream of rows, which need not be known when it begins."""

    def __init__(self, board: Any) -> None:
        super().__init__()
        self._board = board

    def estimate_inmemory_data_size(self) -> int | None:
        return None

    def get_read_tasks(self, *_: Any, **__: Any) -> list[Any]:
        board = self._board
        return [ReadTask(lambda: _blocks(board), BlockMetadata(None, None, None, None))]


def _blocks(board: Any) -> Iterator[Any]:
    """Blocks of one row; asked again after a node was lost, the same ones."""
    for number in count():
        while (group := ray.get(board.group.remote(number))) is None:
            time.sleep(LOOK_EVERY)
        if group == END:
            return
        yield pyarrow.Table.from_pydict({"number": [number], "images": [group]})


def _share(config: RunConfig) -> tuple[int, dict[str, float]]:
    """How many actors there are, and what each takes of the cluster. Raises UsageError where it has not that much."""
    have, wanted = ray.cluster_resources(), config.ray
    gpus = wanted.gpus
    if gpus is None:
        gpus = 1.0 if have.get("GPU", 0) >= 1 and config.run.device != "cpu" else 0.0
    cpus = wanted.cpus or (1.0 if gpus else min(CPUS, max(1.0, have.get("CPU", 1))))
    fits = [have.get(name, 0) / each for name, each in (("GPU", gpus), ("CPU", cpus)) if each]
    if min(fits) < 1:
        said = f"Ray has {have.get('CPU', 0):g} CPUs and {have.get('GPU', 0):g} GPUs, less than one worker takes."
        raise UsageError(said, "Give smaller --ray-cpus and --ray-gpus.")
    return wanted.workers or int(min(fits)), {"num_cpus": cpus, "num_gpus": gpus}


def _memory_share(workers: int, each: dict[str, float]) -> float:
    """The part of what `memory: auto` gives one run that a worker takes: others are on its GPU, or on its machine."""
    if each["num_gpus"]:
        return min(1.0, each["num_gpus"])
    room = max(node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"])
    return 1 / max(1, min(workers, int(room / each["num_cpus"])))


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Ray sets handlers of signals, and greets on stderr; what goes wrong is raised."""
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    stderr, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(null)
        if threading.current_thread() is threading.main_thread():
            for number, handler in kept.items():
                signal.signal(number, handler)


def _alive(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    return False


def _reason(error: Exception) -> Exception:
    """What ended Ray's stream, as what a user can act upon; a bug of ours stays as it is."""
    if isinstance(error, ray.exceptions.RayError) and not isinstance(error, ray.exceptions.RayTaskError):
        said = str(error).strip().partition("\n")[0]
        return DeviceError(f"Ray has ended: {said}", "Run the same command again: finished images stay finished.")
    return error
