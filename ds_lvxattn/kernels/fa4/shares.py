"""Few rows over many keys: shares of the keys as sequences of a batch, which fill the chip, and their merge."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ds_lvxattn.kernels.base import empty_results, lse_dtype
from ds_lvxattn.kernels.triton.merge import merge_partials

# Of ``q, k, v`` into ``out`` and the log-sum-exp.
ForwardInto = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], None]


def forward_in_shares(forward: ForwardInto, shares: int, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """See ``Kernel.forward``; every key is visible.

    Args:
        forward: attention over all keys, any batch size.
        shares: equal shares of the keys, at most as many as there are keys; those left over are one more.
    """
    batch, heads, rows, _ = q.shape
    length = k.shape[2] // shares
    first_left = shares * length
    parts = shares + (first_left < k.shape[2])
    outs = q.new_empty((batch, parts, heads, rows, v.shape[3]))
    lses = q.new_empty((batch, parts, heads, rows), dtype=lse_dtype(q.dtype))
    for b in range(batch):  # the shares of one sequence lie at one distance, those of several do not
        rows_of = q[b : b + 1]
        k_shares, v_shares = (x[b, :, :first_left].unflatten(1, (shares, length)).transpose(0, 1) for x in (k, v))
        forward(rows_of.repeat(shares, 1, 1, 1), k_shares, v_shares, outs[b, :shares], lses[b, :shares])
        if parts > shares:
            k_left, v_left = (x[b : b + 1, :, first_left:] for x in (k, v))
            forward(rows_of, k_left, v_left, outs[b, shares:], lses[b, shares:])
    return merge_partials(outs.transpose(0, 1), lses.transpose(0, 1), *empty_results(q, v))
