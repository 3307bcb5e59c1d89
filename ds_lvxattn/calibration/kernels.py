"""Times of the attention kernels that ``auto`` takes, over rows, keys and kinds of masks."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ds_lvxattn.calibration.clock import Clock, slowest_of
from ds_lvxattn.calibration.extent import Extent, HeadLayout
from ds_lvxattn.calibration.progress import Progress
from ds_lvxattn.kernels.base import Call, Kernel, empty_results
from ds_lvxattn.kernels.dispatch import FEW_TILES, KERNELS, select_kernel
from ds_lvxattn.kernels.pattern import UNKNOWN, pattern_of
from ds_lvxattn.kernels.triton.delta import attention_delta
from ds_lvxattn.plan import kernel_time
from ds_lvxattn.plan.kernel_choice import FUSED
from ds_lvxattn.plan.profile import KernelPoint, KernelRates, Profile

FRAME_KEYS = 64


class Shape(NamedTuple):
    """An attention call of one sequence.

    Attributes:
        layout: its heads.
        rows, keys: query rows and keys.
        mask: ``all``, ``growing``, ``sliding`` or ``frame`` intervals; None for no mask.
    """

    layout: HeadLayout
    rows: int
    keys: int
    mask: str | None

    @property
    def operations(self) -> float:
        """Of the forward pass, were every key visible."""
        return 4.0 * self.layout.heads * self.layout.head_dim * self.rows * self.keys


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


def kernel_calls(shape: Shape, device: torch.device, dtype: torch.dtype, name: str) -> _KernelCalls:
    (q, k, v, dout, start, stop), how = _arguments(shape, device, dtype)
    first = select_kernel(name, Call.forward(q, k, v, start is not None, pattern=how.pattern))
    kernel = select_kernel(name, Call.backward(q, k, v, start is not None, pattern=how.pattern))
    out, lse = first.forward(q, k, v, start, stop, *how)
    delta = None if kernel.needs_out else attention_delta(dout, out, None)
    seen, drift = seen_and_drift(start, stop, shape.keys)
    return _KernelCalls(
        lambda: first.forward(q, k, v, start, stop, *how),
        lambda: kernel.backward(dout, q, k, v, out, lse, delta, start, stop, *how),
        seen,
        drift,
    )


def compile_calls(shape: Shape, name: str, backward: bool, device: torch.device, dtype: torch.dtype) -> None:
    """One call of one pass, for what it compiles: the backward pass takes results that no forward pass made."""
    (q, k, v, dout, start, stop), how = _arguments(shape, device, dtype)
    call = Call.backward if backward else Call.forward
    kernel = select_kernel(name, call(q, k, v, start is not None, pattern=how.pattern))
    if backward:
        out, lse = (x.zero_() for x in empty_results(q, v))
        delta = None if kernel.needs_out else attention_delta(dout, out, None)
        kernel.backward(dout, q, k, v, out, lse, delta, start, stop, *how)
    else:
        kernel.forward(q, k, v, start, stop, *how)
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class _How(NamedTuple):
    scale: float
    softcap: None
    pattern: str


def _arguments(shape: Shape, device: torch.device, dtype: torch.dtype) -> tuple[tuple[Any, ...], _How]:
    """``q, k, v, dout, start, stop``, and what else kernels take."""
    (heads, kv_heads, head_dim), rows, keys, mask = shape
    # As a projection writes them: sequence first, seen as heads first.
    q, dout = (torch.randn(1, rows, heads, head_dim, device=device, dtype=dtype).transpose(1, 2) for _ in range(2))
    k, v = (torch.randn(1, keys, kv_heads, head_dim, device=device, dtype=dtype).transpose(1, 2) for _ in range(2))
    start, stop = _bounds(mask, rows, keys, device)
    pattern = UNKNOWN if start is None or stop is None else pattern_of(start.cpu(), stop.cpu())
    return (q, k, v, dout, start, stop), _How(head_dim**-0.5, None, pattern)


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


class Measured(NamedTuple):
    """What is measured of a kernel at one head size.

    Attributes:
        kernel: the kernel.
        masked: with a mask or without.
        shapes: of the calls.
    """

    kernel: Kernel
    masked: bool
    shapes: tuple[Shape, ...]


def to_measure(
    layouts: Iterable[HeadLayout], extent: Extent, device: torch.device, dtype: torch.dtype
) -> list[Measured]:
    """The kernels that ``auto`` may take for the layouts, with and without a mask, by head size."""
    found = []
    by_size = sorted(set(layouts), key=lambda layout: layout.head_dim)
    for head_dim, some in itertools.groupby(by_size, key=lambda layout: layout.head_dim):
        chosen = sorted(some)
        for masked in (False, True):
            masks: tuple[str | None, ...] = ("all", "growing", "sliding", "frame") if masked else (None,)
            # Layouts that have the same heads a key head share what is measured with one key head.
            shapes = tuple(
                dict.fromkeys(s for layout in chosen for mask in masks for s in _shapes(layout, mask, extent))
            )
            call = Call(device.type, dtype, chosen[0].heads, chosen[0].kv_heads, head_dim, masked)
            found += [Measured(kernel, masked, shapes) for kernel in _worth_measuring(call) if shapes]
    return found


def measured_kernels(
    profile: Profile,
    measured: Sequence[Measured],
    clock: Clock,
    device: torch.device,
    dtype: torch.dtype,
    progress: Progress,
) -> Iterator[KernelRates]:
    """Every one of ``measured``, with its points."""
    for kernel, masked, shapes in measured:
        head_dim = shapes[0].layout.head_dim
        kind = "with intervals" if masked else "without a mask"
        with progress.part(f"{kernel.name} {kind}, head size {head_dim}: both passes of {len(shapes)} calls"):
            points = tuple(_point(shape, clock, device, dtype, kernel.name) for shape in shapes)
        rates = KernelRates(
            kernel.name, masked, head_dim, forward=1.0, backward=1.0, points=points,
            **_tile(kernel, head_dim, dtype, masked, device),
        )  # fmt: skip
        yield with_rates(profile, rates, dtype.itemsize)


def _worth_measuring(call: Call) -> list[Kernel]:
    """What ``auto`` takes for ``call``, and on a GPU every other fused kernel that can do it."""
    chosen = select_kernel("auto", call)
    others = [kernel for kernel in KERNELS if kernel.name in FUSED and kernel.unsupported(call) is None]
    return [chosen, *(kernel for kernel in others if kernel is not chosen)]


def _shapes(layout: HeadLayout, mask: str | None, extent: Extent) -> Iterator[Shape]:
    """Calls over the extent; with one number of keys also with a part of the heads, as head all-to-all has them."""
    some = HeadLayout(layout.heads // layout.kv_heads, 1, layout.head_dim)
    for rows, keys in itertools.product(extent.rows, extent.keys):
        for heads in (layout, some) if keys == extent.keys[1] else (layout,):
            shape = Shape(heads, rows, keys, mask)
            if mask in ("sliding", "frame") and keys == extent.keys[0] and rows > 512:
                continue
            if shape.operations <= extent.operations:
                yield shape


def _point(shape: Shape, clock: Clock, device: torch.device, dtype: torch.dtype, name: str) -> KernelPoint:
    calls = kernel_calls(shape, device, dtype, name)
    visible = shape.operations * calls.seen / shape.keys
    times = [
        clock.seconds(call, many=visible * factor < 3e11, apart=True)
        for call, factor in ((calls.forward, 1.0), (calls.backward, 2.5))
    ]
    forward, backward = slowest_of(times, device)
    sizes = shape.layout
    return KernelPoint(shape.rows, shape.keys, sizes.heads, sizes.kv_heads, calls.seen, calls.drift, forward, backward)


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
