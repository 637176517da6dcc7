"""Paths on stdin as images, each as soon as it is there."""

from __future__ import annotations

import codecs
import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from detxai.errors import UsageError
from detxai.inputs.naming import marked, printable
from detxai.values import ImageRef

_BOMS = {codecs.BOM_UTF8: "utf-8", codecs.BOM_UTF16_LE: "utf-16-le", codecs.BOM_UTF16_BE: "utf-16-be"}


def piped(stream: BinaryIO, separator: bytes, prefix: str) -> Iterator[ImageRef]:
    """The paths on `stream`, each once. Raises UsageError where it cannot be read."""
    given: set[str] = set()
    for line in _split(stream, separator):
        text = os.fsdecode(line) if separator == b"\0" else _bare(os.fsdecode(line.rstrip(b"\r")))
        name = re.sub("^/+", "/", str(PurePosixPath(text)))
        if not text or name in given:
            continue
        given.add(name)
        path, problem = name.lstrip("/"), None
        if ".." in path.split("/"):
            problem = "a path with '..' could leave the output tree; give it without"
        elif "\0" in path:
            problem = "a path with a NUL byte; use -0 for NUL-separated paths"
        elif path in ("", "."):
            problem = "this names a folder, not an image"
        # /a.jpg and a.jpg are two files that want one path.
        twin = path if name.startswith("/") else "/" + path
        if problem or twin in given or path == "summary":
            parts = ("__" if part in ("..", ".", "") else part for part in path.split("/"))
            path = marked("/".join(parts), name)
        yield ImageRef(prefix + printable(path), Path(name), problem)


def _bare(text: str) -> str:
    """A path without the quotes that spreadsheets and some shells put around it, where no file has them in its name."""
    quoted = len(text) > 2 and text[0] == text[-1] and text[0] in "\"'"
    return text[1:-1] if quoted and not os.path.lexists(text) else text


def _split(stream: BinaryIO, separator: bytes) -> Iterator[bytes]:
    rest = b""
    for chunk in _decoded(stream):
        *whole, rest = (rest + chunk).split(separator)
        yield from whole
    yield rest


def _decoded(stream: BinaryIO) -> Iterator[bytes]:
    """What comes on `stream` as it comes, in UTF-8 where a byte order mark says that it is not."""
    chunks = _chunks(stream)
    head = b""
    while len(head) < len(codecs.BOM_UTF8) and (chunk := next(chunks, b"")):
        head += chunk
    mark = next((mark for mark in _BOMS if head.startswith(mark)), b"")
    if _BOMS.get(mark, "utf-8") == "utf-8":
        yield head.removeprefix(mark)
        yield from chunks
        return
    decoder = codecs.getincrementaldecoder(_BOMS[mark])("replace")
    yield decoder.decode(head.removeprefix(mark)).encode()
    for chunk in chunks:
        yield decoder.decode(chunk).encode()


def _chunks(stream: BinaryIO) -> Iterator[bytes]:
    # read1 returns what a pipe holds now; read would wait for a full buffer.
    read = getattr(stream, "read1", stream.read)
    try:
        while chunk := read(1 << 16):
            yield chunk
    except OSError as error:
        raise UsageError(f"stdin cannot be read: {error.strerror}.", "Try: find DIR | detxai explain -") from error
