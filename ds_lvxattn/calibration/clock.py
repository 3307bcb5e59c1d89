"""Seconds of what runs on a device, and the slowest rank's."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

ENOUGH = 3  # measurements, where they are alike
SPREAD = 0.02  # of which the longest is so much longer than the shortest, at most


def alike(times: Sequence[float]) -> bool:
    """Whether more measurements would hardly change the median."""
    return len(times) >= ENOUGH and max(times) - min(times) <= SPREAD * statistics.median(times)


class Clock:
    """Seconds of what runs on a device.

    Args:
        device: the device.
        repeats: measurements of which the median counts.
    """

    def __init__(self, device: torch.device, repeats: int) -> None:
        self.device, self.repeats = device, repeats
        if device.type == "cuda":
            # What keeps the device busy while the host queues short calls behind it.
            self._ballast = torch.empty(1 << 28, dtype=torch.uint8, device=device)
            self._ballast_seconds = 0.8 * min(self._zero_seconds() for _ in range(3))

    def _zero_seconds(self) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(10):
            self._ballast.zero_()
        end.record()
        torch.cuda.synchronize(self.device)
        return begin.elapsed_time(end) / 1e4

    def seconds(self, call: Callable[[], object], many: bool = False, apart: bool = False) -> float:
        """Median seconds of ``call``, after two to warm up.

        Args:
            call: what is measured.
            many: it is shorter than its issue by the host.
            apart: no other rank has a part in it, so that it is measured only as often as this rank needs.
        """
        for _ in range(2):  # the first opens connections and compiles
            call()
        if self.device.type != "cuda":
            times = []
            for _ in range(self.repeats):
                began = time.perf_counter()
                call()
                times.append(time.perf_counter() - began)
                if apart and alike(times):
                    break
            return statistics.median(times)
        calls = 10 if many else 1
        times = []
        torch.cuda.synchronize(self.device)
        began = time.perf_counter()
        for _ in range(calls):
            call()
        ballast = math.ceil((time.perf_counter() - began) / self._ballast_seconds) if many else 0
        torch.cuda.synchronize(self.device)
        for _ in range(self.repeats):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            for _ in range(min(ballast, 500)):
                self._ballast.zero_()
            begin.record()
            for _ in range(calls):
                call()
            end.record()
            torch.cuda.synchronize(self.device)
            times.append(begin.elapsed_time(end) / 1e3 / calls)
            if apart and alike(times):
                break
        return statistics.median(times)


def slowest(value: float, device: torch.device, largest: bool = True) -> float:
    """The largest (or smallest) ``value`` of all ranks."""
    tensor = torch.tensor([value], dtype=torch.float64, device=device)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX if largest else dist.ReduceOp.MIN)
    return tensor.item()


def slowest_of(values: Sequence[float], device: torch.device) -> list[float]:
    tensor = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor.tolist()


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def host_seconds(call: Callable[[], None], device: torch.device) -> float:
    """Seconds from call to call while the device waits for the host; median of short runs, which others disturb."""
    runs, calls = (5, 6) if device.type == "cuda" else (1, 3)
    for _ in range(3):
        call()
    times = []
    for _ in range(runs):
        synchronize(device)
        began = time.perf_counter()
        for _ in range(calls):
            call()
        synchronize(device)
        times.append((time.perf_counter() - began) / calls)
    return statistics.median(times)
