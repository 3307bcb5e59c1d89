"""Recomputation: gradients, gradient hooks, traffic, and the switches that turn it on."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

import deepspeed
import pytest
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_grad
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ds_lvxattn.models import mllama
from ds_lvxattn.training.model import model_dtype, parameter_groups, partition_over_all_ranks
from tests.distributed import run
from tests.tiny_model import attach, ds_config, groups_of, loss_of, tiny_collator, tiny_config, tiny_model, tiny_sample

PATTERNS = ("IItaIIIItIaa", "tIta")
GATHER = ("lv_xattn", "gather", "contiguous")

# What trains: everything, or what is left when the parameters with these name parts are frozen.
FROZEN = {"nothing": (), "vision encoder": ("vision_model",), "language model": ("language_model", "lm_head")}
LORA = "all but adapters of cross-attention"


def model_that_trains(frozen: str) -> nn.Module:
    """The tiny model in training mode, with padding tiles."""
    model = tiny_model(tiny_config(tiles=2)).train()
    if frozen == LORA:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(2)
            targets = r".*cross_attn\.[qkv]_proj"
            # At initialisation one of the two matrices is zero, and the other one's gradient with it.
            inject_adapter_in_model(LoraConfig(r=2, target_modules=targets, init_lora_weights=False), model)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora_" in name)
        return model
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not any(part in name for part in FROZEN[frozen]))
    return model


@contextlib.contextmanager
def frames_in_portions() -> Iterator[None]:
    """The vision encoder takes two frames at once."""
    usual = mllama.TOKENS_AT_ONCE
    mllama.TOKENS_AT_ONCE = 2 * 2 * 8  # frames, tiles, tokens
    try:
        yield
    finally:
        mllama.TOKENS_AT_ONCE = usual


class Calls(TorchDispatchMode):
    """Counts attention operators, and matrix products with as many rows as there are visual tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "ds_lvxattn":
            self.count[func._opname] += 1
        return func(*args, **(kwargs or {}))


def gradients(frozen: str, **block: Any) -> dict[str, Tensor]:
    """Gradients of this rank's part of the loss."""
    samples = [tiny_sample(pattern, seed) for seed, pattern in enumerate(PATTERNS)]
    model = model_that_trains(frozen)
    parallel = attach(model, dist.get_world_size(), GATHER, samples, **block)
    fired: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda p, name=name: fired.update([name]))
    loss_of(model, samples, parallel).backward()
    assert set(fired.values()) == {1}
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def gradients_by_policy(frozen: str) -> dict[str, dict[str, Tensor]]:
    with frames_in_portions():
        return {
            "none": gradients(frozen, recompute="none"),
            "kv": gradients(frozen, recompute="kv"),
            "layer": gradients(frozen, recompute="layer"),
            "kv, offloaded": gradients(frozen, recompute="kv", offload=True),
            "layer, offloaded": gradients(frozen, recompute="layer", offload=True),
        }


@pytest.mark.parametrize("frozen", [*FROZEN, LORA])
def test_gradients_are_those_without_recomputation_to_the_bit(frozen: str) -> None:
    [results] = run(1, gradients_by_policy, frozen)
    want = results.pop("none")
    assert len(want) == {LORA: 12, "language model": 31}.get(frozen, len(want)) and len(want) > 10
    assert all(gradient.abs().max() > 0 for gradient in want.values())
    for policy, got in results.items():
        assert got.keys() == want.keys()
        for name, gradient in got.items():
            assert torch.equal(gradient, want[name]), (policy, name)


# Under ZeRO, on two ranks

OFFLOAD = {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}
STAGES: dict[str, tuple[int, dict[str, Any]]] = {
    "1": (1, {}), "2": (2, {}), "3": (3, {}), "2 with offload": (2, {"offload_optimizer": {"device": "cpu"}}),
    "3 with offload": (3, OFFLOAD),
}  # fmt: skip


def engine_gradients(stage: str, frozen: str, policy: str) -> tuple[dict[str, Tensor], int]:
    """Whole gradients of the third step, when ZeRO-3 knows the order of the modules; bytes of its exchanges."""
    number, zero = STAGES[stage]
    config = ds_config(number, 2, 2, recompute=policy)
    config["zero_optimization"] |= zero
    config["zero_force_ds_cpu_optimizer"] = False
    samples = [tiny_sample(pattern, seed) for seed, pattern in enumerate(PATTERNS)]
    model = model_that_trains(frozen)
    parallel = attach(model, 2, GATHER, samples, recompute=policy)
    collator = tiny_collator(model, parallel)
    layout = collator.layout(samples)
    partition_over_all_ranks(model, config, groups_of(2))
    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=parameter_groups(model), config=config, mpu=groups_of(2)
    )
    assert model_dtype(config) == torch.float32
    for step in range(3):
        parallel.comm.reset()
        engine.backward(engine(**collator.collate(layout, collator.load(samples, layout)).inputs).loss)
        if step < 2:
            engine.step()
    found = {name: safe_get_full_grad(p) for name, p in model.named_parameters() if p.requires_grad}
    received = parallel.comm.bytes_received
    engine.destroy()
    return found, received


def engine_gradients_by_policy(stage: str, frozen: str) -> dict[str, tuple[dict[str, Tensor], int]]:
    with frames_in_portions():
        return {policy: engine_gradients(stage, frozen, policy) for policy in ("none", "kv", "layer")}
