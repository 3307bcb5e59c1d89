"""Query exchange where masks are intervals: a row travels only to the ranks that hold a key it sees.

All-to-all with split sizes from the batch's ``Routes``. Each rank computes the rows that arrive, and only their results
come back. A row that sees the frames of one rank (OpenFlamingo's immediate-media rule) travels to that rank alone, and
not at all where the frames are its own rank's.
"""

from typing import Optional, Sequence

import torch
from torch import Tensor

from ds_lvxattn.exchange.arguments import Exchange
from ds_lvxattn.exchange.comm import AllToAllTensor, Communicator, communicator_by_name
from ds_lvxattn.exchange.routes import Routes
from ds_lvxattn.exchange.strategies.gather import gather_attention
from ds_lvxattn.kernels.base import empty_results
from ds_lvxattn.kernels.differentiable import attention_operator
from ds_lvxattn.kernels.local import BackwardPass, LocalAttention
from ds_lvxattn.kernels.triton.merge import merge_partials
from ds_lvxattn.plan.pipeline import keeps_queries


def routed_attention(q: Tensor, k: Tensor, v: Tensor, exchange: Exchange) -> tuple[Tensor, Tensor]:
    """Attention of the rank's rows over the keys of all ranks; see ``exchange.arguments``."""
    layout, interval, routes = exchange.layout, exchange.interval, exchange.routes
    if interval is None:  # every row sees keys of every rank: what is routed is all that there is to gather
        return gather_attention(q, k, v, exchange)
    if routes is None:
        routes = Routes.build(interval.start.cpu(), interval.stop.cpu(), layout, exchange.comm.rank, q.device)
    keep = exchange.keep_queries
    if keep is None:
        keep = keeps_queries(q.shape[1], k.shape[1], layout.q.lengths, layout.kv.lengths)
    out, lse, _ = _operator(
        q, k, v, routes.start, routes.stop, routes.send_rows, routes.slots, routes.returns,
        *exchange.settings, exchange.comm.name, routes.sent, routes.received, keep,
    )  # fmt: skip
    return out, lse


class _Post:
    """Rows out to the ranks that compute them, and results back to their owners."""

    def __init__(
        self, comm: Communicator, batch: int, send_rows: Tensor, slots: Optional[Tensor], places: int,
        sent: Sequence[int], received: Sequence[int],
    ) -> None:  # fmt: skip
        self.comm, self.batch, self.send_rows, self.slots, self.places = comm, batch, send_rows, slots, places
        self.sent, self.received = sent, received

    def send(self, named: Sequence[tuple[str, Tensor]]) -> list[Tensor]:
        """``[B, H, s, ...]`` of the own rows; returns ``[B, H, r, ...]``, the rows to compute, zeros between them."""
        parts = []
        for what, x in named:
            wire = x.transpose(1, 2).flatten(0, 1).index_select(0, self.send_rows)
            receive = wire.new_empty((sum(self.received), *wire.shape[1:]))
            parts.append(AllToAllTensor(what, wire, receive, (self.sent, self.received)))
        self.comm.start_all_to_all(parts).wait()
        return [self._place(part.receive).unflatten(0, (self.batch, -1)).transpose(1, 2) for part in parts]

    def give_back(self, named: Sequence[tuple[str, Tensor]]) -> list[Tensor]:
        """``[B, H, r, ...]`` computed here; returns ``[sum(sent), H, ...]``, what others computed for this rank."""
        parts = []
        for what, x in named:
            wire = x.transpose(1, 2).flatten(0, 1)
            wire = wire.contiguous() if self.slots is None else wire.index_select(0, self.slots)
            receive = wire.new_empty((sum(self.sent), *wire.shape[1:]))
            parts.append(AllToAllTensor(what, wire, receive, (self.received, self.sent)))
        self.comm.start_all_to_all(parts).wait()
        return [part.receive for part in parts]

    def _place(self, x: Tensor) -> Tensor:
        if self.slots is None:
            return x
        return x.new_zeros((self.batch * self.places, *x.shape[1:])).index_copy_(0, self.slots, x)


def _by_row(x: Tensor, returns: Tensor, fill: float) -> Tensor:
    """``[sum(sent), H, ...]`` to ``[p, B * s, H, ...]``: the partial results of each own row, ``fill`` for none."""
    padded = torch.cat((x, x.new_full((1, *x.shape[1:]), fill)))
    return padded.index_select(0, returns.flatten()).unflatten(0, returns.shape)


def query_routed(
    q: Tensor, k: Tensor, v: Tensor, local: LocalAttention, send_rows: Tensor, slots: Optional[Tensor], returns: Tensor,
    group: str, sent: Sequence[int], received: Sequence[int], keep_queries: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Forward pass. Ranges, the tensors after them and the counts are those of ``Routes``.

    Returns:
        ``out [B, H, s_q, D_v]``, ``lse [B, H, s_q]``, and the queries of the rows computed here ``[B, r, H, D]`` (none
        of them where they are not kept).
    """
    batch, heads, own, head_dim = q.shape
    places = _places(local)
    post = _Post(communicator_by_name(group), batch, send_rows, slots, places, sent, received)
    (queries,) = post.send([("queries", q)])
    partial_out, partial_lse = local.forward(queries, k, v)
    outs, lses = post.give_back([("outputs", partial_out), ("lse", partial_lse)])
    outs = _by_row(outs, returns, 0.0).unflatten(1, (batch, own)).transpose(2, 3)
    lses = _by_row(lses, returns, float("-inf")).unflatten(1, (batch, own)).transpose(2, 3)
    out, lse = empty_results(q, v)
    merge_partials(outs, lses, out=out, lse=lse)
    kept = queries.transpose(1, 2).contiguous() if keep_queries else q.new_empty((0, places, heads, head_dim))
    return out, lse, kept


def _places(call: LocalAttention | BackwardPass) -> int:
    """Rows that are computed here of a sequence, those that pad it included."""
    assert call.start is not None  # without a mask there is nothing to route by
    return call.start.shape[1]


def _kept(q, k, v, local, *more) -> Tensor:
    batch, heads, _, head_dim = q.shape
    return q.new_empty((batch if more[-1] else 0, _places(local), heads, head_dim))


def query_routed_backward(
    given: BackwardPass, send_rows: Tensor, slots: Optional[Tensor], returns: Tensor, group: str, sent: Sequence[int],
    received: Sequence[int], keep_queries: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Backward pass: ``dk`` and ``dv`` are complete on their rank; the parts of ``dq`` go to their owners."""
    q, (batch, _, own, _) = given.q, given.out.shape
    post = _Post(communicator_by_name(group), batch, send_rows, slots, _places(given), sent, received)
    # A padding row of a sequence has log-sum-exp 0 and gradients 0 here, and an empty range: it adds nothing.
    named = [("output gradients", given.dout), ("lse", torch.cat((given.lse, given.delta()), dim=1))]
    if not keep_queries:
        named.append(("queries", q))
    douts, terms, *queries = post.send(named)
    lses, deltas = terms.chunk(2, dim=1)
    if keep_queries:
        queries = [given.kept.transpose(1, 2)]
    partial_dq, dk, dv = given.of_rows(douts, queries[0], lses, deltas, given.k, given.v)
    (parts,) = post.give_back([("query gradients", partial_dq.to(q.dtype))])
    dq = _by_row(parts, returns, 0.0).sum(dim=0, dtype=given.lse.dtype).unflatten(0, (batch, own)).transpose(1, 2)
    return dq, dk, dv


_operator = attention_operator("query_routed", query_routed, query_routed_backward, kept=_kept)
