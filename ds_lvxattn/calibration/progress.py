"""What is being measured and how long it took, for whoever waits: a first calibration takes a minute or two."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager


class Progress:
    """Lines on the error stream of one rank, the first.

    Args:
        shown: whether this rank writes.
    """

    def __init__(self, shown: bool) -> None:
        self._shown, self._began = shown, time.perf_counter()

    def seconds(self) -> float:
        """Since it was made."""
        return time.perf_counter() - self._began

    def say(self, text: str) -> None:
        if self._shown:
            print(
                f"{time.strftime('%H:%M:%S')}  calibration, {self.seconds():.0f} s: {text}", file=sys.stderr, flush=True
            )

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """A part of the calibration; one line behind it."""
        began = time.perf_counter()
        yield
        self.say(f"{name} took {time.perf_counter() - began:.1f} s")
