"""Kills, signals, a failing disk and failing memory against the real command: is anything lost, half-written or mixed?

After every fault each file of the tree is one that an undisturbed run writes, a record and its pictures of the same
run, or a failed record; a run that ends by itself says why in one line, with its exit code; and the same command
once more makes the tree whole. Leaves with 1 where this does not hold.

    python scripts/checks/faults.py [KIND...] --seed 1 --count 200
"""

from __future__ import annotations

import argparse
import errno
import io
import itertools
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import fault_inputs
import torch
from fault_runs import Ended, Job, Row, Runner
from torch.utils._python_dispatch import TorchDispatchMode

NUMBERS = (errno.ENOSPC, errno.EIO, errno.EACCES)
#: What a run that a signal stops may take, in seconds of the clock; on a busy machine this is the first to be missed.
LEAVES_WITHIN = 5.0
TORCH_SAYS = "[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried to allocate"


# -- kills and signals --------------------------------------------------------------------------


def kills(runner: Runner, dice: random.Random, count: int) -> Row:
    """SIGKILL at random moments of runs that resume one another; a tree that is whole is begun anew."""
    row, job = Row("kill -9 at random, resumed"), Job(runner, "kills", 60)
    while row.codes[-9] < count:
        running = job.start()
        time.sleep(dice.random() * job.seconds)
        running.send(signal.SIGKILL)
        ended = running.wait()
        complete = ended.code == 0
        row.add(f"kill {row.tried}", ended, {0, -9}, job.wrong(complete=complete))
        if complete:
            job.forget()
    row.add("the run after the last kill", job.start().wait(), {0}, job.wrong(complete=True))
    return row


def signals(runner: Runner, dice: random.Random, count: int) -> Row:
    """TERM, INT, HUP at random moments, at times twice, or after a stop; each run resumes the one before."""
    row, job = Row("SIGTERM, SIGINT, SIGHUP, twice, STOP and CONT"), Job(runner, "signals", 60)
    for number in range(count):
        sent = dice.choice((signal.SIGTERM, signal.SIGINT, signal.SIGHUP))
        running = job.start()
        time.sleep(dice.random() * job.seconds)
        if stopped := number % 5 == 0:
            running.send(signal.SIGSTOP)
            time.sleep(0.05)
            running.send(signal.SIGCONT)
        asked = time.monotonic()
        running.send(sent)
        if twice := number % 4 == 1:
            running.send(sent)
        ended = running.wait()
        took = time.monotonic() - asked
        late = f"left after {took:.1f} s" if took > LEAVES_WITHIN else None
        row.seconds = max(row.seconds, took)
        said = f"{sent.name}{' after a stop' * stopped}{' twice' * twice}"
        allowed = {0, 128 + sent, -sent} if sent != signal.SIGHUP else {0, -1}
        ended = Ended(ended.code, took, ended.said or "stopped")  # where nothing had been begun, nothing is said
        row.add(said, ended, allowed, late, job.wrong(complete=ended.code == 0))
        if ended.code == 0:
            job.forget()
    row.add("the run after the last", job.start().wait(), {0}, job.wrong(complete=True))
    return row


def together(runner: Runner, dice: random.Random, count: int) -> Row:
    """Two runs on one tree, begun within a moment of each other: one works, the other is refused or comes later."""
    row = Row("two runs on one tree")
    for number in range(count):
        job = Job(runner, "together", 12)
        first = job.start()
        time.sleep(dice.random() * job.seconds)
        second = job.start()
        codes = [first.wait(), second.wait()]
        twice = None if 0 in [c.code for c in codes] else "neither of the two finished"
        row.add(f"pair {number}", codes[0], {0, 6}, twice)
        row.add(f"pair {number}", codes[1], {0, 6}, job.wrong(complete=True))
        job.forget()
    return row


# -- a failing disk -----------------------------------------------------------------------------


