"""``ds_lvxattn::rms_norm``: an RMS norm that keeps its input and a number a row, as one operator in each pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ds_lvxattn.kernels.library import define_operator, seen
from ds_lvxattn.kernels.triton import rms_norm as kernels


def _backward(
    grad: Tensor, x: Tensor, weight: Tensor, inverse: Tensor, of_x: bool, of_weight: bool
) -> tuple[Tensor, Tensor]:
    """What is not wanted is empty: an operator returns tensors."""
    gradients = kernels.rms_norm_backward(grad, x, weight, inverse, (of_x, of_weight))
    return tuple(x.new_empty(0) if each is None else each for each in gradients)  # type: ignore[return-value]


def _fake_backward(
    grad: Tensor, x: Tensor, weight: Tensor, inverse: Tensor, of_x: bool, of_weight: bool
) -> tuple[Tensor, Tensor]:
    return (
        kernels.empty_like_rows(x, x.dtype) if of_x else x.new_empty(0),
        weight.new_empty(weight.shape) if of_weight else x.new_empty(0),
    )


_inputs = {"x": Tensor, "weight": Tensor}
_operator = define_operator(
    "rms_norm", {**_inputs, "epsilon": float}, tuple[Tensor, Tensor], kernels.rms_norm,
    lambda x, weight, epsilon: kernels.empty_norms(x, weight),
)  # fmt: skip
_operator_backward = define_operator(
    "rms_norm_backward",
    {"grad": Tensor, **_inputs, "inverse": Tensor, "of_x": bool, "of_weight": bool},
    tuple[Tensor, Tensor], _backward, _fake_backward,
)  # fmt: skip


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        visible = torch.compiler.is_compiling() or seen((x, weight))
        normed, inverse = (_operator if visible else kernels.rms_norm)(x, weight, epsilon)
        ctx.save_for_backward(x, weight, inverse)
        return normed

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "ds_lvxattn::rms_norm was differentiated with create_graph=True, and its gradient has no derivative; "
                "leave create_graph out, or let this norm run with 'sequence_parallel_size' 1"
            )
        x, weight, inverse = ctx.saved_tensors
        of_x, of_weight = ctx.needs_input_grad[:2]
        if torch.compiler.is_compiling() or seen((grad, x, weight)):
            gradients = _operator_backward(grad, x, weight, inverse, of_x, of_weight)
            return gradients[0] if of_x else None, gradients[1] if of_weight else None, None
        return *kernels.rms_norm_backward(grad, x, weight, inverse, (of_x, of_weight)), None


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """``x`` by the root of the mean of its squares, times ``weight``; computed in float32, rounded once.

    Args:
        x: ``[..., D]``, any strides; float64, float32, bfloat16 or float16.
        weight: ``[D]``, any of these dtypes.
        epsilon: is added to the mean.

    Returns:
        ``[..., D]`` in the wider dtype of the two, with the strides of ``x`` made dense, differentiable once.
    """
    rows = x.flatten(0, -4) if x.dim() > 4 else x
    normed: Tensor = _RMSNorm.apply(rows, weight, epsilon)
    return normed.view(x.shape) if x.dim() > 4 else normed
