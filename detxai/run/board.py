"""What a driver and its workers let each other know: groups of images, how often they were tried, when to stop."""

from __future__ import annotations

import pickle
from collections import Counter
from dataclasses import dataclass
from typing import Any

from detxai.errors import DetxaiError
from detxai.output.seen import Entry
from detxai.output.store import Known
from detxai.values import ImageRef, InputShape

#: A group that is done, and what comes after the last one.
NONE, END = pickle.dumps([]), b""


@dataclass(frozen=True)
class Greeting:
    """What the first worker tells of its plan, as `Plan` has it."""

    info: Any
    shape: InputShape
    side: int
    rect: bool
    fit: str
    device: str
    warnings: tuple[str, ...]
    in_flight: int


@dataclass(frozen=True)
class Given:
    """An image that a worker has, of the group `group`, whose rows come back `together` so many at a time.

    `known`: what the tree has of it, see `Store.known`; `seen`: of its input, see
    `Seen.entry`; `stamp`: which record, see `Store.stamp`.
    """

    ref: ImageRef
    group: int
    known: Known
    seen: Entry | None
    stamp: str
    together: int = 1


class Board:
    """Kept by one process, for all of them. Everything that is asked twice is answered alike."""

    def __init__(self) -> None:
        self._groups: dict[int, bytes] = {}
        self._count, self._closed, self._stopped = 0, False, False
        self._tries: Counter[int | str] = Counter()
        self._word: Greeting | DetxaiError | None = None

    def put(self, group: bytes) -> None:
        """Add the next group."""
        self._groups[self._count], self._count = group, self._count + 1

    def group(self, number: int) -> bytes | None:
        """A group, NONE where it was dropped, END after the last; None: not there yet."""
        if number < self._count:
            return self._groups.get(number, NONE)
        return END if self._closed else None

    def drop(self, number: int) -> None:
        """Forget a group of which all is done."""
        self._groups.pop(number, None)

    def close(self) -> None:
        """There will be no further group."""
        self._closed = True

    def stop(self) -> None:
        """No further image is to be begun."""
        self._stopped = True

    def stopped(self) -> bool:
        """Whether no further image is to be begun."""
        return self._stopped

    def begin(self, what: int | str) -> int:
        """How often a group (its number) or an image alone (its path) was begun, this time counted."""
        self._tries[what] += 1
        return self._tries[what]

    def survive(self, path: str) -> None:
        """The image was no reason for a worker to die."""
        del self._tries[path]

    def say(self, word: Greeting | DetxaiError) -> None:
        """Keep the first greeting, or the error that ends the run."""
        if self._word is None or isinstance(word, DetxaiError):
            self._word = word

    def said(self) -> Greeting | DetxaiError | None:
        """What was said."""
        return self._word
