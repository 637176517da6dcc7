"""Folders that one run holds at a time, and files in them that are whole or not there."""

from __future__ import annotations

import errno
import filecmp
import os
import re
import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from detxai.errors import ImageError, OutputError
from detxai.output.bucket import Place

LOCK = ".detxai.lock"
#: Names of temporaries: only detxai uses such, so what a killed run left can be removed.
TEMPORARY = re.compile(r"\.detxai-[0-9a-f]{16}\.tmp")

_BAD_NAME = {errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.EILSEQ, errno.ELOOP}
_NOT_WRITABLE = {errno.EACCES, errno.EPERM, errno.EROFS}
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@contextmanager
def temporary(folder: Path, chunks: Iterable[bytes]) -> Iterator[Path]:
    """A synced file of `chunks` in `folder`, gone afterwards unless renamed. Raises OSError."""
    file = folder / f".detxai-{secrets.token_hex(8)}.tmp"
    try:
        with open(file, "xb") as stream:
            stream.writelines(chunks)
            stream.flush()
            os.fsync(stream.fileno())
        yield file
    finally:
        file.unlink(missing_ok=True)


def replace(file: Place, chunks: Iterable[bytes]) -> None:
    """Replace `file` at once; one that holds these bytes already is left alone, but for an object. Raises OSError."""
    if not isinstance(file, Path):
        file.put(chunks)
        return
    with temporary(file.parent, chunks) as written:
        same = file.is_file() and not file.is_symlink()
        if not (same and filecmp.cmp(written, file, shallow=False)):
            os.replace(written, file)


def write_file(file: Path, content: bytes) -> None:
    """Write a file that is no part of a tree, whole or not at all. Raises OutputError."""
    with explained(file.parent):
        file.parent.mkdir(parents=True, exist_ok=True)
        replace(file, [content])


def require_writable(folder: Path) -> None:
    """Make `folder` and raise OutputError where nothing can be written to it."""
    with explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with temporary(folder, [b"probe"]):
            pass


@contextmanager
def held(folder: Path, timeout: float = 0) -> Iterator[None]:
    """`folder`, made and writable, for this process alone; waits `timeout` seconds for another. Raises OutputError."""
    with explained(folder):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise OutputError(
                f"The output {folder} cannot be a folder: a file is in the way.", "Choose another with -o."
            ) from error
        lock = FileLock(folder / LOCK, timeout=timeout)
        try:
            lock.acquire()
        except Timeout as error:
            raise OutputError(
                f"Another run is writing to {folder}.",
                "Wait for it (--lock-timeout SECONDS) or choose another folder with -o.",
            ) from error
    try:
        require_writable(folder)
        yield
    finally:
        with suppress(OSError):  # a network's file system may refuse (ENOLCK); the lock goes with the process
            lock.release()


@contextmanager
def explained(folder: Place, path: str = "") -> Iterator[None]:
    """Turn the errors of the file system into what a user can act upon: OutputError about `folder`.

    ImageError `bad_path` where the name of the image `path` is the reason.
    """
    try:
        yield
    except (OSError, UnicodeEncodeError) as error:
        code = error.errno if isinstance(error, OSError) else errno.EILSEQ
        reason = os.strerror(code) if code else str(error)
        if path and code in _BAD_NAME:
            raise ImageError("bad_path", f"no usable name in the output: {reason}") from error
        if code in _FULL:
            message = f"No space is left for the output {folder}."
            hint = "Make room and run the same command again: finished images stay finished."
        elif code in _NOT_WRITABLE:
            message = f"The output {folder} is not writable: {reason}."
            hint = "Choose another folder with -o, or change its permissions."
        else:
            message = f"Cannot write the output {folder}: {reason}."
            hint = "Check the disk, then run the same command again."
        raise OutputError(message, hint) from error
