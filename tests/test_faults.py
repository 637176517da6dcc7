"""What the system refuses: memory, threads, locks, permission. More faults: scripts/checks/faults.py."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FAST, ROOT, Command, Inside, explain, files

sys.path.insert(0, str(ROOT / "scripts" / "checks"))

import damaged_files
import fault_inputs

from detxai import Explainer
from detxai.errors import DeviceError, ImageError
from detxai.inputs import decode
from detxai.models import converted
from detxai.output import records
from detxai.output.store import Store
from detxai.run.explain import ExplainRun
from detxai.run.publish import Publisher
from detxai.values import Image, ImageRef

TORCH_SAYS = "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to"


def test_no_memory_for_a_model_is_no_broken_model(
    tiny: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any) -> None:
        raise RuntimeError(f"{TORCH_SAYS} allocate 4096 bytes. Error code 12 (Cannot allocate memory)")

    monkeypatch.setattr(converted, "read", full)
    assert explain(pictures / "a.png", "-m", tiny, "-o", tmp_path / "tree") == 7
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert said.startswith("error: The system refused memory:")
    assert not (tmp_path / "tree").exists()


def test_no_thread_ends_a_run_with_its_summary(
    tiny: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from detxai.run import pipeline

    def none(*_: Any) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(pipeline.ThreadPoolExecutor, "submit", none)
    assert explain(pictures / "a.png", "-m", tiny, "-o", tmp_path) == 7
    assert "ulimit -u" in capsys.readouterr().err
    assert json.loads((tmp_path / "summary.json").read_text())["exit_code"] == 7


def test_no_memory_for_a_reader_ends_the_run(
    tiny: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is not the fault of one picture: no record blames it."""

    def full(*_: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(decode, "load", full)
    assert explain(pictures / "a.png", "-m", tiny, "-o", tmp_path) == 7
    assert "refused memory" in capsys.readouterr().err
    assert not (tmp_path / "a.png.json").exists()


@pytest.mark.parametrize(("operation", "code"), [(fcntl.LOCK_UN, 0), (fcntl.LOCK_EX, 6)], ids=["unlock", "lock"])
def test_a_file_system_without_locks(
    tiny: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, operation: int, code: int
) -> None:
    """One that refuses to give a lock back is no bug; without a lock nothing is written."""
    real = fcntl.flock

    def flock(file: Any, wanted: int) -> None:
        if wanted & ~fcntl.LOCK_NB == operation:
            raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))
        real(file, wanted)

    monkeypatch.setattr(fcntl, "flock", flock)
    assert explain(pictures / "a.png", "-m", tiny, "-o", tmp_path, *FAST) == code
    assert bool(files(tmp_path)) == (code == 0)


#: What a run does when its images are done.
LAST_STEPS = ((Store, "gather"), (records, "dump"), (Store, "finish"), (ExplainRun, "_report"), (Explainer, "close"))


