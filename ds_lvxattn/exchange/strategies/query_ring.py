"""Query exchange by a ring: queries visit the ranks one after another (LV-XAttn, section 3.1).

Each rank holds the queries of one other rank at a time, so the workspace does not grow with the group; the
next queries arrive while the present ones are computed. Partial results go straight to their owner instead of
round the ring: the same bytes, but every partial is merged once in float32 rather than rounded at each hop.
"""

from typing import Optional, Sequence

import torch
from torch import Tensor

from ds_lvxattn.exchange.arguments import Exchange
from ds_lvxattn.exchange.comm import Communicator, Message, Transfer, communicator_by_name
from ds_lvxattn.kernels.base import empty_results
from ds_lvxattn.kernels.derived import derived_of
from ds_lvxattn.kernels.differentiable import attention_operator
from ds_lvxattn.kernels.local import BackwardPass, LocalAttention
from ds_lvxattn.kernels.triton.merge import merge_partials


def ring_attention(q: Tensor, k: Tensor, v: Tensor, exchange: Exchange) -> tuple[Tensor, Tensor]:
    """Attention of the rank's rows over the keys of all ranks; see ``exchange.arguments``."""
    return _operator(q, k, v, *exchange.local_ranges, *exchange.settings, exchange.comm.name, exchange.layout.q.lengths)


class _Ring:
    """The tensors of one rank at a time, handed on to the next rank; what arrived is that of the rank before."""

    def __init__(self, comm: Communicator, lengths: Sequence[int], what: Sequence[str], own: Sequence[Tensor]):
        self.comm, self.lengths, self.what = comm, lengths, what
        self.held = [x.contiguous() for x in own]
        self.owner = comm.rank

    def __iter__(self):
        """Yield ``(owner, tensors)`` of every rank, own rank first; the next ones travel meanwhile."""
        ranks = self.comm.ranks
        for step in range(ranks):
            following = (self.owner - 1) % ranks
            if step < ranks - 1:
                arriving = [_rows_like(x, self.lengths[following]) for x in self.held]
                to, of = (self.comm.rank + 1) % ranks, (self.comm.rank - 1) % ranks
                transfer = self.comm.exchange(
                    [Message(what, x, to, y, of) for what, x, y in zip(self.what, self.held, arriving, strict=True)]
                )
            yield self.owner, self.held
            if step < ranks - 1:
                transfer.wait()
                self.held, self.owner = arriving, following


def _rows_like(x: Tensor, rows: int) -> Tensor:
    return x.new_empty((*x.shape[:2], rows, *x.shape[3:]))


class _Returns:
    """Partial results on their way to the owners of the rows, one rank a step."""

    def __init__(self, comm: Communicator, own_rows: int) -> None:
        self.comm, self.own_rows = comm, own_rows
        self.parts: list[list[Tensor]] = []
        self.transfers: list[Transfer] = []

    def send(self, owner: int, results: Sequence[Tensor], what: Sequence[str]) -> None:
        """Send ``results`` for the rows of ``owner``; at the same step another rank sends ours."""
        if owner == self.comm.rank:
            self.parts.append(list(results))
            return
        computed_by = (2 * self.comm.rank - owner) % self.comm.ranks
        arriving = [_rows_like(x, self.own_rows) for x in results]
        self.transfers.append(
            self.comm.exchange(
                [
                    Message(kind, x.contiguous(), owner, y, computed_by)
                    for kind, x, y in zip(what, results, arriving, strict=True)
                ]
            )
        )
        self.parts.append(arriving)

    def collect(self) -> list[Tensor]:
        """For each kind of result the parts of all ranks, ``[n, B, H, s_q, ...]``."""
        for transfer in self.transfers:
            transfer.wait()
        return [torch.stack(kind) for kind in zip(*self.parts, strict=True)]


def _of(
    first: Optional[Tensor], last: Optional[Tensor], lengths: Sequence[int], owner: int
) -> tuple[Optional[Tensor], Optional[Tensor]]:
    """Of ``first, last [B, n * s_max]`` those of the rows of ``owner``, cut out once for the layers of a batch."""
    if first is None or last is None:
        return None, None

    def cut() -> tuple[Tensor, Tensor]:
        start, stop = (x.narrow(1, owner * max(lengths), lengths[owner]).clone() for x in (first, last))
        return start, stop

    return derived_of(first, last, ("rows of", owner, tuple(lengths)), cut)


def query_ring(
    q: Tensor, k: Tensor, v: Tensor, local: LocalAttention, group: str, q_lengths: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Forward pass; ``local`` has the ranges of ``Exchange.local_ranges``."""
    comm = communicator_by_name(group)
    returns = _Returns(comm, q.shape[2])
    for owner, (queries,) in _Ring(comm, q_lengths, ("queries",), (q,)):
        ranges = _of(local.start, local.stop, q_lengths, owner)
        returns.send(owner, local.forward(queries, k, v, *ranges), ("outputs", "lse"))
    out, lse = empty_results(q, v)
    outs, lses = returns.collect()
    merge_partials(outs, lses, out=out, lse=lse)
    return out, lse


def query_ring_backward(given: BackwardPass, group: str, q_lengths: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Backward pass: ``Q``, ``dO``, ``L`` and ``delta`` go round, ``dQ`` parts go to their owners."""
    comm = communicator_by_name(group)
    q, k, v, wide = given.q, given.k, given.v, given.lse.dtype
    own = given.dout, q, torch.cat((given.lse, given.delta()), dim=1)
    ring = _Ring(comm, q_lengths, ("output gradients", "queries", "lse"), own)
    dk, dv = torch.zeros_like(k, dtype=wide), torch.zeros_like(v, dtype=wide)
    returns = _Returns(comm, q.shape[2])
    for owner, (dout, queries, terms) in ring:
        ranges = _of(given.start, given.stop, q_lengths, owner)
        lse, delta = terms.chunk(2, dim=1)
        partial_dq, partial_dk, partial_dv = given.of_rows(dout, queries, lse, delta, k, v, *ranges)
        returns.send(owner, (partial_dq.to(q.dtype),), ("query gradients",))
        dk += partial_dk
        dv += partial_dv
    (parts,) = returns.collect()
    return parts.sum(dim=0, dtype=wide), dk, dv


_operator = attention_operator("query_ring", query_ring, query_ring_backward)
