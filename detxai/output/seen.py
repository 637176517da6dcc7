"""Size and time of the inputs that records were made of: `--skip by-stat` opens none that has both still.

A dot-file of the tree, a line an image, appended by who holds the tree's lock; what is lost of it is hashed again.
"""

from __future__ import annotations

import contextlib
import json
import os
import struct
import time
from pathlib import Path
from typing import BinaryIO

from detxai.output.bucket import Place
from detxai.output.records import Record
from detxai.values import ImageRef

FILE = ".detxai.seen"
#: Seconds within which a file system may give two changes one time: what is younger is not noted.
TICK = 2.0

#: Bytes, nanoseconds of the last change, and the SHA-256 that the file had then.
Entry = tuple[int, int, str]
#: An entry as it is kept: a million of them take 150 MB less than as numbers and text.
PACKED = struct.Struct("<Qq32s")


class Seen:
    """The index of the tree `output`; an object store has none, since nothing is appended to there."""

    def __init__(self, output: Place) -> None:
        self._file = output / FILE if isinstance(output, Path) else None
        self._entries: dict[str, bytes] = {}
        self._loaded = False
        self._begun: dict[str, tuple[int, int]] = {}
        self._stream: BinaryIO | None = None

    def load(self) -> None:
        """Read it; lines that are none, as after a kill, are passed over. The last one of an image counts."""
        self._loaded = True
        if self._file is None:
            return
        with contextlib.suppress(FileNotFoundError), self._file.open("rb") as stream:
            for line in stream:
                with contextlib.suppress(ValueError, TypeError, struct.error):
                    path, *entry = json.loads(line)
                    self._entries[path] = _packed(*entry)

    def entry(self, path: str) -> Entry | None:
        """What is known of the image `path`."""
        packed = self._entries.get(path)
        if packed is None:
            return None
        size, changed, sha256 = PACKED.unpack(packed)
        return size, changed, sha256.hex()

    def learn(self, path: str, entry: Entry | None) -> None:
        """Take the word of who has read the index."""
        if entry is not None:
            self._entries[path] = _packed(*entry)

    def forget(self, path: str) -> None:
        """Nothing is known of the image `path` any more."""
        self._entries.pop(path, None)
        self._begun.pop(path, None)

    def trusts(self, ref: ImageRef, sha256: str | None) -> bool:
        """Whether the file of `ref` has size and time still of when it had this `sha256`; it is not opened."""
        entry = self.entry(ref.path)
        return entry is not None and entry[2] == sha256 and _stat(ref) == entry[:2]

    def begin(self, ref: ImageRef) -> ImageRef:
        """Note size and time of an input before anybody reads it."""
        stat = None if self._file is None else _stat(ref)
        if stat is not None and time.time_ns() - stat[1] > TICK * 1e9:
            self._begun[ref.path] = stat
        return ref

    def finish(self, record: Record, *, skipped: bool) -> None:
        """Keep what was noted of the input of an image that is done, where it is not known. Raises OSError."""
        path, sha256 = record.image.path, record.image.sha256
        stat = self._begun.pop(path, None)
        if (
            self._file is None
            or stat is None
            or sha256 is None
            or record.status != "ok"
            or (skipped and not self._loaded)
        ):
            return
        entry = (*stat, sha256)
        if self.entry(path) != entry:
            if self._stream is None:
                self._stream = self._file.open("ab")
                self._stream.write(b"\n")  # the last line may have been cut short
            self._stream.write(json.dumps([path, *entry]).encode() + b"\n")

    def close(self) -> None:
        """All is written. Raises OSError."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None


def _packed(size: int, changed: int, sha256: str) -> bytes:
    """Raises ValueError, TypeError and struct.error for what is none."""
    return PACKED.pack(size, changed, bytes.fromhex(sha256))


def _stat(ref: ImageRef) -> tuple[int, int] | None:
    if ref.data is not None or ref.url is not None or ref.problem or ref.pair:  # two halves are hashed
        return None
    try:
        status = os.stat(ref.file)
    except (OSError, ValueError):
        return None
    return status.st_size, status.st_mtime_ns
