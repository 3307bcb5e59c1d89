"""How the ``gather`` schedule of query exchange is cut into groups of key heads: pure functions of sizes.

With ``G`` groups, ``1/G`` of the first transfer and of the last are not hidden behind computation. But a group must
still fill the chip, and hide the transfers of its neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence

# Operations of a group's forward pass below which cutting costs more than it hides: 1 ms of an H200. Shorter kernels
# leave multiprocessors idle at their ends, which transfers of a few tens of microseconds do not make up for.
GROUP_OPERATIONS = 6e11

# Rows of a query tile and multiprocessors of the chips that kernels are tuned for; see ``_filled``.
TILE_ROWS = 128
MULTIPROCESSORS = 132


def head_groups(
    batch: int, heads: int, kv_heads: int, head_dim: int, q_lengths: Sequence[int], kv_lengths: Sequence[int]
) -> tuple[int, int]:
    """Groups of key heads of the forward and of the backward pass; both divide ``kv_heads``.

    Args:
        batch: sequences in the micro-batch.
        heads, kv_heads, head_dim: query heads, key heads, head size.
        q_lengths, kv_lengths: query rows and keys of every rank.
    """
    rows = len(q_lengths) * max(q_lengths)
    operations = 4.0 * batch * heads * head_dim * rows * max(kv_lengths)
    most = max(1, int(operations / GROUP_OPERATIONS))
    divisors = [count for count in range(1, kv_heads + 1) if kv_heads % count == 0 and count <= most]
    tiles = batch * heads * -(-rows // TILE_ROWS)
    # The backward pass is divided over tiles of keys, of which there are always enough.
    forward = max(count for count in divisors if count == 1 or _filled(tiles // count) >= 0.97 * _filled(tiles))
    return forward, max(divisors)


def _filled(tiles: int) -> float:
    """Share of the chip that is busy while ``tiles`` tiles of equal work run, one a multiprocessor."""
    return tiles / (MULTIPROCESSORS * -(-tiles // MULTIPROCESSORS)) if tiles else 1.0


def keeps_queries(heads: int, kv_heads: int, q_lengths: Sequence[int], kv_lengths: Sequence[int]) -> bool:
    """Whether the gathered queries stay in memory until the backward pass, instead of travelling again.

    They do while they are the small part that the method takes them for: no larger than K and V of the largest shard.
    """
    return len(q_lengths) * max(q_lengths) * heads <= 2 * max(kv_lengths) * kv_heads
