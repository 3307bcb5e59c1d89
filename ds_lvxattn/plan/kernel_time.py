"""Time of one attention kernel call, from its shape: full tiles over multiprocessors, corrected by measured points.

The formula knows why small calls are slow (part-filled tiles, idle multiprocessors in the last round, keys that only a
part of a tile sees, memory traffic). What it does not know, each measured point says as a ratio of measured to
computed; between the points the ratio is interpolated over tiles, keys and the kind of the mask, so a call that was
measured is exact. Beyond them the ratio is that of the nearest.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from ds_lvxattn.plan.profile import KernelPoint, KernelRates, Profile

BACKWARD_OPERATIONS = 2.5
KEYS_FIRST = 128  # keys of a backward program; backward passes divide the keys over programs
MOST_SPLITS = 64


@dataclass(frozen=True)
class AttentionCall:
    """One rank's attention call.

    Attributes:
        batch, heads, kv_heads, rows, keys: its sizes.
        head_dim: head size; of keys and values that differ, the mean.
        seen: keys that a row sees, on average.
        drift: see ``KernelPoint``.
        element: bytes of an element.
    """

    batch: int
    heads: int
    kv_heads: int
    head_dim: float
    rows: float
    keys: float
    seen: float
    drift: float = 0.0
    element: int = 2

    @property
    def operations(self) -> float:
        """Operations on visible scores, forward."""
        return 4.0 * self.batch * self.heads * self.rows * self.seen * self.head_dim


def kernel_seconds(profile: Profile, kernel: KernelRates, call: AttentionCall, backward: bool) -> float:
    """Seconds on the device; a call without rows or keys takes none."""
    if min(call.batch, call.rows, call.keys) <= 0:
        return 0.0
    ratio = interpolated(_ratios(profile, kernel, call.element, backward), _place(kernel, call))
    return profile.launch + ratio * _computed(profile, kernel, call, backward)


class Place(NamedTuple):
    """Where a call lies among the measured ones: logarithms, to base 2.

    Attributes:
        tiles: row tiles.
        span: keys that a row tile computes.
        travel: how far the ranges of the rows move over all rows, in lengths of a range; 0 where all see the same.
    """

    tiles: float
    span: float
    travel: float


def _tiles(kernel: KernelRates, call: AttentionCall) -> tuple[float, float]:
    """Row tiles of a call, and query positions that a tile covers."""
    if kernel.packed:
        group = call.heads // call.kv_heads
        return call.batch * call.kv_heads * math.ceil(call.rows * group / kernel.tile_rows), kernel.tile_rows / group
    return call.batch * call.heads * math.ceil(call.rows / kernel.tile_rows), kernel.tile_rows


def _span(kernel: KernelRates, call: AttentionCall) -> float:
    """Keys that a row tile computes."""
    if not kernel.masked or kernel.name == "math" or call.seen >= call.keys:
        return call.keys  # ``math`` masks scores that it has computed
    positions = min(_tiles(kernel, call)[1], call.rows)
    return min(call.keys, call.seen + call.drift * positions / 2 + kernel.tile_keys)


def busy_operations(profile: Profile, kernel: KernelRates, call: AttentionCall, backward: bool) -> float:
    """Operations of a call with those that part-filled tiles and idle multiprocessors could have done meanwhile."""
    tiles, _ = _tiles(kernel, call)
    span, units = _span(kernel, call), profile.multiprocessors
    operations = 4.0 * tiles * kernel.tile_rows * span * call.head_dim
    if backward:
        lanes = call.batch * (call.kv_heads if kernel.packed else call.heads)
        return BACKWARD_OPERATIONS * operations * _rounds(lanes * math.ceil(call.keys / KEYS_FIRST), units)
    most = min(MOST_SPLITS, int(span // (8 * kernel.tile_keys)), math.ceil(4 * units / tiles))
    shares = range(1, max(most, 1) + 1) if tiles < min(kernel.splits_below, 4 * units) else (1,)
    return operations * min(_rounds(tiles * s, units) for s in shares)


def _computed(profile: Profile, kernel: KernelRates, call: AttentionCall, backward: bool) -> float:
    """Seconds by the formula alone."""
    rate = kernel.backward if backward else kernel.forward
    seconds = busy_operations(profile, kernel, call, backward) / rate
    moved = moved_bytes(kernel, call, backward) / profile.memory_bandwidth
    # A backward program loads its keys and stores their gradients before and after it computes; forward both overlap.
    return seconds + moved if backward else max(seconds, moved)


def moved_bytes(kernel: KernelRates, call: AttentionCall, backward: bool) -> float:
    """Bytes that a call reads and writes in memory."""
    row_bytes = call.batch * call.heads * call.rows * call.head_dim * call.element
    keys = min(call.keys, call.rows * _span(kernel, call))
    if not backward:
        return 2 * (row_bytes + call.batch * call.kv_heads * keys * call.head_dim * call.element)
    # K, V, dK, dV and, where the query heads of a key head each have their own dK and dV, adding those up.
    lanes = call.kv_heads if kernel.packed else call.heads
    return 4 * row_bytes + 5 * call.batch * lanes * keys * call.head_dim * call.element


def _rounds(items: float, units: int) -> float:
    """How much longer than evenly spread work ``items`` equal ones take that run in full rounds over ``units``."""
    return math.ceil(items / units) * units / items


def _place(kernel: KernelRates, call: AttentionCall) -> Place:
    span = max(_span(kernel, call), 1.0)
    travel = call.drift * call.rows / max(call.seen, 1.0)
    return Place(math.log2(_tiles(kernel, call)[0]), math.log2(span), math.log2(1 + travel))


@lru_cache(maxsize=256)
def _ratios(profile: Profile, kernel: KernelRates, element: int, backward: bool) -> tuple[tuple[Place, float], ...]:
    """For each measured point its place and the logarithm of measured over computed."""
    found = []
    for point in kernel.points:
        call = call_of(point, kernel, element)
        measured = (point.backward if backward else point.forward) - profile.launch
        computed = _computed(profile, kernel, call, backward)
        found.append((_place(kernel, call), math.log(max(measured, 1e-7) / computed)))
    return tuple(found)


def call_of(point: KernelPoint, kernel: KernelRates, element: int) -> AttentionCall:
    return AttentionCall(
        1, point.heads, point.kv_heads, kernel.head_dim, point.rows, point.keys, point.seen, point.drift, element
    )


def interpolated(points: Sequence[tuple[Sequence[float], float]], place: Sequence[float]) -> float:
    """Ratio at ``place``, moved into the range of the points: mean of theirs, by the inverse cube of the distance."""
    if not points:
        return 1.0
    inside = [
        min(max(x, min(p[axis] for p, _ in points)), max(p[axis] for p, _ in points)) for axis, x in enumerate(place)
    ]
    total = weights = 0.0
    for point, value in points:
        weight = 1.0 / (math.dist(point, inside) + 1e-3) ** 3
        total += weight * value
        weights += weight
    return math.exp(total / weights)
