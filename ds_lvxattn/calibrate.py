"""Measure this machine for the cost model: attention kernels, collectives on the real group, memory, host.

    deepspeed --module ds_lvxattn.calibrate --output profile.json

All ranks take part; rank 0 writes. A run with strategy ``auto`` calls ``calibrated``, which measures once and keeps the
profile in the user's cache directory (``$XDG_CACHE_HOME/ds_lvxattn`` or ``~/.cache/ds_lvxattn``), by machine, group,
software versions and head layouts. Delete the folder, or run this command, to measure again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ds_lvxattn.calibration.clock import Clock, slowest
from ds_lvxattn.calibration.collectives import collective_curves, level_curves, with_links
from ds_lvxattn.calibration.compile_ahead import compile_kernels
from ds_lvxattn.calibration.dense import layer_host_times, products
from ds_lvxattn.calibration.extent import CPU, DEFAULT_LAYOUTS, GPU, Extent, HeadLayout
from ds_lvxattn.calibration.kernels import measured_kernels, to_measure
from ds_lvxattn.calibration.layers import host_times, projections
from ds_lvxattn.calibration.machine import (
    device_name,
    fastest_copy,
    gpus_per_node,
    matmul,
    memory,
    multiprocessors,
    small_kernel,
    versions,
)
from ds_lvxattn.calibration.progress import Progress
from ds_lvxattn.exchange.comm import Communicator, communicator
from ds_lvxattn.plan.dense import GATHER, PARAMETER
from ds_lvxattn.plan.profile import (
    FORMAT,
    Profile,
    ProfileError,
    profile_for_device,
    profile_from_json,
    profile_to_json,
    write_profile,
)


def calibrated(
    group: dist.ProcessGroup | None,
    layouts: Iterable[HeadLayout],
    device: torch.device,
    dtype: torch.dtype,
    extent: Extent | None = None,
    inner_size: int | None = None,
) -> Profile:
    """The profile of this machine, measured unless the cache has it. All ranks of the world call it.

    Args:
        group: this rank's sequence-parallel group.
        layouts: head layouts whose kernels count.
        device, dtype: where and in what attention is computed.
        extent, inner_size: see ``calibrate``.
    """
    layouts = sorted(set(layouts))
    path = cache_path(group, layouts, device, dtype, inner_size)
    found: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            found[0] = profile_to_json(profile_from_json(json.loads(path.read_text())))
        except (OSError, json.JSONDecodeError, ProfileError):
            found[0] = None  # none yet, or one that another version wrote: measure
    dist.broadcast_object_list(found, src=0)
    if found[0] is not None:
        return profile_from_json(found[0], str(path))
    profile = calibrate(group, layouts, device, dtype, extent, inner_size)
    if device.type == "cuda":  # the run starts as if nothing had been measured
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    if dist.get_rank() == 0:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_profile(profile, path)
        except OSError:
            pass  # a home that cannot be written costs the next run a few seconds, and nothing else
    return profile


def cache_path(
    group: dist.ProcessGroup | None,
    layouts: Sequence[HeadLayout],
    device: torch.device,
    dtype: torch.dtype,
    inner_size: int | None = None,
) -> Path:
    """Where the profile of this machine, group, software and layouts is kept."""
    facts = [
        FORMAT, device_name(device), dist.get_world_size(), dist.get_world_size(group), gpus_per_node(device),
        versions(device), str(dtype), list(layouts), inner_size,
        sorted((k, v) for k, v in os.environ.items() if k.startswith("NCCL_")), repr((GPU, CPU)),
    ]  # fmt: skip
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "ds_lvxattn" / f"profile-{hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]}.json"


def calibrate(
    group: dist.ProcessGroup | None,
    layouts: Sequence[HeadLayout],
    device: torch.device,
    dtype: torch.dtype,
    extent: Extent | None = None,
    inner_size: int | None = None,
) -> Profile:
    """Measure. All ranks of the world call it; every figure is that of the slowest rank, and all get the same profile.

    Args:
        group, layouts, device, dtype: see ``calibrated``.
        extent: how much to measure; by default seconds on a GPU and less on a CPU.
        inner_size: ranks of a node, where the group has two levels; None: those of a host.
    """
    extent = extent or (GPU if device.type == "cuda" else CPU)
    progress = Progress(dist.get_rank() == 0)
    measured = to_measure(layouts, extent, device, dtype)
    compile_kernels(measured, device, dtype, progress)
    clock = Clock(device, extent.repeats)
    comm = Communicator(group)  # not the group's own one, whose counts belong to the run
    known = profile_for_device("cpu" if device.type == "cpu" else device_name(device))
    with progress.part("memory and matrix products"):
        launch = slowest(clock.seconds(small_kernel(device), many=True), device)
        bandwidth = slowest(fastest_copy(clock, device), device, largest=False)
        multiplied = slowest(matmul(clock, device, dtype), device, largest=False)
        dense = products(clock, extent, device, dtype)
    with progress.part(f"collectives of {comm.ranks} ranks"):
        curves = collective_curves(comm, clock, extent, device)
        curves += level_curves(communicator(group), clock, extent, device, inner_size)
    software = versions(device)
    profile = replace(
        known,
        name=f"{device_name(device)} x {dist.get_world_size()}",
        device=device_name(device),
        source=f"measured by ds_lvxattn.calibrate on {comm.ranks} ranks of {device_name(device)}, "
        f"{', '.join(' '.join(each) for each in software.items())}, {dtype}",
        multiprocessors=multiprocessors(device),
        memory=float(memory(device) or known.memory),
        memory_bandwidth=bandwidth,
        matmul=multiplied,
        launch=launch,
        gpus_per_node=gpus_per_node(device),
        curves=curves,
        kernels=(),
        host={},
        host_ranks=comm.ranks,
        products=dense,
        versions=software,
    )
    profile = with_links(profile, known, curves, comm.ranks)
    with progress.part("projections"):
        profile = replace(profile, projections=projections(profile, layouts, clock, device, dtype))
    kernels = tuple(measured_kernels(profile, measured, clock, device, dtype, progress))
    profile = replace(profile, kernels=kernels)
    with progress.part("the host's time"):
        exchanges = host_times(group, comm.ranks, layouts[0], device, dtype, inner_size)
        host = {**layer_host_times(device, dtype), **exchanges}
    # What no measurement here covers stays as known.
    kept = {name: time for name, time in known.host.items() if name in (GATHER, PARAMETER)}
    profile = replace(profile, host=kept | host)
    profile = replace(profile, source=f"{profile.source}; {progress.seconds():.1f} s")
    answer = [profile_to_json(profile)]
    dist.broadcast_object_list(answer, src=0)
    return profile_from_json(answer[0], "calibration")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("profile.json"), help="(default: %(default)s)")
    parser.add_argument(
        "--layouts", default=",".join("/".join(map(str, layout)) for layout in DEFAULT_LAYOUTS),
        help="query heads/key heads/head size, by comma (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), help="default: bfloat16 on a GPU")
    parser.add_argument("--local_rank", type=int, default=0, help="given by the launcher")
    args = parser.parse_args()
    layouts = [HeadLayout(*map(int, text.split("/"))) for text in args.layouts.split(",")]
    device = start_on_device(args.local_rank)
    default = torch.bfloat16 if device.type == "cuda" else torch.float32
    dtype = getattr(torch, args.dtype) if args.dtype else default
    profile = calibrate(dist.group.WORLD, layouts, device, dtype)
    if dist.get_rank() == 0:
        write_profile(profile, args.output)
        print(f"{profile.source}\nwritten to {args.output}")
    dist.destroy_process_group()
    return 0


def start_on_device(local_rank: int) -> torch.device:
    """Start ``torch.distributed`` from the launcher's environment; this rank's device."""
    from ds_lvxattn.groups import start_distributed

    start_distributed()
    if not torch.cuda.is_available() or dist.get_backend() == "gloo":
        return torch.device("cpu")
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", local_rank)))
    return torch.device("cuda", torch.cuda.current_device())


if __name__ == "__main__":
    sys.exit(main())
