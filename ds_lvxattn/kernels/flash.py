"""PyTorch's FlashAttention operators, on CUDA and on the CPU, called below SDPA for their log-sum-exp.

They have no interval mask, so they serve calls in which every key is visible. Their backward pass computes
``delta`` from the output, so it takes ``O`` and no gradient of the log-sum-exp.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ds_lvxattn.kernels.base import Call
from ds_lvxattn.kernels.pattern import UNKNOWN
from ds_lvxattn.kernels.torch_internals import missing_operator

aten = torch.ops.aten
# Why the kernel cannot run, on the CPU and on CUDA; None where it can.
MISSING_ON_CPU = missing_operator(
    "_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention_for_cpu_backward"
)
MISSING_ON_CUDA = missing_operator("_flash_attention_forward", "_flash_attention_backward")


class FlashKernel:
    """FlashAttention-2 on CUDA (bf16, fp16, head size to 256) and PyTorch's CPU counterpart (any float)."""

    name = "flash"
    needs_out = True
    sums_delta = False
    takes_intervals = False

    def splits_keys(self, call: Call) -> bool:
        return False

    def unsupported(self, call: Call) -> str | None:
        if call.masked:
            return "it has no interval mask"
        if call.capped:
            return "it has no soft cap of the scores"
        if call.other_values is not None:
            return call.other_values
        if call.device == "cpu":
            return MISSING_ON_CPU
        if MISSING_ON_CUDA is not None:
            return MISSING_ON_CUDA
        if call.device != "cuda":
            return f"it does not run on {call.device}"
        if call.dtype not in (torch.bfloat16, torch.float16):
            return f"it takes bfloat16 or float16 on CUDA, not {call.dtype}"
        if call.head_dim > 256 or call.head_dim % 8:
            return f"it takes head sizes that are multiples of 8 up to 256, not {call.head_dim}"
        return None

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        start: Tensor | None,
        stop: Tensor | None,
        scale: float,
        softcap: float | None = None,
        pattern: str = UNKNOWN,
    ) -> tuple[Tensor, Tensor]:
        if q.is_cpu:
            out, lse = aten._scaled_dot_product_flash_attention_for_cpu(
                _fold_heads(q, k), k, v, 0.0, False, scale=scale
            )
            return out.reshape(q.shape), lse.reshape(q.shape[:3])
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out, lse, *_ = aten._flash_attention_forward(
            q, k, v, None, None, q.shape[1], k.shape[1], 0.0, False, False, scale=scale
        )
        return out.transpose(1, 2), lse

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor | None,
        lse: Tensor,
        delta: Tensor | None,
        start: Tensor | None,
        stop: Tensor | None,
        scale: float,
        softcap: float | None = None,
        pattern: str = UNKNOWN,
    ) -> tuple[Tensor, Tensor, Tensor]:
        assert out is not None
        if q.is_cpu:
            dq, dk, dv = aten._scaled_dot_product_flash_attention_for_cpu_backward(
                *(_fold_heads(x, k) for x in (dout, q)),
                k,
                v,
                _fold_heads(out, k),
                _fold_heads(lse.unsqueeze(-1), k).squeeze(-1),
                0.0,
                False,
                scale=scale,
            )
            return dq.reshape(q.shape), dk, dv
        dout, q, k, v, out = (x.transpose(1, 2) for x in (dout, q, k, v, out))
        no_dropout = torch.empty(2, dtype=torch.uint64, device=q.device)
        dq, dk, dv = aten._flash_attention_backward(
            dout, q, k, v, out, lse.contiguous(), None, None, q.shape[1], k.shape[1], 0.0, False,
            no_dropout, no_dropout[:0], scale=scale,
        )  # fmt: skip
        return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)


def _fold_heads(x: Tensor, k: Tensor) -> Tensor:
    """``[B, H_q, s, D]`` to ``[B, H_kv, g * s, D]``: grouped heads as rows, so that K and V are not repeated."""
    return x.reshape(x.shape[0], k.shape[1], -1, x.shape[3])
