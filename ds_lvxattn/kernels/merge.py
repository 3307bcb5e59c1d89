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
except ImportError:  # no Triton on this platform: the torch path does every call
    triton = None

if triton is not None:

    @triton.jit(
        do_not_specialize=[
            "lses_stride_n", "lses_stride_b", "lses_stride_h", "lses_stride_s", "parts", "heads", "seq",
        ]
    )  # fmt: skip
    def _merge_kernel(
        outs_ptr, lses_ptr, out_ptr, lse_ptr,
        outs_stride_n, outs_stride_b, outs_stride_h, outs_stride_s, outs_stride_d,
        lses_stride_n, lses_stride_b, lses_stride_h, lses_stride_s,
        out_stride_b, out_stride_h, out_stride_s, out_stride_d,
        parts, heads, seq,
        HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr,
    ):  # fmt: skip
        """BLOCK_S rows of one head: the weights from ``lses`` alone, then one pass over ``outs``."""
        batch = (tl.program_id(1) // heads).to(tl.int64)
        head = (tl.program_id(1) % heads).to(tl.int64)
        row = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
        inside = row < seq
        row64 = row.to(tl.int64)
        dim = tl.arange(0, BLOCK_D)
        tile_mask = inside[:, None] & (dim < HEAD_DIM)[None, :]

        lses = lses_ptr + batch * lses_stride_b + head * lses_stride_h + row64 * lses_stride_s
        top = tl.full([BLOCK_S], float("-inf"), tl.float32)
        for part in tl.range(0, parts, loop_unroll_factor=2):
            top = tl.maximum(top, tl.load(lses + part * lses_stride_n, mask=inside, other=float("-inf")))
        # A row that no partial saw shifts by 0: exp(-inf - 0) = 0 where exp(-inf + inf) would be NaN.
        top = tl.where(top == float("-inf"), 0.0, top)

        outs = outs_ptr + batch * outs_stride_b + head * outs_stride_h
        outs = outs + row64[:, None] * outs_stride_s + dim[None, :] * outs_stride_d
        total = tl.zeros([BLOCK_S], tl.float32)
        acc = tl.zeros([BLOCK_S, BLOCK_D], tl.float32)
        for part in tl.range(0, parts, loop_unroll_factor=2):
            weight = tl.exp(tl.load(lses + part * lses_stride_n, mask=inside, other=float("-inf")) - top)
            value = tl.load(outs, mask=tile_mask, other=0.0).to(tl.float32)
            # What a partial that saw nothing left in its output counts as 0, NaN included.
            acc += tl.where((weight > 0)[:, None], value, 0.0) * weight[:, None]
            total += weight
            outs += outs_stride_n

        seen = total > 0
        acc = tl.where(seen[:, None], acc / total[:, None], 0.0)
        out = out_ptr + batch * out_stride_b + head * out_stride_h
        out = out + row64[:, None] * out_stride_s + dim[None, :] * out_stride_d
        tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=tile_mask)
        tl.store(
            lse_ptr + (batch * heads + head) * seq + row, tl.where(seen, top + tl.log(total), float("-inf")),
            mask=inside,
        )  # fmt: skip

    def merge_partials_triton(outs: Tensor, lses: Tensor, out: Tensor, lse: Tensor) -> None:
        """Merge ``outs [n, B, H, S, D]`` and float32 ``lses [n, B, H, S]`` (any strides) in one pass over
        memory.

        Writes ``out [B, H, S, D]`` (its own dtype, any strides) and float32 contiguous ``lse [B, H, S]``.
        """
        parts, batch, heads, seq, head_dim = outs.shape
        if out.numel() == 0:
            return
        block_d = triton.next_power_of_2(head_dim)
        block_s = max(1, 4096 // block_d)
        _merge_kernel[(triton.cdiv(seq, block_s), batch * heads)](
            outs, lses, out, lse, *outs.stride(), *lses.stride(), *out.stride(), parts, heads, seq,
            HEAD_DIM=head_dim, BLOCK_D=block_d, BLOCK_S=block_s, num_warps=4,
        )  # fmt: skip


def merge_partials(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """Merge ``n`` partial results of the same rows into one.

    Args:
        outs: ``[n, B, H, S, D]`` partial outputs, any strides; float64, float32, bfloat16 or float16.
        lses: ``[n, B, H, S]`` natural log-sum-exp, float32 (float64 for float64 outputs); ``-inf`` where a
            partial saw no key, and its output there counts as 0 whatever it holds.

    Returns:
        ``out [B, H, S, D]`` in the dtype of ``outs`` and ``lse [B, H, S]`` in the dtype of ``lses``. Rows
        that no partial saw give 0 and ``-inf``. The sum runs in the dtype of ``lses``.
    """
    if triton is not None and outs.is_cuda and lses.dtype == torch.float32:
        out = torch.empty_like(outs[0])
        lse = torch.empty(lses.shape[1:], dtype=lses.dtype, device=lses.device)
        merge_partials_triton(outs, lses, out, lse)
        return out, lse
    lse = torch.logsumexp(lses, dim=0)
    # A row that sees nothing has lse = -inf; shifting by 0 there keeps exp(-inf - 0) = 0 instead of NaN.
    shift = lse.masked_fill(lse == float("-inf"), 0.0)
    weights = torch.exp(lses - shift)
    # The rounding of the merged log-sum-exp (1e-5 at 250 in float32) scales whole rows; their sums take it
    # out.
    total = weights.sum(dim=0)
    weights = weights / total.masked_fill(total == 0.0, 1.0)
    out = torch.zeros_like(outs[0], dtype=lses.dtype)
    for part, weight in zip(outs.unbind(0), weights.unbind(0), strict=True):
        weight = weight.unsqueeze(-1)
        out.addcmul_(weight, part.to(lses.dtype).masked_fill(weight == 0, 0.0))
    return out.to(outs.dtype), lse
