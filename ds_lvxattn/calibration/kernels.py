"""Times of the attention kernels that ``auto`` takes, over rows, keys and kinds of masks."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ds_lvxattn.calibration.clock import Clock, slowest_of
from ds_lvxattn.calibration.extent import Extent, HeadLayout
from ds_lvxattn.kernels.base import Call, Kernel
from ds_lvxattn.kernels.dispatch import FEW_TILES, KERNELS, select_kernel
from ds_lvxattn.kernels.pattern import UNKNOWN, pattern_of
from ds_lvxattn.kernels.triton.delta import attention_delta
from ds_lvxattn.plan import kernel_time
from ds_lvxattn.plan.profile import KernelPoint, KernelRates, Profile

FRAME_KEYS = 64
FAST = ("fa4", "cudnn", "triton")  # the others are never the fastest on a GPU


class _KernelCalls(NamedTuple):
    """Both passes of one attention call, and the sizes that the cost model knows it by."""

    forward: Callable[[], object]
    backward: Callable[[], object]
    seen: float
    drift: float


def _bounds(mask: str | None, rows: int, keys: int, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
    """int32 ``start, stop [1, rows]``: all keys, keys so far, a sixteenth of the keys, or a frame; None for no mask."""
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
    elif mask == "frame":
        start = row * (keys // FRAME_KEYS) // rows * FRAME_KEYS
        stop = start + FRAME_KEYS
    return start.int()[None], stop.int()[None]


def seen_and_drift(start: Tensor | None, stop: Tensor | None, keys: int) -> tuple[float, float]:
    """Of ``start, stop [B, rows]``: keys that a row sees, on average, and the drift of the ranges (``KernelPoint``)."""
    if start is None or stop is None:
        return float(keys), 0.0
    drift = float(start.diff().abs().float().mean() + stop.diff().abs().float().mean()) if start.shape[1] > 1 else 0.0
    return float((stop - start).float().mean()), drift


def kernel_calls(
    layout: HeadLayout,
    rows: int,
    keys: int,
    mask: str | None,
    device: torch.device,
    dtype: torch.dtype,
    name: str = "auto",
) -> _KernelCalls:
    heads, kv_heads, head_dim = layout
    # As a projection writes them: sequence first, seen as heads first.
    q, dout = (torch.randn(1, rows, heads, head_dim, device=device, dtype=dtype).transpose(1, 2) for _ in range(2))
    k, v = (torch.randn(1, keys, kv_heads, head_dim, device=device, dtype=dtype).transpose(1, 2) for _ in range(2))
    start, stop = _bounds(mask, rows, keys, device)
    pattern = UNKNOWN if start is None or stop is None else pattern_of(start.cpu(), stop.cpu())
    scale = head_dim**-0.5
    first = select_kernel(name, Call.forward(q, k, v, mask is not None, pattern=pattern))
    kernel = select_kernel(name, Call.backward(q, k, v, mask is not None, pattern=pattern))
    how = scale, None, pattern
    out, lse = first.forward(q, k, v, start, stop, *how)
    delta = None if kernel.needs_out else attention_delta(dout, out, None)
    seen, drift = seen_and_drift(start, stop, keys)
    return _KernelCalls(
        lambda: first.forward(q, k, v, start, stop, *how),
        lambda: kernel.backward(dout, q, k, v, out, lse, delta, start, stop, *how),
        seen,
        drift,
    )


def _tile(kernel: Kernel, head_dim: int, dtype: torch.dtype, masked: bool, device: torch.device) -> dict[str, Any]:
    """The tiles of a kernel, as far as known; what is not known the measured points correct."""
    if kernel.name == "triton":
        from ds_lvxattn.kernels.triton.tiles import forward_config, is_hopper

        config = forward_config((head_dim, head_dim), dtype.itemsize, UNKNOWN if masked else None, is_hopper(device))
        return {"tile_rows": config.block_m, "tile_keys": config.block_n, "packed": True, "splits_below": 1 << 30}
    if kernel.name == "fa4":
        return {"tile_rows": 128, "tile_keys": 128, "packed": True, "splits_below": 0 if masked else 1 << 30}
    if device.type == "cuda" and kernel.name != "math":
        return {"tile_rows": 128, "tile_keys": 128, "packed": False, "splits_below": FEW_TILES}
    return {"tile_rows": 1, "tile_keys": 1, "packed": False, "splits_below": 0}


def measured_kernels(
    profile: Profile,
    layouts: Sequence[HeadLayout],
    clock: Clock,
    extent: Extent,
    device: torch.device,
    dtype: torch.dtype,
) -> Iterable[KernelRates]:
    """The kernels that ``auto`` may take for the layouts, with and without a mask, by head size."""
    for head_dim in sorted({layout.head_dim for layout in layouts}):
        chosen = sorted({layout for layout in layouts if layout.head_dim == head_dim})
        for masked in (False, True):
            masks: tuple[str | None, ...] = ("all", "growing", "sliding", "frame") if masked else (None,)
            call = Call(device.type, dtype, chosen[0].heads, chosen[0].kv_heads, head_dim, masked)
            for local in _worth_measuring(call):
                points: list[KernelPoint] = []
                for layout in chosen:
                    for mask in masks:
                        points += _points(layout, mask, clock, extent, device, dtype, local.name)
                kernel = KernelRates(
                    local.name, masked, head_dim, forward=1.0, backward=1.0, points=tuple(points),
                    **_tile(local, head_dim, dtype, masked, device),
                )  # fmt: skip
                yield with_rates(profile, kernel, dtype.itemsize)


def _worth_measuring(call: Call) -> list[Kernel]:
    """What ``auto`` takes for ``call``, and on a GPU every other fused kernel that can do it."""
    chosen = select_kernel("auto", call)
    others = [kernel for kernel in KERNELS if kernel.name in FAST and kernel.unsupported(call) is None]
    return [chosen, *(kernel for kernel in others if kernel is not chosen)]


def _points(
    layout: HeadLayout,
    mask: str | None,
    clock: Clock,
    extent: Extent,
    device: torch.device,
    dtype: torch.dtype,
    name: str,
) -> list[KernelPoint]:
    """Measured calls over the extent; at few rows also with a part of the heads, as head all-to-all has them."""
    some = HeadLayout(layout.heads // layout.kv_heads, 1, layout.head_dim)
    points, moves = [], mask in ("sliding", "frame")
    for rows in extent.rows:
        for keys in extent.keys:
            variants = [layout]
            if some != layout and keys == extent.keys[1]:
                variants.append(some)
            for sizes in variants:
                operations = 4.0 * sizes.heads * sizes.head_dim * rows * keys
                if operations > extent.operations or (moves and keys == extent.keys[0] and rows > 512):
                    continue
                calls = kernel_calls(sizes, rows, keys, mask, device, dtype, name)
                times = [
                    clock.seconds(call, many=operations * factor < 3e11)
                    for call, factor in ((calls.forward, 1.0), (calls.backward, 2.5))
                ]
                forward, backward = slowest_of(times, device)
                points.append(
                    KernelPoint(rows, keys, sizes.heads, sizes.kv_heads, calls.seen, calls.drift, forward, backward)
                )
    return points


def with_rates(profile: Profile, kernel: KernelRates, element: int) -> KernelRates:
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
