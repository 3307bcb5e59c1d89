"""Two levels: heads are redistributed inside a node, and a flat exchange runs between the ranks of equal place.

Each rank then has its share of the heads for all rows and keys of its node, and sees the other nodes as the ranks of a
group that hold the same heads: queries, or keys and values, cross once for a node. Head counts limit the ranks of a
node alone. Grids of one node, and of nodes of one rank, are the flat strategies.
"""

from __future__ import annotations

import math
from dataclasses import replace

from torch import Tensor

from ds_lvxattn.exchange.arguments import Attention, Exchange
from ds_lvxattn.exchange.shards import ShardLayout
from ds_lvxattn.exchange.strategies.gather import gather_attention
from ds_lvxattn.exchange.strategies.kv_gather import kv_gather_attention
from ds_lvxattn.exchange.strategies.kv_ring import kv_ring_attention
from ds_lvxattn.exchange.strategies.query_ring import ring_attention
from ds_lvxattn.exchange.strategies.routed import routed_attention
from ds_lvxattn.exchange.strategies.ulysses import redistributed_heads, ulysses_attention
from ds_lvxattn.kernels.settled import settled
from ds_lvxattn.kernels.torch_internals import never_compiled


def gather_between_nodes(q: Tensor, k: Tensor, v: Tensor, exchange: Exchange) -> tuple[Tensor, Tensor]:
    """Queries cross by ``gather``; see ``exchange.arguments``."""
    return _two_levels(q, k, v, exchange, gather_attention)


def ring_between_nodes(q: Tensor, k: Tensor, v: Tensor, exchange: Exchange) -> tuple[Tensor, Tensor]:
    """Queries cross by a ring; see ``exchange.arguments``."""
    return _two_levels(q, k, v, exchange, ring_attention)


def routed_between_nodes(q: Tensor, k: Tensor, v: Tensor, exchange: Exchange) -> tuple[Tensor, Tensor]:
    """Queries cross to where they see something; ``routes`` are those of the outer group."""
    return _two_levels(q, k, v, exchange, routed_attention)


def kv_ring_between_nodes(q: Tensor, k: Tensor, v: Tensor, exchange: Exchange) -> tuple[Tensor, Tensor]:
    """Keys and values cross by a ring; see ``exchange.arguments``."""
    return _two_levels(q, k, v, exchange, kv_ring_attention)


def kv_gather_between_nodes(q: Tensor, k: Tensor, v: Tensor, exchange: Exchange) -> tuple[Tensor, Tensor]:
    """Keys and values are gathered across nodes; see ``exchange.arguments``."""
    return _two_levels(q, k, v, exchange, kv_gather_attention)


_of_nodes = settled(ShardLayout.of_nodes)


@never_compiled  # as for ``ulysses_attention``
def _two_levels(q: Tensor, k: Tensor, v: Tensor, exchange: Exchange, across: Attention) -> tuple[Tensor, Tensor]:
    """``across`` between nodes, of this rank's share of the heads of its node."""
    assert exchange.grid is not None
    inner, outer = exchange.grid
    if inner.ranks == 1:
        return across(q, k, v, exchange)
    if outer.ranks == 1:
        return ulysses_attention(q, k, v, exchange)
    size, layout, interval, groups = inner.ranks, exchange.layout, exchange.interval, exchange.head_groups
    between = replace(
        exchange,
        comm=outer,
        layout=_of_nodes(layout, size),
        interval=None if interval is None else interval.of_nodes(layout.q, size),
        grid=None,
    )

    def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        # Of the heads that are left. They are the same on all ranks of the outer group, which have equal places.
        left = None if groups is None else (math.gcd(groups[0], k.shape[1]), math.gcd(groups[1], k.shape[1]))
        return across(q, k, v, replace(between, head_groups=left))

    members = range(outer.rank * size, (outer.rank + 1) * size)
    return redistributed_heads(q, k, v, inner, layout, members, attend)
