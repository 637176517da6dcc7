"""A run as a process: everything it says on stderr but the records of `--json`; signals; its memory."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, BinaryIO

from detxai.errors import DetxaiError

if TYPE_CHECKING:
    from detxai.config.settings import TalkConfig

#: Seconds between status lines where there is no terminal for a progress bar.
STATUS_EVERY = 10.0


class Stopped(BaseException):
    """A signal asked the run to end; `code` is the exit code. Not an Exception: nothing may swallow it."""

    def __init__(self, code: int) -> None:
        super().__init__(f"stopped by signal {code - 128}")
        self.code = code


class ReaderGone(Exception):
    """Whoever read our stdout closed it."""


def keep_freed_memory() -> None:
    """Ask glibc to use freed blocks again, however large: else each activation map costs the zeroing of new pages.

    A sixth to a fifth of a run on a CPU. All threads share one arena, since others give their pages back whatever is
    asked. Elsewhere this does nothing.
    """
    trim_threshold, mmap_threshold, arena_max = -1, -3, -8  # of <malloc.h>
    with contextlib.suppress(OSError, AttributeError, TypeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(mmap_threshold, 2**30)
        libc.mallopt(trim_threshold, 2**31 - 1)
        libc.mallopt(arena_max, 1)


@contextlib.contextmanager
def signals() -> Iterator[None]:
    """Turn the first SIGINT or SIGTERM into `Stopped` in the main thread; a second one ends the process at once."""

    def stop(number: int, _: Any) -> None:
        signal.signal(number, signal.SIG_DFL)
        raise Stopped(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def guarded_stdout() -> Iterator[BinaryIO]:
    """The real stdout for records only; file descriptor 1 points to stderr meanwhile, whoever prints.

    A reader that goes away raises ReaderGone at the next write.
    """
    sys.stdout.flush()
    real = os.dup(1)
    os.dup2(2, 1)
    try:
        with os.fdopen(real, "wb", buffering=0, closefd=False) as stream:
            yield stream
    finally:
        os.dup2(real, 1)
        os.close(real)


def write_line(stream: BinaryIO, line: bytes) -> None:
    """Write a whole line now. Raises ReaderGone where the reader has closed the pipe."""
    try:
        while line:
            line = line[stream.write(line) :]
    except BrokenPipeError:
        raise ReaderGone from None


class Console:
    """Messages of one run, as text or as JSON lines, and its progress."""

    def __init__(self, verbosity: int = 0, color: str = "auto", log_format: str = "text") -> None:
        self.verbosity, self.log_format = verbosity, log_format
        self.terminal = sys.stderr.isatty()
        self.color = color == "always" or (color == "auto" and self.terminal and "NO_COLOR" not in os.environ)
        self._bar: Any = None
        self._last = time.monotonic()

    @classmethod
    def of(cls, talk: TalkConfig) -> Console:
        """The console that the settings ask for."""
        return cls(talk.verbosity, talk.color, talk.log_format)

    def say(self, text: str, *, level: int = 0, kind: str = "info") -> None:
        """Print `text` where `level` (-1 errors, 0 normal, 1 verbose, 2 debug) is within the verbosity."""
        if level > self.verbosity:
            return
        if self.log_format == "json":
            line = json.dumps({"level": kind, "message": text}, ensure_ascii=False)
        else:
            tint = {"error": "31", "warning": "33"}.get(kind, "")
            prefix = "" if kind == "info" else f"{kind}: "
            line = f"\x1b[{tint}m{prefix}\x1b[0m{text}" if self.color and tint else prefix + text
        self._print(line)

    def _print(self, line: str) -> None:
        try:
            if self._bar is not None:
                self._bar.write(line, file=sys.stderr)
            else:
                print(line, file=sys.stderr, flush=True)
        except BrokenPipeError:
            pass

    def error(self, error: DetxaiError) -> None:
        """The sentence of an error and the way on."""
        self.say(str(error), level=-1, kind="error")

    @contextlib.contextmanager
    def progress(self, total: int | None) -> Iterator[None]:
        """A bar on a terminal, a status line now and then elsewhere."""
        if self.terminal and self.verbosity >= 0 and self.log_format == "text":
            from tqdm import tqdm

            with tqdm(total=total, unit=" image", file=sys.stderr, dynamic_ncols=True, smoothing=0.05) as self._bar:
                yield
            self._bar = None
        else:
            yield

    def advance(self, done: int, text: str) -> None:
        """One more image is done; `text` says how things stand."""
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(1)
        elif time.monotonic() - self._last >= STATUS_EVERY:
            self._last = time.monotonic()
            self.say(f"{done} images, {text}")

    def table(self, title: str, columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
        """A small table at the end of a run; its title alone where there are no rows or machines read."""
        if not rows or self.log_format == "json":
            self.say(title)
        if not rows or self.log_format == "json" or self.verbosity < 0:
            return
        from rich.console import Console as RichConsole
        from rich.table import Table

        table = Table(title=title, title_justify="left", title_style="bold")
        for i, column in enumerate(columns):
            table.add_column(column, justify="left" if i == 0 else "right")
        for row in rows:
            table.add_row(*row)
        with contextlib.suppress(BrokenPipeError):
            RichConsole(stderr=True, no_color=not self.color, highlight=False).print(table)
