"""A torch that lacks what it does not promise: the same results, by what it does promise."""

from __future__ import annotations

import importlib.util
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from ds_lvxattn.kernels import cudnn, flash, torch_internals
from ds_lvxattn.kernels.base import Call
from ds_lvxattn.kernels.dispatch import select_kernel
from ds_lvxattn.kernels.triton import rms_norm

NAMES = (
    "_disable_dynamo",
    "_C._nn.linear",
    "_C._len_torch_dispatch_stack",
    "_C._len_torch_function_stack",
    "autograd._profiler_enabled",
    "_C._cuda_getCurrentRawStream",
    "distributed.distributed_c10d._coalescing_manager",
    "_assert_async",
)


REFUSING = (
    "_C._are_functorch_transforms_active", "_C._functorch.is_batchedtensor", "_C._functorch.is_legacy_batchedtensor",
)  # fmt: skip


def imported_without(*names: str) -> ModuleType:
    """The module as it is imported beside a torch without any of the names."""
    spec: Any = importlib.util.find_spec(torch_internals.__name__)
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        for name in names:
            patch.delattr(f"torch.{name}", raising=False)
        spec.loader.exec_module(module)
    return module


def test_every_name_is_stood_in_for(monkeypatch: pytest.MonkeyPatch) -> None:
    without = imported_without(*NAMES)
    assert without._never_compiled is torch.compiler.disable
    x, weight, bias = torch.randn(3, 4), torch.randn(2, 4), torch.randn(2)
    assert torch.equal(without.linear(x, weight, bias), torch_internals.linear(x, weight, bias))
    # Who looks on cannot be told, so that everything goes the way that all of them see.
    assert without.dispatch_modes() and without.function_modes() and without.profiler_looks()
    calls = [lambda: "first", lambda: None, lambda: "second"]
    assert without.start(calls, None, together=True) == ["first", "second"]

    class Stream:
        cuda_stream = 7

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream)
    assert without.current_stream(0) == 7
    for module in (without, torch_internals):
        module.raise_if(torch.tensor([False]), "wrong")
        with pytest.raises(RuntimeError, match="wrong"):
            module.raise_if(torch.tensor([True]), "wrong")


def test_what_is_no_longer_refused_is_said() -> None:
    with pytest.warns(UserWarning, match="is not refused") as said:
        without = imported_without(*REFUSING)
    assert [name for name in REFUSING if any(f"torch.{name}," in str(each.message) for each in said)] == [*REFUSING]
    assert not without.transforms_active() and not without.is_batched(torch.zeros(1))
    with pytest.raises(ImportError, match="has no torch._C._AutoDispatchBelowAutograd"):
        imported_without("_C._AutoDispatchBelowAutograd")


def test_a_kernel_without_its_operator_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    assert torch_internals.missing_operator("add", "mul") is None
    reason = torch_internals.missing_operator("add", "no_such_attention")
    assert reason is not None and "no operator aten::no_such_attention" in reason
    call = Call.of_shapes("cpu", torch.float32, *[torch.Size((1, 2, 8, 16))] * 3, False, False, backward=False)
    assert select_kernel("auto", call).name == "flash"
    monkeypatch.setattr(flash, "MISSING_ON_CPU", reason)
    assert select_kernel("auto", call).name == "math"
    with pytest.raises(ValueError, match="kernel 'flash' cannot do this call: .* aten::no_such_attention"):
        select_kernel("flash", call)
    few: Any = SimpleNamespace(is_cuda=True, dtype=torch.float32, numel=lambda: 4, is_contiguous=lambda: True)
    assert rms_norm.by_torch(few, few)
    monkeypatch.setattr(rms_norm, "MISSING", reason)
    assert not rms_norm.by_torch(few, few)
    assert cudnn.MISSING is None or "aten::_scaled_dot_product_cudnn_attention" in cudnn.MISSING
