"""Ranks that end with their launcher, however it ends.

The launchers of DeepSpeed and torch end their ranks on a signal that they can handle. Killed, or when only the outer
one of DeepSpeed's two processes gets the signal, they leave the ranks training; these see to it themselves.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from pathlib import Path

POLL_SECONDS = 1.0
PR_SET_PDEATHSIG = 1
# What stands in the command line of a process that starts ranks and waits for them.
LAUNCHERS = ("deepspeed.launcher.launch", "torch.distributed.run", "torch.distributed.launch", "torchrun")
# The outer process of ``deepspeed``, which starts the one above and waits for it.
RUNNERS = ("ds_lvxattn.training.runner", "deepspeed.launcher.runner", "bin/deepspeed", "bin/ds")


def follow_launcher() -> None:
    """End this process when the launcher that started it is gone. Without a launcher nothing happens."""
    parent = os.getppid()
    if not _is_one_of(parent, LAUNCHERS):
        return
    watched = {parent: "launcher"}
    above = _parent_of(parent)
    if above is not None and _is_one_of(above, RUNNERS):
        watched[above] = "deepspeed command"
    _end_with_parent()
    started = {pid: _start_time(pid) for pid in watched}
    thread = threading.Thread(target=_watch, args=(watched, started), name="launcher", daemon=True)
    thread.start()


def _watch(watched: dict[int, str], started: dict[int, str | None]) -> None:
    while True:
        for pid, name in watched.items():
            if started[pid] is None or _start_time(pid) != started[pid]:
                rank = os.environ.get("RANK", "0")
                print(f"rank {rank} ends: the {name} (process {pid}) is gone", file=sys.stderr, flush=True)
                os._exit(128 + signal.SIGTERM)
        time.sleep(POLL_SECONDS)


def _end_with_parent() -> None:
    """Have Linux kill this process with its parent, at once and even where no Python thread runs."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)


def _is_one_of(pid: int, names: tuple[str, ...]) -> bool:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return False
    return any(word == name or word.endswith(f"/{name}") for word in words[:4] for name in names)


def _stat(pid: int) -> list[str] | None:
    """Fields of ``/proc/PID/stat`` after the name, which may hold anything."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None


def _parent_of(pid: int) -> int | None:
    fields = _stat(pid)
    return int(fields[1]) if fields else None


def _start_time(pid: int) -> str | None:
    """When a process started, so that another one with its number is not taken for it; None for one that is gone."""
    fields = _stat(pid)
    return None if fields is None or fields[0] in "ZX" else fields[19]
