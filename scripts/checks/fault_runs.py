"""Runs of the real command in forked processes, and what may be in their trees: for `faults.py`."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

import detxai.run.pipeline  # noqa: F401  (torch and all: each run is forked from here)
from detxai.cli.app import run
from detxai.output import records

SAMPLES = Path(__file__).parents[2] / "samples" / "images"
#: A real network and real integrals, but quick ones.
QUICK = ("--imgsz", "64", "--conf", "0.02", "--max-det", "2", "--max-evaluations", "4", "--evidence", "none")
#: Seconds of the clock after which a run counts as one that hangs.
PATIENCE = 600


@dataclass(frozen=True)
class Ended:
    """How a run ended: exit `code` (negative: a signal), `seconds` of the clock, what it `said`, a number it `told`."""

    code: int
    seconds: float
    said: str
    told: int = 0

    @property
    def problem(self) -> str | None:
        """What is wrong with a run that nothing disturbed."""
        return f"exit code {self.code}: {self.said[-300:]}" if self.code else None


@dataclass
class Row:
    """What was tried of a kind, how it ended, and what did not hold."""

    kind: str
    tried: int = 0
    codes: Counter[int] = field(default_factory=Counter)
    seconds: float = 0.0
    broken: list[str] = field(default_factory=list)

    def add(self, what: str, ended: Ended, allowed: set[int], *problems: str | None) -> None:
        self.tried += 1
        self.codes[ended.code] += 1
        self.seconds = max(self.seconds, ended.seconds)
        wrong = [p for p in problems if p]
        if ended.code not in allowed:
            wrong.append(f"exit code {ended.code}: {ended.said[-300:]}")
        elif ended.code > 0 and not any("error" in line or "stopped" in line for line in ended.said.splitlines()):
            wrong.append(f"exit code {ended.code} without a sentence")
        if "Traceback" in ended.said:
            wrong.append(f"a traceback: {ended.said[-300:]}")
        self.broken += [f"{what}: {problem}" for problem in wrong]


class Running:
    """A run of the command in a process that was forked, its words in a file."""

    def __init__(
        self, arguments: list[str], words: Path, before: Callable[[], object], tell: Callable[[], int]
    ) -> None:
        self.words, self.started = words, time.monotonic()
        self.told = words.with_suffix(".told")
        sys.stdout.flush()
        self.child = os.fork()
        if self.child:
            return
        code = 1
        try:
            signal.alarm(PATIENCE)  # its default ends the process
            out = os.open(words, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(out, 1)
            os.dup2(out, 2)
            before()
            code = run(arguments)
        except KeyboardInterrupt:
            code = 130
        finally:
            number = os.open(self.told, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.write(number, str(tell()).encode())
            os._exit(code)

    def send(self, number: int) -> None:
        os.kill(self.child, number)  # one that is over is still there until it is waited for

    def wait(self) -> Ended:
        _, status = os.waitpid(self.child, 0)
        seconds = time.monotonic() - self.started
        told = int(self.told.read_text() or 0) if self.told.exists() else 0
        said = self.words.read_text(errors="replace") if self.words.exists() else ""
        return Ended(os.waitstatus_to_exitcode(status), seconds, said, told)


class Runner:
    """Starts runs; `folder` is theirs."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.number = folder, 0
        folder.mkdir()

    def start(
        self, arguments: list[str], before: Callable[[], object] = bool, tell: Callable[[], int] = int
    ) -> Running:
        """Run the command after `before()`, in the child; `tell()` says there what `Ended.told` is."""
        self.number += 1
        return Running(arguments, self.folder / f"words-{self.number}", before, tell)


def pictures(folder: Path, count: int) -> Path:
    """`folder` with `count` small pictures of the samples."""
    folder.mkdir()
    bags = [Image.open(file).convert("RGB").reduce(4) for file in sorted(SAMPLES.glob("*.jpg"))]
    for k in range(count):
        bag = bags[k % len(bags)]
        bag.crop((k % 7, k % 5, bag.width - k % 3, bag.height - k % 11)).save(folder / f"{k:03d}.png")
    return folder


