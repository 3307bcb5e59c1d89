"""Sequence shards become head shards where the ranks do not divide the heads: one all-to-all of uneven parts each way.

A rank gets some consecutive query heads and the key heads that they read (``plan/head_shards.py``). A key head that
several ranks read goes to each of them, and its gradients are added up on the rank of the keys. Nothing is padded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ds_lvxattn.exchange.arguments import Attend
from ds_lvxattn.exchange.comm import AllToAllTensor, Communicator
from ds_lvxattn.exchange.shards import SequenceShards, ShardLayout
from ds_lvxattn.kernels.base import lse_dtype
from ds_lvxattn.kernels.settled import settled_tables
from ds_lvxattn.plan.head_shards import head_shards


def redistributed_uneven_heads(
    q: Tensor, k: Tensor, v: Tensor, comm: Communicator, layout: ShardLayout, members: range, attend: Attend
) -> tuple[Tensor, Tensor]:
    """``redistributed_heads`` of ``exchange/strategies/ulysses.py``, for any heads of which each rank gets one.

    ``attend`` is called for each run of heads in which equally many query heads read a key head: at most three times.
    """
    shards = head_shards(q.shape[1], k.shape[1], comm.ranks)
    rows = head_division(tuple(shard.queries for shard in shards), layout.q, members, q.device)
    keys = head_division(tuple(shard.keys for shard in shards), layout.kv, members, q.device)
    names = ("queries", "keys and values", "keys and values")
    q, k, v = redistribute(comm, names, (rows, keys, keys), True, q, k, v)
    # A split's backward pass is one concatenation, where a slice's fills a whole tensor.
    query_heads, key_heads = zip(*shards[comm.rank].parts, strict=True)
    parts = zip(q.split(query_heads, dim=1), k.split(key_heads, dim=1), v.split(key_heads, dim=1), strict=True)
    outs, lses = zip(*(attend(*part) for part in parts), strict=True)
    out, lse = (x[0] if len(x) == 1 else torch.cat(x, dim=1) for x in (outs, lses))
    out, lse = redistribute(comm, ("outputs", "lse"), (rows, rows), False, out, lse.unsqueeze(-1))
    return out, lse.squeeze(-1).contiguous()


@dataclass(frozen=True)
class HeadDivision:
    """Heads and tokens of one sequence, of every rank of a group.

    Attributes:
        heads: those of each rank, ascending; ranks may share one.
        lengths: tokens of each rank's shard.
        to_sequence, to_ranks: where each token of the sequence lies in that of the ranks one after another, and the
            inverse; None: in place.
    """

    heads: tuple[range, ...]
    lengths: tuple[int, ...]
    to_sequence: Tensor | None
    to_ranks: Tensor | None

    def send_heads(self, x: Tensor, comm: Communicator, what: str) -> AllToAllTensor:
        """The rank's own tokens ``[B, H, s, D]``, to each rank its heads; see ``received_heads``."""
        batch, _, own, size = x.shape
        sent = [own * batch * len(heads) for heads in self.heads]
        arriving = [length * batch * len(self.heads[comm.rank]) for length in self.lengths]
        send = x.new_empty((sum(sent), size))
        for heads, piece in zip(self.heads, send.split(sent), strict=True):
            piece.view(own, batch, len(heads), size).copy_(x[:, heads.start : heads.stop].permute(2, 0, 1, 3))
        return AllToAllTensor(what, send, x.new_empty((sum(arriving), size)), (sent, arriving))

    def received_heads(self, part: AllToAllTensor, like: Tensor, comm: Communicator) -> Tensor:
        """The rank's heads of all tokens, ``[B, heads, S, D]`` in the order of the sequence."""
        batch, size = like.shape[0], like.shape[3]
        x = part.receive.view(sum(self.lengths), batch, len(self.heads[comm.rank]), size)
        if self.to_sequence is not None:
            x = x.index_select(0, self.to_sequence)
        return x.permute(1, 2, 0, 3)

    def send_tokens(self, x: Tensor, comm: Communicator, what: str) -> AllToAllTensor:
        """The rank's heads of all tokens, ``[B, heads, S, D]``, to each rank its tokens; see ``received_tokens``."""
        batch, count, _, size = x.shape
        own = self.lengths[comm.rank]
        sent = [length * batch * count for length in self.lengths]
        arriving = [own * batch * len(heads) for heads in self.heads]
        x = x.permute(2, 0, 1, 3)
        x = x.contiguous() if self.to_ranks is None else x.index_select(0, self.to_ranks)
        return AllToAllTensor(what, x.view(-1, size), x.new_empty((sum(arriving), size)), (sent, arriving))

    def received_tokens(self, part: AllToAllTensor, like: Tensor, comm: Communicator) -> Tensor:
        """The rank's own tokens with all heads, ``[B, H, s, D]``; what comes of one head from several ranks, added."""
        batch, own, size = like.shape[0], self.lengths[comm.rank], like.shape[3]
        shared = sum(len(heads) for heads in self.heads) > self.heads[-1].stop
        shape = (batch, own, self.heads[-1].stop, size)
        whole = like.new_zeros(shape, dtype=lse_dtype(like.dtype)) if shared else like.new_empty(shape)
        assert part.sizes is not None
        for heads, piece in zip(self.heads, part.receive.split(list(part.sizes[1])), strict=True):
            place, piece = whole[:, :, heads.start : heads.stop], piece.view(own, batch, len(heads), size)
            (place.add_ if shared else place.copy_)(piece.transpose(0, 1))
        return whole.to(like.dtype).transpose(1, 2)


