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
from ds_lvxattn.exchange.strategies.gather import InFlight, head_slices, pipelined, rows_of_group
from ds_lvxattn.exchange.strategies.ulysses import padded_order
from ds_lvxattn.kernels.base import Call
from ds_lvxattn.kernels.differentiable import attention_operator, empty_results
from ds_lvxattn.kernels.operator import backward_kernel, backward_local, forward_local
from ds_lvxattn.kernels.triton.delta import attention_delta
from ds_lvxattn.plan.pipeline import keeps_keys, key_groups


def kv_gather_attention(q: Tensor, k: Tensor, v: Tensor, exchange: Exchange) -> tuple[Tensor, Tensor]:
    """Attention of the rank's rows over the keys of all ranks; see ``exchange.arguments``."""
    layout, comm = exchange.layout, exchange.comm
    start, stop = exchange.own_ranges(q.shape[2])
    places = padded_order(layout.kv, range(comm.ranks), q.device)
    batch, heads, _, head_dim = q.shape
    kv_heads, lengths = k.shape[1], (layout.q.lengths, layout.kv.lengths)
    groups = exchange.head_groups or key_groups(batch, heads, kv_heads, head_dim, q.element_size(), *lengths)
    keep = keeps_keys(heads, kv_heads, *lengths)
    out, lse, _ = torch.ops.ds_lvxattn.kv_gather(
        q, k, v, start, stop, places, exchange.scale, exchange.softcap, exchange.kernel, comm.name, layout.kv.lengths,
        groups, keep,
    )  # fmt: skip
    return out, lse


class _Arrived:
    def wait(self) -> None:
        """Nothing is on its way."""


def kv_gather(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    start: Optional[Tensor],
    stop: Optional[Tensor],
    places: Optional[Tensor],
    scale: float,
    softcap: Optional[float],
    kernel: str,
    group: str,
    kv_lengths: Sequence[int],
    head_groups: Sequence[int],
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Forward pass.

    Args:
        start, stop: int32 ``[B, s_q]``, the keys that the own rows see.
        places: int64 ``[S_kv]``, where each key lies among the padded shards; None where it lies in its place.
        head_groups: groups of key heads of the forward and of the backward pass; divisors of ``H_kv``.
        keep: keep the gathered keys and values for the backward pass.

    Returns:
        ``out [B, H, s_q, D]``, ``lse [B, H, s_q]``, and K and V of all ranks, ``[groups, 2, n * s_max, B, h, D]`` with
        ``h = H_kv / groups`` (no group of them where they are not kept).
    """
    comm = communicator_by_name(group)
    groups = head_groups[0]
    queries, keys = head_slices(q.shape[1], groups), head_slices(k.shape[1], groups)
    out, lse = empty_results(q, v)
    kept = _kept(q, k, v, start, stop, places, scale, softcap, kernel, group, kv_lengths, head_groups, keep)

    def gather(i: int) -> InFlight:
        both = list(kept[i]) if keep else _buffers(k[:, keys[i]], len(kv_lengths) * max(kv_lengths))
        sent = [("keys and values", x[:, keys[i]], buffer) for x, buffer in zip((k, v), both, strict=True)]
        return both, start_gather(sent, comm)

    def attend(i: int, arrived: list[Tensor]) -> InFlight:
        k_all, v_all = (_in_order(x, places) for x in arrived)
        part, part_lse = forward_local(q[:, queries[i]], k_all, v_all, start, stop, scale, kernel, softcap)
        out[:, queries[i]], lse[:, queries[i]] = part, part_lse
        return [], _Arrived()

    pipelined(groups, gather, attend, lambda i, arrived: None)
    return out, lse, kept


def _kept(q, k, v, start, stop, places, scale, softcap, kernel, group, kv_lengths, head_groups, keep) -> Tensor:
    batch, kv_heads, _, head_dim = k.shape
    groups, rows = head_groups[0], len(kv_lengths) * max(kv_lengths)
    return k.new_empty((groups if keep else 0, 2, rows, batch, kv_heads // groups, head_dim))


def _buffers(x: Tensor, rows: int) -> list[Tensor]:
    return [x.new_empty((rows, x.shape[0], x.shape[1], x.shape[3])) for _ in range(2)]


def _in_order(wire: Tensor, places: Optional[Tensor]) -> Tensor:
    """``[n * s_max, B, H, D]`` as ``[B, H, S_kv, D]`` in the order of the sequence."""
    return attention_layout(wire if places is None else wire.index_select(0, places))


def kv_gather_backward(
    dout: Tensor,
    dlse: Optional[Tensor],
    q: Tensor,
    kept: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    start: Optional[Tensor],
    stop: Optional[Tensor],
    places: Optional[Tensor],
    scale: float,
    softcap: Optional[float],
    kernel: str,
    group: str,
    kv_lengths: Sequence[int],
    head_groups: Sequence[int],
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Backward pass: ``dq`` is complete on its rank; the parts of ``dk`` and ``dv`` go to their owners."""
    comm = communicator_by_name(group)
    chosen = backward_kernel(kernel, Call.backward(q, k, v, start is not None, softcap is not None), dlse is not None)
    delta = None if chosen.needs_out else attention_delta(dout, out, dlse).to(lse.dtype)
    groups, rows = head_groups[1], len(kv_lengths) * max(kv_lengths)
    queries, keys = head_slices(q.shape[1], groups), head_slices(k.shape[1], groups)
    dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))

    def gather(i: int) -> InFlight:
        if keep:
            return [rows_of_group(kept[:, side], groups, i) for side in (0, 1)], _Arrived()
        both = _buffers(k[:, keys[i]], rows)
        sent = [("keys and values", x[:, keys[i]], buffer) for x, buffer in zip((k, v), both, strict=True)]
        return both, start_gather(sent, comm)

    def attend(i: int, arrived: list[Tensor]) -> InFlight:
        own = queries[i]
        k_all, v_all = (_in_order(x, places) for x in arrived)
        dq[:, own], *parts = backward_local(
            chosen, dout[:, own], q[:, own], k_all, v_all, out[:, own] if chosen.needs_out else None, lse[:, own],
            None if delta is None else delta[:, own], start, stop, scale, softcap,
        )  # fmt: skip
        parts = [part.to(k.dtype) for part in parts]
        if places is not None:
            parts = [
                part.new_zeros((*part.shape[:2], rows, part.shape[3])).index_copy_(2, places, part) for part in parts
            ]
        return start_return([("key and value gradients", part) for part in parts], comm, k.shape[2])

    def add_up(i: int, arrived: list[Tensor]) -> None:
        for whole, parts in zip((dk, dv), arrived, strict=True):
            whole[:, keys[i]] = parts.sum(dim=0, dtype=lse.dtype)

    pipelined(groups, gather, attend, add_up)
    return dq, dk, dv


attention_operator("kv_gather", kv_gather, kv_gather_backward, kept=_kept, kept_holds_queries=False)
