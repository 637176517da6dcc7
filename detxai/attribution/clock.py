"""How long a device has worked: by its own clock where it has one, else the host's, which waits for it."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Iterator

import torch


class DeviceClock:
    """`seconds` that a device has worked. CUDA works behind the host's back, so its own events tell when."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds = device, 0.0
        self._last: torch.cuda.Event | None = None
        self._marked: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """Count what the device is given in here. On CUDA `read` tells of it, once the device has done it."""
        if self.device.type != "cuda":
            start = time.perf_counter()
            try:
                yield
            finally:
                self.seconds += time.perf_counter() - start
            return
        begun, done = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begun.record()
        yield
        done.record()
        self._marked.append((begun, done))

    def read(self) -> None:
        """Add what the device has finished to `seconds`; waits for nothing."""
        while self._marked and self._marked[0][1].query():
            begun, done = self._marked.popleft()
            worked = begun.elapsed_time(done)
            if self._last is not None:  # streams work side by side: no moment counts twice
                worked = min(worked, self._last.elapsed_time(done))
            if worked > 0:
                self.seconds, self._last = self.seconds + worked / 1e3, done
