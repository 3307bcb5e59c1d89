"""One differentiable operator of ``torch.library`` from a forward and a backward function of attention.

The dispatcher is passed by, forward and backward, where nothing looks on; see ``kernels/library.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Optional, get_type_hints

import torch
from torch import Tensor

from ds_lvxattn.kernels.base import empty_results, empty_rows
from ds_lvxattn.kernels.library import LIBRARY, define_operator, seen
from ds_lvxattn.kernels.local import BackwardPass, LocalAttention
from ds_lvxattn.kernels.torch_internals import below_autograd, is_batched, transforms_active


def attention_operator(
    name: str,
    forward: Callable[..., tuple[Tensor, ...]],
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]],
    kept: Callable[..., Tensor] | None = None,
    kept_holds_queries: bool = True,
) -> Callable[..., Any]:
    """Register ``ds_lvxattn::NAME``, differentiable in its first three arguments, and ``ds_lvxattn::NAME_backward``.

    Args:
        name: of the operator.
        forward: ``(q, k, v, local, *more) -> (out, lse)``, any strides. ``local`` is a ``LocalAttention``; ``more`` are
            tensors or None, then settings, as annotated.
        backward: ``(given, *more) -> (dq, dk, dv)``, any strides, in the dtypes of ``q, k, v`` or wider. ``given`` is a
            ``BackwardPass``.
        kept: for an operator with a third result, which only its backward pass reads, as ``given.kept``: called as
            ``forward``, it gives such a tensor, not filled. The last setting then says whether it is kept.
        kept_holds_queries: what is kept holds the queries too, and ``out`` stands for ``q``, whose shape, but for the
            head size, and order of strides it has.

    Returns:
        The operator, ``(q, k, v, start, stop, *more tensors, scale, softcap, kernel, pattern, *more settings)``, to be
        called by position with arguments of these types.
    """
    types, results, count = _arguments_of(forward)
    run, run_backward = _runs(forward, backward, count, kept is not None)
    fake, fake_backward = _fakes(kept, count)
    operator = define_operator(name, {"q": Tensor, "k": Tensor, "v": Tensor, **types}, results, run, fake)
    given = {"dout": Tensor, "dlse": Optional[Tensor], "q": Tensor, **({} if kept is None else {"kept": Tensor})}
    given |= {"k": Tensor, "v": Tensor, "out": Tensor, "lse": Tensor, **types}
    gradients = tuple[Tensor, Tensor, Tensor]
    operator_backward = define_operator(f"{name}_backward", given, gradients, run_backward, fake_backward)
    place_of_out = 2 if kept is None else 3
    function = _autograd_function(name, run_backward, operator_backward, count, place_of_out, kept_holds_queries)
    return _called(name, run, operator, function, count)


def _arguments_of(forward: Callable[..., Any]) -> tuple[dict[str, Any], Any, int]:
    """Types of an operator's arguments behind q, k and v, by name; of its results; how many of ``more`` are tensors."""
    hints = get_type_hints(forward)
    results = hints.pop("return")
    more = dict(list(hints.items())[4:])
    tensors = {key: hint for key, hint in more.items() if hint in (Tensor, Optional[Tensor])}
    settings = {key: hint for key, hint in more.items() if key not in tensors}
    types = {
        "start": Optional[Tensor], "stop": Optional[Tensor], **tensors,
        "scale": float, "softcap": Optional[float], "kernel": str, "pattern": str, **settings,
    }  # fmt: skip
    return types, results, len(tensors)


def _split(count: int, start: Tensor | None, stop: Tensor | None, *more: Any) -> tuple[LocalAttention, tuple[Any, ...]]:
    """An operator's arguments behind q, k and v, as its functions take them."""
    return LocalAttention(start, stop, *more[count : count + 4]), more[:count] + more[count + 4 :]


