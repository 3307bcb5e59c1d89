"""Keys and values gathered on every rank, what ``hybrid`` does between nodes where they are small.

Pipelined over groups of key heads: the keys of the next group arrive, and the gradients of the last leave, while one is
computed. Gathered keys and values stay until the backward pass where they are no larger than queries and outputs; then
they cross once where a ring sends them twice. Partial gradients are rounded once to travel, as those of queries are.
"""

from typing import Optional, Sequence

import torch
from torch import Tensor

from ds_lvxattn.exchange.arguments import Exchange
from ds_lvxattn.exchange.comm import communicator_by_name
from ds_lvxattn.exchange.query_rows import attention_layout, start_gather, start_return
from ds_lvxattn.exchange.strategies.gather import InFlight, cut, heads_of_group, pipelined, rows_of_group
from ds_lvxattn.exchange.strategies.ulysses import padded_order
from ds_lvxattn.kernels.base import empty_results
from ds_lvxattn.kernels.differentiable import attention_operator
from ds_lvxattn.kernels.local import BackwardPass, LocalAttention


def kv_gather_attention(q: Tensor, k: Tensor, v: Tensor, exchange: Exchange) -> tuple[Tensor, Tensor]:
    """Attention of the rank's rows over the keys of all ranks; see ``exchange.arguments``."""
    layout, comm = exchange.layout, exchange.comm
    start, stop = exchange.own_ranges(q.shape[2])
    places = padded_order(layout.kv, range(comm.ranks), q.device)
    groups, keep = cut(q.shape, k.shape, v.shape[3], q.element_size(), layout, start is not None, True)
    out, lse, _ = _operator(
        q, k, v, start, stop, places, *exchange.settings, comm.name, layout.kv.lengths,
        exchange.head_groups or groups, keep,
    )  # fmt: skip
    return out, lse


class _Arrived:
    def wait(self) -> None:
        """Nothing is on its way."""


def kv_gather(
    q: Tensor, k: Tensor, v: Tensor, local: LocalAttention, places: Optional[Tensor], group: str,
    kv_lengths: Sequence[int], head_groups: Sequence[int], keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Forward pass.

    Args:
        local: ranges of int32 ``[B, s_q]``, the keys that the own rows see.
        places: int64 ``[S_kv]``, where each key lies among the padded shards; None where it lies in its place.
        head_groups: groups of key heads of the forward and of the backward pass; divisors of ``H_kv``.
        keep: keep the gathered keys and values for the backward pass.

    Returns:
        ``out [B, H, s_q, D_v]``, ``lse [B, H, s_q]``, and K and V of all ranks, ``[groups, n * s_max * B * h * (D +
        D_v)]`` with ``h = H_kv / groups`` (no group of them where they are not kept); see ``_by_side``.
    """
    comm = communicator_by_name(group)
    groups = head_groups[0]
    out, lse = empty_results(q, v)
    kept = _kept(q, k, v, local, places, group, kv_lengths, head_groups, keep)

    sides = _by_side(kept, k, v, groups)

    def gather(i: int) -> InFlight:
        both = [side[i] for side in sides] if keep else _buffers(k, v, groups, len(kv_lengths) * max(kv_lengths))
        return both, start_gather(_sent(k, v, both, groups, i), comm)

    def attend(i: int, arrived: list[Tensor]) -> InFlight:
        k_all, v_all = (_in_order(x, places) for x in arrived)
        results = local.forward(heads_of_group(q, groups, i), k_all, v_all)
        for whole, part in zip((out, lse), results, strict=True):
            heads_of_group(whole, groups, i).copy_(part)
        return [], _Arrived()

    pipelined(groups, gather, attend, lambda i, arrived: None)
    return out, lse, kept


def _kept(q, k, v, local, places, group, kv_lengths, head_groups, keep) -> Tensor:
    groups, rows = head_groups[0], len(kv_lengths) * max(kv_lengths)
    return k.new_empty((groups if keep else 0, rows * k.shape[0] * (k.shape[1] // groups) * (k.shape[3] + v.shape[3])))


def _by_side(kept: Tensor, k: Tensor, v: Tensor, groups: int) -> list[Tensor]:
    """K and V of all ranks, ``[groups, n * s_max, B, H_kv / groups, ...]`` each, of ``kept`` as ``_kept`` makes it."""
    batch, heads, sizes = k.shape[0], k.shape[1] // groups, [k.shape[3], v.shape[3]]
    rows = kept.shape[1] // (batch * heads * sum(sizes))
    parts = kept.split([rows * batch * heads * size for size in sizes], dim=1)
    return [part.unflatten(1, (rows, batch, heads, size)) for part, size in zip(parts, sizes, strict=True)]


def _buffers(k: Tensor, v: Tensor, groups: int, rows: int) -> list[Tensor]:
    """Where K and V of one of ``groups`` groups are gathered."""
    return [x.new_empty((rows, x.shape[0], x.shape[1] // groups, x.shape[3])) for x in (k, v)]


def _sent(k: Tensor, v: Tensor, buffers: Sequence[Tensor], groups: int, index: int) -> list[tuple[str, Tensor, Tensor]]:
    """What ``start_gather`` takes of K and V of a group."""
    both = zip((k, v), buffers, strict=True)
    return [("keys and values", heads_of_group(x, groups, index), buffer) for x, buffer in both]


def _in_order(wire: Tensor, places: Optional[Tensor]) -> Tensor:
    """``[n * s_max, B, H, D]`` as ``[B, H, S_kv, D]`` in the order of the sequence."""
    return attention_layout(wire if places is None else wire.index_select(0, places))


def kv_gather_backward(
    given: BackwardPass, places: Optional[Tensor], group: str, kv_lengths: Sequence[int], head_groups: Sequence[int],
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Backward pass: ``dq`` is complete on its rank; the parts of ``dk`` and ``dv`` go to their owners."""
    comm = communicator_by_name(group)
    q, k, v = given.q, given.k, given.v
    groups, rows = head_groups[1], len(kv_lengths) * max(kv_lengths)
    dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
    sides = _by_side(given.kept, k, v, head_groups[0])

    def gather(i: int) -> InFlight:
        if keep:
            return [rows_of_group(side, groups, i) for side in sides], _Arrived()
        both = _buffers(k, v, groups, rows)
        return both, start_gather(_sent(k, v, both, groups, i), comm)

    def attend(i: int, arrived: list[Tensor]) -> InFlight:
        k_all, v_all = (_in_order(x, places) for x in arrived)
        size = q.shape[1] // groups
        heads = None if groups == 1 else slice(i * size, (i + 1) * size)
        partial_dq, *parts = given.of_own_rows(k_all, v_all, heads=heads)
        heads_of_group(dq, groups, i).copy_(partial_dq)
        parts = [part.to(k.dtype) for part in parts]
        if places is not None:
            parts = [
                part.new_zeros((*part.shape[:2], rows, part.shape[3])).index_copy_(2, places, part) for part in parts
            ]
        return start_return([("key and value gradients", part) for part in parts], comm, k.shape[2])

    def add_up(i: int, arrived: list[Tensor]) -> None:
        for whole, parts in zip((dk, dv), arrived, strict=True):
            torch.sum(parts, dim=0, out=heads_of_group(whole, groups, i))

    pipelined(groups, gather, attend, add_up)
    return dq, dk, dv


_operator = attention_operator("kv_gather", kv_gather, kv_gather_backward, kept=_kept, kept_holds_queries=False)
