"""A time limit that does not count the time in which the machine gave the processes no processor."""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path


class Deadline:
    """``seconds`` from now, for processes that may depend on each other.

    A busy machine makes them slow, not wrong: while one of them waits for a processor, the others may wait for it,
    so that time does not count. Linux says how long a thread was ready and did not run; elsewhere all time counts.
    """

    def __init__(self, seconds: float) -> None:
        self.left = seconds
        self._now = time.monotonic()
        self._starved: dict[int, float] = {}

    def passed(self, processes: Iterable[int]) -> bool:
        """Whether the time is over; to be asked about every second, with the ids of the processes."""
        now, before = time.monotonic(), self._starved
        self._starved = {process: _starved_seconds(process) for process in processes}
        waits = (seconds - before.get(process, seconds) for process, seconds in self._starved.items())
        self.left -= max(0.0, now - self._now - max(waits, default=0.0))
        self._now = now
        return self.left <= 0


def _starved_seconds(process: int) -> float:
    """How long the main thread of a process has been ready to run without running."""
    try:
        return int(Path(f"/proc/{process}/schedstat").read_text().split()[1]) / 1e9
    except (OSError, IndexError):
        return 0.0
