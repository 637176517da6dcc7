"""Pictures that are damaged, vanish, change or have odd names, and readers that die, against the real command."""

from __future__ import annotations

import hashlib
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import PIL.Image
from damaged_files import damaged
from fault_runs import QUICK, Ended, Job, Row, Runner, files, pictures

from detxai.errors import ImageError
from detxai.inputs import decode
from detxai.output import records
from detxai.values import ImageRef

#: What a damaged picture may take, in seconds of one core and GiB beside what the process had.
SECONDS, GIB = 2.0, 1.0
#: Files that one run of the command is given.
AT_ONCE = 250


def opened(files: list[Path]) -> Iterator[str]:
    """What is wrong with how each of `files` is opened: only ImageError may come of it, in time, and in room."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for file in files:
        started = time.thread_time()
        try:
            decode.load(ImageRef(file.name, file))
        except ImageError:
            pass
        except Exception as error:  # noqa: BLE001  (this is what is looked for)
            yield f"{file.name}: {type(error).__name__}: {error}"
        took = time.thread_time() - started
        if took > SECONDS:
            yield f"{file.name}: {took:.1f} s"
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20
    if grown > GIB:
        yield f"{files[0].name} to {files[-1].name}: {grown:.1f} GiB"


def _accounted(tree: Path, names: set[str], codes: set[str] | None = None) -> list[str]:
    """What is wrong with a tree that is to have one record for each of `names`, ok or failed with a code and words."""
    lines = [records.load(line) for line in (tree / "records.jsonl").read_bytes().splitlines(keepends=True)]
    wrong = [f"no record, or two: {sorted(names ^ {r.image.path for r in lines})[:5]}"]
    wrong = wrong if {r.image.path for r in lines} != names or len(lines) != len(names) else []
    for record in lines:
        error = record.error
        if error is not None and (
            error.code == "internal" or not error.message or error.code not in (codes or {error.code})
        ):
            wrong.append(f"{record.image.path}: {error.code}: {error.message}")
    return wrong


def mutated(runner: Runner, dice: random.Random, count: int) -> Row:
    """Damaged files of every format: each opened alone and measured, then all of them in runs of the command."""
    row, folder, tree = Row("files of every format, damaged"), runner.folder / "damaged", runner.folder / "tree"
    for start in range(0, count, AT_ONCE):
        folder.mkdir()
        files = []
        for name, data in damaged(dice, min(AT_ONCE, count - start)):
            files.append(folder / name)
            files[-1].write_bytes(data)
        row.broken += opened(files)
        line = ["explain", str(folder), "-o", str(tree), *QUICK, "--imgsz", "32", "--conf", "0.9", "-q"]
        ended = runner.start(line).wait()
        row.add(f"files from {start}", ended, {0, 3}, *_accounted(tree, {file.name for file in files}))
        row.tried += len(files) - 1
        shutil.rmtree(folder)
        shutil.rmtree(tree)
    return row


#: What becomes of a picture between the listing and the reading, and of one that is being read.
CHANGES: dict[str, Callable[[Path], object]] = {
    "gone": lambda file: file.unlink(),
    "empty": lambda file: file.write_bytes(b""),
    "cut": lambda file: os.truncate(file, file.stat().st_size // 2),
    "longer": lambda file: file.write_bytes(file.read_bytes() + bytes(10_000)),
    "another": lambda file: PIL.Image.new("RGB", (50, 70), "red").save(file),
    "no picture": lambda file: file.write_text("no picture any more"),
    "a folder": lambda file: (file.unlink(), file.mkdir()),
    "a FIFO": lambda file: (file.unlink(), os.mkfifo(file)),
    "a link to a device": lambda file: (file.unlink(), file.symlink_to("/dev/zero")),
    "a link to itself": lambda file: (file.unlink(), file.symlink_to(file)),
}
GONE = {"not_found", "unreadable", "empty_file", "truncated", "not_an_image"}


def _changing(folder: Path, change: Callable[[Path], object], place: str) -> None:
    """In a child: every other picture of `folder` changes when it is about to be opened, or when it was (`place`)."""
    call, lock = getattr(decode, place), set()

    def changed(what: Any, *more: Any, **named: Any) -> Any:
        file = Path(getattr(what, "name", "") or what.file)
        if file.parent == folder and int(file.stem) % 2 and file not in lock:
            lock.add(file)
            change(file)
        return call(what, *more, **named)

    setattr(decode, place, changed)


def vanishing(runner: Runner, dice: random.Random, count: int) -> Row:
    """Pictures that vanish or change after they were listed, before or while they are read."""
    row, good = Row("pictures that vanish or change, listed or half read"), pictures(runner.folder / "good", 4)
    for place in ("load", "_content"):
        for said, change in CHANGES.items():
            folder, tree = runner.folder / "changing", runner.folder / "tree"
            shutil.copytree(good, folder)
            names = {file.name for file in folder.iterdir()}
            bytes_before = {file.name: file.read_bytes() for file in folder.iterdir()}
            line = ["explain", str(folder), "-o", str(tree), *QUICK]
            ended = runner.start(line, lambda f=folder, c=change, p=place: _changing(f, c, p)).wait()
            after = {f.name: f.read_bytes() for f in folder.iterdir() if f.is_file() and not f.is_symlink()}
            wrong = _accounted(tree, names, GONE) + list(_odd_sums(tree, bytes_before, after))
            row.add(f"{said}, at {place}", ended, {0, 3}, *wrong)
            shutil.rmtree(folder)
            shutil.rmtree(tree)
    return row


def _odd_sums(tree: Path, before: dict[str, bytes], after: dict[str, bytes]) -> Iterator[str]:
    """Records of a picture that were made of neither its bytes before nor after."""
    for file in tree.glob("*.png.json"):
        record = records.load(file.read_bytes())
        name = record.image.path
        sums = {hashlib.sha256(kept[name]).hexdigest() for kept in (before, after) if name in kept}
        if record.status == "ok" and record.image.sha256 not in sums:
            yield f"{name}: the record is of other bytes than the file ever had"


NAMES = [
    b"a\nb.png",
    b"-m.png",
    b"--help.png",
    b" .png",
    b"a" * 251 + b".png",
    b"caf\xe9.png",
    b"\xff\xfe.png",
    b"a\tb.png",
]
NAMES += [b"summary.json.png", b"records.jsonl.png", b"a#2.png", b"50%.png", "\u202egnp.png".encode(), b"[x]*?.png"]
NAMES += [
    b'"quoted".png',
    b"'.png",
    b"\\.png",
    b"\x1b[31m.png",
    b"a.png.json.png",
    b"a.png.d00.ig.png",
    b"$HOME;ls.png",
]


def names(runner: Runner, dice: random.Random, count: int) -> Row:
    """Odd names, in a folder and one by one on stdin: a record each, and all is done already the second time."""
    row, folder, tree = Row("odd names"), runner.folder / "names", runner.folder / "tree"
    folder.mkdir()
    (good,) = pictures(runner.folder / "good", 1).iterdir()
    for name in NAMES:
        shutil.copy(good, os.fsencode(folder) + b"/" + name)
    for source in (folder, "-"):
        for again in (False, True):
            line = ["explain", str(source), *(["-0"] if source == "-" else []), "-o", str(tree), *QUICK, "-v"]
            ended = runner.start(line, lambda s=source: s == "-" and _listed(folder)).wait()
            lines = (tree / "records.jsonl").read_bytes().splitlines()
            wrong = None if len(lines) == len(NAMES) else f"{len(lines)} records of {len(NAMES)} pictures"
            done = None if not again or ended.said.count("done already") else "nothing was done already"
            row.add(f"{source} {again}", ended, {0, 3}, wrong, done)
        shutil.rmtree(tree)
    row.tried = len(NAMES) * 4
    return row


def _listed(folder: Path) -> None:
    """In a child: the paths of `folder` on stdin, NUL after each."""
    file = folder.parent / "list"
    file.write_bytes(b"".join(os.fsencode(folder) + b"/" + name + b"\0" for name in NAMES))
    os.dup2(os.open(file, os.O_RDONLY), 0)


def readers(runner: Runner, dice: random.Random, count: int) -> Row:
    """A reader dies over the k-th picture: of a bug, of no memory, with the whole process; then all is well again."""
    row, job = Row("a reader that dies"), Job(runner, "readers", 6)

    def dying(k: int, fault: Callable[[], object]) -> None:
        load = decode.load

        def dies(ref: ImageRef, *more: Any) -> Any:
            if ref.path == f"{k:03d}.png":
                fault()
            return load(ref, *more)

        decode.load = dies  # type: ignore[assignment]

    def raises(error: BaseException) -> Callable[[], object]:
        def fault() -> None:
            raise error

        return fault

    crash = lambda: os.kill(os.getpid(), signal.SIGSEGV)  # noqa: E731
    faults: dict[str, tuple[Callable[[], object], set[int]]] = {
        "a bug": (raises(RuntimeError("odd")), {1}),
        "leaves": (raises(SystemExit(0)), {1}),
        "no memory": (raises(MemoryError()), {3, 7}),
        "crash": (crash, {-signal.SIGSEGV}),
    }
    for said, (fault, codes) in faults.items():
        for k in range(6):
            job.forget()
            ended = job.start(lambda k=k, f=fault: dying(k, f)).wait()
            row.add(f"{said} at {k}", ended, codes, job.wrong(failed={"internal", "memory", "too_large"}))
            again = job.start().wait()
            row.broken += [
                f"{said} at {k}, the run after it: {p}" for p in (job.wrong(complete=True), again.problem) if p
            ]
    return row


def bare(runner: Runner, dice: random.Random, count: int) -> Row:
    """No environment, no home, one that cannot be written, no temporary folder: the tree is the same."""
    row, source = Row("empty environment, no home"), pictures(runner.folder / "bare", 2)
    missing, kept = (
        str(runner.folder / "nowhere"),
        {"PYTHONPATH": os.environ.get("PYTHONPATH", ""), "OMP_NUM_THREADS": "1"},
    )
    trees: dict[str, dict[str, bytes]] = {}
    for said, more in {
        "all": dict(os.environ),
        "nothing": {},
        "no home": {"HOME": missing},
        "home is a device": {"HOME": "/dev/null", "XDG_CONFIG_HOME": "/dev/null", "XDG_CACHE_HOME": "/dev/null"},
        "no temporary folder": {"TMPDIR": missing, "HOME": missing},
    }.items():
        tree = runner.folder / f"tree-{len(trees)}"
        line = [sys.executable, "-m", "detxai", "explain", str(source), *QUICK, "-o", str(tree)]
        started = time.monotonic()
        done = subprocess.run(line, env=more | kept, capture_output=True, text=True, check=False)
        trees[said] = files(tree) if tree.exists() else {}
        same = None if trees[said] == trees["all"] else "not the tree of an ordinary run"
        row.add(said, Ended(done.returncode, time.monotonic() - started, done.stderr), {0}, same)
    return row


KINDS: dict[str, Callable[[Runner, random.Random, int], Row]] = {
    "mutated": mutated,
    "vanishing": vanishing,
    "names": names,
    "readers": readers,
    "bare": bare,
}
