"""Folders and globs as images, in a stable order; what detxai itself has written is passed over."""

from __future__ import annotations

import os
import re
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

from detxai.inputs.naming import printable
from detxai.values import ImageRef
from detxai.vocabulary import RECORD_SCHEMA

_IMAGES = "jpg jpeg jpe jfif png webp bmp dib tif tiff gif avif mpo jp2 j2k j2c jpx ppm pgm pnm"
# Read with an extra, and without it failed records that name it: a dump of scans may consist of them.
_SCANS = "dcm dicom dcs dicos heic heif"
IMAGE_SUFFIXES = frozenset(f".{name}" for name in f"{_IMAGES} {_SCANS}".split())
MAGIC = re.compile(r"[*?\[]")
_PICTURE = re.compile(r"(.+)\.d\d{2,}\..+", re.DOTALL)
_RECORD_START = f'{{"schema":"{RECORD_SCHEMA.partition("/")[0]}/'.encode()


def written_by_us(name: str, folder: Path, names: Container[str] | None = None, *, in_output: bool = False) -> bool:
    """Whether the picture `name` in `folder` is one that detxai made of another: that one's record lies beside it.

    `names`: what lies in the folder. `in_output`: the folder is in the output tree; there pictures of an image beside
    them count without a record as well, since a run that was killed had not written it yet.
    """
    stem, _ = os.path.splitext(name)
    match = _PICTURE.fullmatch(stem)
    for image in dict.fromkeys([match[1] if match else stem, stem]):
        record = f"{image}.json"
        if (names is None or record in names) and _is_record(folder / record):
            return True
        shown = match is not None or os.path.splitext(image)[1].lower() in IMAGE_SUFFIXES
        if in_output and shown and names is not None and image in names:
            return True
    return False


def _is_record(file: Path) -> bool:
    try:
        if not file.is_file():
            return False
        with file.open("rb") as stream:
            return stream.read(len(_RECORD_START)) == _RECORD_START
    except OSError:
        return False


@dataclass
class Walk:
    """The images below `root` that match `pattern` (() for all), as paths that start with `prefix`.

    `output`: the output tree. What was passed over, by path: `ignored` are no images, `own` are pictures of ours.
    """

    root: str
    pattern: tuple[str, ...]
    prefix: str
    output: Path | None
    ignored: list[str] = field(default_factory=list)
    own: list[str] = field(default_factory=list)

    def __iter__(self) -> Iterator[ImageRef]:
        """Sorted by path; one folder in memory at a time. Links are followed, each folder is entered once.

        An unreadable folder is a failed record.
        """
        if self.pattern and not os.path.isdir(self.root):
            return
        entered: set[tuple[int, int]] = set()
        pending = [""]  # relative paths, those of folders end in "/": so they sort as whole paths do
        while pending:
            relative = pending.pop()
            file = Path(self.root, relative)
            if relative and not relative.endswith("/"):
                yield ImageRef(self.prefix + printable(relative), file)
                continue
            try:
                status = file.stat()
                seen = (status.st_dev, status.st_ino) in entered
                if seen or (relative and self._is_output(file)):
                    continue
                entered.add((status.st_dev, status.st_ino))
                pending += sorted(self._children(relative, file), reverse=True)
            except OSError as error:
                path = printable(relative.rstrip("/") or os.path.basename(os.path.abspath(self.root)))
                yield ImageRef(self.prefix + path, file, f"the folder cannot be read: {error.strerror}")

    def _is_output(self, folder: Path) -> bool:
        return self.output is not None and os.path.realpath(self.output) == os.path.realpath(folder)

    def _in_output(self, folder: Path) -> bool:
        return self.output is not None and Path(os.path.realpath(folder)).is_relative_to(os.path.realpath(self.output))

    def _children(self, relative: str, folder: Path) -> Iterator[str]:
        """Folders and images in a folder, as relative paths."""
        # A glob that names a suffix means it, known or not.
        known_only = not self.pattern or bool(MAGIC.search(os.path.splitext(self.pattern[-1])[1] or "*"))
        depth = len(self.pattern) if self.pattern and "**" not in self.pattern else None
        with os.scandir(folder) as entries:
            listed = {entry.name: entry for entry in entries}
        in_output = self._in_output(folder)
        for name, entry in listed.items():
            if name.startswith("."):
                continue
            path = relative + name
            linked = entry.is_symlink() and os.path.isdir(entry.path)
            if linked or entry.is_dir(follow_symlinks=False):
                if depth is None or path.count("/") + 1 < depth:
                    yield path + "/"
            elif not self.pattern or _matches(path.split("/"), self.pattern):
                if known_only and os.path.splitext(path)[1].lower() not in IMAGE_SUFFIXES:
                    self.ignored.append(self.prefix + printable(path))
                elif written_by_us(name, folder, listed, in_output=in_output):
                    self.own.append(self.prefix + printable(path))
                else:
                    yield path


def _matches(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    """Whether the components of a path match those of a glob; `**` is any number of folders."""
    if not pattern or not parts:
        return not pattern and not parts
    if pattern[0] == "**":
        rest = pattern[1:] or ["*"]
        return any(_matches(parts[n:], rest) for n in range(len(parts)))
    return fnmatchcase(parts[0], pattern[0]) and _matches(parts[1:], pattern[1:])
