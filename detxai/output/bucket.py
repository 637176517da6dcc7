"""An output tree in an object store, by fsspec (extra `[remote]`): as much of `pathlib.Path` as a tree needs.

A put stands for a rename: an object is whole or not there, and replaced at once. What differs: no lock goes with a
process, so a mark tells runs that they are two; equal bytes are put again, since only reading could tell. Credentials
come from the environment, never from the address.
"""

from __future__ import annotations

import re
import secrets
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from detxai.errors import OutputError
from detxai.inputs.remote import store_of

MARK = ".detxai.writer"
#: Objects that are read at a time.
AT_ONCE = 32
_URL = re.compile(r"(s3|gs|az|memory)://")


@dataclass(frozen=True)
class Bucket:
    """A place at `url` in a store; `pathlib.Path`'s words mean what they mean there. All raise OutputError."""

    url: str
    _files: Any = field(repr=False)
    _path: str = field(repr=False)

    @classmethod
    def at(cls, url: str) -> Bucket:
        """The place of that address. Raises UsageError where a package for it is missing."""
        return cls(url.rstrip("/"), *store_of(url))

    def __str__(self) -> str:
        return self.url

    def __truediv__(self, name: str) -> Bucket:
        return Bucket(f"{self.url}/{name}", self._files, f"{self._path}/{name}")

    def joinpath(self, *names: str) -> Bucket:
        return self / "/".join(names)

    @property
    def name(self) -> str:
        return self._path.rpartition("/")[2]

    @property
    def parent(self) -> Bucket:
        return Bucket(self.url.rpartition("/")[0], self._files, self._path.rpartition("/")[0])

    def read_bytes(self) -> bytes:
        """Raises FileNotFoundError, too."""
        with self._told():
            content: bytes = self._files.cat_file(self._path)
            return content

    def stamp(self) -> str:
        """Which object this is; another one after it was put again. Raises FileNotFoundError, too."""
        with self._told():
            known = self._files.info(self._path)
            return repr(
                [known.get(key) for key in ("ETag", "etag", "LastModified", "last_modified", "mtime", "created")]
            )

    def is_file(self) -> bool:
        with suppress(FileNotFoundError), self._told():
            return bool(self._files.info(self._path)["type"] == "file")
        return False

    exists = is_file

    def is_dir(self) -> bool:
        """Never: an object and others below its name get along."""
        return False

    def unlink(self, *, missing_ok: bool = False) -> None:
        """Raises FileNotFoundError, too."""
        try:
            with self._told():
                self._files.rm_file(self._path)
        except FileNotFoundError:
            if not missing_ok:
                raise

    def put(self, chunks: Iterable[bytes]) -> None:
        """One object of `chunks`; those of a stream are all there before the put begins."""
        if isinstance(chunks, Sequence):
            with self._told(putting=True):
                self._files.pipe_file(self._path, b"".join(chunks))
            return
        with tempfile.NamedTemporaryFile() as spool:
            spool.writelines(chunks)
            spool.flush()
            with self._told(putting=True):
                self._files.put_file(spool.name, self._path)

    def glob(self, pattern: str) -> Iterator[Bucket]:
        """What lies here and is called so; `*` alone means anything."""
        wanted = re.compile(".*".join(map(re.escape, pattern.split("*"))), re.DOTALL)
        names = next(iter(self.walk()))[1]
        return (self / name for name in names if wanted.fullmatch(name))

    def walk(self) -> Iterator[tuple[str, list[str]]]:
        """(folder with a slash, names of its objects) here and below, folder by folder; the first is this one."""
        pending = [""]
        while pending:
            prefix, names = pending.pop(), []
            here = f"{self._path}/{prefix}".rstrip("/")
            with self._told():
                try:
                    entries = self._files.ls(here, detail=True)
                except FileNotFoundError:  # a tree that begins now
                    entries = []
            for entry in entries:
                path = entry["name"].rstrip("/")
                if path.lstrip("/") == here.lstrip("/"):
                    continue
                name = path.rpartition("/")[2]
                if entry["type"] == "directory":
                    pending.append(f"{prefix}{name}/")
                else:
                    names.append(name)
            yield prefix, names

    @contextmanager
    def _told(self, *, putting: bool = False) -> Iterator[None]:
        """Each store has errors of its own, whose words may hold what is nobody's business.

        `putting`: what is not found then is the bucket.
        """
        try:
            yield
        except UnicodeEncodeError:
            raise
        except Exception as error:
            if isinstance(error, FileNotFoundError) and not putting:
                raise
            raise OutputError(
                f"The output {self.url} cannot be read or written: {type(error).__name__}.",
                "Check the address, and what the environment says of its store and credentials.",
            ) from error


Place = Path | Bucket


def place(output: Path | str) -> Place:
    """Where an output tree lies. Raises UsageError where a package for it is missing."""
    return Bucket.at(str(output)) if _URL.match(str(output)) else Path(output)


def contents(folder: Place, names: Iterable[str]) -> Iterator[bytes]:
    """The bytes of the files `names`, in their order, some of them in memory at a time."""
    if isinstance(folder, Path):
        yield from ((folder / name).read_bytes() for name in names)
        return
    left = iter(names)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        while some := list(islice(left, 4 * AT_ONCE)):
            yield from pool.map(lambda name: (folder / name).read_bytes(), some)


class Mark:
    """What a run leaves where nothing can be locked, while it writes; `other`: one that has not ended was there.

    Of two runs the earlier finds its mark replaced when it ends, the later one finds a mark when it begins.
    """

    def __init__(self, folder: Bucket) -> None:
        self._folder, self._file, self._own = folder, folder / MARK, secrets.token_hex(16).encode()
        self.other = self._file.exists()
        self._file.put([self._own])

    def check(self) -> None:
        """Raises OutputError where another run has begun since."""
        if self._lies() != self._own:
            raise OutputError(
                f"Another run has written to {self._folder} meanwhile: records and pictures may be of both.",
                "Let one run write there, with --force.",
            )

    def remove(self) -> None:
        """Not that of another run."""
        if self._lies() == self._own:
            self._file.unlink(missing_ok=True)

    def _lies(self) -> bytes:
        with suppress(FileNotFoundError):
            return self._file.read_bytes()
        return b""
