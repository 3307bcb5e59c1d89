"""What every mode's attention function takes: ``(q, k, v, exchange) -> (out, lse)``.

Differentiable attention of the rank's own rows ``q [B, H_q, s_q, D]`` over the keys of all ranks, of which ``k
[B, H_kv, s_kv, D]`` and ``v [B, H_kv, s_kv, D_v]`` are its own; ``out [B, H_q, s_q, D_v]`` and the natural log-sum-exp
``lse [B, H_q, s_q]``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ds_lvxattn.exchange.comm import Communicator
from ds_lvxattn.exchange.grid import Grid
from ds_lvxattn.exchange.interval import KVInterval
from ds_lvxattn.exchange.routes import Routes
from ds_lvxattn.exchange.shards import ShardLayout
from ds_lvxattn.kernels.pattern import UNKNOWN


@dataclass(frozen=True)
class Exchange:
    """Everything about an attention call but its tensors.

    Args:
        comm: communicator of the sequence-parallel group.
        layout: shards of queries and keys, the same on every rank.
        interval: the key ranges of the query rows of every rank, ``[n, B, s_max]``, padded to the longest shard (for
            replicated queries ``[1, B, s_q]``), and the ranges of a row behind where they are several; None when every
            key is visible.
        scale: factor of the scores.
        kernel: ``auto`` or a local kernel's name.
        head_groups: groups of key heads of the forward and the backward pass that collectives pipeline; None chooses
            from sizes.
        keep_queries: whether ``gather`` and ``routed`` keep the queries of other ranks for the backward pass rather
            than have them sent again; None chooses from sizes.
        routes: which rows travel where, for ``routed``; None makes them from the interval.
        grid: both levels of the group, for the modes that know them.
        softcap: soft cap of the scores, ``softcap * tanh(scale * q k / softcap)``; None: none.
        gradient_parts: for replicated queries, gradients of output and queries are parts that add up over the ranks.
    """

    comm: Communicator
    layout: ShardLayout
    interval: KVInterval | None
    scale: float
    kernel: str = "auto"
    head_groups: tuple[int, int] | None = None
    keep_queries: bool | None = None
    routes: Routes | None = None
    grid: Grid | None = None
    softcap: float | None = None
    gradient_parts: bool = False

    @property
    def pattern(self) -> str:
        """Of the ranges, as far as the kernels' tiles depend on it; see ``kernels/pattern.py``."""
        return UNKNOWN if self.interval is None else self.interval.pattern

    @property
    def settings(self) -> tuple[float, float | None, str, str]:
        """What every operator of ``kernels/differentiable.py`` takes behind its tensors, ahead of its own settings."""
        return self.scale, self.softcap, self.kernel, self.pattern

    @property
    def local_ranges(self) -> tuple[Tensor | None, Tensor | None]:
        """Keys of this rank that the rows of every rank see, ``[B, n * s_max, ...]``."""
        return (None, None) if self.interval is None else self.interval.local_to(self.layout.kv, self.comm.rank)

    def own_ranges(self, rows: int) -> tuple[Tensor | None, Tensor | None]:
        """Global key positions that the rank's own ``rows`` rows see, ``[B, rows]``."""
        return (None, None) if self.interval is None else self.interval.rows_of(self.comm.rank, rows)


Attention = Callable[[Tensor, Tensor, Tensor, Exchange], tuple[Tensor, Tensor]]
# The same with everything but the tensors settled, for whichever heads it is given.
Attend = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
