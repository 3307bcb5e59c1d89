"""LV-XAttn (arXiv 2502.02406): keys and values stay where they are, the small queries are exchanged."""

from __future__ import annotations

from torch import Tensor

from ds_lvxattn.exchange.base import Exchange
from ds_lvxattn.exchange.strategies.gather import gather_attention
from ds_lvxattn.exchange.strategies.query_ring import ring_attention
from ds_lvxattn.exchange.strategies.replicated import replicated_attention
from ds_lvxattn.exchange.strategies.routed import routed_attention


class LVXAttn:
    """Query exchange. Works for any head counts, and for more ranks than key heads."""

    name = "lv_xattn"
    schedules = ("gather", "ring", "routed")

    def unsupported(self, heads: int, kv_heads: int, ranks: int, replicated: bool) -> str | None:
        return None

    def attention(self, q: Tensor, k: Tensor, v: Tensor, exchange: Exchange) -> tuple[Tensor, Tensor]:
        if exchange.replicated:
            return replicated_attention(q, k, v, exchange)
        if exchange.schedule == "ring":
            return ring_attention(q, k, v, exchange)
        # Without masks every row sees keys of every rank: what is routed is then all that there is to gather.
        if exchange.schedule == "routed" and exchange.interval is not None:
            return routed_attention(q, k, v, exchange)
        # Gather needs two messages where the ring needs 2(n - 1), and sends the queries once, not again backward.
        return gather_attention(q, k, v, exchange)
