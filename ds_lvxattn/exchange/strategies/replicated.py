"""Query exchange when every rank already holds all the queries: only partial results travel.

Decoding, and the learned queries of a Q-Former or resampler. The output is the same on every rank. Its gradient is one
of two things, and ``dq`` is the same thing:

- *whole*: the same on every rank, where each rank computes the whole loss. ``dq`` is summed over the ranks.
- *parts*: the ranks' losses are parts of one sum, so the gradient of the output is the sum of what the ranks have. That
  sum is taken here, since the keys of every rank matter to it; the ``dq`` from a rank's own keys is already its part.

``dk`` and ``dv`` are complete on the rank of the keys in both. Either way one sum over the ranks travels.
"""

from typing import Optional

import torch
from torch import Tensor

from ds_lvxattn.exchange.arguments import Exchange
from ds_lvxattn.exchange.comm import Communicator, communicator_by_name
from ds_lvxattn.kernels.base import empty_results, lse_dtype
from ds_lvxattn.kernels.differentiable import attention_operator
from ds_lvxattn.kernels.local import BackwardPass, LocalAttention
from ds_lvxattn.kernels.triton.merge import merge_partials

ALIGNMENT = 8  # bytes: each rank's message holds values of up to so many


def replicated_attention(q: Tensor, k: Tensor, v: Tensor, exchange: Exchange) -> tuple[Tensor, Tensor]:
    """Attention of the shared rows over the keys of all ranks, on every rank; see ``exchange.arguments``."""
    first, last = exchange.local_ranges
    return _operator(q, k, v, first, last, *exchange.settings, exchange.comm.name, exchange.gradient_parts)


def query_replicated(
    q: Tensor, k: Tensor, v: Tensor, local: LocalAttention, group: str, parts: bool
) -> tuple[Tensor, Tensor]:
    """Forward pass; the results are equal on every rank."""
    comm = communicator_by_name(group)
    partial_out, partial_lse = local.forward(q, k, v)
    out, lse = empty_results(q, v)
    merge_partials(*_gather_results(partial_out, partial_lse, comm), out=out, lse=lse)
    return out, lse


def _gather_results(out: Tensor, lse: Tensor, comm: Communicator) -> tuple[Tensor, Tensor]:
    """Partial results of all ranks, ``[n, B, H, s_q, D_v]`` and ``[n, B, H, s_q]``.

    A token's result is small: both travel in one message, side by side in bytes.
    """
    if not out.numel():
        return out.new_empty((comm.ranks, *out.shape)), lse.new_empty((comm.ranks, *lse.shape))
    parts = [x.contiguous().view(-1).view(torch.uint8) for x in (lse, out)]
    size = sum(part.numel() for part in parts)
    parts.append(parts[0].new_empty(-size % ALIGNMENT))
    results = comm.all_gather(torch.cat(parts), "outputs")
    lses, outs, _ = results.split([part.numel() for part in parts], dim=1)
    return outs.view(out.dtype).unflatten(1, out.shape), lses.view(lse.dtype).unflatten(1, lse.shape)


def query_replicated_backward(given: BackwardPass, group: str, parts: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Backward pass: everything is at hand but one sum over the ranks, of ``dq`` or (``parts``) of ``dout``."""
    comm = communicator_by_name(group)
    if parts:
        given.dout, given.dlse = _sum_parts(given.dout, given.dlse, comm)
    dq, dk, dv = given.local()
    if not parts:
        dq = comm.all_reduce(dq.to(given.lse.dtype).contiguous(), "query gradients")
    return dq, dk, dv


def _sum_parts(dout: Tensor, dlse: Optional[Tensor], comm: Communicator) -> tuple[Tensor, Optional[Tensor]]:
    """The sums over the ranks, taken in the dtype of the log-sum-exp, in one message."""
    parts = [dout] if dlse is None else [dout, dlse]
    # A new tensor, which the sum may overwrite.
    flat = torch.cat([part.to(lse_dtype(dout.dtype)).flatten() for part in parts])
    sums = comm.all_reduce(flat, "output gradients").split([part.numel() for part in parts])
    whole, *rest = (x.view(part.shape).to(part.dtype) for x, part in zip(sums, parts, strict=True))
    return whole, rest[0] if rest else None


_operator = attention_operator("query_replicated", query_replicated, query_replicated_backward)
