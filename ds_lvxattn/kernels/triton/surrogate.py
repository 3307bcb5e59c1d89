"""A stand-in for the attention output with the same ``delta``: ``O* = dO * delta / |dO|^2``, row by row.

The backward passes of cuDNN and FlashAttention take the output ``O``, but use it only in ``delta = rowsum(dO * O)``
(FlashAttention-2, arXiv 2307.08691, algorithm 2, line 4). ``rowsum(dO * O*) = delta`` too, so the owner of the rows
sends one number a row instead of ``O``. All terms of that sum have the sign of ``delta``: rounding ``O*`` to its dtype
moves it by no more than rounding ``O`` does.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl

    from ds_lvxattn.kernels.triton.launch import KEPT, Launch, Layout, layout, place
    from ds_lvxattn.kernels.triton.row_order import row_offset, row_order
except ImportError:  # no Triton on this platform: the torch path does every call
    triton = None

if triton is not None:

    @triton.jit(do_not_specialize=["delta_stride_0", "delta_stride_1", "delta_stride_2", "rows", "size_1", "size_2"])
    def _output_with_delta_kernel(
        dout_ptr, delta_ptr, out_ptr,
        dout_stride_0, dout_stride_1, dout_stride_2, dout_stride_d, delta_stride_0, delta_stride_1, delta_stride_2,
        out_stride_0, out_stride_1, out_stride_2, out_stride_d, rows, size_1, size_2,
        DIMS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr,
    ):  # fmt: skip
        """BLOCK_S rows."""
        row = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
        inside = row < rows
        dim = tl.arange(0, BLOCK_D)
        mask = inside[:, None] & (dim < HEAD_DIM)[None, :]
        dout = dout_ptr + row_offset(row, size_1, size_2, dout_stride_0, dout_stride_1, dout_stride_2, DIMS)
        dout = tl.load(dout[:, None] + dim[None, :] * dout_stride_d, mask=mask, other=0.0).to(tl.float32)
        delta = delta_ptr + row_offset(row, size_1, size_2, delta_stride_0, delta_stride_1, delta_stride_2, DIMS)
        delta = tl.load(delta, mask=inside, other=0.0)
        # Divided by the row's largest entry first: the square of a small gradient underflows.
        shrink = 1.0 / tl.maximum(tl.max(tl.abs(dout), 1), 1e-38)
        unit = dout * shrink[:, None]
        square = tl.sum(unit * unit, 1)
        factor = tl.where(square == 0.0, 0.0, delta * shrink / square)
        out = out_ptr + row_offset(row, size_1, size_2, out_stride_0, out_stride_1, out_stride_2, DIMS)
        out = out[:, None] + dim[None, :] * out_stride_d
        tl.store(out, (unit * factor[:, None]).to(out_ptr.dtype.element_ty), mask=mask)

    def output_with_delta_triton(dout: Tensor, delta: Tensor) -> Tensor:
        """``output_with_delta`` in one pass over memory, for inputs narrower than float64."""
        out = torch.empty_like(dout)
        if out.numel() == 0:
            return out
        launch, integers = _surrogate_plan(place(dout), layout(dout), layout(delta), layout(out))
        launch(dout, delta, out, *integers)
        return out

    @functools.lru_cache(maxsize=KEPT)
    def _surrogate_plan(
        where: tuple[int, int], dout: Layout, delta: Layout, out: Layout
    ) -> tuple[Launch, tuple[int, ...]]:
        """The kernel and its integers."""
        _, sizes, *_ = delta
        order = row_order(sizes, dout[2], delta[2], out[2])
        dout_strides, delta_strides, out_strides = order.strides
        head_dim, rows = dout[1][3], math.prod(sizes)
        block_d = triton.next_power_of_2(head_dim)
        block_s = max(1, 1024 // block_d)
        launch = Launch(
            _output_with_delta_kernel, (triton.cdiv(rows, block_s),),
            DIMS=order.dims, HEAD_DIM=head_dim, BLOCK_D=block_d, BLOCK_S=block_s, num_warps=2,
        )  # fmt: skip
        return launch, (*dout_strides, dout[2][3], *delta_strides, *out_strides, out[2][3], rows, *order.sizes)


def output_with_delta(dout: Tensor, delta: Tensor) -> Tensor:
    """An output that gives ``delta`` in a backward pass which computes ``rowsum(dO * O)`` itself.

    Args:
        dout: ``[B, H, S, D]`` gradient of the output, any strides.
        delta: ``[B, H, S]``, ``rowsum(dO * O)`` (``attention_delta`` without a gradient of the log-sum-exp), float32
            (float64 for float64 inputs).

    Returns:
        ``[B, H, S, D]`` in the dtype and, where they are dense, the strides of ``dout``. Rows whose gradient is 0
        give 0: their ``delta`` is 0.
    """
    if triton is not None and dout.is_cuda and dout.dtype != torch.float64:
        return output_with_delta_triton(dout, delta)
    wide = dout.to(delta.dtype)
    top = wide.abs().amax(dim=-1, keepdim=True).clamp(min=1e-38)
    unit = wide / top
    square = unit.square().sum(dim=-1, keepdim=True)
    factor = (delta.unsqueeze(-1) / top / square).masked_fill(square == 0.0, 0.0)
    return torch.empty_like(dout).copy_(unit * factor)
