"""Recomputation: gradients, gradient hooks, traffic, and the switches that turn it on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
import torch.distributed as dist
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.utils import safe_get_full_grad
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ds_lvxattn.batches.prepare import Batches
from ds_lvxattn.data.sample import Sample
from ds_lvxattn.training.loading import parameter_groups, partition_over_all_ranks
from tests.support.distributed import run
from tests.support.tiny_model import (
    attach,
    ds_config,
    frames_in_portions,
    groups_of,
    loss_of,
    losses_on_one_rank,
    tiny_config,
    tiny_model,
    tiny_sample,
)
from tests.support.training import Case, metrics_in, mixed_samples, train

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


def gradients(frozen: str, **block: Any) -> dict[str, Tensor]:
    """Gradients of this rank's part of the loss."""
    samples = [tiny_sample(pattern, seed) for seed, pattern in enumerate(PATTERNS)]
    model = model_that_trains(frozen)
    batches = attach(model, dist.get_world_size(), GATHER, samples, **block)
    fired: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda p, name=name: fired.update([name]))
    loss_of(model, samples, batches).backward()
    assert set(fired.values()) == {1}
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def gradients_by_policy(frozen: str) -> dict[str, dict[str, Tensor]]:
    with frames_in_portions(2, tiny_config(tiles=2)):
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
    assert len(want) == {LORA: 12, "language model": 41}.get(frozen, len(want)) and len(want) > 10
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


def engine_gradients(stage: str, frozen: str, policy: str) -> tuple[dict[str, Tensor], dict[str, int], dict[str, int]]:
    """Gradients of the second step, when ZeRO-3 knows the order of the modules; how often the hook of each parameter
    fired; bytes received in exchanges."""
    number, zero = STAGES[stage]
    config = ds_config(number, 2, 2, recompute=policy)
    config["zero_optimization"] |= zero
    config["zero_force_ds_cpu_optimizer"] = False
    samples = [tiny_sample(pattern, seed) for seed, pattern in enumerate(PATTERNS)]
    model = model_that_trains(frozen)
    batches = attach(model, 2, GATHER, samples, recompute=policy)
    partition_over_all_ranks(model, config, groups_of(2))
    fired: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda p, name=name: fired.update([name]))
    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=parameter_groups(model), config=config, mpu=groups_of(2)
    )
    for step in range(2):
        fired.clear()
        batches.parallel.comm.reset()
        engine.backward(engine(**batches.prepare(samples).inputs).loss)
        if step == 0:
            engine.step()
    found = {name: safe_get_full_grad(p) for name, p in model.named_parameters() if p.requires_grad}
    if number == 3:
        # Nothing stays gathered that a backward pass has used; what is left goes when the step ends.
        engine.step()
        assert all(p.ds_status == ZeroParamStatus.NOT_AVAILABLE for p in model.parameters())
    engine.destroy()
    return found, dict(fired), dict(batches.parallel.comm.received)


def engine_gradients_by_policy(stage: str, frozen: Sequence[str]) -> list[dict[str, Any]]:
    with frames_in_portions(5, tiny_config(tiles=2)):
        return [
            {policy: engine_gradients(stage, name, policy) for policy in ("none", "kv", "layer")} for name in frozen
        ]


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_gradients_under_zero(stage: str) -> None:
    """Query exchange sends nothing again; each gradient hook fires once."""
    frozen = [*FROZEN, LORA] if stage == "3" else ["nothing", LORA]
    for results in run(2, engine_gradients_by_policy, stage, frozen)[0]:
        want, fired, received = results.pop("none")
        assert fired.keys() == want.keys() and set(fired.values()) == {1} and sum(received.values()) > 0
        for policy, (got, fired_again, received_again) in results.items():
            assert (fired_again, received_again) == (fired, received), policy
            for name, gradient in want.items():
                torch.testing.assert_close(got[name], gradient, rtol=1e-5, atol=1e-6)


def train_in_portions(case: Case, folder: Path) -> None:
    with frames_in_portions(1, tiny_config()):
        train(case, folder)


@pytest.mark.slow
def test_groups_with_unequal_frames_call_the_encoder_equally_often(tmp_path: Path) -> None:
    """ZeRO-3 gathers the encoder's parameters over two groups of two ranks, in each portion."""
    case = Case(4, 2, 3, GATHER, steps=4, micro_batch=1, recompute="kv")
    run(4, train_in_portions, case, tmp_path, timeout=300)
    assert metrics_in(tmp_path) == pytest.approx(losses_on_one_rank(mixed_samples(8).samples, 4, 2, 1), rel=1e-5)


# The switches


class Operators(TorchDispatchMode):
    """Counts attention operators of forward and backward passes."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "ds_lvxattn":
            self.counts[func._opname] += 1
        return func(*args, **(kwargs or {}))


def switched(how: str) -> tuple[str, list[bool], bool, int, bool]:
    """Policy, switched layers, offload and attention calls of a step, and whether the gradients stay as they are."""
    samples = [tiny_sample(pattern, seed) for seed, pattern in enumerate(PATTERNS)]
    model = tiny_model().train()
    want = gradients_of(model, attach(model, 1, GATHER, samples, recompute="none"), samples)
    model = tiny_model().train()
    before, named, kwargs = SWITCHES[how]
    if before:
        model.gradient_checkpointing_enable(**kwargs)
    batches = attach(model, 1, GATHER, samples, **named)
    if not before:
        model.gradient_checkpointing_enable(**kwargs)
    if how == "off again":
        model.gradient_checkpointing_disable()
    with Operators() as operators:
        got = gradients_of(model, batches, samples)
    layers = [layer.gradient_checkpointing for layer in batches.parallel.recomputation.layers]
    same = all(torch.equal(got[name], gradient) for name, gradient in want.items())
    recomputation = batches.parallel.recomputation
    return recomputation.policy, layers, recomputation.offload, operators.counts["local_attention"], same


def gradients_of(model: nn.Module, batches: Batches, samples: Sequence[Sample]) -> dict[str, Tensor]:
    loss_of(model, samples, batches).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


# Before or after attaching, what the config names, arguments of the switch.
SWITCHES: dict[str, tuple[bool, dict[str, Any], dict[str, Any]]] = {
    "before": (True, {}, {}),
    "after": (False, {}, {"gradient_checkpointing_kwargs": {"use_reentrant": True}}),
    "every second layer": (False, {}, {"every_n_layers": 2}),
    "offload": (False, {}, {"offload": True}),
    "off again": (False, {}, {}),
    "config says none": (False, {"recompute": "none"}, {}),
    "config says kv": (True, {"recompute": "kv"}, {}),
    "config says layer": (False, {"recompute": "layer", "offload": True}, {}),
}
EXPECTED = {
    "before": ("layer", [True] * 4, False),
    "after": ("layer", [True] * 4, False),
    "every second layer": ("layer", [True, False, True, False], False),
    "offload": ("layer", [True] * 4, True),
    "off again": ("kv", [False] * 4, False),
    "config says none": ("none", [False] * 4, False),
    "config says kv": ("kv", [False] * 4, False),
    "config says layer": ("layer", [True] * 4, True),
}


@pytest.mark.parametrize("how", SWITCHES)
def test_the_switch_of_transformers(how: str) -> None:
    [(policy, layers, offload, attended, same)] = run(1, switched, how)
    assert (policy, layers, offload) == EXPECTED[how]
    encoder = 2 if policy == "none" else 4  # its two layers keep nothing, and attend again
    assert attended == 4 + encoder and same, "an attention operator of the text runs once a layer, and gradients stay"
