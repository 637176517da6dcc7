"""What the user names, as images to work on: files, folders, globs, paths on stdin; shards of them.

Everything is checked at once but walked lazily: the first image comes before the last is known.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from typing import BinaryIO

from detxai.errors import NoInputError, UsageError
from detxai.inputs import pairs
from detxai.inputs.folders import IMAGE_SUFFIXES, MAGIC, Walk, written_by_us
from detxai.inputs.naming import digest, printable, unused
from detxai.inputs.piped import piped
from detxai.inputs.remote import REMOTE, Objects
from detxai.text import without_secrets
from detxai.values import ImageRef

__all__ = ["IMAGE_SUFFIXES", "STDIN_NAME", "ImageSource", "Shard", "find"]

STDIN_NAME = "stdin"
_URL = re.compile(r"[a-z][a-z0-9+.-]+://", re.IGNORECASE)
_ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".7z", ".rar")

#: So many ignored files are named at the end of a run.
NAMED = 5

Shard = tuple[int, int]


@dataclass
class ImageSource:
    """Images in a stable order, each `path` once; iterate `refs` once, then the counts are final.

    `ignored`: files in folders that are no images (of this shard), `named`: the first of them; `own`: pictures that
    detxai had made; `total`: images of all shards. `count` walks once more, for the number of images of this shard;
    None where paths come on stdin.
    """

    refs: Iterable[ImageRef] = ()
    ignored: int = 0
    named: list[str] = field(default_factory=list)
    own: int = 0
    total: int = 0
    shard: Shard | None = field(default=None, repr=False)
    count: Callable[[], int] | None = field(default=None, repr=False)

    def require_some(self) -> None:
        """Look for the first of `refs`. Raises NoInputError where there is no image in any shard."""
        refs = iter(self.refs)
        first = next(refs, None)
        if first is None and not self.total:
            raise NoInputError(
                f"No image was found ({self.ignored} other files).",
                "Give a folder with images, or a quoted glob that matches.",
            )
        self.refs = chain(() if first is None else (first,), refs)

    def mine(self, path: str) -> bool:
        """Whether `path` belongs to this shard."""
        if self.shard is None:
            return True
        return int(digest(path)[:16], 16) % self.shard[1] == self.shard[0] - 1


def find(
    sources: Sequence[str],
    stdin: BinaryIO | None = None,
    *,
    null: bool = False,
    shard: Shard | None = None,
    exclude: Path | str | None = None,
    frames: str = "first",
    pair: tuple[str, str, str] | None = None,
    views: tuple[str, str] | None = None,
) -> ImageSource:
    """The images of `sources`, in their order, folders sorted by path.

    `frames`: `all` makes an image of each picture of a file that holds several, `first` of the first alone.
    `pair`: (LOW, HIGH, colours) makes one image of two files, see `pairs.paired`; `views`: names of
    two views of one bag, see `pairs.viewed`.
    `stdin` is read for the source `-`, a path a line (`null`: NUL-separated), as the lines come.
    The folder `exclude` (the output tree) is left out, and so are pictures that lie beside the record of the image
    they were made of. Raises UsageError for a source that does not exist, and for one with the address `exclude` in
    it; finding nothing is no error here (see `ImageSource.total`).
    """
    if not sources:
        raise UsageError("No SOURCE was given.", "Name a file, a folder, a quoted glob or '-'.")
    listed = ImageSource(shard=shard)
    # The same source twice is one source; what remains decides about prefixes.
    distinct = {text if text == "-" else os.path.abspath(text): text for text in sources}
    taken = {"summary"}  # the record of an image of this name would be the tree's own summary.json
    streams: list[Iterable[ImageRef]] = []
    for source in distinct.values():
        if source != "-" and os.path.exists(source) and not os.path.isdir(source):
            _refuse_archive(source)
            name = printable(os.path.basename(source))
            streams.append([ImageRef(unused(*os.path.splitext(name), taken), Path(source))])
            continue
        if REMOTE.fullmatch(source):
            streams.append(_objects(source, alone=len(distinct) == 1, taken=taken, pair=pair, exclude=exclude))
            continue
        root, pattern = _root(source, stdin)
        name = printable(os.path.basename(os.path.abspath(root))) or "root"
        prefix = "" if len(distinct) == 1 else unused(name, "", taken) + "/"
        if stdin is not None and source == "-":
            streams.append(piped(stdin, b"\0" if null else b"\n", prefix))
        else:
            streams.append(Walk(root, pattern, prefix, exclude if isinstance(exclude, Path) else None))
    listed.refs = _pictures(_counted(streams, listed), frames, pair)
    if views is not None:
        listed.refs = pairs.viewed(listed.refs, views)
    if "-" not in distinct:
        listed.count = partial(_count, sources, shard, exclude, frames, pair)
    return listed


def _objects(url: str, *, alone: bool, taken: set[str], pair: object, exclude: Path | str | None) -> Objects:
    """The images of an object store. Raises UsageError."""
    if isinstance(exclude, str) and f"{exclude}/".startswith(f"{url.rstrip('/')}/"):
        raise UsageError(f"The output {exclude} lies in SOURCE {url}.", "Choose another with -o, beside the images.")
    if pair is not None:
        raise UsageError("--pair reads files only.", f"Copy {url} here first, then name the folder.")
    name = printable(url.rstrip("/").rpartition("/")[2])
    return Objects(url, "" if alone else unused(name, "", taken) + "/")


def _count(
    sources: Sequence[str],
    shard: Shard | None,
    exclude: Path | str | None,
    frames: str,
    pair: tuple[str, str, str] | None,
) -> int:
    return sum(1 for _ in find(sources, shard=shard, exclude=exclude, frames=frames, pair=pair).refs)


def _pictures(refs: Iterable[ImageRef], frames: str, pair: tuple[str, str, str] | None) -> Iterable[ImageRef]:
    """The pictures in the files of `refs`. Raises UsageError for both at once."""
    if pair is not None and frames == "all":
        raise UsageError("--pair and --frames all exclude each other.", "Leave one of them out.")
    if pair is not None:
        return pairs.paired(refs, *pair)
    if frames == "all":
        from detxai.inputs import decode
        from detxai.inputs.frames import expanded

        return expanded(refs, decode.pictures)
    return refs


def _refuse_archive(source: str) -> None:
    if source.lower().endswith(_ARCHIVES):
        raise UsageError(
            f"SOURCE {source!r} is an archive, and detxai reads files and folders only.",
            "Unpack it, then name the folder.",
        )


def _root(source: str, stdin: BinaryIO | None) -> tuple[str, tuple[str, ...]]:
    """The folder of a source and the glob below it, () for all; UsageError if it does not exist."""
    if source == "-":
        if stdin is None:
            raise UsageError("SOURCE '-' needs paths on stdin.", "Try: find DIR | detxai explain -")
        return STDIN_NAME, ()
    if os.path.isdir(source):
        return source, ()
    if _URL.match(source):
        raise UsageError(
            f"SOURCE {without_secrets(source)!r} is a URL, and detxai reads s3://, gs:// and az:// only, without"
            " credentials.",
            "Copy it here first, then name the file or folder.",
        )
    parts = Path(source).parts
    fixed = next((n for n, part in enumerate(parts) if MAGIC.search(part)), None)
    if fixed is None:
        shown = source if len(source) <= 200 else f"{source[:200]}…"
        raise UsageError(f"SOURCE {shown!r} does not exist.", "Check the spelling; quote a glob.")
    return str(Path(*parts[:fixed])), parts[fixed:]


def _counted(streams: Iterable[Iterable[ImageRef]], source: ImageSource) -> Iterator[ImageRef]:
    for stream in streams:
        for ref in stream:
            # A folder's own pictures are known by what lies in it; those named one by one are looked up here.
            if (
                not isinstance(stream, Walk | Objects)
                and not ref.problem
                and written_by_us(ref.file.name, ref.file.parent)
            ):
                source.own += 1
                continue
            source.total += 1
            if source.mine(ref.path):
                yield ref
        if isinstance(stream, Walk | Objects):
            ignored = [path for path in stream.ignored if source.mine(path)]
            source.ignored += len(ignored)
            source.named += ignored[: NAMED - len(source.named)]
            source.own += sum(map(source.mine, stream.own))
