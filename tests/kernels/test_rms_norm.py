"""RMS norms: the Triton path and the torch path against float64, and the operators as compilers see them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

pytest.importorskip("triton")

from ds_lvxattn.kernels.rms_norm import rms_norm as differentiable
from ds_lvxattn.kernels.triton import rms_norm as kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = st.sampled_from((torch.float32, torch.float16, torch.bfloat16))
EPSILON = 1e-5
BOTH = (True, True)


def laid_out(layout: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Random ``[2, 3, rows, size]``: dense, keys of all heads row by row, or some heads of more."""
    batch, heads, rows, size = shape
    if layout == "dense":
        return torch.randn(*shape, device=DEVICE).to(dtype)
    if layout == "columns":
        return torch.randn(batch, heads, size, rows, device=DEVICE).to(dtype).transpose(2, 3)
    more = heads if layout == "sequence first" else heads + 2
    return torch.randn(batch, rows, more, size, device=DEVICE).to(dtype).transpose(1, 2)[:, :heads]


@settings(max_examples=8, deadline=None)
@given(
    rows=st.integers(0, 40), size=st.sampled_from((32, 80, 128)), dtypes=st.tuples(DTYPES, DTYPES),
    layouts=st.tuples(*[st.sampled_from(("dense", "sequence first", "some heads", "columns"))] * 2),
    wanted=st.tuples(st.booleans(), st.booleans()),
)  # fmt: skip
@example(rows=3, size=8192, dtypes=(torch.bfloat16,) * 2, layouts=("dense", "sequence first"), wanted=BOTH)
@example(rows=60, size=128, dtypes=(torch.bfloat16, torch.float32), layouts=("sequence first",) * 2, wanted=BOTH)
def test_equals_float64(rows, size, dtypes, layouts, wanted):
    torch.manual_seed(rows)
    x = laid_out(layouts[0], (2, 3, rows, size), dtypes[0])
    weight = (1 + 0.3 * torch.randn(size, device=DEVICE)).to(dtypes[1])
    grad = laid_out(layouts[1], x.shape, torch.promote_types(*dtypes))
    exact, exact_inverse = kernels.rms_norm(x.double(), weight.double(), EPSILON)
    exact_gradients = kernels.rms_norm_backward(grad.double(), x.double(), weight.double(), exact_inverse, BOTH)
    for forward, backward in (
        (kernels.rms_norm_triton, kernels.rms_norm_backward_triton), (kernels.rms_norm, kernels.rms_norm_backward),
    ):  # fmt: skip
        normed, inverse = forward(x, weight, EPSILON)
        assert normed.dtype == grad.dtype and normed.stride(-1) == 1
        torch.testing.assert_close(inverse.double(), exact_inverse, rtol=1e-6, atol=0.0)
        torch.testing.assert_close(normed, exact.to(normed.dtype))
        for inverted in (inverse, inverse.contiguous()):  # what comes back from the CPU has the strides of another
            gradients = backward(grad, x, weight, inverted, wanted)
            for got, want, like, asked in zip(gradients, exact_gradients, (x, weight), wanted, strict=True):
                assert (got is not None) == asked
                if asked:
                    assert got.dtype == like.dtype
                    tolerance = 2 * torch.finfo(like.dtype).eps
                    torch.testing.assert_close(got, want.to(like.dtype), rtol=tolerance, atol=1e-5)


@pytest.mark.parametrize("shape", [(7,), (5, 7), (2, 3, 7), (2, 1, 3, 2, 7)])
def test_any_number_of_dimensions(shape):
    x = torch.randn(shape, dtype=torch.float64, device=DEVICE, requires_grad=True)
    weight = torch.randn(shape[-1], dtype=torch.float64, device=DEVICE, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *inputs: differentiable(*inputs, EPSILON), (x, weight))
    if len(shape) <= 4:
        narrow, weights = x.detach().float(), weight.detach().float()
        normed, inverse = kernels.rms_norm_triton(narrow, weights, EPSILON)
        assert inverse.shape == shape[:-1]
        torch.testing.assert_close(normed, differentiable(narrow, weights, EPSILON))


def test_compilers_see_one_operator():
    x = laid_out("sequence first", (2, 3, 9, 64), torch.bfloat16).requires_grad_()
    weight = torch.rand(64, device=DEVICE, requires_grad=True)
    operators = torch.ops.ds_lvxattn
    inputs = x.detach(), weight.detach()
    torch.library.opcheck(operators.rms_norm.default, (*inputs, EPSILON), test_utils=("test_schema", "test_faketensor"))
    normed, inverse = kernels.rms_norm(*inputs, EPSILON)
    for wanted in (BOTH, (False, True)):
        torch.library.opcheck(
            operators.rms_norm_backward.default, (normed, *inputs, inverse, *wanted),
            test_utils=("test_schema", "test_faketensor"),
        )  # fmt: skip

    def layer(x, weight):
        return 2 * differentiable(x.sin(), weight, EPSILON)

    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    results = []
    for function in (layer, compiled, lambda *given: checkpoint(layer, *given, use_reentrant=False)):
        y = function(x, weight)
        results.append((y, *torch.autograd.grad(y.float().square().sum(), (x, weight))))
    for again in results[1:]:
        torch.testing.assert_close(again, results[0], rtol=0.0, atol=0.0)
    with pytest.raises(RuntimeError, match="leave create_graph out"):
        torch.autograd.grad(layer(x, weight).sum(), x, create_graph=True)
