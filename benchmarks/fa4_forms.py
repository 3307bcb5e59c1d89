"""Other forms of calling FlashAttention-4 than the library's, which ``tiles.py`` measures."""

from __future__ import annotations

from torch import Tensor

from ds_lvxattn.kernels.base import Kernel
from ds_lvxattn.kernels.cudnn import CudnnKernel
from ds_lvxattn.kernels.derived import derived_of
from ds_lvxattn.kernels.fa4.kernel import FlashAttention4Kernel
from ds_lvxattn.kernels.fa4.packed import packed, packed_ranges, unpacked
from ds_lvxattn.kernels.fa4.shares import forward_in_shares

CUDNN, FA4 = CudnnKernel(), FlashAttention4Kernel()


def packed_forward(
    q: Tensor, k: Tensor, v: Tensor, start: Tensor | None, stop: Tensor | None, scale: float, backwards: bool = False
) -> tuple[Tensor, Tensor]:
    """The query heads of a key head as rows of one head.

    Args:
        backwards: the last position first. Where later rows see more keys, the longest tiles start first.
    """
    kv_heads, group = k.shape[1], q.shape[1] // k.shape[1]
    rows = packed(q.flip(2) if backwards else q, kv_heads)
    out, lse = FA4.forward(rows, k, v, *_ranges(start, stop, group, backwards), scale)
    out, lse = unpacked(out, q), unpacked(lse, q[..., 0])
    return (out.flip(2), lse.flip(2)) if backwards else (out, lse)


def _ranges(
    start: Tensor | None, stop: Tensor | None, group: int, backwards: bool
) -> tuple[Tensor, Tensor] | tuple[None, None]:  # fmt: skip
    if start is not None and stop is not None and backwards:
        start, stop = derived_of(start, stop, "backwards", lambda: (start.flip(1), stop.flip(1)))
    return packed_ranges(start, stop, group)


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
