"""What a sequence-parallel strategy is: one exchange pattern around the local attention kernels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from ds_lvxattn.exchange.comm import Communicator
from ds_lvxattn.exchange.interval import KVInterval
from ds_lvxattn.exchange.routes import Routes
from ds_lvxattn.exchange.shards import ShardLayout


@dataclass(frozen=True)
class Exchange:
    """Everything about an attention call but its tensors.

    Args:
        comm: communicator of the sequence-parallel group.
        layout: shards of queries and keys, the same on every rank.
        interval: the key ranges of the query rows of every rank, ``[n, B, s_max]``, padded to the longest shard (for
            replicated queries ``[1, B, s_q]``); None when every key is visible.
        scale: factor of the scores.
        kernel: ``auto`` or a local kernel's name.
        schedule: ``auto`` or a schedule's name, for strategies that have several.
        replicated: every rank holds all the queries.
        head_groups: groups of key heads of the forward and the backward pass that ``gather`` pipelines; None chooses
            from sizes.
        keep_queries: whether ``gather`` and ``routed`` keep the queries of other ranks for the backward pass rather
            than have them sent again; None chooses from sizes.
        routes: which rows travel where, for ``routed``.
        gradient_parts: for replicated queries, gradients of output and queries are parts that add up over the ranks.
    """

    comm: Communicator
    layout: ShardLayout
    interval: KVInterval | None
    scale: float
    kernel: str = "auto"
    schedule: str = "auto"
    replicated: bool = False
    head_groups: tuple[int, int] | None = None
    keep_queries: bool | None = None
    routes: Routes | None = None
    gradient_parts: bool = False

    @property
    def local_ranges(self) -> tuple[Tensor | None, Tensor | None]:
        """Keys of this rank that the rows of every rank see, ``[B, n * s_max]``."""
        return (None, None) if self.interval is None else self.interval.local_to(self.layout.kv, self.comm.rank)

    @property
    def bounds(self) -> tuple[Tensor | None, Tensor | None]:
        """``start, stop`` of ``interval``."""
        return (None, None) if self.interval is None else (self.interval.start, self.interval.stop)


class Strategy(Protocol):
    """A sequence-parallel strategy.

    Attributes:
        name: its value of the configuration key ``strategy``.
        schedules: values of the configuration key ``schedule`` that it takes, besides ``auto``.
    """

    @property
    def name(self) -> str: ...

    @property
    def schedules(self) -> tuple[str, ...]: ...

    def unsupported(self, heads: int, kv_heads: int, ranks: int, replicated: bool) -> str | None:
        """Why it cannot run a layer of these sizes (and what to use instead), or None when it can."""

    def attention(self, q: Tensor, k: Tensor, v: Tensor, exchange: Exchange) -> tuple[Tensor, Tensor]:
        """Differentiable attention of the rank's own rows over the keys of all ranks.

        ``q [B, H_q, s_q, D]``, ``k, v [B, H_kv, s_kv, D]``; returns ``out`` like ``q`` and the natural
        log-sum-exp ``[B, H_q, s_q]``.
        """
