"""Other forms of calling FlashAttention-4 than the library's, which ``tiles.py`` measures."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ds_lvxattn.kernels.base import Kernel, empty_rows
from ds_lvxattn.kernels.derived import derived_of
from ds_lvxattn.kernels.triton.merge import merge_partials

Ranges = tuple[Tensor, Tensor] | tuple[None, None]


def packed(x: Tensor, kv_heads: int, backwards: bool = False) -> Tensor:
    """``[B, H_q, S, ...]`` as ``[B, H_kv, S * group, ...]``, the heads of a group beside each other.

    A tile then holds the rows of few positions, whose ranges are close together, and the gradients of the keys need
    no sum over query heads.

    Args:
        backwards: the last position first. Where later rows see more keys, the longest tiles start first.
    """
    rows = x.unflatten(1, (kv_heads, -1)).transpose(2, 3)
    return (rows.flip(2) if backwards else rows).flatten(2, 3)


def unpacked(x: Tensor, rows: int, like: Tensor, backwards: bool = False) -> Tensor:
    """The opposite of ``packed``, laid out as ``like [B, H_q, S, ...]``."""
    parts = x.unflatten(2, (rows, -1))
    parts = (parts.flip(2) if backwards else parts).transpose(2, 3)
    out = torch.empty_like(like, dtype=x.dtype)
    out.unflatten(1, (x.shape[1], -1)).copy_(parts)
    return out


def packed_ranges(start: Tensor | None, stop: Tensor | None, group: int, backwards: bool = False) -> Ranges:
    """Ranges of ``packed`` rows, made once for the layers of a batch."""
    if start is None or stop is None:
        return None, None

    def make() -> tuple[Tensor, Tensor]:
        start_of, stop_of = ((x.flip(1) if backwards else x).repeat_interleave(group, 1) for x in (start, stop))
        return start_of, stop_of

    return derived_of(start, stop, ("packed", group, backwards), make)


def packed_forward(
    kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, start: Tensor | None, stop: Tensor | None, scale: float,
    backwards: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    kv_heads, rows = k.shape[1], q.shape[2]
    ranges = packed_ranges(start, stop, q.shape[1] // kv_heads, backwards)
    out, lse = kernel.forward(packed(q, kv_heads, backwards), k, v, *ranges, scale)
    return unpacked(out, rows, q, backwards), unpacked(lse, rows, q[..., 0], backwards)


def packed_backward(
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]], dout: Tensor, q: Tensor, k: Tensor, v: Tensor,
    lse: Tensor, delta: Tensor, start: Tensor | None, stop: Tensor | None, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    kv_heads = k.shape[1]
    rows = [packed(x, kv_heads) for x in (dout, q, lse, delta)]
    ranges = packed_ranges(start, stop, q.shape[1] // kv_heads)
    dq, dk, dv = backward(*rows[:2], k, v, *rows[2:], *ranges, scale)
    return unpacked(dq, q.shape[2], q), dk, dv


def forward_in_shares(
    kernel: Kernel, shares: int, q: Tensor, k: Tensor, v: Tensor, scale: float, pack: bool = False
) -> tuple[Tensor, Tensor]:
    """Equal shares of the keys as a batch, then their merge: few rows fill the chip. One sequence, no mask."""
    k_shares, v_shares = (x[0].unflatten(1, (shares, -1)).transpose(0, 1) for x in (k, v))
    rows = packed(q, k.shape[1]) if pack else q
    outs, lses = kernel.forward(rows.repeat(shares, 1, 1, 1), k_shares, v_shares, None, None, scale)
    out, lse = merge_partials(outs.unsqueeze(1), lses.unsqueeze(1), empty_rows(rows, v.shape[3]))
    return (unpacked(out, q.shape[2], q), unpacked(lse, q.shape[2], q[..., 0])) if pack else (out, lse)


def fa4_backward_lean(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor, start: Tensor | None,
    stop: Tensor | None, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """As ``fa4_backward``, without a tensor of zeros and without padding head sizes between multiples of 32."""
    from flash_attn.cute.interface import _flash_attn_bwd

    from ds_lvxattn.kernels.fa4.attention import BACKWARD_ROWS, _masked

    dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
    nothing = dout.new_zeros(dout.shape[3]).expand(dout.transpose(1, 2).shape)
    with accumulators_as_written():
        _flash_attn_bwd(
            *(x.transpose(1, 2) for x in (q, k, v)), nothing, dout.transpose(1, 2), lse, scale, dlse=delta.neg(),
            dq=dq.transpose(1, 2), dk=dk.transpose(1, 2), dv=dv.transpose(1, 2),
            **_masked(start, stop, k.shape[2], BACKWARD_ROWS, transposed=True),
        )  # fmt: skip
    return dq, dk, dv


@contextmanager
def accumulators_as_written() -> Iterator[None]:
    """On Hopper the backward kernel writes its float32 sums in rows of the head size up to 16; they are read back in
    rows up to 32. Here they are read as they were written, so that head sizes 72 and 80 are right."""
    from flash_attn.cute import interface

    read = interface._bwd_postprocess_convert

    @functools.wraps(read)
    def as_written(*args: object, **options: object) -> None:
        if options.get("hdim_multiple_of") == 32:
            options["hdim_multiple_of"] = 16
        read(*args, **options)

    interface._bwd_postprocess_convert = as_written
    try:
        yield
    finally:
        interface._bwd_postprocess_convert = read
