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
MOST_KEY_GROUPS = 8

# Bytes a second that a rank receives over NVLink in a collective of two H200, where nobody has measured the link.
NVLINK = 2.4e11

# Rows of a query tile, keys of a key tile; multiprocessors of the chips that kernels are tuned for; see ``_filled``.
TILE_ROWS = 128
MULTIPROCESSORS = 132
FEW_ROUNDS = 4  # of tiles in a backward pass; of more, the last one does not count


def mean_head_dim(head_dim: int, value_dim: int | None) -> float:
    """The head size of keys and of values (None: the same), where their mean counts."""
    return head_dim if value_dim is None else (head_dim + value_dim) / 2


def head_groups(
    batch: int,
    heads: int,
    kv_heads: int,
    head_dim: float,
    element: int,
    q_lengths: Sequence[int],
    kv_lengths: Sequence[int],
    link: float = NVLINK,
    masked: bool = False,
) -> tuple[int, int]:
    """Groups of key heads of the forward and of the backward pass; both divide ``kv_heads``.

    Args:
        batch: sequences in the micro-batch.
        heads, kv_heads, head_dim: query heads, key heads, ``mean_head_dim``.
        element: bytes of an element.
        q_lengths, kv_lengths: query rows and keys of every rank.
        link: bytes a second that a rank receives.
        masked: whether rows see intervals: the kernels for them take the query heads of a key head together.
    """
    ranks, rows, keys = len(q_lengths), max(q_lengths), max(kv_lengths)
    forward = 4.0 * batch * heads * head_dim * ranks * rows * keys / THROUGHPUT
    # Queries and outputs; in the backward pass their gradients.
    transfers = 2.0 * batch * (ranks - 1) * rows * heads * head_dim * element / link
    copy = 2 * 2.0 * batch * keys * kv_heads * head_dim * element / COPY
    tiles, key_tiles = batch * heads * -(-ranks * rows // TILE_ROWS), batch * kv_heads * -(-keys // TILE_ROWS)

    def forward_time(groups: int) -> float:
        idle = forward * (_filled(tiles) / _filled(tiles / groups) - 1)
        return transfers / groups + DEVICE_SECONDS * groups + max(idle, 0.0)

    def backward_time(groups: int) -> float:
        # Divided over tiles of keys. Of short shards a kernel that takes the query heads together has few.
        few = masked and key_tiles / groups < FEW_ROUNDS * MULTIPROCESSORS
        idle = 2.5 * forward * (_filled(key_tiles) / _filled(key_tiles / groups) - 1) if few else 0.0
        return transfers / groups + DEVICE_SECONDS * groups + (copy if groups > 1 else 0.0) + max(idle, 0.0)

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


def key_groups(
    batch: int,
    heads: int,
    kv_heads: int,
    head_dim: float,
    element: int,
    q_lengths: Sequence[int],
    kv_lengths: Sequence[int],
    link: float = NVLINK,
) -> tuple[int, int]:
    """Groups of key heads in which K and V are gathered, forward and backward; arguments as of ``head_groups``.

    What of the first group arrives and of the last leaves is not hidden; the rest is where kernels take longer.
    """
    ranks, rows, keys = len(q_lengths), max(q_lengths), max(kv_lengths)
    forward = 4.0 * batch * heads * head_dim * rows * ranks * keys / THROUGHPUT
    crossing = 2.0 * batch * (ranks - 1) * keys * kv_heads * head_dim * element / link
    again = 0.0 if keeps_keys(heads, kv_heads, q_lengths, kv_lengths) else crossing

    def fewest(kernels: float, transfers: float) -> int:
        best, least = 1, kernels + transfers
        for count in range(2, min(kv_heads, MOST_KEY_GROUPS) + 1):
            hidden = max(kernels, transfers * (count - 1) / count)
            seconds = max(transfers / count + hidden + DEVICE_SECONDS * count, HOST_SECONDS * count)
            if kv_heads % count == 0 and seconds < least:
                best, least = count, seconds
        return best

    return fewest(forward, crossing), fewest(2.5 * forward, crossing + again)
