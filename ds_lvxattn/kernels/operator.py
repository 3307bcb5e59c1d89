"""``ds_lvxattn::local_attention``: the local attention of one rank as one registered operator."""

from typing import Optional

import torch
from torch import Tensor

from ds_lvxattn.kernels.base import Call, Kernel
from ds_lvxattn.kernels.derived import derived_of
from ds_lvxattn.kernels.differentiable import attention_operator, empty_results, empty_rows
from ds_lvxattn.kernels.dispatch import fastest_first, select_kernel
from ds_lvxattn.kernels.triton.delta import attention_delta
from ds_lvxattn.kernels.triton.merge import merge_partials
from ds_lvxattn.kernels.triton.surrogate import output_with_delta


def like(x: Tensor, pattern: Tensor) -> Tensor:
    """``x`` in the dtype and strides of ``empty_rows(pattern, ...)``; no copy where the kernel chose them already."""
    filled = x.untyped_storage().nbytes() == x.nbytes  # then equal strides are those of ``empty_rows``
    if filled and x.dtype == pattern.dtype and x.stride() == pattern.stride():
        return x
    want = empty_rows(pattern, x.shape[3], "meta")
    if x.dtype == want.dtype and x.stride() == want.stride():
        return x
    return empty_rows(pattern, x.shape[3]).copy_(x)


def backward_kernel(name: str, call: Call, with_dlse: bool) -> Kernel:
    """The kernel of the backward pass: the chosen one, unless it cannot take the log-sum-exp's gradient."""
    kernel = select_kernel(name, call)
    if not (kernel.needs_out and with_dlse):
        return kernel
    return next(other for other in fastest_first(call) if not other.needs_out and other.unsupported(call) is None)


def forward_local(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    start: Optional[Tensor],
    stop: Optional[Tensor],
    scale: float,
    kernel: str,
    softcap: Optional[float],
) -> tuple[Tensor, Tensor]:
    """Attention of ``q`` over the keys at hand, which may be none; see ``Kernel.forward``.

    Of several ranges a row, int32 ``[B, S_q, ranges]``, each is attended to by itself, and the results are merged.
    """
    if q.numel() == 0 or k.shape[2] == 0:
        out, lse = empty_results(q, v)
        return out.zero_(), lse.fill_(float("-inf"))
    chosen = select_kernel(kernel, Call.forward(q, k, v, start is not None, softcap is not None))
    if start is None or stop is None or start.dim() == 2:
        return chosen.forward(q, k, v, start, stop, scale, softcap)
    results = (chosen.forward(q, k, v, *each, scale, softcap) for each in _each_range(start, stop))
    outs, lses = zip(*results, strict=True)
    return merge_partials(torch.stack(outs), torch.stack(lses))


def _each_range(start: Tensor, stop: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Of ``[B, S_q, ranges]`` each range ``[B, S_q]``, cut out once for the layers of a batch."""

    def cut() -> list[tuple[Tensor, Tensor]]:
        return [(start[..., i].clone(), stop[..., i].clone()) for i in range(start.shape[-1])]

    return derived_of(start, stop, "each range", cut)


def backward_local(
    kernel: Kernel,
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Optional[Tensor],
    lse: Tensor,
    delta: Optional[Tensor],
    start: Optional[Tensor],
    stop: Optional[Tensor],
    scale: float,
    softcap: Optional[float],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``forward_local`` given the whole group's log-sum-exp; see ``Kernel.backward``.

    Where the rows come from other ranks, ``out`` is None: a kernel that insists on it gets one with that ``delta``.
    """
    if q.numel() == 0 or k.shape[2] == 0:
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    if kernel.needs_out and out is None:
        assert delta is not None
        out = output_with_delta(dout, delta)
    if start is None or stop is None or start.dim() == 2:
        return kernel.backward(dout, q, k, v, out, lse, delta, start, stop, scale, softcap)
    # The log-sum-exp is that over all ranges, so the gradients of the ranges add up.
    first, *others = _each_range(start, stop)
    dq, dk, dv = (x.to(lse.dtype) for x in kernel.backward(dout, q, k, v, out, lse, delta, *first, scale, softcap))
    for each in others:
        parts = kernel.backward(dout, q, k, v, out, lse, delta, *each, scale, softcap)
        dq, dk, dv = (whole.add_(part) for whole, part in zip((dq, dk, dv), parts, strict=True))
    return dq, dk, dv


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    start: Optional[Tensor],
    stop: Optional[Tensor],
    scale: float,
    softcap: Optional[float],
    kernel: str,
) -> tuple[Tensor, Tensor]:
    out, lse = forward_local(q, k, v, start, stop, scale, kernel, softcap)
    return like(out, q), lse.contiguous()


def _backward(
    dout: Tensor,
    dlse: Optional[Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    start: Optional[Tensor],
    stop: Optional[Tensor],
    scale: float,
    softcap: Optional[float],
    kernel: str,
) -> tuple[Tensor, Tensor, Tensor]:
    chosen = backward_kernel(kernel, Call.backward(q, k, v, start is not None, softcap is not None), dlse is not None)
    delta = None if chosen.needs_out else attention_delta(dout, out, dlse)
    dq, dk, dv = backward_local(chosen, dout, q, k, v, out, lse, delta, start, stop, scale, softcap)
    return like(dq, q), like(dk, k), like(dv, v)


_operator = attention_operator("local_attention", _forward, _backward)


def local_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    start: Tensor | None,
    stop: Tensor | None,
    scale: float,
    kernel: str,
    softcap: float | None = None,
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

    Returns:
        ``out [B, H_q, S_q, D_v]`` and the natural log-sum-exp ``[B, H_q, S_q]``, both differentiable.
    """
    return _operator(q, k, v, start, stop, scale, softcap, kernel)
