"""Patches as a matrix product, and two products of the same rows: what the modules themselves give."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ds_lvxattn.runtime.projections import both_products, fuse_patches


@pytest.mark.parametrize(
    ("convolution", "sizes"),
    [(nn.Conv2d(3, 5, 4, 4, bias=False), (8, 12)), (nn.Conv3d(3, 5, (2, 4, 4), (2, 4, 4)), (4, 8, 4))],
)
def test_patches(convolution: Any, sizes: tuple[int, ...]) -> None:
    convolution = convolution.double()
    pixels = torch.randn(2, 3, *sizes, dtype=torch.float64)
    grad = torch.randn_like(convolution(pixels))

    def results() -> list[Tensor]:
        convolution.zero_grad()
        embedded = convolution(pixels)
        embedded.backward(grad)
        assert embedded.flatten(2).transpose(1, 2).is_contiguous() or "forward" not in vars(convolution)
        return [embedded, *(p.grad for p in convolution.parameters())]

    want = results()
    fuse_patches(convolution)
    torch.testing.assert_close(results(), want)
    odd = torch.randn(1, 3, *(size + 1 for size in sizes), dtype=torch.float64)  # the convolution leaves rows out
    torch.testing.assert_close(convolution(odd), type(convolution).forward(convolution, odd))


def test_other_convolutions_stay() -> None:
    model = nn.ModuleList([nn.Conv2d(3, 5, 4, 2), nn.Conv2d(8, 5, 4, 4), nn.Conv2d(3, 5, 4, 4, padding=1)])
    fuse_patches(model)
    assert not any("forward" in vars(module) for module in model)


@pytest.mark.parametrize("frozen", ["", "x", "first", "second"])
def test_both_products(frozen: str) -> None:
    x = torch.randn(2, 7, 6, dtype=torch.float64, requires_grad=frozen != "x")
    first, second = (nn.Linear(6, width, bias=False).double() for width in (3, 4))
    first.requires_grad_(frozen != "first")
    second.requires_grad_(frozen != "second")
    inputs = [y for y in (x, first.weight, second.weight) if y.requires_grad]

    def gradients(products: tuple[Tensor, Tensor]) -> list[Tensor]:
        return [*products, *torch.autograd.grad(products[0].sin().sum() + products[1].cos().sum(), inputs)]

    torch.testing.assert_close(gradients(both_products(x, first, second)), gradients((first(x), second(x))))


def test_modules_with_more_to_do_are_called() -> None:
    x, first, second = torch.randn(2, 6), nn.Linear(6, 3, bias=False), nn.Linear(6, 3, bias=False)
    handle = second.register_forward_hook(lambda module, args, output: output + 1)
    assert torch.equal(both_products(x, first, second)[1], x @ second.weight.t() + 1)
    handle.remove()
    with torch.autocast("cpu", torch.bfloat16):
        assert both_products(x, first, second)[0].dtype == torch.bfloat16
    assert both_products(x, first, second)[0].grad_fn.name() == "_BothProductsBackward"
