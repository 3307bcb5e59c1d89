"""Products of many rows: pictures to patches as one matrix product, two products of the same rows, and sums."""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from ds_lvxattn.runtime.kept_parameters import plain_linear

PIXELS = 3  # channels


def fuse_patches(model: nn.Module) -> None:
    """Let convolutions that cut pictures or films into patches be matrix products, which cuDNN's are far behind."""
    for module in model.modules():
        if type(module) in (nn.Conv2d, nn.Conv3d) and "forward" not in vars(module) and _cuts(module):
            vars(module)["forward"] = types.MethodType(patches, module)


def patches(self: Any, pixels: Tensor) -> Tensor:
    """The convolution ``self`` of ``pixels [n, channels, *sizes]``: ``[n, d, *patches]``, a view of ``[.., d]``."""
    kernel = self.kernel_size
    sizes = pixels.shape[2:]
    if pixels.dim() != 2 + len(kernel) or any(size % side for size, side in zip(sizes, kernel, strict=True)):
        own: Tensor = type(self).forward(self, pixels)
        return own
    for place, side in enumerate(kernel):  # [n, channels, *(patches, side) of each dimension]
        pixels = pixels.unflatten(2 + 2 * place, (-1, side))
    places, sides = range(2, pixels.dim(), 2), range(3, pixels.dim(), 2)
    rows = pixels.permute(0, *places, 1, *sides).flatten(-1 - len(kernel))
    return linear(rows, self.weight.flatten(1), self.bias).movedim(-1, 1)


def _cuts(module: Any) -> bool:
    one = (1,) * len(module.kernel_size)
    unpadded = module.padding == "valid" or not any(module.padding)
    plain = unpadded and module.groups == 1 and module.dilation == one
    return plain and module.in_channels == PIXELS and module.stride == module.kernel_size != one


def both_products(x: Tensor, first: Any, second: Any) -> tuple[Tensor, Tensor]:
    """``first(x)`` and ``second(x)`` of two modules; of plain linear layers the gradient of ``x`` is summed in place.

    Autograd would make the gradient of each, and add them up in a pass of its own.

    Args:
        x: ``[..., d]``.
    """
    if not (_is_product(first, x) and _is_product(second, x)):
        return first(x), second(x)
    products: tuple[Tensor, Tensor] = _BothProducts.apply(x, first.weight, second.weight)
    return products


def plus_product(rows: Tensor, x: Tensor, module: Any, overwrite: bool) -> Tensor:
    """``rows + module(x)``; with ``overwrite``, where ``module`` is a plain product, added up in the place of ``rows``.

    Nothing is overwritten where gradients are recorded.

    Args:
        rows: ``[..., d]``.
        x: ``[..., d_x]`` of as many rows.
    """
    overwrite = overwrite and not torch.is_grad_enabled() and rows.is_contiguous() and rows.dtype == x.dtype
    if not (overwrite and _is_product(module, x)):
        sums: Tensor = rows + module(x)
        return sums
    rows.view(-1, rows.shape[-1]).addmm_(x.flatten(0, -2), module.weight.t())
    return rows


def _is_product(module: Any, x: Tensor) -> bool:
    """Whether ``module(x)`` is a matrix product in the dtype of both, and nothing else."""
    plain = plain_linear(module) and module.bias is None and module.weight.dtype == x.dtype
    return plain and not torch.is_autocast_enabled(x.device.type)


class _BothProducts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, first, second)
        return x @ first.t(), x @ second.t()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, first, second = ctx.saved_tensors
        one, two = (grad.flatten(0, -2) for grad in grads)
        rows = x.flatten(0, -2)
        of_x, of_first, of_second = ctx.needs_input_grad
        return (
            torch.mm(one, first).addmm_(two, second).view_as(x) if of_x else None,
            one.t() @ rows if of_first else None,
            two.t() @ rows if of_second else None,
        )
