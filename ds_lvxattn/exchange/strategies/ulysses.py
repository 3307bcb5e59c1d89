"""DeepSpeed-Ulysses (arXiv 2309.14509): sequence shards become head shards, through DeepSpeed's own module.

``deepspeed.sequence.layer.DistributedAttention`` does the exchange and its backward pass; between its
all-to-alls stands the registered local attention operator, so intervals and every kernel work here too.
Heads that the ranks do not divide are exchanged by ``exchange/uneven_heads.py``.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ds_lvxattn.exchange.arguments import Attend, Exchange
from ds_lvxattn.exchange.comm import Communicator
from ds_lvxattn.exchange.shards import SequenceShards, ShardLayout
from ds_lvxattn.exchange.uneven_heads import redistributed_uneven_heads
from ds_lvxattn.kernels.operator import local_attention
from ds_lvxattn.kernels.settled import settled_tables
from ds_lvxattn.kernels.torch_internals import never_compiled
from ds_lvxattn.plan.head_shards import divides_heads


# Never part of a compiled graph: DeepSpeed's exchange and the count of its bytes, in the backward pass too, are of
# tensors with data.
@never_compiled
def ulysses_attention(q: Tensor, k: Tensor, v: Tensor, exchange: Exchange) -> tuple[Tensor, Tensor]:
    """Attention of the rank's rows over the keys of all ranks; see ``exchange.arguments``."""
    layout = exchange.layout
    start, stop = _ranges_in_order(exchange)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return local_attention(
            q, k, v, start, stop, exchange.scale, exchange.kernel, exchange.softcap, exchange.pattern
        )

    return redistributed_heads(q, k, v, exchange.comm, layout, range(layout.q.ranks), attend)


def _ranges_in_order(exchange: Exchange) -> tuple[Tensor | None, Tensor | None]:
    """Keys that the rows of all ranks see, ``[B, rows]``, in the order of the sequence."""
    interval, shards = exchange.interval, exchange.layout.q
    if interval is None:
        return None, None

    def in_order() -> tuple[Tensor, Tensor]:
        order = padded_order(shards, range(shards.ranks), interval.start.device)
        start, stop = (_select(x.transpose(0, 1).flatten(1, 2), order) for x in (interval.start, interval.stop))
        return start, stop

    return interval.once(("in the order of", shards), in_order)


