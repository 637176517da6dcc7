"""A bound, in bytes, on what is decoded ahead by many threads, granted in order so that nobody waits for ever."""

from __future__ import annotations

from threading import Condition


class Budget:
    """`total` bytes for takers numbered 0, 1, 2, …: each is served after those before it.

    The first in line always gets what it asks for once everything before it was given back, even beyond `total`.
    """

    def __init__(self, total: int) -> None:
        self.total = total
        self._held: dict[int, int] = {}
        self._passed: set[int] = set()
        self._turn = 0
        self._closed = False
        self._changed = Condition()

    def take(self, number: int, size: int) -> None:
        """Wait for `size` bytes; a second call of the same taker returns at once."""
        with self._changed:
            if number < self._turn or number in self._passed:
                return
            self._changed.wait_for(lambda: self._closed or (self._turn == number and self._fits(size)))
            self._held[number] = size
            self._pass(number)

    def shrink(self, number: int, size: int) -> None:
        """Of what `number` holds only `size` bytes are still in use."""
        with self._changed:
            if number in self._held:
                self._held[number] = min(size, self._held[number])
                self._changed.notify_all()

    def give_back(self, number: int) -> None:
        """What `number` holds is free again; one that never took is passed over."""
        with self._changed:
            self._held.pop(number, None)
            self._pass(number)

    def skip(self, number: int) -> None:
        """`number` will take nothing (more): those behind it need not wait."""
        with self._changed:
            self._pass(number)

    def close(self) -> None:
        """Nobody waits any longer: the run is over."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _fits(self, size: int) -> bool:
        return not self._held or sum(self._held.values()) + size <= self.total

    def _pass(self, number: int) -> None:
        if number >= self._turn:
            self._passed.add(number)
        while self._turn in self._passed:
            self._passed.remove(self._turn)
            self._turn += 1
        self._changed.notify_all()