@pytest.mark.parametrize("after", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["before", "after"])
@pytest.mark.parametrize(("owner", "name"), LAST_STEPS, ids=[name for _, name in LAST_STEPS])
def test_a_signal_at_the_end_loses_no_account_of_the_run(
    finished: Callable[[], Path],
    tiny: Path,
    pictures: Path,
    inside: Inside,
    monkeypatch: pytest.MonkeyPatch,
    owner: Any,
    name: str,
    after: bool,
) -> None:
    tree, call, calls = finished(), getattr(owner, name), 0
    before = files(tree)
    (tree / "summary.json").unlink()

    def signalled(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 1 and not after:
            os.kill(os.getpid(), signal.SIGTERM)
        value = call(*arguments, **named)
        if calls == 1 and after:
            os.kill(os.getpid(), signal.SIGTERM)
        return value

    monkeypatch.setattr(owner, name, signalled)
    outcome = inside("explain", pictures, "-m", tiny, "-o", tree, "--maps", "npz", *FAST, "-q")
    assert calls
    assert outcome.code in (0, 143), outcome.err
    assert json.loads((tree / "summary.json").read_text())["exit_code"] == outcome.code
    assert "bug" not in outcome.err
    assert files(tree) == before


@pytest.mark.parametrize(
    "raised",
    [
        RuntimeError("odd"),
        *(pytest.param(e, marks=pytest.mark.slow) for e in (TypeError("odd"), OSError(5, "odd"), SystemExit(0))),
    ],
)
def test_a_reader_that_breaks_over_one_picture_is_one_failed_record(
    tiny: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, raised: BaseException
) -> None:
    load = decode.load

    def breaks(ref: ImageRef, *more: Any) -> Image:
        if ref.path == "b.png":
            raise raised
        return load(ref, *more)

    monkeypatch.setattr(decode, "load", breaks)
    assert explain(pictures, "-m", tiny, "-o", tmp_path, "--evidence", "none", *FAST, "--no-overlays") == 1
    lines = [json.loads(line) for line in (tmp_path / "records.jsonl").read_text().splitlines()]
    failed = [line for line in lines if line["status"] == "failed"]
    assert [(line["image"]["path"], line["error"]["code"]) for line in failed] == [("b.png", "internal")]
    assert len(lines) == 6


@pytest.mark.slow
def test_what_fails_behind_the_device_fails_one_picture(
    tiny: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = Publisher.image
    (tmp_path / "out" / "b.png.json").mkdir(parents=True)  # in the way of a record
    raised = {"a.png": ImageError("not_finite", "odd"), "b.jpg": MemoryError(), "gray one.png": TypeError("odd")}

    def fails(self: Publisher, prepared: Any, *more: Any) -> Any:
        if error := raised.get(prepared.ref.path):
            raise error
        return image(self, prepared, *more)

    monkeypatch.setattr(Publisher, "image", fails)
    assert explain(pictures, "-m", tiny, "-o", tmp_path / "out", "--evidence", "none", *FAST) == 1
    lines = [json.loads(line) for line in (tmp_path / "out" / "records.jsonl").read_text().splitlines()]
    codes = {line["image"]["path"]: line["error"]["code"] for line in lines if line["status"] == "failed"}
    expected = {"a.png": "not_finite", "b.jpg": "memory", "gray one.png": "internal", "b.png": "bad_path"}
    assert codes == expected
    assert len(lines) == 6


@pytest.mark.slow
def test_a_device_that_fails_at_detecting(tiny: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without memory it fails that picture; a device that is lost ends the run."""
    explainer = Explainer(tiny, method="grad", evidence="none")
    kind, errors = type(explainer.plan.detector), [RuntimeError(f"{TORCH_SAYS} allocate 4096 bytes.")]

    def fails(*_: Any) -> Any:
        raise errors[0]

    monkeypatch.setattr(kind, "predict", fails)
    (result,) = explainer.explain([pictures / "a.png"])
    assert result.record.error is not None
    assert result.record.error.code == "memory"
    errors[0] = torch.AcceleratorError("CUDA error: unspecified launch failure")
    with pytest.raises(DeviceError, match="cpu was lost: CUDA error"):
        list(explainer.explain([pictures / "a.png"]))


def test_damaged_files_of_every_format_fail_in_time_and_typed(tmp_path: Path) -> None:
    files = [tmp_path / name for name, _ in damaged_files.damaged(random.Random(18), 80)]
    for file, (_, data) in zip(files, damaged_files.damaged(random.Random(18), 80), strict=True):
        file.write_bytes(data)
    assert {file.suffix for file in files} >= {".png", ".jpg", ".gif", ".tif", ".webp", ".bmp", ".ppm", ".jp2", ".avif"}
    assert list(fault_inputs.opened(files)) == []


@pytest.mark.parametrize("place", ["load", pytest.param("_content", marks=pytest.mark.slow)])
def test_pictures_that_change_when_they_were_listed_or_half_read(
    tiny: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    folder, call = tmp_path / "in", getattr(decode, place)
    folder.mkdir()
    for name in fault_inputs.CHANGES:
        shutil.copy(pictures / "b.png", folder / f"{name}.png")
    changes = dict(fault_inputs.CHANGES)

    def changed(what: Any, *more: Any) -> Any:
        file = Path(what.file if place == "load" else what.name)
        if change := changes.pop(file.stem, None):
            change(file)
        return call(what, *more)

    monkeypatch.setattr(decode, place, changed)
    line = (folder, "-m", tiny, "-o", tmp_path / "out", "--method", "grad", "--evidence", "none", "--no-overlays")
    assert explain(*line, "--max-det", 1) == 3
    assert not changes
    lines = [json.loads(line) for line in (tmp_path / "out" / "records.jsonl").read_text().splitlines()]
    ok = {line["image"]["path"].removesuffix(".png") for line in lines if line["status"] == "ok"}
    replaced = {"gone", "a folder", "a FIFO", "a link to a device", "a link to itself"}
    assert ok == {"another", "longer"} | (replaced if place == "_content" else set())
    assert {line["error"]["code"] for line in lines if line["status"] == "failed"} <= fault_inputs.GONE
    assert len(lines) == len(fault_inputs.CHANGES)


# -- refused by the system itself -------------------------------------------------------------------


@pytest.fixture
def command(detxai: Command, tiny: Path, pictures: Path) -> Command:
    (detxai.cwd / "tiny.safetensors").symlink_to(tiny)
    (detxai.cwd / "a.png").symlink_to(pictures / "a.png")
    return detxai


LINE = ("explain", "a.png", "-m", "tiny.safetensors", "-o", "tree", *FAST)


@pytest.mark.slow
@pytest.mark.parametrize("mib", [500, 1500, 3000])
def test_memory_that_the_system_refuses(command: Command, mib: int) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (mib << 20, mib << 20))

    running = command.start(*LINE, preexec_fn=limit)
    _, err = running.communicate()
    assert running.returncode == 7, err
    assert err.count(b"\n") == err.count(b"error: The system refused memory") == 1


@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_that_the_system_refuses(command: Command, threads: int) -> None:
    """As another user where this is root, whom no limit holds; one who may read Python in root's home."""
    if os.geteuid() == 0 and not shutil.which("setpriv"):
        pytest.skip("needs setpriv")
    rights = "+dac_override,+dac_read_search"
    nobody = ["setpriv", "--reuid=65534", "--clear-groups", f"--inh-caps={rights}", f"--ambient-caps={rights}"]
    limited = ["prlimit", f"--nproc={threads}:{threads}", sys.executable, "-m", "detxai", *LINE]
    line = [*(nobody if os.geteuid() == 0 else []), *limited]
    done = subprocess.run(line, capture_output=True, cwd=command.cwd, env=command.env, check=False)
    assert done.returncode == 7, done.stderr
    assert done.stderr.count(b"error: The system refused a thread") == 1


@pytest.mark.slow
def test_an_output_without_permission(command: Command) -> None:
    """Root loses the right to override permissions first; others never had it."""
    (command.cwd / "tree").mkdir(mode=0o555)

    def bound() -> None:
        libc, drop, override = ctypes.CDLL(None), 24, 1  # PR_CAPBSET_DROP, CAP_DAC_OVERRIDE
        libc.prctl(drop, override)

    running = command.start(*LINE, preexec_fn=bound)
    _, err = running.communicate()
    assert running.returncode == 6, err
    assert err.count(b"error: ") == 1
    assert b"not writable: Permission denied. Choose another folder with -o" in err


@pytest.mark.slow
@pytest.mark.parametrize("home", [None, "/nowhere", "/dev/null"])
def test_without_a_home(command: Command, home: str | None) -> None:
    environment = {k: v for k, v in command.env.items() if k != "HOME" and not k.startswith("XDG_")}
    environment |= {} if home is None else {"HOME": home, "XDG_CONFIG_HOME": home, "XDG_CACHE_HOME": home}
    line = [sys.executable, "-m", "detxai", *LINE]
    done = subprocess.run(line, capture_output=True, cwd=command.cwd, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert b"1 explained" in done.stderr and b"Traceback" not in done.stderr


#: Makes everything read-only but the folder $1 (and memory, unless $2), for the command that follows.
READ_ONLY = """
mount --make-rprivate / && mount --bind "$1" "$1" || exit 77
for place in $(cut -d' ' -f2 /proc/self/mounts | sort -u); do
    case $place in
        "$1" | /proc* | /sys* | $2) ;;
        *) mount -o remount,bind,ro "$place" || exit 77 ;;
    esac
done
shift 2
exec "$@"
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("memory", "out", "code", "said"),
    [
        (True, "writable/tree", 0, "1 explained"),
        (True, "tree", 6, "not writable: Read-only file system. Choose another folder with -o"),
        (False, "writable/tree", 6, "TMPDIR=DIR detxai"),
    ],
    ids=["output elsewhere", "nothing", "no memory as a folder"],
)
def test_a_read_only_system(command: Command, memory: bool, out: str, code: int, said: str) -> None:
    """Neither home nor the temporary folders nor the working directory can be written."""
    (writable := command.cwd / "writable").mkdir()
    own = ["unshare", "--mount", *([] if os.geteuid() == 0 else ["--map-root-user"])]
    line = [*own, "sh", "-c", READ_ONLY, "sh", str(writable), "/dev*" if memory else ""]
    line += [sys.executable, "-m", "detxai", *LINE, "-o", out]
    if not shutil.which("unshare") or subprocess.run([*own, "true"], capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount")
    done = subprocess.run(line, capture_output=True, cwd=command.cwd, env=command.env, check=False)
    if done.returncode == 77:
        pytest.skip("needs the right to mount")
    err = done.stderr.decode()
    assert done.returncode == code, err
    assert said in err and "Traceback" not in err
    assert err.count("error: ") == bool(code)
    assert (writable / "tree" / "a.png.json").exists() == (code == 0)
