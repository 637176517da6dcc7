"""Masks of the telling parts of labelled items: does the blade make the knife?"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from detxai.errors import ImageError, UsageError
from detxai.values import ImageRef

NAMES = "parts.json"


class Parts:
    """A folder of `<stem>.<i>.png`: for label line i of an image, 0 none and k ≥ 1 the part k of its class.

    `parts.json` beside them names the parts: `{"knife": ["blade", "handle"]}`; without it they are numbers.
    Raises UsageError for a `parts.json` that says something else.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.names: dict[str, list[str]] = {}
        file = folder / NAMES
        if file.is_file():
            try:
                document = json.loads(file.read_bytes())
                self.names = {str(key): [str(name) for name in names] for key, names in document.items()}
            except (OSError, ValueError, AttributeError, TypeError) as error:
                raise UsageError(f"{file} cannot be read as class -> [part, ...]: {error}.") from error

    def name(self, class_name: str, part: int) -> str:
        """What part `part` (from 1) of a class is called."""
        known = self.names.get(class_name, [])
        return known[part - 1] if part <= len(known) else str(part)

    def read(self, ref: ImageRef, line: int, height: int, width: int) -> NDArray[np.uint8] | None:
        """(height, width) uint8 for label `line` of an image; None where it has no mask. Raises ImageError."""
        file = self.folder / f"{ref.file.stem}.{line}.png"
        if not file.is_file():
            return None
        try:
            with Image.open(file) as image:
                mask = np.asarray(image if image.mode == "P" else image.convert("L"), np.uint8)
        except (OSError, ValueError, SyntaxError) as error:
            raise ImageError("masks", f"{file.name}: cannot be read: {error}") from error
        if mask.shape != (height, width):
            raise ImageError("masks", f"{file.name}: {mask.shape[1]} x {mask.shape[0]}, not {width} x {height}")
        return mask

    def digest(self, ref: ImageRef, lines: int) -> str:
        """Hex SHA-256 of the masks of an image with that many label lines, and of the names."""
        digest = hashlib.sha256(json.dumps(self.names, sort_keys=True).encode())
        for line in range(lines):
            file = self.folder / f"{ref.file.stem}.{line}.png"
            digest.update(file.read_bytes() if file.is_file() else b"-")
        return digest.hexdigest()
