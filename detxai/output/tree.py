"""Reading a finished, growing or killed output tree: the records beside the pictures are the truth."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from detxai.errors import NoInputError
from detxai.output import records
from detxai.output.store import SUMMARY

#: A tree in an object store, as a path has it.
_STORE = re.compile(r"(s3|gs|az):/")


@dataclass
class Tree:
    """The records below `folder`; `foreign` are the `.json` files that hold none, known once all were read."""

    folder: Path
    foreign: list[str] = field(default_factory=list)

    def read(self) -> Iterator[records.Record]:
        """Every record, ordered by path, one in memory at a time.

        `records.jsonl` is not read: a run that was killed leaves it old or absent. Raises NoInputError where there is
        no record at all.
        """
        if not self.folder.is_dir():
            hint = "Give the folder of detxai explain -o" + (
                ", copied here from its store." if _STORE.match(str(self.folder)) else "."
            )
            raise NoInputError(f"There is no output tree at {self.folder}.", hint)
        self.foreign.clear()
        count = 0
        for name in sorted(self._names(), key=lambda name: name.removesuffix(".json")):
            record = self._load(name)
            if record is None:
                self.foreign.append(name)
            else:
                count += 1
                yield record
        if not count:
            raise NoInputError(
                f"No record was found below {self.folder}.", "Give the folder that detxai explain wrote to (-o)."
            )

    def warnings(self) -> list[str]:
        """A sentence on the files that were passed over; none where there are none."""
        if not self.foreign:
            return []
        count = f"{len(self.foreign)} .json files" if len(self.foreign) > 1 else "1 .json file"
        return [f"{count} below {self.folder} passed over, no record of this tree: {self.foreign[0]}"]

    def _load(self, name: str) -> records.Record | None:
        """The record in the file `name`; None for anything else, and for the record of another tree below this."""
        try:
            record = records.load((self.folder / name).read_bytes())
        except (ValueError, OSError):
            return None
        own = name.encode("utf-8", "backslashreplace").decode() == f"{record.image.path}.json"
        return record if own or record.status == "failed" else None

    def _names(self) -> Iterator[str]:
        for folder, _, names in os.walk(self.folder):
            inside = os.path.relpath(folder, self.folder)
            prefix = "" if inside == "." else f"{inside}/"
            yield from (prefix + name for name in names if name.endswith(".json") and prefix + name != SUMMARY)
