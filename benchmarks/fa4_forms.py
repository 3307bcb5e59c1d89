"""Other forms of calling FlashAttention-4 than the library's, which ``tiles.py`` measures."""

from __future__ import annotations

from torch import Tensor

from ds_lvxattn.kernels.base import Kernel
from ds_lvxattn.kernels.cudnn import CudnnKernel
from ds_lvxattn.kernels.fa4.kernel import FlashAttention4Kernel
from ds_lvxattn.kernels.fa4.packed import packed, packed_ranges, unpacked
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


def in_shares(kernel: Kernel, shares: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The keys in so many shares."""

    def forward(q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> None:
        for written, made in zip((out, lse), kernel.forward(q, k, v, None, None, scale), strict=True):
            written.copy_(made)

    return forward_in_shares(forward, shares, q, k, v)
