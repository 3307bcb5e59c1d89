"""Measure this machine for the cost model: attention kernels, collectives on the real group, memory, host.

    deepspeed --module ds_lvxattn.calibrate --output profile.json

All ranks take part; rank 0 writes. A run with strategy ``auto`` calls ``calibrated``, which measures once and keeps the
profile in the user's cache directory (``$XDG_CACHE_HOME/ds_lvxattn`` or ``~/.cache/ds_lvxattn``), by machine, group,
software versions and head layouts. Delete the folder, or run this command, to measure again.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ds_lvxattn.attention import sp_attention
from ds_lvxattn.comm import Communicator, Message, Part, Transfer, communicator
from ds_lvxattn.interval import KVInterval
from ds_lvxattn.kernels.base import Call
from ds_lvxattn.kernels.base import Kernel as LocalKernel
from ds_lvxattn.kernels.delta import attention_delta
from ds_lvxattn.kernels.dispatch import FEW_TILES, select_kernel
from ds_lvxattn.plan import kernel_time
from ds_lvxattn.plan.cost import obstacle
from ds_lvxattn.plan.profile import (
    FORMAT,
    Curve,
    HostTime,
    Kernel,
    KernelPoint,
    Link,
    Profile,
    ProfileError,
    profile_for_device,
    profile_from_json,
    profile_to_json,
    write_profile,
)
from ds_lvxattn.routes import Routes
from ds_lvxattn.shards import SequenceShards, ShardLayout


class HeadLayout(NamedTuple):
    """Heads of an attention layer."""

    heads: int
    kv_heads: int
    head_dim: int


@dataclass(frozen=True)
class Extent:
    """How much is measured.

    Attributes:
        rows, keys: of the kernel calls, every pair of them.
        operations: forward operations above which a kernel call is left out.
        messages: bytes of the collectives.
        repeats: measurements of which the median counts.
    """

    rows: tuple[int, ...]
    keys: tuple[int, ...]
    operations: float
    messages: tuple[int, ...]
    repeats: int


GPU = Extent(
    (128, 512, 2048, 8192), (4096, 32768, 131072), 1.2e13, (1 << 12, 1 << 17, 1 << 20, 1 << 23, 1 << 26, 1 << 28), 5
)
CPU = Extent((16, 128), (128, 1024), 4e8, (1 << 10, 1 << 16, 1 << 20, 1 << 22), 3)

DEFAULT_LAYOUTS = (HeadLayout(32, 8, 128), HeadLayout(8, 8, 64))
MODES = (("lv_xattn", "gather"), ("lv_xattn", "routed"), ("lv_xattn", "ring"), ("ulysses", "auto"), ("ring", "ring"))


def calibrated(
    group: dist.ProcessGroup | None,
    layouts: Iterable[HeadLayout],
    device: torch.device,
    dtype: torch.dtype,
    extent: Extent | None = None,
) -> Profile:
    """The profile of this machine, measured unless the cache has it. All ranks of the world call it.

    Args:
        group: this rank's sequence-parallel group.
        layouts: head layouts whose kernels count.
        device, dtype: where and in what attention is computed.
        extent: see ``calibrate``.
    """
    layouts = sorted(set(layouts))
    path = cache_path(group, layouts, device, dtype)
    found: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            found[0] = profile_to_json(profile_from_json(json.loads(path.read_text())))
        except (OSError, json.JSONDecodeError, ProfileError):
            found[0] = None  # none yet, or one that another version wrote: measure
    dist.broadcast_object_list(found, src=0)
    if found[0] is not None:
        return profile_from_json(found[0], str(path))
    profile = calibrate(group, layouts, device, dtype, extent)
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
    group: dist.ProcessGroup | None, layouts: Sequence[HeadLayout], device: torch.device, dtype: torch.dtype
) -> Path:
    """Where the profile of this machine, group, software and layouts is kept."""
    facts = [
        FORMAT, _device_name(device), dist.get_world_size(), dist.get_world_size(group), _gpus_per_node(device),
        torch.__version__, _triton_version(), torch.version.cuda, str(dtype), list(layouts),
        sorted((k, v) for k, v in os.environ.items() if k.startswith("NCCL_")),
    ]  # fmt: skip
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "ds_lvxattn" / f"profile-{hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]}.json"


def calibrate(
    group: dist.ProcessGroup | None,
    layouts: Sequence[HeadLayout],
    device: torch.device,
    dtype: torch.dtype,
    extent: Extent | None = None,
) -> Profile:
    """Measure. All ranks of the world call it; every figure is that of the slowest rank, and all get the same profile.

    Args:
        group, layouts, device, dtype: see ``calibrated``.
        extent: how much to measure; by default seconds on a GPU and less on a CPU.
    """
    began = time.perf_counter()
    extent = extent or (GPU if device.type == "cuda" else CPU)
    clock = _Clock(device, extent.repeats)
    comm = Communicator(group)  # not the group's own one, whose counts belong to the run
    known = profile_for_device("cpu" if device.type == "cpu" else _device_name(device))
    launch = _slowest(clock.seconds(_small_kernel(device), many=True), device)
    bandwidth = _fastest_copy(clock, device)
    curves = _curves(comm, clock, extent, device)
    profile = replace(
        known,
        name=f"{_device_name(device)} x {dist.get_world_size()}",
        device=_device_name(device),
        source=f"measured by ds_lvxattn.calibrate on {comm.ranks} ranks of {_device_name(device)}, torch "
        f"{torch.__version__}, Triton {_triton_version()}, CUDA {torch.version.cuda}, {dtype}",
        multiprocessors=_multiprocessors(device),
        memory=float(_memory(device) or known.memory),
        memory_bandwidth=_slowest(bandwidth, device, largest=False),
        matmul=_slowest(_matmul(clock, device, dtype), device, largest=False),
        launch=launch,
        gpus_per_node=_gpus_per_node(device),
        curves=curves,
        kernels=(),
        host={},
        host_ranks=comm.ranks,
    )
    profile = _with_links(profile, known, curves, comm.ranks)
    profile = replace(profile, kernels=tuple(_kernels(profile, layouts, clock, extent, device, dtype)))
    if comm.ranks > 1:
        profile = replace(
            profile,
            overlap=_slowest(_overlap(comm, clock, device, dtype, layouts[0]), device, largest=False),
            host=_host_times(group, comm.ranks, layouts[0], device, dtype),
        )
    seconds = time.perf_counter() - began
    profile = replace(profile, source=f"{profile.source}; {seconds:.1f} s")
    answer = [profile_to_json(profile)]
    dist.broadcast_object_list(answer, src=0)
    return profile_from_json(answer[0], "calibration")


class _Clock:
    """Seconds of what runs on a device."""

    def __init__(self, device: torch.device, repeats: int) -> None:
        self.device, self.repeats = device, repeats
        if device.type == "cuda":
            # What keeps the device busy while the host queues short calls behind it.
            self._ballast = torch.empty(1 << 28, dtype=torch.uint8, device=device)
            self._ballast_seconds = self._ballast.nbytes / 8e12  # at least: the fastest memory of today

    def seconds(self, call: Callable[[], object], many: bool = False) -> float:
        """Median seconds of ``call``, after two to warm up; ``many`` for calls shorter than their issue by the host."""
        for _ in range(2):  # the first opens connections and compiles
            call()
        if self.device.type != "cuda":
            times = []
            for _ in range(self.repeats):
                began = time.perf_counter()
                call()
                times.append(time.perf_counter() - began)
            return statistics.median(times)
        calls = 20 if many else 1
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
        return statistics.median(times)


def _slowest(value: float, device: torch.device, largest: bool = True) -> float:
    """The largest (or smallest) ``value`` of all ranks."""
    tensor = torch.tensor([value], dtype=torch.float64, device=device)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX if largest else dist.ReduceOp.MIN)
    return tensor.item()


def _slowest_of(values: Sequence[float], device: torch.device) -> list[float]:
    tensor = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor.tolist()


# The machine


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _memory(device: torch.device) -> int | None:
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None


def _gpus_per_node(device: torch.device) -> int:
    there = torch.cuda.device_count() if device.type == "cuda" else dist.get_world_size()
    return int(os.environ.get("LOCAL_WORLD_SIZE", there))


def _triton_version() -> str | None:
    try:
        import triton
    except ImportError:
        return None
    return triton.__version__


def _small_kernel(device: torch.device) -> Callable[[], object]:
    x = torch.zeros(256, device=device)
    return lambda: x.add_(1.0)


def _fastest_copy(clock: _Clock, device: torch.device) -> float:
    """Bytes a second, read and written both counted."""
    source = torch.empty(1 << (28 if device.type == "cuda" else 22), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / clock.seconds(lambda: target.copy_(source))


def _matmul(clock: _Clock, device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of a projection of visual tokens."""
    tokens, width = (65536, 4096) if device.type == "cuda" else (512, 256)
    x = torch.randn(tokens, width, device=device, dtype=dtype)
    w = torch.randn(width, width // 4, device=device, dtype=dtype)
    return 2.0 * tokens * width * (width // 4) / clock.seconds(lambda: x @ w)


# The group


def _curves(comm: Communicator, clock: _Clock, extent: Extent, device: torch.device) -> tuple[Curve, ...]:
    """Times of the collectives that the strategies use, by the bytes that a rank receives."""
    n = comm.ranks
    if n == 1:
        return ()
    following, before = (comm.rank + 1) % n, (comm.rank - 1) % n

    def all_gather(size: int) -> tuple[int, Callable[[], object]]:
        buffer = torch.zeros((n, max(size // (n - 1), 1)), dtype=torch.uint8, device=device)
        return (n - 1) * buffer.shape[1], lambda: _gather(comm, buffer).wait()

    def all_to_all(size: int) -> tuple[int, Callable[[], object]]:
        there = torch.zeros((n, max(size // (n - 1), 1)), dtype=torch.uint8, device=device)
        back = torch.empty_like(there)
        part = Part("calibration", there, back)
        return (n - 1) * there.shape[1], lambda: comm.start_all_to_all([part]).wait()

    def send(size: int) -> tuple[int, Callable[[], object]]:
        out, arriving = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))
        message = Message("calibration", out, following, arriving, before)
        return size, lambda: comm.exchange([message]).wait()

    curves = []
    for op, make in (("all_gather", all_gather), ("all_to_all", all_to_all), ("send", send)):
        sizes, times = [], []
        for size in extent.messages:
            received, call = make(size)
            dist.barrier()
            sizes.append(received)
            times.append(clock.seconds(call, many=size <= 1 << 20))
        curves.append(Curve(op, n, tuple(zip(sizes, _slowest_of(times, device), strict=True))))
    return tuple(curves)


def _with_links(profile: Profile, known: Profile, curves: Sequence[Curve], ranks: int) -> Profile:
    """The link that the group uses, from its curves, for groups of other sizes; the other link as known."""
    if not curves:
        return profile
    gather, _, hop = curves
    latency = min(gather.points[0][1], hop.points[0][1])
    message = max(gather.points[0][1] - latency, 0.0) / max(ranks - 2, 1) if ranks > 2 else known.intra.message
    (small, quick), (large, slow) = gather.points[-2:]
    link = Link(latency, message, (large - small) / max(slow - quick, 1e-9))
    if ranks <= profile.gpus_per_node:
        return replace(profile, intra=link, source=f"{profile.source}; between nodes as in '{known.name}'")
    return replace(profile, inter=link, source=f"{profile.source}; inside a node as in '{known.name}'")


def _gather(comm: Communicator, buffer: Tensor) -> Transfer:
    return comm.start_all_gather([("calibration", buffer)])


def _overlap(comm: Communicator, clock: _Clock, device: torch.device, dtype: torch.dtype, layout: HeadLayout) -> float:
    """Share of the shorter one that a kernel and a collective of about equal length hide of each other."""
    rows, keys = (2048, 32768) if device.type == "cuda" else (128, 512)
    calls = _kernel_calls(layout, rows, keys, None, device, dtype)
    alone = _slowest(clock.seconds(calls.forward), device)
    # As many bytes as take that long, between what is worth measuring and what fits.
    probe = torch.zeros((comm.ranks, 1 << (24 if device.type == "cuda" else 16)), dtype=torch.uint8, device=device)
    rate = probe.shape[1] / _slowest(clock.seconds(lambda: _gather(comm, probe).wait()), device)
    size = int(min(max(alone * rate, 1 << 16), 1 << 28))
    buffer = torch.zeros((comm.ranks, size), dtype=torch.uint8, device=device)

    def both() -> None:
        transfer = _gather(comm, buffer)
        calls.forward()
        transfer.wait()

    sent, together = (_slowest(clock.seconds(call), device) for call in (lambda: _gather(comm, buffer).wait(), both))
    return min(max((alone + sent - together) / min(alone, sent), 0.0), 1.0)


def _host_times(
    group: dist.ProcessGroup | None, ranks: int, layout: HeadLayout, device: torch.device, dtype: torch.dtype
) -> dict[str, HostTime]:
    """Host seconds of a layer by strategy and schedule, on sizes for which the device does next to nothing.

    The layer projects K and V, as those of models do.
    """
    heads = layout.heads if layout.heads % ranks == 0 else layout.heads * ranks
    kv_heads = layout.kv_heads if obstacle("ulysses", heads, layout.kv_heads, ranks) is None else heads
    rows, keys = 16, 64
    make: dict[str, Any] = {"device": device, "dtype": dtype}
    q = torch.randn(1, heads, rows, layout.head_dim, requires_grad=True, **make)
    features = torch.randn(1, keys, 64, requires_grad=True, **make)
    project_k, project_v = (nn.Linear(64, kv_heads * layout.head_dim, bias=False, **make) for _ in range(2))
    norm = nn.RMSNorm(layout.head_dim, **make)
    leaves = [q, features, *project_k.parameters(), *project_v.parameters(), *norm.parameters()]
    shards = ShardLayout(SequenceShards((rows,) * ranks), SequenceShards((keys,) * ranks))
    stop = torch.full((ranks, 1, rows), keys * ranks, dtype=torch.int32, device=device)
    interval = KVInterval(torch.zeros_like(stop), stop)
    routes = Routes.build(interval.start.cpu(), stop.cpu(), shards, communicator(group).rank, device)
    counts = communicator(group).received.copy()
    repeats = 20 if device.type == "cuda" else 3
    found: dict[str, HostTime] = {}
    for (strategy, schedule), masked in itertools.product(MODES, (False, True)):
        if schedule == "routed" and not masked:
            continue

        def step(forward_only: bool, strategy: str = strategy, schedule: str = schedule, masked: bool = masked) -> None:
            with torch.set_grad_enabled(not forward_only):
                k, v = (project(features).unflatten(2, (kv_heads, -1)) for project in (project_k, project_v))
                out, _ = sp_attention(
                    q, norm(k).transpose(1, 2), v.transpose(1, 2), group=group, strategy=strategy,
                    schedule=schedule, interval=interval if masked else None, shards=shards,
                    routes=routes if masked else None,
                )  # fmt: skip
            if not forward_only:
                torch.autograd.grad(out, leaves, torch.ones_like(out))

        times = []
        for forward_only in (True, False):
            for _ in range(3):
                step(forward_only)
            _synchronize(device)
            began = time.perf_counter()
            for _ in range(repeats):
                step(forward_only)
            _synchronize(device)
            times.append((time.perf_counter() - began) / repeats)
        forward, both = _slowest_of(times, device)
        found[f"{strategy}/{schedule}" + " masked" * masked] = HostTime(forward, max(both - forward, 0.0))
    communicator(group).received = counts
    return found


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# The kernels


class _KernelCalls(NamedTuple):
    """Both passes of one attention call, and the sizes that the cost model knows it by."""

    forward: Callable[[], object]
    backward: Callable[[], object]
    seen: float
    drift: float


def _bounds(mask: str | None, rows: int, keys: int, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
    """int32 ``start, stop [1, rows]``: all keys, keys so far, or a sixteenth of the keys; None for no mask."""
    if mask is None:
        return None, None
    row = torch.arange(rows, device=device)
    start = torch.zeros_like(row)
    stop = torch.full_like(row, keys)
    if mask == "growing":
        stop = (row + 1) * keys // rows
    elif mask == "sliding":
        width = max(keys // 16, 1)
        start = (keys - width) * row // max(rows - 1, 1)
        stop = start + width
    return start.int()[None], stop.int()[None]


def _kernel_calls(
    layout: HeadLayout, rows: int, keys: int, mask: str | None, device: torch.device, dtype: torch.dtype
) -> _KernelCalls:
    heads, kv_heads, head_dim = layout
    # As a projection writes them: sequence first, seen as heads first.
    q, dout = (torch.randn(1, rows, heads, head_dim, device=device, dtype=dtype).transpose(1, 2) for _ in range(2))
    k, v = (torch.randn(1, keys, kv_heads, head_dim, device=device, dtype=dtype).transpose(1, 2) for _ in range(2))
    start, stop = _bounds(mask, rows, keys, device)
    scale = head_dim**-0.5
    first = select_kernel("auto", Call.forward(q, k, mask is not None))
    kernel = select_kernel("auto", Call.backward(q, k, mask is not None))
    out, lse = first.forward(q, k, v, start, stop, scale)
    delta = None if kernel.needs_out else attention_delta(dout, out, None)
    seen, drift = float(keys), 0.0
    if start is not None and stop is not None:
        seen = float((stop - start).float().mean())
        drift = float(start.diff().abs().float().mean() + stop.diff().abs().float().mean()) if rows > 1 else 0.0
    return _KernelCalls(
        lambda: first.forward(q, k, v, start, stop, scale),
        lambda: kernel.backward(dout, q, k, v, out, lse, delta, start, stop, scale),
        seen,
        drift,
    )


def _tile(kernel: LocalKernel, head_dim: int, dtype: torch.dtype, masked: bool, device: torch.device) -> dict[str, Any]:
    """The tiles of a kernel, as far as known; what is not known the measured points correct."""
    if kernel.name == "triton":
        from ds_lvxattn.kernels.interval_forward import forward_config, is_hopper

        config = forward_config(head_dim, dtype.itemsize, masked, is_hopper(device))
        return {"tile_rows": config.block_m, "tile_keys": config.block_n, "packed": True, "splits_below": 1 << 30}
    if device.type == "cuda" and kernel.name != "math":
        return {"tile_rows": 128, "tile_keys": 128, "packed": False, "splits_below": FEW_TILES}
    return {"tile_rows": 1, "tile_keys": 1, "packed": False, "splits_below": 0}


def _kernels(
    profile: Profile,
    layouts: Sequence[HeadLayout],
    clock: _Clock,
    extent: Extent,
    device: torch.device,
    dtype: torch.dtype,
) -> Iterable[Kernel]:
    """The kernels that ``auto`` takes for the layouts, with and without a mask, by head size."""
    for head_dim in sorted({layout.head_dim for layout in layouts}):
        chosen = sorted({layout for layout in layouts if layout.head_dim == head_dim})
        for masked in (False, True):
            masks: tuple[str | None, ...] = ("all", "growing", "sliding") if masked else (None,)
            points: list[KernelPoint] = []
            for layout in chosen:
                for mask in masks:
                    found = _points(layout, mask, clock, extent, device, dtype)
                    points += found
            call = Call(device.type, dtype, chosen[0].heads, chosen[0].kv_heads, head_dim, masked)
            local = select_kernel("auto", call)
            kernel = Kernel(
                local.name, masked, head_dim, forward=1.0, backward=1.0, points=tuple(points),
                **_tile(local, head_dim, dtype, masked, device),
            )  # fmt: skip
            yield _with_rates(profile, kernel, dtype.itemsize)


def _points(
    layout: HeadLayout, mask: str | None, clock: _Clock, extent: Extent, device: torch.device, dtype: torch.dtype
) -> list[KernelPoint]:
    """Measured calls over the extent; at few rows also with a part of the heads, as head all-to-all has them."""
    some = HeadLayout(layout.heads // layout.kv_heads, 1, layout.head_dim)
    masks_narrow = mask in ("growing", "sliding")
    points = []
    for rows in extent.rows:
        for keys in extent.keys:
            variants = [layout]
            if some != layout and keys == extent.keys[1]:
                variants.append(some)
            for sizes in variants:
                operations = 4.0 * sizes.heads * sizes.head_dim * rows * keys
                if operations > extent.operations or (masks_narrow and keys == extent.keys[0] and rows > 512):
                    continue
                calls = _kernel_calls(sizes, rows, keys, mask, device, dtype)
                times = [
                    clock.seconds(call, many=operations * factor < 3e11)
                    for call, factor in ((calls.forward, 1.0), (calls.backward, 2.5))
                ]
                forward, backward = _slowest_of(times, device)
                points.append(
                    KernelPoint(rows, keys, sizes.heads, sizes.kv_heads, calls.seen, calls.drift, forward, backward)
                )
    return points


def _with_rates(profile: Profile, kernel: Kernel, element: int) -> Kernel:
    """Rates that make the formula right on average for the largest measured calls; points correct the rest."""
    rates = []
    for backward in (False, True):
        ratios = []
        for point in kernel.points:
            call = kernel_time.call_of(point, kernel, element)
            measured = point.backward if backward else point.forward
            if backward:  # see ``kernel_time._computed``
                measured -= kernel_time.moved_bytes(kernel, call, backward) / profile.memory_bandwidth
            busy = kernel_time.busy_operations(profile, kernel, call, backward)
            ratios.append((call.operations, busy / max(measured, 1e-7)))
        large = sorted(ratios)[-max(len(ratios) // 3, 1) :]
        rates.append(math.exp(statistics.fmean(math.log(rate) for _, rate in large)))
    return replace(kernel, forward=rates[0], backward=rates[1])


def main() -> None:
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


def start_on_device(local_rank: int) -> torch.device:
    """Start ``torch.distributed`` from the launcher's environment; this rank's device."""
    from ds_lvxattn.groups import start_distributed

    start_distributed()
    if not torch.cuda.is_available() or dist.get_backend() == "gloo":
        return torch.device("cpu")
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", local_rank)))
    return torch.device("cuda", torch.cuda.current_device())


if __name__ == "__main__":
    main()
