"""Ring Attention (arXiv 2310.01889), the baseline: queries stay, keys and values visit every rank.

The next keys arrive while the present ones are computed. In the backward pass the float32 gradients of keys and
values follow them; the part of the keys' own rank stays at home, so they travel ``n - 1`` times, not ``n``.
"""

from typing import Optional, Sequence

import torch
from torch import Tensor

from ds_lvxattn.exchange.base import Exchange
from ds_lvxattn.exchange.comm import Communicator, Message, Transfer, communicator_by_name
from ds_lvxattn.exchange.interval import clip_to_rank
from ds_lvxattn.exchange.shards import SequenceShards
from ds_lvxattn.kernels.base import Call
from ds_lvxattn.kernels.differentiable import attention_operator
from ds_lvxattn.kernels.operator import backward_kernel, backward_local, forward_local, like
from ds_lvxattn.kernels.triton.delta import attention_delta
from ds_lvxattn.kernels.triton.merge import merge_partials


def kv_ring_attention(q: Tensor, k: Tensor, v: Tensor, exchange: Exchange) -> tuple[Tensor, Tensor]:
    """Attention of the rank's rows over the keys of all ranks; see ``exchange.base``."""
    layout = exchange.layout
    start, stop = exchange.bounds
    if start is not None and stop is not None:
        own = (exchange.comm.rank, slice(None), slice(q.shape[2]))
        start, stop = start[own], stop[own]
    return torch.ops.ds_lvxattn.kv_ring(
        q, k, v, start, stop, exchange.scale, exchange.kernel,
        exchange.comm.name, layout.kv.lengths, layout.kv.deal,
    )  # fmt: skip


def _pass_on(comm: Communicator, held: Sequence[Tensor], lengths: Sequence[int], owner: int, what: str):
    """Send ``held`` (keys of ``owner``) to the next rank; return the buffers and handle of what arrives."""
    following = lengths[(owner - 1) % comm.ranks]
    arriving = [x.new_empty((*x.shape[:2], following, x.shape[3])) for x in held]
    to, of = (comm.rank + 1) % comm.ranks, (comm.rank - 1) % comm.ranks
    return arriving, comm.exchange([Message(what, x, to, y, of) for x, y in zip(held, arriving, strict=True)])


def _ranges_of(start: Optional[Tensor], stop: Optional[Tensor], kv: SequenceShards, owner: int):
    if start is None or stop is None:
        return None, None
    return clip_to_rank(start, stop, kv, owner)


def kv_ring(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    start: Optional[Tensor],
    stop: Optional[Tensor],
    scale: float,
    kernel: str,
    group: str,
    kv_lengths: Sequence[int],
    kv_deal: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """Forward pass: ``out [B, H, s_q, D]`` and ``lse [B, H, s_q]``; ranges are those of the own rows."""
    comm = communicator_by_name(group)
    kv = SequenceShards.of_deal(kv_lengths, kv_deal)
    held = [k.contiguous(), v.contiguous()]
    out = lse = None
    for step in range(comm.ranks):
        owner = (comm.rank - step) % comm.ranks
        transfer = None
        if step < comm.ranks - 1:
            arriving, transfer = _pass_on(comm, held, kv_lengths, owner, "keys and values")
        first, last = _ranges_of(start, stop, kv, owner)
        part, part_lse = forward_local(q, held[0], held[1], first, last, scale, kernel)
        # The running result stays in float32: rounding it at every step would cost accuracy.
        part = part.to(part_lse.dtype)
        if out is None or lse is None:
            out, lse = part, part_lse
        else:
            out, lse = merge_partials(torch.stack((out, part)), torch.stack((lse, part_lse)))
        if transfer is not None:
            transfer.wait()
            held = arriving
    assert out is not None and lse is not None
    return like(out, q), lse.contiguous()


def kv_ring_backward(
    dout: Tensor,
    dlse: Optional[Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    start: Optional[Tensor],
    stop: Optional[Tensor],
    scale: float,
    kernel: str,
    group: str,
    kv_lengths: Sequence[int],
    kv_deal: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor]:
    """Backward pass: ``dq`` stays, ``dk`` and ``dv`` of other ranks' keys travel home with them in float32."""
    comm = communicator_by_name(group)
    kv = SequenceShards.of_deal(kv_lengths, kv_deal)
    chosen = backward_kernel(kernel, Call.backward(q, k, start is not None), dlse is not None)
    delta = None if chosen.needs_out else attention_delta(dout, out, dlse)
    wide = lse.dtype
    dq = torch.zeros_like(q, dtype=wide)
    held = [k.contiguous(), v.contiguous()]
    home: list[Tensor] = []
    travelling: list[Tensor] = []
    gradients: Transfer | None = None
    for step in range(comm.ranks):
        owner = (comm.rank - step) % comm.ranks
        transfer = None
        if step < comm.ranks - 1:
            arriving, transfer = _pass_on(comm, held, kv_lengths, owner, "keys and values")
        first, last = _ranges_of(start, stop, kv, owner)
        part_dq, *parts = backward_local(
            chosen, dout, q, held[0], held[1], out if chosen.needs_out else None, lse, delta, first, last, scale
        )
        dq += part_dq
        parts = [part.to(wide).contiguous() for part in parts]
        if step == 0:
            home = parts
        else:
            if gradients is not None:
                gradients.wait()
                parts = [part.add_(sum_so_far) for part, sum_so_far in zip(parts, travelling, strict=True)]
            # After the last step this sends the sums to the rank that owns the keys, which adds its own part.
            travelling, gradients = _pass_on(comm, parts, kv_lengths, owner, "key and value gradients")
        if transfer is not None:
            transfer.wait()
            held = arriving
    if gradients is not None:
        gradients.wait()
        home = [part.add_(rest) for part, rest in zip(home, travelling, strict=True)]
    dk, dv = home
    return like(dq, q), like(dk, k), like(dv, v)


attention_operator("kv_ring", kv_ring, kv_ring_backward)
