"""cuDNN's fused attention through PyTorch's operators: the fastest kernel on Hopper when every key is visible."""

from __future__ import annotations

import torch
from torch import Tensor

from ds_lvxattn.kernels.base import Call
from ds_lvxattn.kernels.pattern import UNKNOWN
from ds_lvxattn.kernels.torch_internals import missing_operator

aten = torch.ops.aten
# Why the kernel cannot run; None where it can.
MISSING = missing_operator("_scaled_dot_product_cudnn_attention", "_scaled_dot_product_cudnn_attention_backward")


class CudnnKernel:
    """cuDNN attention, bf16 and fp16, head sizes to 128. Like flash, its backward pass takes ``O``."""

    name = "cudnn"
    needs_out = True
    sums_delta = False
    takes_intervals = False

    def splits_keys(self, call: Call) -> bool:
        return False

    def unsupported(self, call: Call) -> str | None:
        if call.device != "cuda":
            return f"it does not run on {call.device}"
        if MISSING is not None:
            return MISSING
        if call.masked:
            return "it has no interval mask"
        if call.capped:
            return "it has no soft cap of the scores"
        if call.other_values is not None:
            return call.other_values
        if call.dtype not in (torch.bfloat16, torch.float16):
            return f"it takes bfloat16 or float16, not {call.dtype}"
        if call.head_dim > 128 or call.head_dim % 8:
            return f"it takes head sizes that are multiples of 8 up to 128, not {call.head_dim}"
        if torch.cuda.get_device_capability()[0] < 8:
            return "it needs compute capability 8.0 or higher"
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
        out, lse, *_ = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, False, False, scale=scale)
        return out, lse.reshape(q.shape[:3])

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
        no_dropout = torch.zeros((), dtype=torch.int64, device=q.device)
        return aten._scaled_dot_product_cudnn_attention_backward(
            dout, q, k, v, out, lse.unsqueeze(-1), no_dropout, no_dropout, None, None, None,
            q.shape[2], k.shape[2], 0.0, False, scale=scale,
        )  # fmt: skip