def files(tree: Path) -> dict[str, bytes]:
    """The tree without what may change: the summary and dot-files."""
    return {
        str(file.relative_to(tree)): file.read_bytes()
        for file in sorted(tree.rglob("*"))
        if file.is_file() and file.name != "summary.json" and not file.name.startswith(".")
    }


class Job:
    """One command again and again on a tree: the tree of an undisturbed run, and of one with other settings before."""

    def __init__(self, runner: Runner, name: str, count: int, before: list[str] | None = None) -> None:
        self.runner, self.tree = runner, runner.folder / f"{name}-tree"
        source = runner.folder / f"{name}-pictures"
        self.source = source if source.exists() else pictures(source, count)
        self.line = ["explain", str(self.source), *QUICK, "-o"]
        self.good = self._made(name, [])
        #: Seconds of a run that nothing disturbs.
        self.seconds = self._took
        self.old = {} if before is None else self._made(f"{name}-before", before)
        self._old_tree = None if before is None else runner.folder / f"{name}-before-good"
        assert any(name.endswith(".png") for name in self.good), "no picture is written: the faults would hit nothing"

    def _made(self, name: str, more: list[str]) -> dict[str, bytes]:
        tree = self.runner.folder / f"{name}-good"
        if not tree.exists():
            ended = self.runner.start([*self.line, str(tree), *more]).wait()
            assert ended.code == 0, ended.said
            self.runner.times = {**getattr(self.runner, "times", {}), name: ended.seconds}  # type: ignore[attr-defined]
        self._took: float = self.runner.times[name]  # type: ignore[attr-defined]
        return files(tree)

    def start(
        self, before: Callable[[], object] = bool, tell: Callable[[], int] = int, more: Sequence[str] = ()
    ) -> Running:
        return self.runner.start([*self.line, str(self.tree), *more], before, tell)

    def forget(self) -> None:
        """No tree any more."""
        shutil.rmtree(self.tree, ignore_errors=True)

    def begin(self) -> None:
        """The tree as the run with other settings left it."""
        self.forget()
        if self._old_tree is not None:
            shutil.copytree(self._old_tree, self.tree)

    def wrong(self, *, complete: bool = False, failed: frozenset[str] | set[str] = frozenset()) -> str | None:
        """What is wrong with the tree; `complete`: it is to be that of an undisturbed run; `failed`: codes allowed."""
        there = files(self.tree) if self.tree.exists() else {}
        if complete:
            odd = [name for name in {*there, *self.good} if there.get(name) != self.good.get(name)]
            left = [file.name for file in self.tree.rglob(".*.tmp")]
            return f"not the tree of an undisturbed run: {sorted(odd)[:5]} {left[:5]}" if odd or left else None
        return mixed(there, [self.good, self.old], failed)


def mixed(there: dict[str, bytes], wholes: list[dict[str, bytes]], failed: frozenset[str] | set[str]) -> str | None:
    """What of the files of a tree is of none of the `wholes`, or a record with pictures of another."""
    for name, content in there.items():
        if name == "records.jsonl":
            continue
        if not any(whole.get(name) == content for whole in wholes) and not _fails(content, failed):
            return f"{name} ({len(content)} bytes) is no file of a whole run"
        if not name.endswith(".json"):
            continue
        folder = name.rpartition("/")[0]
        for picture in records.load(content).files():
            own = f"{folder}/{picture}" if folder else picture
            if not any(whole.get(name) == content and whole.get(own) == there.get(own) for whole in wholes):
                return f"{name} vouches for {own}, which is not its own"
    for line in there.get("records.jsonl", b"").splitlines(keepends=True):
        name = f"{records.load(line).image.path}.json"
        if not any(line == whole.get(name) for whole in wholes) and not _fails(line, failed):
            return f"a line of records.jsonl is no record: {line[:80]!r}"
    return None


def _fails(content: bytes, codes: frozenset[str] | set[str]) -> bool:
    """Whether `content` is a failed record of one of these codes."""
    try:
        record = records.load(content)
    except ValueError:
        return False
    return record.error is not None and record.error.code in codes