class Disk:
    """Calls of the file system below `tree`: the `at`-th fails with `number`, or (`lasting`) all from it on."""

    def __init__(self, tree: Path, at: int, number: int, lasting: bool) -> None:
        self.tree, self.at, self.number, self.lasting = str(tree), at, number, lasting
        self.count, self.lock = 0, threading.Lock()

    def call(self, path: object = None) -> None:
        """Count a call; raise OSError where it is one that fails."""
        if isinstance(path, str | os.PathLike) and not os.fspath(path).startswith(self.tree):
            return
        with self.lock:
            self.count += 1
            fails = self.count >= self.at if self.lasting else self.count == self.at
        if fails:
            raise OSError(self.number, os.strerror(self.number))

    def install(self) -> None:
        """Put this disk under the process."""
        for name in ("open", "replace", "unlink", "mkdir", "fsync", "scandir", "stat"):
            setattr(os, name, self.through(getattr(os, name)))
        import builtins

        builtins.open = io.open = self.opened(io.open)  # type: ignore[assignment]

    def through(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def tried(*arguments: Any, **named: Any) -> Any:
            self.call(arguments[0] if arguments else None)
            return call(*arguments, **named)

        return tried

    def opened(self, call: Callable[..., Any]) -> Callable[..., Any]:
        disk = self

        class File(io.FileIO):
            def write(self, data: Any) -> int:
                disk.call()
                return super().write(data) or 0

        def tried(file: Any, mode: str = "r", *arguments: Any, **named: Any) -> Any:
            below = isinstance(file, str | os.PathLike) and os.fspath(file).startswith(disk.tree)
            if below:
                disk.call(file)
            if below and mode == "xb":
                return io.BufferedWriter(File(file, "xb"))
            return call(file, mode, *arguments, **named)

        return tried


def disk(runner: Runner, dice: random.Random, count: int) -> Row:
    """Every k-th call of the file system fails, in a run that replaces a tree of other settings."""
    row = Row("every k-th open, write, fsync, rename, … fails")
    job = Job(runner, "disk", 2, before=["--target", "left"])
    for k in itertools.count(1):
        last = True
        for number in NUMBERS:
            lasting = bool(dice.randrange(2))
            counted = Disk(job.tree, k, number, lasting)
            job.begin()
            ended = job.start(counted.install, tell=lambda counted=counted: counted.count).wait()
            last &= ended.told < k
            said = f"call {k} fails with {errno.errorcode[number]}{' and so do all after it' * lasting}"
            row.add(said, ended, {0, 6}, job.wrong(complete=ended.code == 0))
            again = job.start().wait()
            row.broken += [f"{said}, the run after it: {p}" for p in (job.wrong(complete=True), again.problem) if p]
        if last or row.tried >= count:
            return row
    return row


# -- failing memory -----------------------------------------------------------------------------


class Memory(TorchDispatchMode):
    """Operations of torch on the thread that computes, of which those numbered in `fails` find no memory."""

    def __init__(self, fails: Callable[[int], bool]) -> None:
        super().__init__()
        self.fails, self.count = fails, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        if self.fails(self.count):
            raise RuntimeError(f"{TORCH_SAYS} 4096 bytes. Error code 12 (Cannot allocate memory)")
        return func(*args, **(kwargs or {}))


def memory(runner: Runner, dice: random.Random, count: int) -> Row:
    """torch finds no memory: once, in a row, or from some operation on; at times a full disk comes on top."""
    row, job = Row("no memory for torch, at times no disk either"), Job(runner, "memory", 4)
    watched = Memory(lambda k: False)
    operations = job.start(watched.__enter__, lambda: watched.count).wait().told
    job.forget()
    assert operations > 100
    for number in range(count):
        at, length = dice.randrange(1, operations), dice.choice((1, 1, 2, 3, 10, 100, 1000, 10**9))
        failing = Memory(lambda k, at=at, length=length: at <= k < at + length)
        broken = Disk(job.tree, dice.randrange(1, 60), dice.choice(NUMBERS), lasting=False) if number % 4 == 3 else None
        job.forget()
        batch = ["--batch", str(dice.choice((1, 2, 4)))]
        ended = job.start(partial(_under, failing, broken), more=batch).wait()
        said = f"operations {at} to {at + length} of {operations} fail{' and a call of the disk' * bool(broken)}"
        row.add(said, ended, {0, 3, 6, 7}, job.wrong(complete=ended.code == 0, failed={"memory", "too_large"}))
        again = job.start().wait()
        row.broken += [f"{said}, the run after it: {p}" for p in (job.wrong(complete=True), again.problem) if p]
    return row


def _under(mode: Memory, broken: Disk | None) -> None:
    mode.__enter__()
    if broken is not None:
        broken.install()


KINDS: dict[str, Callable[[Runner, random.Random, int], Row]] = {
    "kills": kills,
    "signals": signals,
    "together": together,
    "disk": disk,
    "memory": memory,
    **fault_inputs.KINDS,
}


def main() -> None:
    """Try the kinds and print a Markdown table; leaves with 1 where something did not hold."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=f"of {', '.join(KINDS)}; default: all")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--count", type=int, default=200, help="faults of a kind, at most")
    options = parser.parse_args()
    torch.set_num_threads(1)  # threads do not live on in a process that is forked
    broken = []
    print("| kind | faults | exit codes | longest s | did not hold |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for name in options.kinds or KINDS:
            row = KINDS[name](Runner(Path(folder, name)), random.Random(options.seed), options.count)
            codes = ", ".join(f"{code}: {n}" for code, n in sorted(row.codes.items()))
            print(f"| {row.kind} | {row.tried} | {codes} | {row.seconds:.1f} | {len(row.broken)} |", flush=True)
            broken += row.broken
            shutil.rmtree(Path(folder, name))
    for problem in broken:
        print(f"\n{problem}")
    sys.exit(bool(broken))


if __name__ == "__main__":
    main()
