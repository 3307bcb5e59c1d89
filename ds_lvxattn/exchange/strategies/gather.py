"""Query exchange by collectives: all-gather the queries, attend, send the partial results to their owners.

Pipelined over groups of key heads: while one group is computed, the queries of the next arrive and the results of
the one before leave on the process group's communication stream. Only the first arrival and the last return are not
hidden, and the workspace is that of two groups.

Forward: ``Q`` in, ``(o, l)`` out, one merge. Backward: ``dO``, ``L`` and ``delta`` in, ``dQ`` parts out, summed in
float32. ``O`` does not travel, for no kernel. The gathered ``Q`` is kept from the forward pass, or, where it would be
large, gathered again.
"""

from collections.abc import Callable
from typing import Sequence

import torch
from torch import Tensor

from ds_lvxattn.exchange.arguments import Exchange
from ds_lvxattn.exchange.query_rows import Waiting, attention_layout, gather_buffer, rows_by_name
from ds_lvxattn.exchange.shards import ShardLayout
from ds_lvxattn.kernels.base import empty_results, empty_rows
from ds_lvxattn.kernels.differentiable import attention_operator
from ds_lvxattn.kernels.local import BackwardPass, LocalAttention
from ds_lvxattn.kernels.settled import settled
from ds_lvxattn.kernels.triton.merge import merge_partials
from ds_lvxattn.plan.pipeline import head_groups, keeps_keys, keeps_queries, key_groups, mean_head_dim


def gather_attention(q: Tensor, k: Tensor, v: Tensor, exchange: Exchange) -> tuple[Tensor, Tensor]:
    """Attention of the rank's rows over the keys of all ranks; see ``exchange.arguments``."""
    return _gathered(q, k, v, exchange, exchange.comm.name, "", *exchange.local_ranges)


def two_level_attention(q: Tensor, k: Tensor, v: Tensor, exchange: Exchange) -> tuple[Tensor, Tensor]:
    """The same, where rows and results cross from node to node once; see ``exchange.arguments``."""
    assert exchange.grid is not None
    inner, outer = exchange.grid
    if 1 in (inner.ranks, outer.ranks):
        return gather_attention(q, k, v, exchange)
    return _gathered(q, k, v, exchange, outer.name, inner.name, *_ranges_by_node(exchange, outer.ranks, inner.ranks))


def _ranges_by_node(exchange: Exchange, nodes: int, size: int) -> tuple[Tensor | None, Tensor | None]:
    """``Exchange.local_ranges`` in the order of ``NodeRows``, not of the ranks."""
    interval, comm, layout = exchange.interval, exchange.comm, exchange.layout
    if interval is None:
        return None, None

    def by_node() -> tuple[Tensor, Tensor]:
        bounds = interval.local_to(layout.kv, comm.rank)
        shape = (nodes, size, layout.q.longest)
        first, last = (x.unflatten(1, shape).transpose(1, 2).flatten(1, 3) for x in bounds)
        return first, last

    return interval.once(("by node", layout.kv, comm.rank, nodes), by_node)


