"""Kernels compiled side by side before they are measured, by processes that fill the caches on disk.

A process that measures compiles one kernel after the other, FlashAttention-4's masked ones for 8 to 13 seconds each.
Processes that make the same calls beforehand, each some of them, leave what they compile where the measuring processes
of their host, and the runs behind them, look it up. Where they cannot, the measuring process compiles as it goes.

The calls run on the device, on which nothing is timed yet. (The benchmark of tiles compiles while it times: by
processes that touch no device.)
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

import ds_lvxattn
from ds_lvxattn.calibration.kernels import Measured, Shape
from ds_lvxattn.calibration.machine import first_of_host
from ds_lvxattn.calibration.progress import Progress

PROCESS = "ds_lvxattn.calibration.compile_process"
COMPILED = ("fa4", "triton")  # kernels that compile, and keep what they compiled
MOST_PROCESSES = 16
ROOM = 4 << 30  # bytes of device memory that a process takes at most: its context, and the largest call's tensors


class Item(NamedTuple):
    """Calls of one pass of a kernel, which share most of what they compile.

    Attributes:
        kernel: its name.
        backward: which pass.
        shapes: of the calls.
    """

    kernel: str
    backward: bool
    shapes: tuple[Shape, ...]


def compile_kernels(measured: Sequence[Measured], device: torch.device, dtype: torch.dtype, progress: Progress) -> None:
    """Compile what ``measured`` needs, by processes that the first rank of each host starts; all ranks call it."""
    if device.type != "cuda":
        return  # nothing there is compiled
    items = items_of(measured)
    processes = processes_for(items, device) if first_of_host() else 0
    if processes:
        with progress.part(f"compiling kernels in {processes} processes"):
            troubles = compile_ahead(items, device, dtype, processes)
        if troubles:
            progress.say(f"not compiled ahead, {len(troubles)} of {len(items)}: {troubles[0]}")
    dist.barrier()


def items_of(measured: Sequence[Measured]) -> list[Item]:
    """The calls by what they compile, the slowest to compile first.

    Few rows compile other kernels than many, one key head others than several, and heads that share keys others than
    heads that do not. What items have in common, those behind find compiled.
    """
    found: dict[tuple[bool, bool, bool, bool, str, str, int, int], list[Shape]] = {}
    for kernel, masked, shapes in measured:
        if kernel.name not in COMPILED:
            continue
        few = min(shape.rows for shape in shapes)
        for shape in reversed(shapes):
            heads, kv_heads, head_dim = shape.layout
            # Tiles go by the mask in Triton.
            mask = str(shape.mask) if kernel.name == "triton" else ""
            for forward in (False, True):
                order = (
                    shape.rows == few, kv_heads == 1, not masked, forward, kernel.name, mask, head_dim,
                    heads // kv_heads,
                )  # fmt: skip
                found.setdefault(order, []).append(shape)
    return [Item(order[4], not order[3], tuple(found[order])) for order in sorted(found)]


def compile_ahead(items: Sequence[Item], device: torch.device, dtype: torch.dtype, processes: int) -> list[str]:
    """Make the calls of ``items``, first to last, in so many processes; what went wrong, a line each."""
    waiting: queue.SimpleQueue[Item] = queue.SimpleQueue()
    for item in items:
        waiting.put(item)
    troubles: list[str] = []
    threads = [
        threading.Thread(target=_feed, args=(waiting, device, dtype, troubles), daemon=True) for _ in range(processes)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return troubles


def processes_for(items: Sequence[Item], device: torch.device) -> int:
    """Processes that compile: as many as the host has cores for and the device has memory for; 0 where one core has to
    do all."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    free = torch.cuda.mem_get_info(device)[0]
    found = min(cores, free // ROOM, len(items), MOST_PROCESSES)
    return found if found > 1 else 0


def _feed(waiting: queue.SimpleQueue[Item], device: torch.device, dtype: torch.dtype, troubles: list[str]) -> None:
    """A process, given one item after the other until none is left."""
    root = str(Path(ds_lvxattn.__file__).parents[1])
    known = os.environ.get("PYTHONPATH")
    environment = os.environ | {"PYTHONPATH": root if known is None else f"{root}{os.pathsep}{known}"}
    command = [sys.executable, "-m", PROCESS, str(device), str(dtype).removeprefix("torch.")]
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment
        ) as process,
    ):
        assert process.stdin is not None and process.stdout is not None
        try:
            while True:
                item = waiting.get_nowait()
                process.stdin.write(json.dumps(item) + "\n")
                process.stdin.flush()
                answer = process.stdout.readline()
                if not answer:
                    raise BrokenPipeError
                if trouble := json.loads(answer):
                    troubles.append(f"{item.kernel}: {trouble}")
        except queue.Empty:
            pass
        except OSError:  # the process is gone
            errors.seek(0)
            last = (errors.read().strip().splitlines() or ["no word"])[-1]
            troubles.append(f"a process that compiles ended with {process.wait()}: {last}")
