"""The Triton kernels with interval masks as a ``Kernel``: the fastest one where something is masked."""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from ds_lvxattn.kernels.base import Call
from ds_lvxattn.kernels.pattern import UNKNOWN

INSTALLED = importlib.util.find_spec("triton") is not None


class TritonKernel:
    """Interval attention in Triton on CUDA, bf16 and fp16; its backward pass takes ``delta`` or sums it up."""

    name = "triton"
    needs_out = False
    sums_delta = True
    takes_intervals = True

    def splits_keys(self, call: Call) -> bool:
        return True

    def unsupported(self, call: Call) -> str | None:
        if call.device != "cuda":
            return f"it does not run on {call.device}"
        if not INSTALLED:
            return "Triton is not installed"
        if call.dtype not in (torch.bfloat16, torch.float16):
            return f"it takes bfloat16 or float16, not {call.dtype}"
        # Imported late: the other kernels work without Triton.
        from ds_lvxattn.kernels.triton.forward import interval_forward_supported

        reasons = (interval_forward_supported(call.dtype, size, call.device) for size in call.head_dims)
        return next((reason for reason in reasons if reason is not None), None)

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
        from ds_lvxattn.kernels.triton.forward import interval_forward

        return interval_forward(q, k, v, start, stop, scale, softcap=softcap, pattern=pattern)

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
        from ds_lvxattn.kernels.triton.backward import interval_backward

        return interval_backward(
            dout, q, k, v, lse, delta, start, stop, scale, softcap=softcap, pattern=pattern, out=out
        )  # fmt: skip
