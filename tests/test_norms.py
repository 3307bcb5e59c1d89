"""RMS norms with one kernel: no less exact than transformers' modules, and in their place only where they are equal."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.mllama.modeling_mllama import MllamaTextRMSNorm

from ds_lvxattn.kernels.rms_norm import rms_norm
from ds_lvxattn.runtime.norms import fuse_norms

HEADS, KEYS, SIZE = 3, 40, 64


def norm_of(dtype: torch.dtype, make: Any = MllamaTextRMSNorm) -> Any:
    norm = make(SIZE, eps=1e-5)
    nn.init.normal_(norm.weight, mean=1.0, std=0.3, generator=torch.Generator().manual_seed(0))
    return norm.to(dtype)


def keys_and_grads(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """As attention has them: views of rows of all heads; both with a mean that a norm has to take away."""
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(2, 2, KEYS, HEADS, SIZE, generator=generator) + torch.tensor(0.5)
    k, grad = rows.to(dtype).transpose(2, 3)
    return k, grad


def results(norm: Any, k: Tensor, grad: Tensor) -> list[Tensor]:
    k = k.clone().requires_grad_()
    normed = norm(k)
    normed.backward(grad.to(normed.dtype))
    return [normed, k.grad, norm.weight.grad]


def in_float64(norm: Any, k: Tensor, grad: Tensor) -> list[Tensor]:
    k, weight = k.double().requires_grad_(), norm.weight.detach().double().requires_grad_()
    normed = weight * k * torch.rsqrt(k.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon)
    normed.backward(grad.double())
    return [normed, k.grad, weight.grad]


@pytest.mark.parametrize(
    ("rows", "weights"),
    [
        (torch.bfloat16, torch.bfloat16), (torch.float16, torch.float16), (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32), (torch.float64, torch.float64),
    ],
)  # fmt: skip
def test_norms_are_no_less_exact(rows: torch.dtype, weights: torch.dtype) -> None:
    own = norm_of(weights)
    ours = copy.deepcopy(own)
    fuse_norms(ours)
    k, grad = keys_and_grads(rows)
    for got, theirs, want in zip(results(ours, k, grad), results(own, k, grad), in_float64(own, k, grad), strict=True):
        assert got.dtype == theirs.dtype and got.stride() == theirs.stride()
        error, usual = ((x.double() - want).norm() for x in (got, theirs))
        assert error <= 1.1 * usual  # in float32 both round alike


def test_gradients_are_those_of_differences() -> None:
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, 1e-5), (x, weight))
    normed = rms_norm(x[:0], weight, 1e-5)  # a rank without keys
    assert not torch.autograd.grad(normed.sum(), weight)[0].any()


def test_only_plain_norms_are_fused() -> None:
    class Other(MllamaTextRMSNorm):
        def forward(self, hidden_states: Tensor) -> Tensor:
            return 2 * super().forward(hidden_states)

    replaced = norm_of(torch.float32)
    replaced.forward = nn.Identity().forward
    model = nn.ModuleList([
        norm_of(torch.float32, make) for make in (LlamaRMSNorm, MllamaTextRMSNorm, GemmaRMSNorm, Other)
    ])  # fmt: skip
    model.extend([replaced, nn.RMSNorm(SIZE), nn.LayerNorm(SIZE)])
    before = [vars(norm).get("forward") for norm in model]
    seen: list[Tensor] = []
    model[1].register_forward_hook(lambda module, args, output: seen.append(output))
    x = torch.randn(4, SIZE)
    want = [norm(x) for norm in model]
    fuse_norms(model)
    changed = [vars(norm).get("forward") is not old for norm, old in zip(model, before, strict=True)]
    assert changed == [True, True, False, False, False, False, False]
    torch.testing.assert_close([norm(x) for norm in model], want)
    assert len(seen) == 2 and seen[1].grad_fn is not None
