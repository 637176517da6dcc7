"""The output folder of an evaluation: held by one run, every file whole, an image's figures found by its path."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from filelock import FileLock, Timeout

from detxai.errors import OutputError
from detxai.output.atomic import TEMPORARY, temporary

#: Figures of images and rows of the contact sheet, each in a folder of their own.
IMAGES, ROWS, LOCK = "images", "rows", ".detxai.lock"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Files:
    """The folder `output` of this run alone while entered. Raises OutputError where it cannot be used."""

    def __init__(self, output: Path) -> None:
        self.output = output
        self._lock = FileLock(output / LOCK, timeout=0)

    def __enter__(self) -> Self:
        with self._explained():
            for name in (IMAGES, ROWS):
                (self.output / name).mkdir(parents=True, exist_ok=True)
            try:
                self._lock.acquire()
            except Timeout as error:
                raise OutputError(
                    f"Another run is writing to {self.output}.", "Wait for it or choose another folder with -o."
                ) from error
            for folder in (self.output, self.output / IMAGES, self.output / ROWS):
                for file in folder.iterdir():  # left by a run that was killed
                    if TEMPORARY.fullmatch(file.name):
                        file.unlink(missing_ok=True)
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def read(self, path: str) -> dict[str, Any] | None:
        """The figures of the image `path`; None where there are none that can be read."""
        try:
            found = json.loads((self.output / IMAGES / f"{_name(path)}.json").read_bytes())
        except (OSError, ValueError):
            return None
        whole = isinstance(found, dict) and {"fingerprint", "detections", "contact"} <= set(found)
        if not whole or (found["contact"] and not (self.output / ROWS / found["contact"]).is_file()):
            return None
        return dict(found)

    def write_image(self, path: str, figures: dict[str, Any]) -> None:
        """Write the figures of the image `path`."""
        text = json.dumps(figures, ensure_ascii=False)
        self.write(f"{IMAGES}/{_name(path)}.json", text.encode("utf-8", "backslashreplace"))

    def write_row(self, path: str, picture: bytes) -> str:
        """Write the row of `path` for the contact sheet and return its name."""
        name = f"{_name(path)}.png"
        self.write(f"{ROWS}/{name}", picture)
        return name

    def row(self, name: str) -> bytes:
        """A row of the contact sheet."""
        with self._explained():
            return (self.output / ROWS / name).read_bytes()

    def write(self, name: str, content: bytes) -> None:
        """Replace the file `name` at once."""
        with self._explained():
            file = self.output / name
            with temporary(file.parent, [content]) as written:
                os.replace(written, file)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno in (errno.EEXIST, errno.ENOTDIR):
                message = f"The output {self.output} cannot be a folder: a file is in the way."
                hint = "Choose another with -o."
            elif error.errno in _FULL:
                message = f"No space is left for the output {self.output}."
                hint = "Make room and run the same command again: finished images stay finished."
            else:
                message = f"The output {self.output} is not writable: {error.strerror}."
                hint = "Choose another folder with -o, or change its permissions."
            raise OutputError(message, hint) from error


def _name(path: str) -> str:
    """A flat file name for the image `path`, legible and its own."""
    digest = hashlib.sha256(path.encode("utf-8", "surrogatepass")).hexdigest()[:12]
    stem = re.sub(r"[^\w.-]+", "_", path.rpartition("/")[2])[:80]
    return f"{stem}~{digest}"
