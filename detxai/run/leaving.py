"""How a run is left that is over: within ten seconds, and with as much of its work as that allows."""

from __future__ import annotations

import time
from collections.abc import Callable

#: Seconds that images on the device have to be finished after no more are begun, and those behind it after that.
DEVICE_GRACE, WRITER_GRACE = 4.0, 3.0


class Leaving:
    """What may still go on once `over()` held or `now` was called."""

    def __init__(self, over: Callable[[], bool]) -> None:
        self._over = over
        self._since: float | None = None
        self._interrupted = False

    def begins_no_more(self) -> bool:
        """Whether no further image is begun."""
        if self._since is None and self._over():
            self._since = time.monotonic()
        return self._since is not None

    def leaves_device(self) -> bool:
        """Whether images on the device are left as they are."""
        return self.begins_no_more() and self._for(DEVICE_GRACE)

    def leaves_writers(self) -> bool:
        """Whether maps that are made are left without their pictures; asked by other threads."""
        return self._since is not None and self._for(WRITER_GRACE if self._interrupted else DEVICE_GRACE + WRITER_GRACE)

    def now(self) -> None:
        """The device is left at once."""
        self._interrupted, self._since = True, time.monotonic()

    def _for(self, seconds: float) -> bool:
        return self._since is not None and time.monotonic() - self._since > seconds
