"""Which heads each rank gets where the heads of a layer are redistributed. Pure functions of sizes; no torch."""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass


@dataclass(frozen=True)
class HeadShard:
    """The heads of one rank.

    Attributes:
        queries: its query heads.
        keys: the key heads that these read.
        parts: its heads as runs of ``(query heads, key heads)`` in each of which equally many query heads read a key
            head, as kernels take them.
    """

    queries: range
    keys: range
    parts: tuple[tuple[int, int], ...]


def divides_heads(heads: int, kv_heads: int, ranks: int) -> bool:
    """Whether all ranks get equally many query and key heads; key heads fewer than ranks may be shared by some."""
    return heads % ranks == 0 and (kv_heads % ranks == 0 or ranks % kv_heads == 0)


@functools.lru_cache(maxsize=256)
def head_shards(heads: int, kv_heads: int, ranks: int) -> tuple[HeadShard, ...]:
    """The heads of every rank: consecutive ones, at least one and none more than an equal share, rounded up.

    Within that, ranks end where the query heads of a key head do, so that few key heads go to several ranks.

    Args:
        heads, kv_heads: query heads, at least one a rank, and key heads, which divide them.
        ranks: ranks that share them.
    """
    group, most = heads // kv_heads, -(-heads // ranks)
    cuts = [0]
    for left in range(ranks - 1, 0, -1):
        first, last = max(cuts[-1] + 1, heads - left * most), min(cuts[-1] + most, heads - left)
        whole = last // group * group
        cuts.append(whole if whole >= first else last)
    return tuple(_shard(a, b, group) for a, b in itertools.pairwise([*cuts, heads]))


def busiest_shard(heads: int, kv_heads: int, ranks: int) -> HeadShard:
    """The shard with most query heads, and of these with most runs and key heads."""
    shards = head_shards(heads, kv_heads, ranks)
    return max(shards, key=lambda shard: (len(shard.queries), len(shard.parts), len(shard.keys)))


def _shard(first: int, last: int, group: int) -> HeadShard:
    """Query heads ``[first, last)``, ``group`` of which read a key head."""
    keys = range(first // group, -(-last // group))
    # Of each key head, those of its query heads that are here: fewer than the group at the two ends.
    counts = [min(last, (key + 1) * group) - max(first, key * group) for key in keys]
    runs = [(count, len(list(some))) for count, some in itertools.groupby(counts)]
    return HeadShard(range(first, last), keys, tuple((count * keys, keys) for count, keys in runs))
