"""Merge of partial attentions over disjoint keys: ``L = logsumexp(l)``, ``O = sum exp(l - L) o``.

LV-XAttn (arXiv 2502.02406), section 3.2. The maximum is subtracted before any exponential, because a real
log-sum-exp exceeds 88, where ``exp`` overflows float32.
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

# Of the output, a program.
MERGE_ELEMENTS = 1024

if triton is not None:
    # Sizes and the strides of short tensors change with lengths: compiling again for them would stall a step.
    @triton.jit(
        do_not_specialize=[
            "lses_stride_n", "lses_stride_0", "lses_stride_1", "lses_stride_2", "lse_stride_0", "lse_stride_1",
            "lse_stride_2", "parts", "rows", "size_1", "size_2",
        ]
    )  # fmt: skip
    def _merge_kernel(
        outs_ptr, lses_ptr, out_ptr, lse_ptr,
        outs_stride_n, outs_stride_0, outs_stride_1, outs_stride_2, outs_stride_d,
        lses_stride_n, lses_stride_0, lses_stride_1, lses_stride_2,
        out_stride_0, out_stride_1, out_stride_2, out_stride_d, lse_stride_0, lse_stride_1, lse_stride_2,
        parts, rows, size_1, size_2,
        DIMS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr,
    ):  # fmt: skip
        """BLOCK_S rows: the weights from ``lses`` alone, then one pass over ``outs``, two partials in flight."""
        row = (tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S))[:, None]
        dim = tl.arange(0, BLOCK_D)[None, :]
        inside_d = dim < HEAD_DIM
        lse_row = row_offset(row, size_1, size_2, lses_stride_0, lses_stride_1, lses_stride_2, DIMS)
        value_at = row_offset(row, size_1, size_2, outs_stride_0, outs_stride_1, outs_stride_2, DIMS)
        value_at += dim * outs_stride_d

        # Finite, so that rows that no partial saw have weights exp(-inf - top) = 0 and not NaN.
        top = tl.full([BLOCK_S, 1], -1e30, tl.float32)
        part_lses = lses_ptr
        for first in tl.range(0, parts, 2):
            for i in tl.static_range(2):
                here = row < tl.where(first + i < parts, rows, 0)
                top = tl.maximum(top, tl.load(part_lses + lse_row, mask=here, other=float("-inf")))
                part_lses += lses_stride_n

        total = tl.zeros([BLOCK_S, 1], tl.float32)
        acc = tl.zeros([BLOCK_S, BLOCK_D], tl.float32)
        for first in tl.range(0, parts, 2):
            for i in tl.static_range(2):
                here = row < tl.where(first + i < parts, rows, 0)
                weight = tl.exp(tl.load(lses_ptr + lse_row, mask=here, other=float("-inf")) - top)
                # What a partial that saw nothing left in its output is not read, so it counts as 0, NaN included.
                value = tl.load(outs_ptr + value_at, mask=(weight > 0) & inside_d, other=0.0)
                acc += value.to(tl.float32) * weight
                total += weight
                outs_ptr += outs_stride_n
                lses_ptr += lses_stride_n

        seen = total > 0
        # One division a row, not one an element: the pass is as much bound by instructions as by memory.
        acc *= tl.where(seen, 1.0 / total, 0.0)
        inside = row < rows
        out = out_ptr + row_offset(row, size_1, size_2, out_stride_0, out_stride_1, out_stride_2, DIMS)
        tl.store(out + dim * out_stride_d, acc.to(out_ptr.dtype.element_ty), mask=inside & inside_d)
        lse = lse_ptr + row_offset(row, size_1, size_2, lse_stride_0, lse_stride_1, lse_stride_2, DIMS)
        tl.store(lse, tl.where(seen, top + tl.log(total), float("-inf")), mask=inside)

    def merge_partials_triton(outs: Tensor, lses: Tensor, out: Tensor, lse: Tensor) -> None:
        """Merge ``outs [n, B, H, S, D]`` and float32 ``lses [n, B, H, S]`` in one pass over memory.

        Writes ``out [B, H, S, D]`` (its own dtype) and float32 ``lse [B, H, S]``. Any strides everywhere.
        """
        if out.numel() == 0:
            return
        launch, integers = _plan(place(outs), layout(outs), layout(lses), layout(out), layout(lse))
        launch(outs, lses, out, lse, *integers)

    @functools.lru_cache(maxsize=KEPT)
    def _plan(
        where: tuple[int, int], outs: Layout, lses: Layout, out: Layout, lse: Layout
    ) -> tuple[Launch, tuple[int, ...]]:
        """The kernel and its integers."""
        _, (parts, *sizes, head_dim), (outs_stride, *outs_strides), _ = outs
        lses_stride, *lses_strides = lses[2]
        order = row_order(sizes, outs_strides, lses_strides, out[2], lse[2])
        of_outs, of_lses, of_out, of_lse = order.strides
        rows = math.prod(sizes)
        block_d = triton.next_power_of_2(head_dim)
        block_s = max(1, MERGE_ELEMENTS // block_d)
        launch = Launch(
            _merge_kernel, (triton.cdiv(rows, block_s),),
            DIMS=order.dims, HEAD_DIM=head_dim, BLOCK_D=block_d, BLOCK_S=block_s, num_warps=2,
        )  # fmt: skip
        integers = (
            outs_stride, *of_outs, outs_strides[3], lses_stride, *of_lses, *of_out, out[2][3], *of_lse, parts, rows,
            *order.sizes,
        )  # fmt: skip
        return launch, integers


def merge_partials(
    outs: Tensor, lses: Tensor, out: Tensor | None = None, lse: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Merge ``n`` partial results of the same rows into one.

    Args:
        outs: ``[n, B, H, S, D]`` partial outputs, any strides; float64, float32, bfloat16 or float16.
        lses: ``[n, B, H, S]`` natural log-sum-exp, float32 (float64 for float64 outputs); ``-inf`` where a
            partial saw no key, and its output there counts as 0 whatever it holds.
        out: ``[B, H, S, D]`` to write the output to, for instance some heads of a larger tensor; any strides, any
            float dtype. None allocates one in the dtype and, where they are dense, the strides of one partial.
        lse: ``[B, H, S]`` to write the log-sum-exp to, in the dtype of ``lses``; any strides. None allocates one.

    Returns:
        ``out [B, H, S, D]`` and ``lse [B, H, S]``. Rows that no partial saw give 0 and ``-inf``. The sum runs in
        the dtype of ``lses``.
    """
    if out is None:
        out = torch.empty_like(outs[0])
    if lse is None:
        lse = torch.empty_like(lses[0])
    if triton is not None and outs.is_cuda and lses.dtype == torch.float32:
        merge_partials_triton(outs, lses, out, lse)
        return out, lse
    torch.logsumexp(lses, dim=0, out=lse)
    # A row that sees nothing has lse = -inf; shifting by 0 there keeps exp(-inf - 0) = 0 instead of NaN.
    shift = lse.masked_fill(lse == float("-inf"), 0.0)
    weights = torch.exp(lses - shift)
    # The rounding of the merged log-sum-exp (1e-5 at 250 in float32) scales whole rows; their sums take it
    # out.
    total = weights.sum(dim=0)
    weights = weights / total.masked_fill(total == 0.0, 1.0)
    merged = torch.zeros_like(outs[0], dtype=lses.dtype)
    for part, weight in zip(outs.unbind(0), weights.unbind(0), strict=True):
        weight = weight.unsqueeze(-1)
        merged.addcmul_(weight, part.to(lses.dtype).masked_fill(weight == 0, 0.0))
    return out.copy_(merged), lse
