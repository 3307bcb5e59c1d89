"""Other forms of calling FlashAttention-4 than the library's, which ``tiles.py`` measures."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ds_lvxattn.kernels.base import Kernel
from ds_lvxattn.kernels.cudnn import CudnnKernel
from ds_lvxattn.kernels.fa4.kernel import FlashAttention4Kernel
from ds_lvxattn.kernels.fa4.packed import packed, packed_backward, packed_ranges, unpacked
from ds_lvxattn.kernels.fa4.shares import forward_in_shares

CUDNN, FA4 = CudnnKernel(), FlashAttention4Kernel()


def unpacked_forward(
    q: Tensor, k: Tensor, v: Tensor, start: Tensor | None, stop: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Each query head apart, in the order of the rows."""
    from ds_lvxattn.kernels.fa4.attention import fa4_forward

    return fa4_forward(q, k, v, start, stop, scale)


def packed_forward(
    q: Tensor, k: Tensor, v: Tensor, start: Tensor | None, stop: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The query heads of a key head as rows of one head, in their order."""
    kv_heads = k.shape[1]
    ranges = packed_ranges(start, stop, q.shape[1] // kv_heads)
    out, lse = unpacked_forward(packed(q, kv_heads), k, v, *ranges, scale)
    return unpacked(out, q), unpacked(lse, q[..., 0])


def unpacked_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor, start: Tensor | None,
    stop: Tensor | None, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Each query head apart."""
    from ds_lvxattn.kernels.fa4.attention import fa4_backward

    return fa4_backward(dout, q, k, v, lse, delta, start, stop, scale)


@functools.cache
def _backward_of_own_columns() -> Callable[..., object]:
    """The library's backward pass without padding of the head size on Hopper, see ``attention.backward_columns``.

    Its own ``_flash_attn_bwd``, but for the kernel behind it, which reads ``dQ`` in tiles of columns rounded up to 16,
    as they were written, and not up to 32.
    """
    from flash_attn.cute import interface

    def convert(*args: Any, **options: Any) -> None:
        interface._bwd_postprocess_convert(*args, **{**options, "hdim_multiple_of": 16})

    theirs = interface._flash_attn_bwd
    names = {**vars(interface), "_bwd_postprocess_convert": convert}
    return types.FunctionType(theirs.__code__, names, theirs.__name__, theirs.__defaults__)


def backward_form(
    one_zero: bool, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor,
    start: Tensor | None, stop: Tensor | None, scale: float, softcap: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Each query head apart, without padding.

    Args:
        one_zero: the output that stands in, of zeros, is one row that all share, and not as large as the queries.
    """
    from ds_lvxattn.kernels.fa4.attention import BACKWARD_ROWS, _masked

    dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
    zeros = dout.new_zeros(dout.shape[3]).expand(dout.shape) if one_zero else torch.zeros_like(dout)
    _backward_of_own_columns()(
        *(x.transpose(1, 2) for x in (q, k, v, zeros, dout)), lse, scale, dlse=delta.neg(),
        dq=dq.transpose(1, 2), dk=dk.transpose(1, 2), dv=dv.transpose(1, 2),
        **_masked(start, stop, k.shape[2], BACKWARD_ROWS, transposed=True),
    )  # fmt: skip
    return dq, dk, dv


def one_zero_packed(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor, start: Tensor | None,
    stop: Tensor | None, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The query heads of a key head as rows of one head, and one row of zeros that stands in for the output."""
    backward = functools.partial(backward_form, True)
    return packed_backward(backward, dout, q, k, v, lse, delta, start, stop, scale, None)


def in_shares(kernel: Kernel, shares: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The keys in so many shares."""

    def forward(q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> None:
        for written, made in zip((out, lse), kernel.forward(q, k, v, None, None, scale), strict=True):
            written.copy_(made)

    return forward_in_shares(forward, shares, q, k, v)
