"""The output folder of an evaluation: held by one run, every file whole, an image's figures found by its path."""

from __future__ import annotations

import hashlib
import json
import re
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

from detxai.output.atomic import TEMPORARY, explained, held, replace

#: Figures of images and rows of the contact sheet, each in a folder of their own.
IMAGES, ROWS = "images", "rows"


class Files:
    """The folder `output` of this run alone while entered. Raises OutputError where it cannot be used."""

    def __init__(self, output: Path) -> None:
        self.output = output
        self._entered = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as entered:
            entered.enter_context(held(self.output))
            with explained(self.output):
                for name in (IMAGES, ROWS):
                    (self.output / name).mkdir(exist_ok=True)
                for file in self.output.glob("**/.detxai-*.tmp"):  # left by a run that was killed
                    if TEMPORARY.fullmatch(file.name):
                        file.unlink(missing_ok=True)
            self._entered = entered.pop_all()
        return self

    def __exit__(self, *raised: object) -> None:
        self._entered.close()

    def read(self, path: str) -> dict[str, Any] | None:
        """The figures of the image `path`; None where there are none that can be read."""
        try:
            document = json.loads((self.output / IMAGES / f"{_name(path)}.json").read_bytes())
        except (OSError, ValueError):
            return None
        whole = isinstance(document, dict) and {"fingerprint", "detections", "contact"} <= set(document)
        if not whole or (document["contact"] and not (self.output / ROWS / document["contact"]).is_file()):
            return None
        return dict(document)

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
        with explained(self.output):
            return (self.output / ROWS / name).read_bytes()

    def write(self, name: str, content: bytes) -> None:
        """Replace the file `name` at once."""
        with explained(self.output):
            replace(self.output / name, [content])


def _name(path: str) -> str:
    """A flat file name for the image `path`, legible and its own."""
    digest = hashlib.sha256(path.encode("utf-8", "surrogatepass")).hexdigest()[:12]
    stem = re.sub(r"[^\w.-]+", "_", path.rpartition("/")[2])[:80]
    return f"{stem}~{digest}"
