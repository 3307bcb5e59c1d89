"""The query heads of a key head as rows of one head.

A tile then holds the rows of few positions, whose ranges are close together. In the backward pass the gradients of the
keys need no sum over query heads: each is written once, in its own dtype. In the forward pass the rows can be put into
another order with it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ds_lvxattn.kernels.derived import derived_of

Grads = tuple[Tensor, Tensor, Tensor]


def packed(x: Tensor, kv_heads: int, order: Tensor | None = None) -> Tensor:
    """``[B, H_q, S, ...]`` as ``[B, H_kv, S * group, ...]``, the heads of a group beside each other.

    Args:
        order: int64 ``[S]``, the positions one after another; None: as they are.
    """
    rows = x.unflatten(1, (kv_heads, -1)).transpose(2, 3)
    return (rows if order is None else rows.index_select(2, order)).flatten(2, 3)


def unpacked(x: Tensor, like: Tensor, order: Tensor | None = None) -> Tensor:
    """The opposite of ``packed``, laid out as ``like [B, H_q, S, ...]``."""
    out = torch.empty_like(like, dtype=x.dtype)
    rows, packed_rows = out.unflatten(1, (x.shape[1], -1)).transpose(2, 3), x.unflatten(2, (like.shape[2], -1))
    if order is None:
        rows.copy_(packed_rows)
    else:
        rows.index_copy_(2, order, packed_rows)
    return out


def packed_ranges(
    start: Tensor | None, stop: Tensor | None, group: int
) -> tuple[Tensor, Tensor] | tuple[None, None]:  # fmt: skip
    """Ranges ``[B, S * group]`` of packed rows from those of ``S``, made once for the layers of a batch."""
    if start is None or stop is None:
        return None, None
    return derived_of(start, stop, ("packed", group), lambda: (_repeated(start, group), _repeated(stop, group)))


def _repeated(x: Tensor, group: int) -> Tensor:
    return x.unsqueeze(2).repeat(1, 1, group).flatten(1)


def last_rows_first(
    forward: Callable[..., tuple[Tensor, Tensor]], q: Tensor, k: Tensor, v: Tensor, start: Tensor, stop: Tensor,
    scale: float, softcap: float | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``forward``, which takes and returns the same, over packed rows from the last position to the first.

    Where later rows see more keys, the longest tiles start first then, and the short ones fill the chip at the end.
    """
    group = q.shape[1] // k.shape[1]

    def turned() -> tuple[Tensor, Tensor, Tensor]:
        order = torch.arange(q.shape[2] - 1, -1, -1, device=q.device)
        return order, _repeated(start.flip(1), group), _repeated(stop.flip(1), group)

    order, start, stop = derived_of(start, stop, ("last rows first", group), turned)
    out, lse = forward(packed(q, k.shape[1], order), k, v, start, stop, scale, softcap)
    return unpacked(out, q, order), unpacked(lse, q[..., 0], order)


def packed_backward(
    backward: Callable[..., Grads], dout: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor,
    start: Tensor | None, stop: Tensor | None, scale: float, softcap: float | None,
) -> Grads:  # fmt: skip
    """``backward``, which takes and returns the same, over packed rows."""
    kv_heads = k.shape[1]
    dout, rows, lse, delta = (packed(x, kv_heads) for x in (dout, q, lse, delta))
    start, stop = packed_ranges(start, stop, q.shape[1] // kv_heads)
    dq, dk, dv = backward(dout, rows, k, v, lse, delta, start, stop, scale, softcap)
    return unpacked(dq, q), dk, dv
