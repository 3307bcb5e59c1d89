"""Processors for the threads of one rank."""

from __future__ import annotations

import math
import os
from pathlib import Path

from ds_lvxattn.groups import launched_ranks_of_host

CGROUPS = Path("/sys/fs/cgroup")


def processors_of_rank() -> int:
    """Processors that this process may use, at most as many as its container's quota pays for, divided over the ranks
    of the host. What the launcher has bound to this rank alone is not divided."""
    own = os.sched_getaffinity(0)
    try:
        bound = own < os.sched_getaffinity(os.getppid())
    except OSError:
        bound = False
    ranks = launched_ranks_of_host() or 1
    shared = len(own) * (ranks if bound else 1)
    allowed = min(shared, math.ceil(quota(CGROUPS, own_cgroup()) or shared))
    return max(1, allowed // ranks)


def own_cgroup() -> str:
    """Path of this process's cgroup (version 2) below the folder of cgroups."""
    try:
        lines = Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((line[len("0::") :] for line in lines if line.startswith("0::")), "").strip("/")


def quota(root: Path, own: str) -> float | None:
    """Processors that a container's time of computing comes to; beyond it all its threads stand still. None: no limit.

    Args:
        root: folder of the cgroups, as the container has it.
        own: path below it, of version 2.
    """
    folders = [root / own, *(root / own).parents]
    found = [_ratio(f / "cpu.max") for f in folders if f == root or root in f.parents]
    found.append(_ratio(root / "cpu" / "cpu.cfs_quota_us", root / "cpu" / "cpu.cfs_period_us"))
    return min((ratio for ratio in found if ratio is not None), default=None)


def _ratio(*files: Path) -> float | None:
    """The quota over the period, both in microseconds; None where there are none."""
    try:
        part, period = (int(word) for file in files for word in file.read_text().split())
    except (OSError, ValueError):  # not there, or "max"
        return None
    return part / period if part > 0 else None