def _runs(
    forward: Callable[..., tuple[Tensor, ...]], backward: Callable[..., Any], count: int, keeps: bool
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """What the operator and its backward operator compute."""

    def run(q: Tensor, k: Tensor, v: Tensor, *args: Any) -> tuple[Tensor, ...]:
        local, more = _split(count, *args)
        out, lse, *extra = forward(q, k, v, local, *more)
        return _like(out, q), lse.contiguous(), *extra

    def run_backward(dout: Tensor, dlse: Tensor | None, q: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
        extra, (k, v, out, lse, *rest) = (args[0], args[1:]) if keeps else (None, args)
        local, more = _split(count, *rest)
        dq, dk, dv = backward(BackwardPass(dout, dlse, q, extra, k, v, out, lse, local), *more)
        return _like(dq, q), _like(dk, k), _like(dv, v)

    return run, run_backward


def _fakes(kept: Callable[..., Tensor] | None, count: int) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The same without numbers, for tracing."""

    def fake(q: Tensor, k: Tensor, v: Tensor, *args: Any) -> tuple[Tensor, ...]:
        if kept is None:
            return empty_results(q, v)
        local, more = _split(count, *args)
        return *empty_results(q, v), kept(q, k, v, local, *more)

    def fake_backward(dout: Tensor, dlse: Tensor | None, q: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
        k, v = args[:2] if kept is None else args[1:3]
        return empty_rows(q, k.shape[3]), torch.empty_like(k), torch.empty_like(v)

    return fake, fake_backward


def _autograd_function(
    name: str,
    run_backward: Callable[..., Any],
    operator_backward: Callable[..., Any],
    count: int,
    place_of_out: int,
    kept_holds_queries: bool,
) -> Callable[..., tuple[Tensor, ...]]:
    """``(function, settings, *tensors) -> function(*tensors, *settings)``, differentiable.

    Args:
        place_of_out: of ``out`` among what is saved behind the queries.
    """
    no_gradients = (None,) * (2 + count)  # of the tensors behind q, k and v

    class Attention(torch.autograd.Function):
        # The settings come as one: autograd looks at every argument.
        @staticmethod
        def forward(ctx, function, settings, *tensors):
            with below_autograd():
                results = function(*tensors, *settings)
            out, lse, *extra = results
            q, k, v, *more = tensors
            ctx.settings = settings
            ctx.save_for_backward(
                None if extra and settings[-1] and kept_holds_queries else q, *extra, k, v, out, lse, *more
            )
            ctx.set_materialize_grads(False)
            return results

        @staticmethod
        def backward(ctx, dout, dlse, *_):
            _refuse_batched(name, dout, dlse)
            q, *more = ctx.saved_tensors
            out = more[place_of_out]
            dout = torch.zeros_like(out) if dout is None else dout
            dout = dout if dout.stride(-1) == 1 else dout.contiguous()  # that of a sum is one number, expanded
            q = out if q is None else q
            inputs = (dout, dlse, q, *more)
            if torch.is_grad_enabled():
                raise RuntimeError(
                    f"ds_lvxattn::{name} was differentiated with create_graph=True, and its gradient has no "
                    "derivative; leave create_graph out, or let this attention run with 'sequence_parallel_size' 1"
                )
            if seen(inputs):
                return None, None, *operator_backward(*inputs, *ctx.settings), *no_gradients
            with below_autograd():
                return None, None, *run_backward(*inputs, *ctx.settings), *no_gradients

    return Attention.apply


def _called(
    name: str,
    run: Callable[..., tuple[Tensor, ...]],
    operator: Callable[..., Any],
    function: Callable[..., tuple[Tensor, ...]],
    count: int,
) -> Callable[..., Any]:
    """What calls the operator, or ``run`` where nothing looks on; by the autograd ``function`` for a gradient."""
    saved = 5 + count  # tensors among the arguments

    def differentiable(called: Callable[..., tuple[Tensor, ...]], args: tuple[Any, ...]) -> tuple[Tensor, ...]:
        q, k, v = args[:3]
        if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
            return function(called, args[saved:], *args[:saved])
        with below_autograd():
            return called(*args)

    def autograd(*args: Any) -> tuple[Tensor, ...]:
        return differentiable(operator if seen(args[:saved]) else run, args)

    def call(*args: Any) -> tuple[Tensor, ...]:
        compiling = torch.compiler.is_compiling()
        if not compiling:
            refuse_transforms(f"ds_lvxattn::{name}")
        if compiling or seen(args[:saved]):
            return operator(*args)
        return differentiable(run, args)

    LIBRARY.impl(name, autograd, "Autograd")
    return call


def _like(x: Tensor, pattern: Tensor) -> Tensor:
    """``x`` in the dtype and strides of ``empty_rows(pattern, ...)``; no copy where the kernel chose them already."""
    filled = x.untyped_storage().nbytes() == x.nbytes  # then equal strides are those of ``empty_rows``
    if filled and x.dtype == pattern.dtype and x.stride() == pattern.stride():
        return x
    want = empty_rows(pattern, x.shape[3], "meta")
    if x.dtype == want.dtype and x.stride() == want.stride():
        return x
    return empty_rows(pattern, x.shape[3]).copy_(x)


def refuse_transforms(name: str) -> None:
    """Raise ``RuntimeError`` inside a transform of ``torch.func`` or forward-mode differentiation; ``name`` is told.

    A tangent would end at the operator, silently, and a batched operator call its collectives once for each entry.
    """
    if transforms_active():
        raise RuntimeError(
            f"{name} was called inside a transform of torch.func (grad, vmap, jvp, ...) or forward-mode "
            "differentiation, which it does not take part in; call backward or torch.autograd.grad instead"
        )


def _refuse_batched(name: str, *gradients: Tensor | None) -> None:
    """Raise ``RuntimeError`` where gradients are batches of them, ahead of a collective that would fail on those."""
    for x in gradients:
        if x is not None and is_batched(x):
            raise RuntimeError(
                f"ds_lvxattn::{name} was differentiated with a batch of gradients at once (is_grads_batched, "
                "vectorize, vmap), which it does not take; leave that out, and go through them one by one"
            )