def redistributed_heads(
    q: Tensor, k: Tensor, v: Tensor, comm: Communicator, layout: ShardLayout, members: range, attend: Attend
) -> tuple[Tensor, Tensor]:
    """``attend`` with this rank's share of the heads, for all rows and keys of the ranks of ``comm``.

    Args:
        q, k, v: the rank's own rows and keys with all heads.
        layout: shards of queries and keys over ``comm`` and maybe more ranks.
        members: the ranks of ``layout`` that ``comm`` consists of.
        attend: takes q, k and v, ``[B, heads, rows or keys, D or D_v]`` in the order of the sequence; gives output and
            log-sum-exp. Called once where the ranks divide the heads.

    Returns:
        Output and log-sum-exp of the rank's own rows with all heads.
    """
    if not divides_heads(q.shape[1], k.shape[1], comm.ranks):
        return redistributed_uneven_heads(q, k, v, comm, layout, members, attend)
    if k.shape[1] < comm.ranks:
        # Each rank needs a key head of its own: the group's heads are sent to every rank that shares one.
        k, v = (x.repeat_interleave(comm.ranks // k.shape[1], dim=1) for x in (k, v))
    own, (rows, keys) = q.shape[2], (_longest(shards, members) for shards in (layout.q, layout.kv))
    local = _HeadShard(comm, layout, members, attend)
    distributed = _distributed_attention(comm)
    context = distributed(_padded(q, rows), _padded(k, keys), _padded(v, keys), 0, None, local)
    out = comm.account(context, "outputs")
    lse = comm.account(_sequence_shard(local.lse, comm), "lse")
    return out[:, :own].transpose(1, 2), lse[:, :own, :, 0].transpose(1, 2).contiguous()


class _HeadShard:
    """Attention of this rank's heads over the whole sequence: what DistributedAttention calls in the middle."""

    def __init__(self, comm: Communicator, layout: ShardLayout, members: range, attend: Attend) -> None:
        self.comm, self.layout, self.members, self.attend = comm, layout, members, attend
        self.lse: Tensor

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """``[B, n * s_max, heads of this rank, D]``, rank-major and padded; the result likewise."""
        comm = self.comm
        q = comm.account(q, "queries")
        k, v = comm.account(k, "keys and values"), comm.account(v, "keys and values")
        q_order, kv_order = (padded_order(x, self.members, q.device) for x in (self.layout.q, self.layout.kv))
        padded_rows = q.shape[1]
        q, k, v = (_select(x, order) for x, order in ((q, q_order), (k, kv_order), (v, kv_order)))
        out, lse = self.attend(*(x.transpose(1, 2) for x in (q, k, v)))
        # The log-sum-exp stays float32 beside bf16 outputs, so it makes the way back on its own.
        self.lse = _place(lse.transpose(1, 2).unsqueeze(-1), q_order, padded_rows)
        return _place(out.transpose(1, 2), q_order, padded_rows)


def _distributed_attention(comm: Communicator) -> torch.nn.Module:
    """DeepSpeed's module, once a group. It hands its last argument, a ``_HeadShard``, to what it calls midway."""
    if "DistributedAttention" not in comm.made:
        from deepspeed.sequence.layer import DistributedAttention

        def attend(q: Tensor, k: Tensor, v: Tensor, local: _HeadShard) -> Tensor:
            return local(q, k, v)

        _start_deepspeed_comm()
        comm.made["DistributedAttention"] = DistributedAttention(attend, comm.group, scatter_idx=2, gather_idx=1)
    return comm.made["DistributedAttention"]


def _sequence_shard(x: Tensor, comm: Communicator) -> Tensor:
    """``[B, S, heads of this rank, 1]`` to ``[B, s, all heads, 1]`` by DeepSpeed's own exchange."""
    from deepspeed.sequence.layer import _SeqAllToAll

    return _SeqAllToAll.apply(comm.group, x, 1, 2, 0)


@functools.cache
def _start_deepspeed_comm() -> None:
    """DeepSpeed sends through its own front end, which a caller who only started torch.distributed lacks."""
    import deepspeed.comm

    from ds_lvxattn.groups import start_distributed

    if not deepspeed.comm.is_initialized():
        start_distributed(torch.distributed.get_backend())


def _longest(shards: SequenceShards, members: range) -> int:
    """Tokens of the longest shard of ``members``; at least one, as DeepSpeed's exchange takes no empty tensors."""
    return max(1, *(shards.lengths[rank] for rank in members))


def _padded(x: Tensor, length: int) -> Tensor:
    """``[B, H, s, D]`` to ``[B, length, H, D]``: DeepSpeed's exchange wants even shards."""
    missing = length - x.shape[2]
    x = x.transpose(1, 2)
    return torch.nn.functional.pad(x, (0, 0, 0, 0, 0, missing)) if missing else x


@settled_tables
def padded_order(shards: SequenceShards, members: range, device: torch.device) -> Tensor | None:
    """Where the tokens of ``members`` lie in their rank-major sequence, padded to the longest; None: in place."""
    order = shards.order_from_padded(members, _longest(shards, members))
    return None if order is None else torch.tensor(order, device=device)


def _select(x: Tensor, order: Tensor | None) -> Tensor:
    """Rank-major padded tokens (dim 1) to the order of the sequence without padding."""
    return x if order is None else x.index_select(1, order)


def _place(x: Tensor, order: Tensor | None, padded: int) -> Tensor:
    """The inverse of ``_select``; padding becomes zeros."""
    if order is None:
        return x
    return x.new_zeros((x.shape[0], padded, *x.shape[2:])).index_copy(1, order, x)