@settled_tables
def head_division(
    heads: tuple[range, ...], shards: SequenceShards, members: range, device: torch.device
) -> HeadDivision:
    """The division of some heads of the tokens of ``shards`` over the ranks ``members`` of it."""
    lengths = tuple(shards.lengths[rank] for rank in members)
    order = shards.order_from_ranks(members)
    if order is None:
        return HeadDivision(heads, lengths, None, None)
    inverse = np.argsort(order)
    return HeadDivision(heads, lengths, torch.tensor(order, device=device), torch.tensor(inverse, device=device))


def redistribute(
    comm: Communicator, names: Sequence[str], divisions: Sequence[HeadDivision], to_heads: bool, *tensors: Tensor
) -> tuple[Tensor, ...]:
    """The rank's tokens ``[B, H, s, D]`` with all heads to its heads ``[B, heads, S, D]`` of all tokens, in the order
    of the sequence; or back.

    Differentiable: gradients go the other way, and those of heads that several ranks have are added up. All tensors
    travel at once.

    Args:
        names: what each of the tensors carries, for the count.
        divisions: of each of them; see ``head_division``.
        to_heads: False for the way back, which takes and gives the other of the two.
    """
    moved: tuple[Tensor, ...] = _Redistribution.apply(comm, names, divisions, to_heads, *tensors)
    return moved


class _Redistribution(torch.autograd.Function):
    """Tokens of this rank with all heads to heads of this rank with all tokens, or back; the gradient goes the other
    way."""

    @staticmethod
    def forward(
        ctx,
        comm: Communicator,
        names: Sequence[str],
        divisions: Sequence[HeadDivision],
        to_heads: bool,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.comm, ctx.names, ctx.divisions, ctx.to_heads = comm, names, divisions, to_heads
        ctx.set_materialize_grads(False)
        return _redistribute(comm, names, divisions, to_heads, tensors)

    @staticmethod
    def backward(ctx, *grads: Tensor | None):
        given = {i: grad for i, grad in enumerate(grads) if grad is not None and ctx.needs_input_grad[4 + i]}
        names, divisions = ([of[i] for i in given] for of in (ctx.names, ctx.divisions))
        results = _redistribute(ctx.comm, names, divisions, not ctx.to_heads, [*given.values()])
        moved = dict(zip(given, results, strict=True))
        return None, None, None, None, *(moved.get(i) for i in range(len(grads)))


def _redistribute(
    comm: Communicator,
    names: Sequence[str],
    divisions: Sequence[HeadDivision],
    to_heads: bool,
    tensors: Sequence[Tensor],
) -> tuple[Tensor, ...]:
    send, received = (
        (HeadDivision.send_heads, HeadDivision.received_heads)
        if to_heads
        else (HeadDivision.send_tokens, HeadDivision.received_tokens)
    )
    parts = [send(division, x, comm, what) for division, x, what in zip(divisions, tensors, names, strict=True)]
    comm.start_all_to_all(parts).wait()
    return tuple(received(division, part, x, comm) for division, part, x in zip(divisions, parts, tensors, strict=True))
