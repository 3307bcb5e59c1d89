"""Ring Attention (arXiv 2310.01889), the baseline: queries stay, keys and values visit every rank.

The next keys arrive while the present ones are computed. In the backward pass the float32 gradients of keys and
values follow them; the part of the keys' own rank stays at home, so they travel ``n - 1`` times, not ``n``.
"""

from typing import Optional, Sequence

import torch
from torch import Tensor

from ds_lvxattn.exchange.arguments import Exchange
from ds_lvxattn.exchange.comm import Communicator, Message, Transfer, communicator_by_name
from ds_lvxattn.exchange.interval import clip_to_rank
from ds_lvxattn.kernels.derived import derived_of
from ds_lvxattn.kernels.differentiable import attention_operator
from ds_lvxattn.kernels.local import BackwardPass, LocalAttention
from ds_lvxattn.kernels.triton.merge import merge_partials


def kv_ring_attention(q: Tensor, k: Tensor, v: Tensor, exchange: Exchange) -> tuple[Tensor, Tensor]:
    """Attention of the rank's rows over the keys of all ranks; see ``exchange.arguments``."""
    layout = exchange.layout
    first, last = _ranges_of_owners(exchange, q.shape[2])
    return _operator(q, k, v, first, last, *exchange.settings, exchange.comm.name, layout.kv.lengths)


def _ranges_of_owners(exchange: Exchange, rows: int) -> tuple[Tensor | None, Tensor | None]:
    """What the rank's own rows see of the keys of every rank, as local positions, ``[n, B, s_q]``."""
    interval, comm, kv = exchange.interval, exchange.comm, exchange.layout.kv
    if interval is None:
        return None, None

    def clipped() -> tuple[Tensor, Tensor]:
        own = interval.rows_of(comm.rank, rows)
        first, last = zip(*(clip_to_rank(*own, kv, owner) for owner in range(kv.ranks)), strict=True)
        return torch.stack(first), torch.stack(last)

    return interval.once(("of owners", kv, comm.rank, rows), clipped)


def _pass_on(comm: Communicator, held: Sequence[Tensor], lengths: Sequence[int], owner: int, what: str):
    """Send ``held`` (keys of ``owner``) to the next rank; return the buffers and handle of what arrives."""
    following = lengths[(owner - 1) % comm.ranks]
    arriving = [x.new_empty((*x.shape[:2], following, x.shape[3])) for x in held]
    to, of = (comm.rank + 1) % comm.ranks, (comm.rank - 1) % comm.ranks
    return arriving, comm.exchange([Message(what, x, to, y, of) for x, y in zip(held, arriving, strict=True)])


def _of(first: Optional[Tensor], last: Optional[Tensor], owner: int) -> tuple[Optional[Tensor], Optional[Tensor]]:
    """What the rows see of the keys of ``owner``, cut out once for the layers of a batch."""
    if first is None or last is None:
        return None, None
    return derived_of(first, last, ("keys of", owner), lambda: (first[owner].clone(), last[owner].clone()))


def kv_ring(
    q: Tensor, k: Tensor, v: Tensor, local: LocalAttention, group: str, kv_lengths: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Forward pass; ``local`` has the ranges of ``_ranges_of_owners``."""
    comm = communicator_by_name(group)
    held = [k.contiguous(), v.contiguous()]
    out = lse = None
    for step in range(comm.ranks):
        owner = (comm.rank - step) % comm.ranks
        transfer = None
        if step < comm.ranks - 1:
            arriving, transfer = _pass_on(comm, held, kv_lengths, owner, "keys and values")
        part, part_lse = local.forward(q, held[0], held[1], *_of(local.start, local.stop, owner))
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
    return out, lse


def kv_ring_backward(given: BackwardPass, group: str, kv_lengths: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Backward pass: ``dq`` stays, ``dk`` and ``dv`` of other ranks' keys travel home with them in float32."""
    comm = communicator_by_name(group)
    wide = given.lse.dtype
    dq = torch.zeros_like(given.q, dtype=wide)
    held = [given.k.contiguous(), given.v.contiguous()]
    home: list[Tensor] = []
    travelling: list[Tensor] = []
    gradients: Transfer | None = None
    for step in range(comm.ranks):
        owner = (comm.rank - step) % comm.ranks
        transfer = None
        if step < comm.ranks - 1:
            arriving, transfer = _pass_on(comm, held, kv_lengths, owner, "keys and values")
        part_dq, *parts = given.of_own_rows(held[0], held[1], *_of(given.start, given.stop, owner))
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
    return dq, dk, dv


_operator = attention_operator("kv_ring", kv_ring, kv_ring_backward)
