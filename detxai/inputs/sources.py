"""What the user names, as images to work on: files, folders, globs, paths on stdin; shards of them.

Everything is checked at once but walked lazily: the first image comes before the last is known.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from detxai.errors import UsageError
from detxai.values import ImageRef

_IMAGES = "jpg jpeg jpe jfif png webp bmp dib tif tiff gif avif mpo jp2 ppm pgm pnm"
# Not read yet, but never passed over in silence: a dump of scans may consist of them.
_SCANS = "dcm dicom"
IMAGE_SUFFIXES = frozenset(f".{name}" for name in f"{_IMAGES} {_SCANS}".split())
#: Longer components are cut: file systems stop at 255 bytes, and the pictures' names add to them.
MAX_COMPONENT = 180
STDIN_NAME = "stdin"
_MAGIC = re.compile(r"[*?\[]")

Shard = tuple[int, int]


@dataclass
class Found:
    """Images in a stable order, each `path` once; iterate `refs` once, then the counts are final.

    `ignored`: files in folders that are no images (of this shard); `total`: images of all shards.
    """

    refs: Iterable[ImageRef] = ()
    ignored: int = 0
    total: int = 0
    shard: Shard | None = field(default=None, repr=False)

    def mine(self, path: str) -> bool:
        """Whether `path` belongs to this shard."""
        if self.shard is None:
            return True
        return int(_digest(path)[:16], 16) % self.shard[1] == self.shard[0] - 1


def parse_shard(text: str) -> Shard:
    """(i, n) of `i/n`, 1 <= i <= n; UsageError for anything else."""
    match = re.fullmatch(r"\s*(\d{1,9})\s*/\s*(\d{1,9})\s*", text)
    if match and 1 <= int(match[1]) <= int(match[2]):
        return int(match[1]), int(match[2])
    raise UsageError(f"--shard {text!r} is not a shard.", "Write i/n with 1 <= i <= n, as 2/8.")


def find(
    sources: Sequence[str],
    stdin: BinaryIO | None = None,
    null: bool = False,
    shard: Shard | None = None,
    exclude: Path | None = None,
) -> Found:
    """The images of `sources`, in their order, folders sorted by path.

    `stdin` is read for the source `-`, a path a line (`null`: NUL-separated), as the lines come.
    The folder `exclude` (the output tree) is left out. Raises UsageError for a source that does
    not exist; finding nothing is no error here (see `Found.total`).
    """
    if not sources:
        raise UsageError("No SOURCE was given.", "Name a file, a folder, a quoted glob or '-'.")
    found = Found(shard=shard)
    # The same source twice is one source; what remains decides about prefixes.
    distinct = {text if text == "-" else os.path.abspath(text): text for text in sources}
    taken = {"summary"}  # the record of an image of this name would be the tree's own summary.json
    streams: list[Iterable[ImageRef]] = []
    for source in distinct.values():
        if source != "-" and os.path.exists(source) and not os.path.isdir(source):
            name = _printable(os.path.basename(source))
            streams.append([ImageRef(_unused(*os.path.splitext(name), taken), Path(source))])
            continue
        root, pattern = _root(source, stdin)
        name = _printable(os.path.basename(os.path.abspath(root))) or "root"
        prefix = "" if len(distinct) == 1 else _unused(name, "", taken) + "/"
        if stdin is not None and source == "-":
            streams.append(_piped(stdin, b"\0" if null else b"\n", prefix))
        else:
            streams.append(_walk(root, pattern, prefix, found, exclude))
    found.refs = _counted(streams, found)
    return found


def _root(source: str, stdin: BinaryIO | None) -> tuple[str, tuple[str, ...]]:
    """The folder of a source and the glob below it, () for all; UsageError if it does not exist."""
    if source == "-":
        if stdin is None:
            raise UsageError("SOURCE '-' needs paths on stdin.", "Try: find DIR | detxai explain -")
        return STDIN_NAME, ()
    if os.path.isdir(source):
        return source, ()
    parts = Path(source).parts
    fixed = next((n for n, part in enumerate(parts) if _MAGIC.search(part)), None)
    if fixed is None:
        raise UsageError(f"SOURCE {source!r} does not exist.", "Check the spelling; quote a glob.")
    return str(Path(*parts[:fixed])), parts[fixed:]


def _counted(streams: Iterable[Iterable[ImageRef]], found: Found) -> Iterator[ImageRef]:
    for stream in streams:
        for ref in stream:
            found.total += 1
            if found.mine(ref.path):
                yield ref


def _walk(root: str, pattern: tuple[str, ...], prefix: str, found: Found, exclude: Path | None) -> Iterator[ImageRef]:
    """The images below `root` that match `pattern`, sorted by path; one folder in memory at a time.

    Links are followed, each folder is entered once. An unreadable folder is a failed record.
    """
    if pattern and not os.path.isdir(root):
        return
    # A glob that names a suffix means it, known or not.
    known_only = not pattern or bool(_MAGIC.search(os.path.splitext(pattern[-1])[1] or "*"))
    depth = len(pattern) if pattern and "**" not in pattern else None
    output = exclude and os.path.realpath(exclude)
    entered: set[tuple[int, int]] = set()
    pending = [""]  # relative paths, those of folders end in "/": so they sort as whole paths do
    while pending:
        relative = pending.pop()
        file = Path(root, relative)
        if relative and not relative.endswith("/"):
            yield ImageRef(prefix + _printable(relative), file)
            continue
        try:
            status = file.stat()
            seen = (status.st_dev, status.st_ino) in entered
            if seen or (relative and output == os.path.realpath(file)):
                continue
            entered.add((status.st_dev, status.st_ino))
            children = []
            with os.scandir(file) as entries:
                for entry in entries:
                    if entry.name.startswith("."):
                        continue
                    path = relative + entry.name
                    linked = entry.is_symlink() and os.path.isdir(entry.path)
                    if linked or entry.is_dir(follow_symlinks=False):
                        if depth is None or path.count("/") + 1 < depth:
                            children.append(path + "/")
                    elif not pattern or _matches(path.split("/"), pattern):
                        suffix = os.path.splitext(path)[1].lower()
                        if suffix in IMAGE_SUFFIXES or not known_only:
                            children.append(path)
                        else:
                            found.ignored += found.mine(prefix + _printable(path))
            pending += sorted(children, reverse=True)
        except OSError as error:
            path = _printable(relative.rstrip("/") or os.path.basename(os.path.abspath(root)))
            problem = f"the folder cannot be read: {error.strerror}"
            yield ImageRef(prefix + path, file, problem)


def _matches(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    """Whether the components of a path match those of a glob; `**` is any number of folders."""
    if not pattern or not parts:
        return not pattern and not parts
    if pattern[0] == "**":
        rest = pattern[1:] or ["*"]
        return any(_matches(parts[n:], rest) for n in range(len(parts)))
    return fnmatchcase(parts[0], pattern[0]) and _matches(parts[1:], pattern[1:])


def _piped(stream: BinaryIO, separator: bytes, prefix: str) -> Iterator[ImageRef]:
    """The paths on `stream`, each as soon as it is there and once."""
    given: set[str] = set()
    for line in _split(stream, separator):
        text = os.fsdecode(line if separator == b"\0" else line.rstrip(b"\r"))
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
            path = _marked("/".join(parts), name)
        yield ImageRef(prefix + _printable(path), Path(name), problem)


def _split(stream: BinaryIO, separator: bytes) -> Iterator[bytes]:
    # read1 returns what a pipe holds now; read would wait for a full buffer.
    read = getattr(stream, "read1", stream.read)
    rest = b""
    while chunk := read(1 << 16):
        *whole, rest = (rest + chunk).split(separator)
        yield from whole
    yield rest


def _printable(path: str) -> str:
    """`path` without control characters, undecodable bytes and overlong components; injective."""
    lengths = map(len, path.encode(errors="surrogatepass").split(b"/"))
    if path.isprintable() and "\\" not in path and max(lengths) <= MAX_COMPONENT:
        return path
    odd = {"Cc", "Cs", "Zl", "Zp"}
    escaped = "".join(
        char.encode("unicode_escape").decode() if char == "\\" or unicodedata.category(char) in odd else char
        for char in path
    )
    parts = escaped.split("/")
    return "/".join(p if len(p.encode()) <= MAX_COMPONENT else _marked(p, p) for p in parts)


def _marked(path: str, key: str) -> str:
    """`path` with a hash of `key` before its suffix, its last component short enough."""
    folder, slash, name = path.rpartition("/")
    stem, suffix = os.path.splitext(name)
    stem = stem.encode(errors="surrogatepass")[: MAX_COMPONENT - 40].decode(errors="ignore")
    return f"{folder}{slash}{stem}~{_digest(key)[:8]}{suffix if len(suffix) < 8 else ''}"


def _unused(stem: str, suffix: str, taken: set[str]) -> str:
    """`stem` + `suffix`, or `stem-2` and so on where it is taken; taken from now on."""
    numbered = (f"{stem}-{n}" if n > 1 else stem for n in itertools.count(1))
    name = next(name + suffix for name in numbered if name + suffix not in taken)
    taken.add(name)
    return name


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()
