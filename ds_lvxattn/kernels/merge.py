"""Merge of partial attentions over disjoint keys: ``L = logsumexp(l)``, ``O = sum exp(l - L) o``.

LV-XAttn (arXiv 2502.02406), section 3.2. The maximum is subtracted before any exponential, because a real
log-sum-exp exceeds 88, where ``exp`` overflows float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl

    from ds_lvxattn.kernels.row_order import row_offset, row_order, row_sizes, row_strides
except ImportError:  # no Triton on this platform: the torch path does every call
    triton = None

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
        HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr, UNROLL: tl.constexpr,
    ):  # fmt: skip
        """BLOCK_S rows: an online sum over the partials, UNROLL of them in flight at once."""
        row = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
        inside = row < rows
        dim = tl.arange(0, BLOCK_D)
        inside_d = (dim < HEAD_DIM)[None, :]
        lse_row = row_offset(row, size_1, size_2, lses_stride_0, lses_stride_1, lses_stride_2)
        out_row = row_offset(row, size_1, size_2, outs_stride_0, outs_stride_1, outs_stride_2)
        value_at = out_row[:, None] + dim[None, :] * outs_stride_d

        # Finite, so that rows that no partial saw have weights exp(-inf - top) = 0 and not NaN.
        top = tl.full([BLOCK_S], -1e30, tl.float32)
        total = tl.zeros([BLOCK_S], tl.float32)
        acc = tl.zeros([BLOCK_S, BLOCK_D], tl.float32)
        for _ in tl.range(0, parts, UNROLL):
            lses = lses_ptr
            new_top = top
            for i in tl.static_range(UNROLL):
                here = row < tl.where(i < parts, rows, 0)
                part = tl.load(lses + lse_row, mask=here, other=float("-inf"))
                new_top = tl.maximum(new_top, part)
                lses += lses_stride_n
            shrink = tl.exp(top - new_top)
            total *= shrink
            acc *= shrink[:, None]
            top = new_top
            for i in tl.static_range(UNROLL):
                here = row < tl.where(i < parts, rows, 0)
                value = tl.load(outs_ptr + value_at, mask=here[:, None] & inside_d, other=0.0).to(tl.float32)
                weight = tl.exp(tl.load(lses_ptr + lse_row, mask=here, other=float("-inf")) - top)
                # What a partial that saw nothing left in its output counts as 0, NaN included.
                acc += tl.where((weight > 0)[:, None], value, 0.0) * weight[:, None]
                total += weight
                outs_ptr += outs_stride_n
                lses_ptr += lses_stride_n
            parts -= UNROLL

        seen = total > 0
        acc = tl.where(seen[:, None], acc / total[:, None], 0.0)
        out = out_ptr + row_offset(row, size_1, size_2, out_stride_0, out_stride_1, out_stride_2)
        out = out[:, None] + dim[None, :] * out_stride_d
        tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=inside[:, None] & inside_d)
        lse = lse_ptr + row_offset(row, size_1, size_2, lse_stride_0, lse_stride_1, lse_stride_2)
        tl.store(lse, tl.where(seen, top + tl.log(total), float("-inf")), mask=inside)

    def merge_partials_triton(outs: Tensor, lses: Tensor, out: Tensor, lse: Tensor) -> None:
        """Merge ``outs [n, B, H, S, D]`` and float32 ``lses [n, B, H, S]`` in one pass over memory.

        Writes ``out [B, H, S, D]`` (its own dtype) and float32 ``lse [B, H, S]``. Any strides everywhere.
        """
        if out.numel() == 0:
            return
        parts, head_dim = outs.shape[0], outs.shape[-1]
        order = row_order(outs[0])
        block_d = triton.next_power_of_2(head_dim)
        block_s = max(1, 4096 // block_d)
        _merge_kernel[(triton.cdiv(lse.numel(), block_s),)](
            outs, lses, out, lse,
            outs.stride(0), *row_strides(outs[0], order), outs.stride(-1), lses.stride(0), *row_strides(lses[0], order),
            *row_strides(out, order), out.stride(-1), *row_strides(lse, order),
            parts, lse.numel(), *row_sizes(lse, order),
            HEAD_DIM=head_dim, BLOCK_D=block_d, BLOCK_S=block_s, UNROLL=1 if parts == 1 else 2, num_warps=4,
        )  # fmt: skip


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
        lse = torch.empty(lses.shape[1:], dtype=lses.dtype, device=lses.device)
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
