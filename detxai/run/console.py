"""A run as a process: everything it says, on stderr, by `logging`; its progress; signals; its memory."""

from __future__ import annotations

import contextlib
import ctypes
import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from detxai.errors import DetxaiError, ExitCode, ImageError
from detxai.text import printable

if TYPE_CHECKING:
    from detxai.config.settings import TalkConfig

#: Seconds between status lines where there is no terminal for a progress bar, and between looks at a bar.
STATUS_EVERY, LOOK_EVERY = 10.0, 0.5
LOGGER = logging.getLogger("detxai")
KINDS = {"info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}
TINTS = {"ERROR": "31", "WARNING": "33"}


class Stopped(BaseException):
    """A signal asked the run to end; `code` is the exit code. Not an Exception: nothing may swallow it."""

    def __init__(self, code: int) -> None:
        super().__init__(f"interrupted by {signal.Signals(code - 128).name}")
        self.code = code


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


class Signals:
    """Turns the first SIGINT or SIGTERM into `Stopped` in the main thread; a second one ends the process at once."""

    def __init__(self) -> None:
        self._held = False
        self._code: int | None = None
        self._came: int | None = None

    def _stop(self, number: int, _: Any) -> None:
        signal.signal(number, signal.SIG_DFL)
        self._came = 128 + number
        if self._held:
            self._code = 128 + number
        else:
            raise Stopped(128 + number)

    def check(self) -> None:
        """Raise the `Stopped` of a signal again: Python drops it where it comes while an object is finalized."""
        if self._came is not None and not self._held:
            raise Stopped(self._came)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """What must not be done by half: a signal within counts at its end, at the outermost one's."""
        before, self._held = self._held, True
        try:
            yield
        finally:
            self._held = before
        if not before:
            self._count()

    @contextlib.contextmanager
    def let(self) -> Iterator[None]:
        """What may take long within `held`: a signal counts at once, one that was held back before at the end."""
        before, self._held = self._held, False
        try:
            yield
            self._count()
        finally:
            self._held = before

    def _count(self) -> None:
        """Raise the `Stopped` of a signal that was held back."""
        code, self._code = self._code, None
        if code is not None:
            raise Stopped(code)

    def __enter__(self) -> Signals:
        main = threading.current_thread() is threading.main_thread()
        self._before = {n: signal.signal(n, self._stop) for n in (signal.SIGINT, signal.SIGTERM)} if main else {}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


class _Lines(logging.Handler):
    """Messages as lines on stderr; above the progress bar, while there is one."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self.console = console

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(OSError, ValueError):  # a closed stderr
            self.console.write((self._json if self.console.log_format == "json" else self._text)(record))

    def _text(self, record: logging.LogRecord) -> str:
        message = "\n".join(map(printable, record.getMessage().split("\n")))
        if record.levelno < logging.WARNING:
            return message
        tint, word = TINTS.get(record.levelname, ""), f"{record.levelname.lower()}: "
        return f"\x1b[{tint}m{word}\x1b[0m{message}" if self.console.color else word + message

    def _json(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "code": getattr(record, "code", None),
            "path": getattr(record, "path", None),
            "message": record.getMessage(),
        }
        text = json.dumps(line, ensure_ascii=False)
        return text if text.isprintable() else json.dumps(line)


class Console:
    """Messages of one run, as text or as JSON lines, and its progress."""

    def __init__(self, verbosity: int = 0, color: str = "auto", log_format: str = "text") -> None:
        self.verbosity, self.log_format = verbosity, log_format
        self.terminal = sys.stderr.isatty()
        self.color = color == "always" or (color == "auto" and self.terminal and "NO_COLOR" not in os.environ)
        self._bar: Any = None
        self._task: Any = None
        self._total: int | None = None
        self._done, self._standing = 0, ""
        for logger in (LOGGER, logging.getLogger("py.warnings")):
            logger.handlers, logger.propagate = [_Lines(self)], False
        LOGGER.setLevel(logging.DEBUG)

    @classmethod
    def of(cls, talk: TalkConfig) -> Console:
        """The console that the settings ask for."""
        return cls(talk.verbosity, talk.color, talk.log_format)

    def say(self, text: str, *, level: int = 0, kind: str = "info", code: str | None = None, path: str = "") -> None:
        """Say `text` where `level` (-1 errors, 0 normal, 1 verbose, 2 debug) is within the verbosity.

        `code` and `path` (of an image) go into JSON lines.
        """
        if level <= self.verbosity:
            LOGGER.log(KINDS[kind], "%s", text, extra={"code": code, "path": path or None})

    @property
    def width(self) -> int | None:
        """Columns of the terminal that people read; None where it is none."""
        from rich.console import Console as RichConsole

        return RichConsole(stderr=True).width if self.terminal and self.log_format == "text" else None

    def write(self, line: str) -> None:
        """A whole line on stderr, never wrapped."""
        if self._bar is None:
            print(line, file=sys.stderr, flush=True)
        else:
            from rich.text import Text

            self._bar.console.print(Text.from_ansi(line), soft_wrap=True)

    def error(self, error: DetxaiError, path: str = "") -> None:
        """The sentence of an error and the way on."""
        code = error.code if isinstance(error, ImageError) else ExitCode(error.exit_code).name.lower()
        self.say(str(error), level=-1, kind="error", code=code, path=path)

    @contextlib.contextmanager
    def waiting(self, text: str) -> Iterator[None]:
        """Something that moves on a terminal while what `text` says takes its time."""
        if not self._draws:
            self.say(text, level=1)
            yield
            return
        from rich.console import Console as RichConsole
        from rich.text import Text

        with RichConsole(stderr=True, no_color=not self.color).status(Text(printable(text))):
            yield

    @property
    def _draws(self) -> bool:
        """Whether there is somebody who sees things move."""
        return self.terminal and self.verbosity >= 0 and self.log_format == "text"

    @contextlib.contextmanager
    def progress(self, total: Callable[[], int] | int | None, pulse: Callable[[], str] = str) -> Iterator[None]:
        """A bar on a terminal, a status line now and then elsewhere; it moves while nothing is finished, too.

        `total`: of images; a function is asked in the background; None: nobody knows. `pulse`: what has been done of
        images that are not finished yet.
        """
        self._done, self._standing = 0, ""
        self._total = total if isinstance(total, int) else None
        if callable(total):
            threading.Thread(target=self._count, args=(total,), daemon=True).start()
        over = threading.Event()
        ticker = threading.Thread(target=self._tick, args=(over, pulse), daemon=True)
        with self._drawn() if self._draws else _nothing():
            ticker.start()
            try:
                yield
            finally:
                over.set()
                ticker.join()

    def _count(self, total: Callable[[], int]) -> None:
        self._total = total()

    @contextlib.contextmanager
    def _drawn(self) -> Iterator[None]:
        from rich import progress
        from rich.console import Console as RichConsole

        columns = (
            progress.SpinnerColumn(),
            progress.MofNCompleteColumn(),
            progress.BarColumn(),
            progress.TextColumn("{task.fields[rate]}"),
            progress.TimeRemainingColumn(compact=True),
            progress.TextColumn("{task.description}", markup=False),
        )
        console = RichConsole(stderr=True, no_color=not self.color, highlight=False)
        with progress.Progress(*columns, console=console, transient=True, redirect_stdout=False) as self._bar:
            self._task = self._bar.add_task("", total=self._total, rate="")
            try:
                yield
            finally:
                self._bar, bar = None, self._bar
                bar.refresh()

    def _tick(self, over: threading.Event, pulse: Callable[[], str]) -> None:
        """Show how things stand, until it is `over`."""
        said = started = time.monotonic()
        while not over.wait(LOOK_EVERY):
            now = time.monotonic()
            standing = ", ".join(part for part in (self._standing, pulse()) if part)
            if self._bar is not None:
                rate = f"{self._done / (now - started):.2g} images/s" if self._done else ""
                self._bar.update(self._task, completed=self._done, total=self._total, description=standing, rate=rate)
            elif now - said >= STATUS_EVERY:
                said = now
                of = "" if self._total is None else f" of {self._total}"
                self.say(f"{self._done}{of} images, {standing}")

    def advance(self, done: int, text: str) -> None:
        """`done` images are done; `text` says how things stand."""
        self._done, self._standing = done, text

    def table(self, title: str, columns: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
        """A small table at the end of a run; its title alone where there are no rows or machines read."""
        if not rows or self.log_format == "json":
            self.say(title)
        if not rows or self.log_format == "json" or self.verbosity < 0:
            return
        from rich.box import SIMPLE
        from rich.console import Console as RichConsole
        from rich.table import Table
        from rich.text import Text

        table = Table(
            title=Text(printable(title)), title_justify="left", title_style="bold", box=SIMPLE, pad_edge=False
        )
        for i, column in enumerate(columns):
            words = " ".join((column, *(row[i] for row in rows))).split()
            longest = max(len(printable(word)) for word in words)
            table.add_column(Text(column), justify="left" if i in (0, 5, 6) else "right", min_width=longest)
        for row in rows:
            table.add_row(*(Text(printable(cell)) for cell in row))
        with contextlib.suppress(OSError, ValueError):
            screen = RichConsole(stderr=True, no_color=not self.color, highlight=False)
            # A log has no width: nothing is broken there. On a terminal cells break between words.
            if not screen.is_terminal:
                screen.width = 10_000
            screen.print(table)


@contextlib.contextmanager
def _nothing() -> Iterator[None]:
    yield
