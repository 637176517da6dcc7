"""The standard streams: talking never stops the work; what is asked for on stdout comes whole, or is an error."""

from __future__ import annotations

import contextlib
import io
import os
import select
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, BinaryIO

from detxai.errors import OutputError


class ReaderGone(Exception):
    """Whoever read our stdout closed it."""


class _Talk(io.FileIO):
    """stderr: what cannot be said (a full log disk, a closed terminal) is lost, and nothing else is."""

    def write(self, data: Any) -> int:
        with contextlib.suppress(OSError):
            return super().write(data) or 0
        return len(data)


class _Asked(io.FileIO):
    """stdout: the first failure is raised; what is left in buffers is dropped after that."""

    broken = False

    def write(self, data: Any) -> int:
        if self.broken:
            return len(data)
        try:
            return super().write(data) or 0
        except BrokenPipeError:
            self.broken = True
            raise ReaderGone from None
        except OSError as error:
            self.broken = True
            raise OutputError(f"stdout cannot be written: {error.strerror}.", "Check where it goes.") from error


def install() -> None:
    """Give the process streams that behave as said here, and its three file descriptors to nobody else.

    A closed descriptor would go to the next file that is opened, and then take what belongs on a stream. A closed
    stdout fails when it is written to; a closed stdin is empty.
    """
    for number, mode in ((0, os.O_RDONLY), (1, os.O_RDONLY), (2, os.O_WRONLY)):
        try:
            os.fstat(number)
        except OSError:
            null = os.open(os.devnull, mode)  # the lowest that is free: as a rule `number` itself
            os.dup2(null, number)
            if null != number:
                os.close(null)
    sys.stdin = sys.stdin or os.fdopen(0)
    encoding = {f: getattr(f, "encoding", "utf-8") for f in (sys.stdout, sys.stderr)}
    sys.stdout, sys.stderr = (
        io.TextIOWrapper(
            io.BufferedWriter(raw),
            encoding=encoding[old],
            errors="backslashreplace",
            line_buffering=raw.fileno() == 2 or raw.isatty(),
        )
        for old, raw in ((sys.stdout, _Asked(1, "wb", closefd=False)), (sys.stderr, _Talk(2, "wb", closefd=False)))
    )


@contextlib.contextmanager
def guarded_stdout() -> Iterator[BinaryIO]:
    """The real stdout for records only; file descriptor 1 points to stderr meanwhile, whoever prints.

    Writing raises ReaderGone where the reader has gone away, OutputError where it fails otherwise.
    """
    sys.stdout.flush()
    real = os.dup(1)
    os.dup2(2, 1)
    try:
        with _Asked(real, "wb", closefd=False) as stream:
            yield stream
    finally:
        sys.stdout.flush()  # what others have printed and Python still holds
        os.dup2(real, 1)
        os.close(real)


class Lines:
    """Whole lines on a stream, now; after one that failed or was cut short, none.

    `held` keeps signals back: they come between lines, or while nobody reads.
    """

    def __init__(self, stream: BinaryIO, held: Callable[[], AbstractContextManager[None]]) -> None:
        self.stream, self.held, self.broken = stream, held, False
        self._last = b""

    def write(self, line: bytes) -> None:
        """Write a line, unless it is the last one again.

        Raises ReaderGone where the reader has closed the pipe, OutputError for a full disk.
        """
        rest = b"" if self.broken or line == self._last else line
        try:
            while rest:
                with self.held():
                    while rest and self._takes(0):
                        rest = rest[self.stream.write(rest[: select.PIPE_BUF]) :]
                    self._last = line if not rest else self._last
                if rest:
                    self._takes(None)
        except (ReaderGone, OutputError):
            self.broken = True
            raise
        finally:
            self.broken |= 0 < len(rest) < len(line)

    def _takes(self, seconds: float | None) -> bool:
        """Whether the stream takes PIPE_BUF bytes at once, within `seconds`."""
        return bool(select.select([], [self.stream], [], seconds)[1])
