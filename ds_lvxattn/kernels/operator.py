"""``ds_lvxattn::local_attention``: the local attention of one rank as one registered operator."""

from __future__ import annotations

import torch
from torch import Tensor

from ds_lvxattn.kernels.differentiable import attention_operator
from ds_lvxattn.kernels.local import BackwardPass, LocalAttention
from ds_lvxattn.kernels.pattern import UNKNOWN


def _forward(q: Tensor, k: Tensor, v: Tensor, local: LocalAttention) -> tuple[Tensor, Tensor]:
    return local.forward(q, k, v)


def _backward(given: BackwardPass) -> tuple[Tensor, Tensor, Tensor]:
    return given.local()


_operator = attention_operator("local_attention", _forward, _backward)


def as_kernels_take(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``q, k, v`` with the numbers of a head beside each other, which not every kernel and no message does without.

    Under ``torch.autocast`` in its dtype, but for float64, as torch's own attention has it: layers hand over queries
    and keys in float32 there, as their rotary tables are, and values in low precision.
    """
    device = q.device.type
    if device != "meta" and torch.is_autocast_enabled(device) and q.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    if q.dim() == k.dim() == v.dim() == 4:  # else they are refused
        q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    return q, k, v


def local_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    start: Tensor | None,
    stop: Tensor | None,
    scale: float,
    kernel: str,
    softcap: float | None = None,
    pattern: str = UNKNOWN,
) -> tuple[Tensor, Tensor]:
    """Attention over the keys at hand, on one rank.

    Args:
        q: ``[B, H_q, S_q, D]``.
        k, v: ``[B, H_kv, S_kv, D]`` and ``[B, H_kv, S_kv, D_v]``; ``H_q`` is a multiple of ``H_kv``.
        start, stop: int32 ``[B, S_q]`` visible key ranges, or ``[B, S_q, ranges]`` disjoint ones; None when every key
            is visible.
        scale: factor of the scores.
        kernel: ``auto`` or a kernel's name.
        softcap: soft cap of the scores, which are then ``softcap * tanh(scale * q k / softcap)``; None: none.
        pattern: of the ranges; see ``kernels/pattern.py``.

    Returns:
        ``out [B, H_q, S_q, D_v]`` and the natural log-sum-exp ``[B, H_q, S_q]``, both differentiable.
    """
    return _operator(q, k, v, start, stop, scale, softcap, kernel, pattern)
