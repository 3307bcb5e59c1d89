"""Ends a run whose ranks wait for one that does not come, and names it.

Every rank tells the others through the store of the process group what it does: a thread of its own, so that a rank
that is busy still gives signs of life. A rank is out when it gives none for ``SIGN_OF_LIFE`` seconds (it is stopped,
or its machine is gone), or when it does not get on for the run's timeout (it waits for another). Then every rank
that still can prints which rank is in which phase, and leaves without cleaning up: that could wait for the lost rank.

The store lies in the process of rank 0; a store that no longer answers means that rank 0 is out.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.distributed as dist

logger = logging.getLogger(__name__)

SIGN_OF_LIFE = 120.0  # seconds; three quarters of the timeout if that is shorter
SECONDS_APART = 5.0  # between two signs of life
GRACE_SECONDS = 5.0  # for a run that is ending as it should
SHOWN = 8  # ranks of which the message tells
EXIT_CODE = 1


class Watchdog:
    """What this rank does, told to the others, and what becomes of them; inert until ``start``."""

    def __init__(self) -> None:
        self.phase, self._since, self._beat = "starting", time.monotonic(), 0
        self._stopped = threading.Event()
        self._threads: list[threading.Thread] = []

    def start(self, timeout: float, store: dist.Store | None = None) -> None:
        """Watch the ranks of the process group.

        Args:
            timeout: seconds that a rank may stay in one place.
            store: of the process group; None: that of the default group.
        """
        store_of_group: Any = getattr(dist.distributed_c10d, "_get_default_store", None)
        if store is None and store_of_group is None:
            logger.warning("this torch does not give the store of its process group: what ranks do is not watched")
            return
        self.timeout, self.life = timeout, min(0.75 * timeout, SIGN_OF_LIFE)
        self.apart = min(SECONDS_APART, self.life / 8)
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()
        shared: Any = store or store_of_group()
        # A connection of its own: a group that is being made may hold the other one for long.
        self._store = dist.PrefixStore("watchdog", shared.clone())
        self._answered = time.monotonic()
        self._ended: str | None = None  # what another rank says of the end
        self._lost = False  # the store is gone
        self._others: dict[int, tuple[str, float]] = {}  # last sign of each rank, and when it changed
        self.enter(self.phase)
        for target in (self._tell, self._judge):
            thread = threading.Thread(target=target, name=f"watchdog {target.__name__}", daemon=True)
            thread.start()
            self._threads.append(thread)

    def enter(self, phase: str) -> None:
        """This rank begins something."""
        self.phase = phase
        self.tick()

    def tick(self) -> None:
        """This rank gets on with it."""
        self._since = time.monotonic()

    def failed(self, error: BaseException, code: int = EXIT_CODE) -> None:
        """Tell the other ranks that this one ends by an error, with an exit code, for those that do not know of it."""
        if not self._threads:
            return
        text = f"{code}|rank {self.rank} ended in the phase '{self.phase}': {type(error).__name__}: {error}"
        self._tell_once(text[:2000])

    def end_of_others(self) -> tuple[int, str] | None:
        """How another rank has ended the run, as exit code and reason; None: none has.

        An error of this rank may be no more than the echo of that.
        """
        if not self._threads:
            return None
        asking = threading.Thread(target=self._try, args=(self._read_end,), daemon=True)
        asking.start()
        asking.join(2.0)
        if self._ended is not None:
            code, _, why = self._ended.partition("|")
            return int(code), why
        return (EXIT_CODE, "rank 0 has ended") if self._lost else None

    def _read_end(self) -> None:
        if self._store.check(["ended"]):
            self._ended = self._store.get("ended").decode()

    def _tell_once(self, text: str) -> None:
        telling = threading.Thread(target=self._try, args=(self._store.set, "ended", text), daemon=True)
        telling.start()
        telling.join(2.0)  # the store may be gone, or never answer

    def stop(self) -> None:
        """The run has ended, and what others do is no longer of interest."""
        self._stopped.set()
        for thread in self._threads:
            thread.join(2 * SECONDS_APART if thread.name.endswith("_judge") else 0.1)
        self._threads = []

    def _try(self, ask: Callable[..., None], *arguments: Any) -> None:
        try:
            ask(*arguments)
        except Exception:  # the store's errors are of several kinds
            self._lost = True

    def _tell(self) -> None:
        """Signs of life; the first rank also reads those of the others. May block in the store for ever."""
        while not self._stopped.wait(self.apart):
            self._beat += 1
            self._try(self._exchange)
            if self._lost:
                return
            self._answered = time.monotonic()

    def _exchange(self) -> None:
        stalled = time.monotonic() - self._since
        self._store.set(str(self.rank), f"{self._beat}|{self.phase}|{stalled:.0f}")
        self._read_end()
        if self.rank != 0 and stalled <= self.timeout / 2:
            self._others = {}  # of no interest, and old when they are again
            return
        now, seen = time.monotonic(), dict[int, tuple[str, float]]()
        for rank in range(self.ranks):
            sign = self._store.get(str(rank)).decode() if self._store.check([str(rank)]) else ""
            before = self._others.get(rank)
            seen[rank] = before if before is not None and before[0] == sign else (sign, now)
        self._others = seen  # replaced as a whole: the other thread may be reading

    def _judge(self) -> None:
        """Never blocks."""
        while not self._stopped.wait(self.apart / 2):
            self._look()

    def _look(self) -> None:
        """Look at the clock, and at what the other thread found; leave where it must be."""
        now = time.monotonic()
        if self._ended is not None:
            code, _, why = self._ended.partition("|")
            self._leave(why, int(code))
        elif self._lost:
            self._leave("rank 0 has ended")
        elif now - self._answered > self.life:
            self._leave(self._unanswered(now))
        else:
            silent = [r for r, (_, at) in self._others.items() if now - at > self.life and r != self.rank]
            if silent or now - self._since > self.timeout:
                self._leave(self._report(now, silent), found_here=True)

    def _unanswered(self, now: float) -> str:
        return (
            f"rank 0 gives no sign of life since {now - self._answered:.0f} s: it is stopped, or its machine is gone; "
            f"rank {self.rank} is in the phase '{self.phase}' since {now - self._since:.0f} s"
        )

    def _report(self, now: float, silent: list[int]) -> str:
        """Which rank is where."""
        lines = []
        for rank, (sign, at) in sorted(self._others.items(), key=lambda item: item[1][1])[:SHOWN]:
            _, phase, stalled = sign.split("|") if sign else ("", "starting", "0")
            since = float(stalled) + now - at
            if rank in silent:
                lines.append(
                    f"rank {rank} gives no sign of life since {now - at:.0f} s: it is stopped, or its machine is "
                    f"gone; its phase was '{phase}'"
                )
            else:
                lines.append(f"rank {rank} is in the phase '{phase}' since {since:.0f} s")
        return "; ".join(lines) or f"rank {self.rank} is in the phase '{self.phase}' since {now - self._since:.0f} s"

    def _leave(self, why: str, code: int = EXIT_CODE, found_here: bool = False) -> None:
        """End this process, unless it is ending by itself.

        Args:
            found_here: by this rank, which tells the others.
        """
        if found_here:
            self._tell_once(f"{code}|{why}")
        elif self._stopped.wait(GRACE_SECONDS):
            return
        frame = sys._current_frames().get(threading.main_thread().ident or 0)
        place = ""
        if frame is not None:
            inner = traceback.extract_stack(frame)[-1]
            place = f" (here in {inner.filename}:{inner.lineno}, {inner.name})"
        print(f"rank {self.rank} ends the run: {why}{place}", file=sys.stderr, flush=True)
        os._exit(code)


def group_timeout(timeout: float) -> timedelta:
    """Timeout of process groups: later than the watchdog's, which says more."""
    return timedelta(seconds=timeout + SIGN_OF_LIFE / 4)
