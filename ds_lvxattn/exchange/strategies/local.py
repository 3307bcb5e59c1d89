"""A rank attends to its own keys: one rank, or no key on any other."""

from __future__ import annotations

from torch import Tensor

from ds_lvxattn.exchange.arguments import Exchange
from ds_lvxattn.kernels.operator import local_attention


def attend_locally(q: Tensor, k: Tensor, v: Tensor, exchange: Exchange) -> tuple[Tensor, Tensor]:
    """Attention of the rank's rows over its own keys, which are all that there are (or of no samples); nothing is sent.

    Raises:
        ValueError: other ranks hold keys.
    """
    comm, keys = exchange.comm, exchange.layout.kv
    if q.shape[0] and keys.total > keys.lengths[comm.rank]:
        raise ValueError("strategy 'local' exchanges nothing, and other ranks hold keys; choose another strategy")
    return local_attention(
        q, k, v, *exchange.own_ranges(q.shape[2]), exchange.scale, exchange.kernel, exchange.softcap, exchange.pattern
    )  # fmt: skip
