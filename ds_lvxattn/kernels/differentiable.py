"""One differentiable operator of ``torch.library`` from a forward and a backward function of attention.

Registered without ``torch.library.custom_op``, whose checks of every call cost more host time than the operator itself.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Optional, get_type_hints

import torch
from torch import Tensor

_library = torch.library.Library("ds_lvxattn", "FRAGMENT")


def lse_dtype(dtype: torch.dtype) -> torch.dtype:
    """dtype of the log-sum-exp of inputs in ``dtype``: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def empty_rows(x: Tensor, size: int, device: torch.device | str | None = None) -> Tensor:
    """``[B, H, S, size]`` in the dtype and, where they are dense, the order of the strides of ``x [B, H, S, D]``; not
    filled."""
    if size == x.shape[3]:
        return torch.empty_like(x, device=device)
    order = sorted(range(3), key=x.stride, reverse=True)
    return torch.empty_permuted((*x.shape[:3], size), (*order, 3), dtype=x.dtype, device=device or x.device)


def empty_results(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """``out`` as ``empty_rows`` of ``q`` in the head size of ``v``, and its log-sum-exp; not filled."""
    return empty_rows(q, v.shape[3]), q.new_empty(q.shape[:3], dtype=lse_dtype(q.dtype))


def attention_operator(
    name: str,
    forward: Callable[..., tuple[Tensor, ...]],
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]],
    kept: Callable[..., Tensor] | None = None,
    kept_holds_queries: bool = True,
) -> torch._ops.OpOverload:
    """Register ``ds_lvxattn::NAME``, differentiable in its first three arguments, and ``ds_lvxattn::NAME_backward``.

    Args:
        name: of the operator.
        forward: ``(q, k, v, *more) -> (out, lse)``, strides of ``empty_results``. ``more`` are tensors or None, then
            settings, as annotated.
        backward: ``(dout, dlse, q, k, v, out, lse, *more) -> (dq, dk, dv)``, strides of ``empty_rows``; ``dlse`` is
            None where nobody uses the log-sum-exp.
        kept: for an operator with a third result, which only its backward pass reads, as ``(..., q, kept, k, ...)``:
            called as ``forward``, it gives such a tensor, not filled. The last setting then says whether it is kept.
        kept_holds_queries: what is kept holds the queries too, and ``out`` stands for ``q``, whose shape, but for the
            head size, and order of strides it has.

    Returns:
        The operator.
    """
    parameters = list(inspect.signature(forward).parameters)
    hints = get_type_hints(forward)
    tensors = sum(hints[parameter] in (Tensor, Optional[Tensor]) for parameter in parameters)
    no_gradients = (None,) * (len(parameters) - 3)

    def fake(*args: Any) -> tuple[Tensor, ...]:
        results = empty_results(args[0], args[2])
        return results if kept is None else (*results, kept(*args))

    def fake_backward(dout: Tensor, dlse: Tensor | None, q: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
        k, v = args[:2] if kept is None else args[1:3]
        return empty_rows(q, k.shape[3]), torch.empty_like(k), torch.empty_like(v)

    operator = _define(name, forward, fake)
    operator_backward = _define(f"{name}_backward", backward, fake_backward)

    class Attention(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *args):
            results = _below_autograd(operator, args)
            out, lse, *extra = results
            q, k, v, *more = args[:tensors]
            ctx.settings = args[tensors:]
            ctx.save_for_backward(
                None if extra and args[-1] and kept_holds_queries else q, *extra, k, v, out, lse, *more
            )
            ctx.set_materialize_grads(False)
            return results

        @staticmethod
        def backward(ctx, dout, dlse, *_):
            q, *more = ctx.saved_tensors
            out = more[2 if kept is None else 3]
            dout = torch.zeros_like(out) if dout is None else dout
            q = out if q is None else q
            return *operator_backward(dout, dlse, q, *more, *ctx.settings), *no_gradients

    def autograd(*args: Any) -> tuple[Tensor, ...]:
        if torch.is_grad_enabled() and any(x.requires_grad for x in args[:3]):
            return Attention.apply(*args)
        return _below_autograd(operator, args)

    _library.impl(name, autograd, "Autograd")
    return operator


def _define(name: str, function: Callable[..., Any], fake: Callable[..., Any]) -> torch._ops.OpOverload:
    """``ds_lvxattn::NAME``, for every device; it returns new tensors."""
    _library.define(name + torch.library.infer_schema(function, mutates_args=()))
    _library.impl(name, function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"ds_lvxattn::{name}", fake, lib=_library)
    return getattr(torch.ops.ds_lvxattn, name).default


def _below_autograd(operator: torch._ops.OpOverload, args: tuple[Any, ...]) -> tuple[Tensor, ...]:
    with torch._C._AutoDispatchBelowAutograd():
        return operator(*args)
