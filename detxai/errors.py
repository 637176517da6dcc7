"""Exit codes and the error tree: every failure a user can meet has a code, a sentence and a way on."""

from __future__ import annotations

import errno
import re
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum
from pathlib import Path


class ExitCode(IntEnum):
    """Process exit codes of every command (see the README's table)."""

    OK = 0
    BUG = 1
    USAGE = 2
    SOME_FAILED = 3
    NO_INPUT = 4
    MODEL = 5
    OUTPUT = 6
    DEVICE = 7
    OUT_OF_TIME = 8
    GATE = 10
    INTERRUPTED = 130
    READER_GONE = 141
    TERMINATED = 143


#: Where several codes hold, the first in this order wins.
PRECEDENCE = (1, 7, 6, 5, 2, 143, 130, 141, 8, 3, 10, 4, 0)


def worst(codes: set[ExitCode]) -> ExitCode:
    """The code that wins among `codes` (`OK` for none)."""
    return min(codes, key=lambda code: PRECEDENCE.index(code), default=ExitCode.OK)


class DetxaiError(Exception):
    """A failure with a sentence for the user; `hint` is the next thing to type or check."""

    exit_code = ExitCode.BUG

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(f"{message} {hint}".strip())
        self.message, self.hint = message, hint


class UsageError(DetxaiError):
    """Wrong option, unknown config key, impossible combination."""

    exit_code = ExitCode.USAGE


class NoInputError(DetxaiError):
    """Nothing to work on: empty folder, glob without a match."""

    exit_code = ExitCode.NO_INPUT


class ModelError(DetxaiError):
    """The model is missing, refused or cannot be explained."""

    exit_code = ExitCode.MODEL


class OutputError(DetxaiError):
    """The output tree cannot be written, is full, or is locked by another run."""

    exit_code = ExitCode.OUTPUT


class DeviceError(DetxaiError):
    """The device was lost, or what is judged does not fit into its memory."""

    exit_code = ExitCode.DEVICE


class ImageError(DetxaiError):
    """One image cannot be used; the run goes on. `code` goes into its record.

    Codes: `not_found`, `unreadable`, `empty_file`, `not_an_image`, `unsupported`, `truncated`,
    `too_large`, `bad_path`, `unpaired`, `baseline`, `labels`, `predictions`, `not_finite`, `impossible`,
    `memory`, `internal`.
    What is known of the picture all the same goes there too: `sha256` of its bytes, `size` (width, height).
    """

    exit_code = ExitCode.SOME_FAILED

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.sha256: str | None = None
        self.size: tuple[int | None, int | None] = (None, None)


#: What torch, oneDNN, Python and the kernel say where the system gives no memory or no thread.
_NO_MEMORY = re.compile(
    "could not create a (primitive|memory)|failed to map segment|can't start new thread|(can't|cannot) allocate memory"
    "|not enough memory|out of memory",
    re.IGNORECASE,
)


def memory_refused(error: BaseException | None) -> bool:
    """Whether `error` says that the system gives no memory, or no thread."""
    number = getattr(error, "errno", None)
    return isinstance(error, MemoryError) or number == errno.ENOMEM or bool(_NO_MEMORY.search(str(error)))


def no_memory(error: BaseException) -> DeviceError:
    """What an `error` of which `memory_refused` holds is to the user."""
    said = (str(error).strip() or type(error).__name__).splitlines()[0]
    if "thread" in said:
        return DeviceError(f"The system refused a thread: {said}.", "Raise the limit of this user (ulimit -u).")
    return DeviceError(f"The system refused memory: {said}.", "Make room (see ulimit -v), or try a smaller --memory.")


def missing_package(error: BaseException) -> UsageError | None:
    """What an `error` is to the user that says that a package is missing or broken here; None for any other."""
    if not isinstance(error, ImportError) or (error.name or "detxai").partition(".")[0] == "detxai":
        return None
    said = f"detxai needs a package that cannot be imported: {error}."
    checkout = Path(__file__).parents[1]
    package = str(checkout) if (checkout / "pyproject.toml").is_file() else "detxai"
    install = shlex.join([sys.executable, "-m", "pip", "install", package])
    return UsageError(said, f"Install it with all that it needs: {install}")


@contextmanager
def sound_if_it_had_room() -> Iterator[None]:
    """Within, a model that failed because the system refused memory is a DeviceError, not a broken model."""
    try:
        yield
    except ModelError as error:
        if error.__cause__ is not None and memory_refused(error.__cause__):
            raise no_memory(error.__cause__) from error
        raise
