"""RMS norms with one kernel in each pass, where transformers' modules run seven and more.

Over the keys of a video those modules would read and write far more than the projections that lead to them, and keep a
float32 copy. Here a norm keeps its input and a number a row, and rounds once where the modules round twice.
"""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import Tensor, nn


def fuse_norms(model: nn.Module) -> None:
    """Let the RMS norms in ``model`` that are as transformers writes Llama's compute ``fused_norm``.

    transformers copies that class from model to model. One whose code differs (Gemma's weight is an offset of 1) stays
    as it is, as does a norm whose ``forward`` somebody has replaced. Hooks are the module's, and stay in force.
    """
    for module in model.modules():
        if "forward" not in vars(module) and _is_written(type(module).forward):
            # A method, not a partial object: torch.compile then takes the norms of all layers for one.
            vars(module)["forward"] = types.MethodType(fused_norm, module)


def fused_norm(self: Any, hidden_states: Tensor) -> Tensor:
    """The norm ``self`` of ``hidden_states [..., D]``; keys ``[B, H, S, D]`` may be a view of ``[B, S, H, D]``.

    In the dtype that the module returns: the wider one of input and weight. For float64 it is the module's own code,
    which computes in float32.
    """
    dtype = torch.promote_types(hidden_states.dtype, self.weight.dtype)
    if dtype == torch.float64:
        own: Tensor = type(self).forward(self, hidden_states)
        return own
    heads_first = hidden_states.dim() == 4 and not hidden_states.is_contiguous()
    rows = hidden_states.transpose(1, 2) if heads_first else hidden_states  # whose rows lie one behind the other
    normed: Tensor = _RMSNorm.apply(rows.to(dtype), self.weight.to(dtype), self.variance_epsilon)
    return normed.transpose(1, 2) if heads_first else normed


class _RMSNorm(torch.autograd.Function):
    """``x`` by the root of the mean of its squares, times ``weight``; computed in float32, rounded once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        if _on_gpu(x):
            normed, inverse = torch.ops.aten._fused_rms_norm(x, weight.shape, weight, epsilon)
        else:
            wide = x.to(torch.promote_types(x.dtype, torch.float32))
            inverse = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
            normed = (wide * inverse * weight).to(x.dtype)
        ctx.save_for_backward(x, weight, inverse)
        return normed

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, inverse = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:2]
        if _on_gpu(x):
            backward = torch.ops.aten._fused_rms_norm_backward
            of_x, of_weight = backward(grad, x, weight.shape, inverse, weight, wanted)
        else:
            unit, wide = x * inverse, grad.to(inverse.dtype)
            through = wide * weight
            of_x = (inverse * (through - unit * (through * unit).mean(-1, keepdim=True))).to(x.dtype)
            of_weight = (wide * unit).flatten(0, -2).sum(0).to(weight.dtype)
        return of_x if wanted[0] else None, of_weight if wanted[1] else None, None


def _on_gpu(x: Tensor) -> bool:
    return x.is_cuda and x.numel() > 0  # a rank without frames has no keys, and a gradient of zeros


def _is_written(forward: Any) -> bool:
    code, written = getattr(forward, "__code__", None), _as_written.__code__
    parts = ("co_code", "co_names", "co_consts")
    return code is not None and all(getattr(code, part) == getattr(written, part) for part in parts)


def _as_written(self: Any, hidden_states: Tensor) -> Tensor:
    input_dtype = hidden_states.dtype
    hidden_states = hidden_states.to(torch.float32)
    variance = hidden_states.pow(2).mean(-1, keepdim=True)
    hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
    return self.weight * hidden_states.to(input_dtype)
