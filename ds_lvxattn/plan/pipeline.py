"""How the ``gather`` schedule of query exchange is cut into groups of key heads: pure functions of sizes.

With ``G`` groups, ``1/G`` of the first transfer and of the last are not hidden behind computation. But each group has
its own launches, must fill the chip, and in the backward pass its gradients of K and V are copied into their place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

# What one H200 does with these kernels; the choice is coarse enough to hold on its neighbours. Throughput in operations
# a second; bytes a second of a copy into a slice of heads; seconds that the host needs to start a group, and that a
# group's small kernels and messages take on the device.
THROUGHPUT = 6e14
COPY = 1.4e12
HOST_SECONDS = 1e-3
DEVICE_SECONDS = 4e-5

# Bytes a second that a rank receives over NVLink in a collective of two H200, where nobody has measured the link.
NVLINK = 2.4e11

# Rows of a query tile and multiprocessors of the chips that kernels are tuned for; see ``_filled``.
TILE_ROWS = 128
MULTIPROCESSORS = 132


def head_groups(
    batch: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    element: int,
    q_lengths: Sequence[int],
    kv_lengths: Sequence[int],
    link: float = NVLINK,
) -> tuple[int, int]:
    """Groups of key heads of the forward and of the backward pass; both divide ``kv_heads``.

    Args:
        batch: sequences in the micro-batch.
        heads, kv_heads, head_dim: query heads, key heads, head size.
        element: bytes of an element.
        q_lengths, kv_lengths: query rows and keys of every rank.
        link: bytes a second that a rank receives.
    """
    ranks, rows, keys = len(q_lengths), max(q_lengths), max(kv_lengths)
    forward = 4.0 * batch * heads * head_dim * ranks * rows * keys / THROUGHPUT
    # Queries and outputs; in the backward pass their gradients.
    transfers = 2.0 * batch * (ranks - 1) * rows * heads * head_dim * element / link
    copy = 2 * 2.0 * batch * keys * kv_heads * head_dim * element / COPY
    tiles = batch * heads * -(-ranks * rows // TILE_ROWS)

    def forward_time(groups: int) -> float:
        idle = forward * (_filled(tiles) / _filled(tiles / groups) - 1)
        return transfers / groups + DEVICE_SECONDS * groups + max(idle, 0.0)

    def backward_time(groups: int) -> float:
        # Divided over tiles of keys, of which there are always enough.
        return transfers / groups + DEVICE_SECONDS * groups + (copy if groups > 1 else 0.0)

    def fastest(seconds: float, time: Callable[[int], float]) -> int:
        # No ``min`` with a key: torch.compile, which traces this, does not know it.
        best = 1
        for count in range(2, kv_heads + 1):
            if kv_heads % count == 0 and seconds / count > HOST_SECONDS and time(count) < time(best):
                best = count
        return best

    return fastest(forward, forward_time), fastest(2.5 * forward, backward_time)


def _filled(tiles: float) -> float:
    """Share of the chip that is busy while ``tiles`` tiles of equal work run, one a multiprocessor."""
    return tiles / (MULTIPROCESSORS * -(-tiles // MULTIPROCESSORS)) if tiles else 1.0


def keeps_queries(heads: int, kv_heads: int, q_lengths: Sequence[int], kv_lengths: Sequence[int]) -> bool:
    """Whether the gathered queries stay in memory until the backward pass, instead of travelling again.

    They do while they are the small part that the method takes them for: no larger than K and V of the largest shard.
    """
    return len(q_lengths) * max(q_lengths) * heads <= 2 * max(kv_lengths) * kv_heads


def keeps_keys(heads: int, kv_heads: int, q_lengths: Sequence[int], kv_lengths: Sequence[int]) -> bool:
    """Whether gathered K and V stay in memory until the backward pass: while no larger than queries and outputs."""
    return len(kv_lengths) * max(kv_lengths) * kv_heads <= max(q_lengths) * heads


def key_groups(kv_heads: int) -> int:
    """Groups of key heads in which K and V are gathered: a message's start and a group's kernels want few."""
    return next(count for count in (4, 2, 1) if kv_heads % count == 0)