def _gathered(
    q: Tensor, k: Tensor, v: Tensor, exchange: Exchange, group: str, inner: str,
    first: Tensor | None, last: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    layout = exchange.layout
    groups, keep = cut(q.shape, k.shape, v.shape[3], q.element_size(), layout, first is not None, False)
    if exchange.keep_queries is not None:
        keep = exchange.keep_queries
    out, lse, _ = _operator(
        q, k, v, first, last, *exchange.settings, group, inner, layout.q.lengths, exchange.head_groups or groups,
        keep,
    )  # fmt: skip
    return out, lse


@settled
def cut(
    q: torch.Size, k: torch.Size, value_dim: int, element: int, layout: ShardLayout, masked: bool, keys_travel: bool
) -> tuple[tuple[int, int], bool]:
    """Groups of key heads of either pass where nobody says, and whether what travels is kept; see ``plan.pipeline``.

    Args:
        q, k: shapes of the rank's own queries and keys.
        value_dim, element: head size of the values, bytes of an element.
        layout: the shards.
        masked: whether rows see intervals, which counts where queries travel.
        keys_travel: keys and values are gathered, not queries.
    """
    (batch, heads, _, head_dim), kv_heads = q, k[1]
    lengths = layout.q.lengths, layout.kv.lengths
    sizes = batch, heads, kv_heads, mean_head_dim(head_dim, value_dim), element, *lengths
    if keys_travel:
        return key_groups(*sizes), keeps_keys(heads, kv_heads, *lengths)
    return head_groups(*sizes, masked=masked), keeps_queries(heads, kv_heads, *lengths)


InFlight = tuple[list[Tensor], Waiting]


def pipelined(
    groups: int,
    gather: Callable[[int], InFlight],
    attend: Callable[[int, list[Tensor]], InFlight],
    finish: Callable[[int, list[Tensor]], None],
) -> None:
    """While group ``i`` is computed, group ``i + 1`` arrives and the results of group ``i - 1`` come home.

    ``gather(i)`` starts the exchange of a group's rows, ``attend`` computes them and starts the return of the results,
    ``finish`` takes what came back. Every rank issues the same collectives in the same order.
    """
    gathered = gather(0)
    returning: InFlight | None = None
    for i in range(groups):
        rows, arrival = gathered
        if i + 1 < groups:
            gathered = gather(i + 1)
        arrival.wait()
        leaving = attend(i, rows)
        if returning is not None:
            returning[1].wait()
            finish(i - 1, returning[0])
        returning = leaving
    assert returning is not None
    returning[1].wait()
    finish(groups - 1, returning[0])


def heads_of_group(x: Tensor, groups: int, index: int) -> Tensor:
    """Of ``[B, H, ...]`` the heads of group ``index``, a view."""
    if groups == 1:
        return x
    size = x.shape[1] // groups
    return x[:, index * size : (index + 1) * size]


def query_gather(
    q: Tensor, k: Tensor, v: Tensor, local: LocalAttention, group: str, inner: str, q_lengths: Sequence[int],
    head_groups: Sequence[int], keep_queries: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Forward pass.

    Args:
        local: ranges of int32 ``[B, n * s_max, ...]``, the keys of this rank that the rows of every rank see, in the
            order in which they are gathered.
        group, inner: see ``rows_by_name``.
        q_lengths: query rows of every rank, in the order of the ranks.
        head_groups: groups of key heads of the forward and of the backward pass; divisors of ``H_kv``.
        keep_queries: keep the gathered queries for the backward pass.

    Returns:
        ``out [B, H, s_q, D_v]``, ``lse [B, H, s_q]``, and the gathered queries ``[groups, n * s_max, B, H / groups,
        D]`` (no group of them where they are not kept).
    """
    exchange = rows_by_name(group, inner)
    rows, own = max(q_lengths), q_lengths[exchange.rank]
    groups = head_groups[0]
    out, lse = empty_results(q, v)
    kept = _kept(q, k, v, local, group, inner, q_lengths, head_groups, keep_queries)

    def gather(i: int) -> InFlight:
        queries = heads_of_group(q, groups, i)
        q_all = kept[i] if keep_queries else gather_buffer(queries, exchange.ranks, rows)
        return [q_all], exchange.gather([("queries", queries, q_all)], rows)

    def attend(i: int, arrived: list[Tensor]) -> InFlight:
        keys, values = heads_of_group(k, groups, i), heads_of_group(v, groups, i)
        partial_out, partial_lse = local.forward(attention_layout(arrived[0]), keys, values)
        return exchange.give_back([("outputs", partial_out), ("lse", partial_lse)], rows, own, _merged)

    def merge(i: int, arrived: list[Tensor]) -> None:
        outs, lses = arrived
        merge_partials(outs, lses, out=heads_of_group(out, groups, i), lse=heads_of_group(lse, groups, i))

    pipelined(groups, gather, attend, merge)
    return out, lse, kept


def _merged(parts: list[Tensor]) -> list[Tensor]:
    return list(merge_partials(*parts))


def _kept(q, k, v, local, group, inner, q_lengths, head_groups, keep_queries) -> Tensor:
    batch, heads, _, head_dim = q.shape
    groups, rows = head_groups[0], len(q_lengths) * max(q_lengths)
    return q.new_empty((groups if keep_queries else 0, rows, batch, heads // groups, head_dim))


def rows_of_group(kept: Tensor, groups: int, index: int) -> Tensor:
    """Gathered rows of group ``index`` of ``groups``, ``[n * s_max, B, H / groups, D]``, from those kept by groups."""
    kept_groups, _, _, heads, _ = kept.shape
    if groups % kept_groups:
        # Coarser groups than the forward pass had: what is kept is the small side, so it is laid out anew.
        kept = kept.movedim(0, 2).flatten(2, 3).unsqueeze(0)
        kept_groups, heads = 1, kept.shape[3]
    finer = groups // kept_groups
    rows, size = kept[index // finer], heads // finer
    return rows if finer == 1 else rows[:, :, index % finer * size : (index % finer + 1) * size]


def query_gather_backward(
    given: BackwardPass, group: str, inner: str, q_lengths: Sequence[int], head_groups: Sequence[int],
    keep_queries: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Backward pass: ``dk`` and ``dv`` are complete on their rank; the parts of ``dq`` go to their owners."""
    exchange = rows_by_name(group, inner)
    rows, own = max(q_lengths), q_lengths[exchange.rank]
    q, k, v = given.q, given.k, given.v
    groups = head_groups[1]
    delta = given.delta()
    dq = empty_rows(q, k.shape[3])  # ``q`` may be ``out``, in its place
    # The gradients of K and V: of one group they are what the kernel returns, of several they are put together.
    complete: tuple[Tensor, ...] = () if groups == 1 else (torch.empty_like(k), torch.empty_like(v))

    def gather(i: int) -> InFlight:
        terms = torch.cat([heads_of_group(x, groups, i) for x in (given.lse, delta)], dim=1)
        travelling = [("output gradients", heads_of_group(given.dout, groups, i)), ("lse", terms)]
        if not keep_queries:
            travelling.append(("queries", heads_of_group(q, groups, i)))
        sent = [(what, x, gather_buffer(x, exchange.ranks, rows)) for what, x in travelling]
        return [buffer for _, _, buffer in sent], exchange.gather(sent, rows)

    def attend(i: int, arrived: list[Tensor]) -> InFlight:
        nonlocal complete
        if keep_queries:
            arrived = [*arrived, rows_of_group(given.kept, groups, i)]
        douts, terms, q_all = (attention_layout(x) for x in arrived)
        lses, deltas = terms.chunk(2, dim=1)
        partial_dq, *parts = given.of_rows(
            douts, q_all, lses, deltas, heads_of_group(k, groups, i), heads_of_group(v, groups, i)
        )
        if groups == 1:
            complete = tuple(parts)
        else:
            for whole, part in zip(complete, parts, strict=True):
                heads_of_group(whole, groups, i).copy_(part)
        return exchange.give_back([("query gradients", partial_dq.to(q.dtype))], rows, own, summed)

    def summed(parts: list[Tensor]) -> list[Tensor]:
        return [parts[0].sum(dim=0)]  # of 16 bits too, torch adds up in 32

    def add_up(i: int, arrived: list[Tensor]) -> None:
        torch.sum(arrived[0], dim=0, out=heads_of_group(dq, groups, i))

    pipelined(groups, gather, attend, add_up)
    dk, dv = complete
    return dq, dk, dv


_operator = attention_operator("query_gather", query_gather, query_gather_backward, kept=_kept)
