"""RMS norms with one kernel in each pass, where transformers' modules run seven and more.

Over the keys of a video those modules would read and write far more than the projections that lead to them, and keep a
float32 copy. Here a norm keeps its input and a number a row, and rounds once where the modules round twice.
"""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import Tensor, nn

from ds_lvxattn.kernels.rms_norm import rms_norm


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
    if torch.float64 in (hidden_states.dtype, self.weight.dtype):
        own: Tensor = type(self).forward(self, hidden_states)
        return own
    return rms_norm(hidden_states, self.weight, self.variance_epsilon)


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
