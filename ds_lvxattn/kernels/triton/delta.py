"""``delta = rowsum(dO * O) - dL``: the row term of the attention backward pass.

FlashAttention-2 (arXiv 2307.08691), algorithm 2, line 4; ``- dL`` makes the log-sum-exp output
differentiable."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl

    from ds_lvxattn.kernels.triton.launch import KEPT, Launch, Layout, layout, place
except ImportError:  # no Triton on this platform: the torch path does every call
    triton = None

if triton is not None:

    @triton.jit(do_not_specialize=["dlse_stride_b", "dlse_stride_h", "dlse_stride_s", "heads", "seq"])
    def _delta_kernel(
        dout_ptr, out_ptr, dlse_ptr, delta_ptr,
        dout_stride_b, dout_stride_h, dout_stride_s, dout_stride_d,
        out_stride_b, out_stride_h, out_stride_s, out_stride_d,
        dlse_stride_b, dlse_stride_h, dlse_stride_s,
        heads, seq,
        HAS_DLSE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr,
    ):  # fmt: skip
        """BLOCK_S rows of one head."""
        batch = (tl.program_id(1) // heads).to(tl.int64)
        head = (tl.program_id(1) % heads).to(tl.int64)
        row = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
        inside = row < seq
        row64 = row.to(tl.int64)
        dim = tl.arange(0, BLOCK_D)
        tile_mask = inside[:, None] & (dim < HEAD_DIM)[None, :]
        dout = dout_ptr + batch * dout_stride_b + head * dout_stride_h
        dout = dout + row64[:, None] * dout_stride_s + dim[None, :] * dout_stride_d
        out = out_ptr + batch * out_stride_b + head * out_stride_h
        out = out + row64[:, None] * out_stride_s + dim[None, :] * out_stride_d
        product = tl.load(dout, mask=tile_mask, other=0.0).to(tl.float32)
        product *= tl.load(out, mask=tile_mask, other=0.0).to(tl.float32)
        delta = tl.sum(product, 1)
        if HAS_DLSE:
            dlse = dlse_ptr + batch * dlse_stride_b + head * dlse_stride_h + row64 * dlse_stride_s
            delta -= tl.load(dlse, mask=inside, other=0.0).to(tl.float32)
        tl.store(delta_ptr + (batch * heads + head) * seq + row, delta, mask=inside)

    def attention_delta_triton(dout: Tensor, out: Tensor, dlse: Tensor | None) -> Tensor:
        """``attention_delta`` in one pass over memory, for inputs narrower than float64."""
        delta = torch.empty(out.shape[:3], dtype=torch.float32, device=out.device)
        if delta.numel() == 0:
            return delta
        launch, integers = _plan(place(out), layout(dout), layout(out), None if dlse is None else layout(dlse))
        launch(dout, out, dlse, delta, *integers)
        return delta

    @functools.lru_cache(maxsize=KEPT)
    def _plan(where: tuple[int, int], dout: Layout, out: Layout, dlse: Layout | None) -> tuple[Launch, tuple[int, ...]]:
        """The kernel and its integers."""
        batch, heads, seq, head_dim = out[1]
        block_d = triton.next_power_of_2(head_dim)
        block_s = max(1, 4096 // block_d)
        launch = Launch(
            _delta_kernel, (triton.cdiv(seq, block_s), batch * heads),
            HAS_DLSE=dlse is not None, HEAD_DIM=head_dim, BLOCK_D=block_d, BLOCK_S=block_s, num_warps=4,
        )  # fmt: skip
        return launch, (*dout[2], *out[2], *((0, 0, 0) if dlse is None else dlse[2]), heads, seq)


def attention_delta(dout: Tensor, out: Tensor, dlse: Tensor | None) -> Tensor:
    """Row term of the backward pass, computed once by the owner of the rows.

    Args:
        dout: ``[B, H, S, D]`` gradient of the output.
        out: ``[B, H, S, D]`` output of the whole (merged) attention.
        dlse: ``[B, H, S]`` gradient of the log-sum-exp, or None when it is not used.

    Returns:
        ``[B, H, S]`` in float32 (float64 for float64 inputs).
    """
    wide = dout.dtype if dout.element_size() == 8 else None
    if triton is not None and dout.is_cuda and wide is None:
        return attention_delta_triton(dout, out, dlse)
    if wide is None:
        dout, out = dout.float(), out.float()
    delta = (dout * out).sum(dim=-1)
    return delta if dlse is None else delta - dlse
