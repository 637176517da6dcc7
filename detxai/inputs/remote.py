"""Objects of a store as images, by fsspec (extra `[remote]`): listed folder by folder, read whole.

Credentials come from the environment, as each store's own client finds them, and never from the address.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from detxai.errors import ImageError, UsageError
from detxai.inputs.folders import IMAGE_SUFFIXES
from detxai.inputs.naming import printable
from detxai.values import ImageRef

#: Stores whose addresses are sources; `memory` is that of this process.
REMOTE = re.compile(r"(s3|gs|az|memory)://[^@?#]+", re.IGNORECASE)


@dataclass
class Objects:
    """The images below `url`, as paths that start with `prefix`; `ignored` are other objects; none is `own`."""

    url: str
    prefix: str
    ignored: list[str] = field(default_factory=list)
    own: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Raises UsageError where there is nothing of this name, or nobody who can read it."""
        scheme = self.url.partition("://")[0].lower()
        self._files, self._root = store_of(self.url)
        try:
            self._single = bool(self._files.isfile(self._root))
            if not self._single and not self._files.exists(self._root):
                raise UsageError(f"SOURCE {self.url!r} does not exist.", "Check the spelling.")
        except UsageError:
            raise
        except Exception as error:  # each store has errors of its own
            raise UsageError(
                f"SOURCE {self.url!r} cannot be listed: {type(error).__name__}.",
                f"Check the address, and what the environment says of {scheme} and its credentials.",
            ) from error

    def __iter__(self) -> Iterator[ImageRef]:
        """Sorted by path; one folder in memory at a time."""
        if self._single:
            name = self._root.rpartition("/")[2]
            yield ImageRef(self.prefix + printable(name), Path(name), url=self.url)
            return
        pending = [""]
        while pending:
            relative = pending.pop()
            if relative and not relative.endswith("/"):
                path = printable(relative)
                yield ImageRef(self.prefix + path, Path(path), url=f"{self.url.rstrip('/')}/{relative}")
                continue
            pending += sorted(self._children(relative), reverse=True)

    def _children(self, relative: str) -> Iterator[str]:
        for entry in self._files.ls(f"{self._root}/{relative}".rstrip("/"), detail=True):
            name = entry["name"].rstrip("/").rpartition("/")[2]
            if not name or name.startswith("."):
                continue
            if entry["type"] == "directory":
                yield f"{relative}{name}/"
            elif os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES:
                yield relative + name
            else:
                self.ignored.append(self.prefix + printable(relative + name))


def read(url: str, most: int) -> bytes:
    """The object at `url`, of `most` bytes. Raises ImageError, in which no credential can stand."""
    try:
        files, path = store_of(url)
        if files.info(path)["size"] > most:
            raise ImageError("too_large", f"an object of more than {most} bytes; --max-pixels allows no more")
        content: bytes = files.cat_file(path)
        return content
    except FileNotFoundError as error:
        raise ImageError("not_found", "there is no such object") from error
    except ImageError:
        raise
    except Exception as error:  # each store has errors of its own
        raise ImageError("unreadable", f"the object cannot be read: {type(error).__name__}") from error


def store_of(url: str) -> tuple[Any, str]:
    """The store of `url`, as fsspec has it, and the place there. Raises UsageError without the extra."""
    try:
        from fsspec.core import url_to_fs

        files, root = url_to_fs(url, use_listings_cache=False)
    except ImportError as error:
        raise UsageError(f"{url!r} needs a package that is not here.", "pip install 'detxai[remote]'") from error
    return files, root.rstrip("/")
