"""What is finished of images whose records are not: dot-files beside the record to come, which no reader looks at."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection

from detxai.output.bucket import Place

#: By the image path, the fingerprint of its record, and the number of the part.
_NAME = re.compile(r"\.detxai-([0-9a-f]{16})-([0-9a-f]{16})-(\d+)\.part")


class Parts:
    """The parts of unfinished records in the tree `output`, as far as it was walked or they were made here."""

    def __init__(self, output: Place) -> None:
        self.output = output
        #: (folder, hash of an image path) -> names.
        self._names: dict[tuple[str, str], set[str]] = {}

    def learn(self, folder: str, name: str) -> bool:
        """Whether a file of the tree, in `folder` (with a slash), is a part; then it is known from now on."""
        match = _NAME.fullmatch(name)
        if match:
            self._names.setdefault((folder, match[1]), set()).add(name)
        return match is not None

    def names(self, path: str) -> tuple[str, ...]:
        """The parts of the image `path` that are known."""
        return tuple(sorted(self._names.get(_place(path), ())))

    def know(self, path: str, names: Collection[str]) -> None:
        """These are the parts of the image `path`."""
        self._names |= {_place(path): set(names)} if names else {}

    def existing(self, path: str) -> list[str]:
        """The parts of the image `path` that there are."""
        folder, digest = _place(path)
        return [file.name for file in (self.output / folder).glob(f".detxai-{digest}-*.part")]

    def add(self, path: str, fingerprint: str, number: int) -> Place:
        """The file of a new part of the image `path`."""
        folder, digest = place = _place(path)
        name = f".detxai-{digest}-{fingerprint[:16]}-{number}.part"
        self._names.setdefault(place, set()).add(name)
        return self.output / folder / name

    def read(self, path: str, fingerprint: str) -> dict[int, bytes]:
        """The parts of the image `path` by number; those with another fingerprint are removed. Raises OSError."""
        place = _place(path)
        matches = [match for match in map(_NAME.fullmatch, self._names.get(place, ())) if match]
        own = {int(match[3]): match[0] for match in matches if match[2] == fingerprint[:16]}
        self.drop(path, keep=set(own.values()))
        return {number: (self.output / place[0] / name).read_bytes() for number, name in own.items()}

    def drop(self, path: str, keep: Collection[str] = ()) -> None:
        """Remove the parts of the image `path` but those to `keep`. Raises OSError."""
        place = _place(path)
        for name in self._names.pop(place, set()).difference(keep):
            (self.output / place[0] / name).unlink(missing_ok=True)
        if keep:
            self._names[place] = set(keep)


def _place(path: str) -> tuple[str, str]:
    folder = path.rpartition("/")[0]
    return folder and f"{folder}/", hashlib.sha256(path.encode("utf-8", "surrogatepass")).hexdigest()[:16]
