"""Query exchange by two collectives: all-gather the queries, attend, send the partial results to their owners.

Forward: ``Q`` in, ``(o, l)`` out, one merge. Backward: ``dO``,
``L`` and ``delta`` in (``O`` only for kernels that insist on it), ``dQ`` parts out, summed in float32. The
gathered ``Q`` is kept from the forward pass, so it does not travel twice.
"""

from typing import Optional, Sequence

import torch
from torch import Tensor

from ds_lvxattn.comm import communicator_by_name
from ds_lvxattn.kernels.base import Call
from ds_lvxattn.kernels.delta import attention_delta
from ds_lvxattn.kernels.merge import merge_partials
from ds_lvxattn.kernels.operator import backward_kernel, backward_local, forward_local, lse_dtype
from ds_lvxattn.shards import SequenceShards
from ds_lvxattn.strategies.base import Exchange
from ds_lvxattn.strategies.rows import attention_layout, gather_rows, local_ranges, return_rows


def gather_attention(q: Tensor, k: Tensor, v: Tensor, exchange: Exchange) -> tuple[Tensor, Tensor]:
    """Attention of the rank's rows over the keys of all ranks; see ``Strategy.attention``."""
    layout = exchange.layout
    out, lse, _ = torch.ops.ds_lvxattn.query_gather(
        q, k, v, exchange.start, exchange.stop, exchange.scale, exchange.kernel,
        exchange.comm.name, layout.q.lengths, layout.kv.lengths, layout.kv.stripe,
    )  # fmt: skip
    return out, lse


@torch.library.custom_op("ds_lvxattn::query_gather", mutates_args=())
def query_gather(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    start: Optional[Tensor],
    stop: Optional[Tensor],
    scale: float,
    kernel: str,
    group: str,
    q_lengths: Sequence[int],
    kv_lengths: Sequence[int],
    kv_stripe: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Forward pass: ``out [B, H, s_q, D]``, ``lse [B, H, s_q]`` and the gathered queries, kept for backward."""
    comm = communicator_by_name(group)
    kv = SequenceShards(tuple(kv_lengths), kv_stripe)
    own = q_lengths[comm.rank]
    q_all = gather_rows(q, comm, max(q_lengths), "queries")
    first, last = local_ranges(start, stop, kv, comm.rank)
    partial_out, partial_lse = forward_local(attention_layout(q_all), k, v, first, last, scale, kernel)
    out, lse = merge_partials(
        return_rows(partial_out, comm, own, "outputs"), return_rows(partial_lse, comm, own, "lse")
    )
    return out.contiguous(), lse.contiguous(), q_all


@query_gather.register_fake
def _(q, k, v, start, stop, scale, kernel, group, q_lengths, kv_lengths, kv_stripe):
    batch, heads, _, head_dim = q.shape
    q_all = q.new_empty((len(q_lengths) * max(q_lengths), batch, heads, head_dim))
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=lse_dtype(q.dtype)), q_all


@torch.library.custom_op("ds_lvxattn::query_gather_backward", mutates_args=())
def query_gather_backward(
    dout: Tensor,
    dlse: Optional[Tensor],
    q_all: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    start: Optional[Tensor],
    stop: Optional[Tensor],
    scale: float,
    kernel: str,
    group: str,
    q_lengths: Sequence[int],
    kv_lengths: Sequence[int],
    kv_stripe: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Backward pass: ``dk`` and ``dv`` are complete on their rank; the parts of ``dq`` go to their owners."""
    comm = communicator_by_name(group)
    kv = SequenceShards(tuple(kv_lengths), kv_stripe)
    rows, own = max(q_lengths), q_lengths[comm.rank]
    queries = attention_layout(q_all)
    chosen = backward_kernel(kernel, Call.of(queries, k, start is not None), dlse is not None)

    dout_all = attention_layout(gather_rows(dout, comm, rows, "output gradients"))
    if chosen.needs_out:
        out_all = attention_layout(gather_rows(out, comm, rows, "outputs"))
        lse_all, delta_all = attention_layout(gather_rows(lse, comm, rows, "lse")), None
    else:
        stats = torch.stack((lse, attention_delta(dout, out, dlse).to(lse.dtype)), dim=-1)
        lse_all, delta_all = attention_layout(gather_rows(stats, comm, rows, "lse")).unbind(-1)
        out_all = None

    first, last = local_ranges(start, stop, kv, comm.rank)
    partial_dq, dk, dv = backward_local(
        chosen, dout_all, queries, k, v, out_all, lse_all, delta_all, first, last, scale
    )
    parts = return_rows(partial_dq.to(out.dtype), comm, own, "query gradients")
    dq = parts.sum(dim=0, dtype=lse.dtype).to(out.dtype)
    return dq.contiguous(), dk.to(k.dtype).contiguous(), dv.to(v.dtype).contiguous()


@query_gather_backward.register_fake
def _(dout, dlse, q_all, k, v, out, *_):
    return out.new_empty(out.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx, inputs, output):
    _, k, v, start, stop, *ctx.call = inputs
    out, lse, q_all = output
    ctx.save_for_backward(q_all, k, v, out, lse, start, stop)
    ctx.set_materialize_grads(False)


def _backward(ctx, dout, dlse, _):
    q_all, k, v, out, lse, start, stop = ctx.saved_tensors
    dout = torch.zeros_like(out) if dout is None else dout
    grads = torch.ops.ds_lvxattn.query_gather_backward(dout, dlse, q_all, k, v, out, lse, start, stop, *ctx.call)
    return *grads, *[None] * 8


query_gather.register_autograd(_backward, setup_context=_save)
