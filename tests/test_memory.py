"""The memory plan: what it says a layer keeps, against what autograd saves; model states; the frames that fit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from ds_lvxattn import KVInterval
from ds_lvxattn.exchange.strategies.ulysses import padded_order
from ds_lvxattn.plan.layer_sizes import LayerSizes
from ds_lvxattn.plan.memory import POLICIES, ModelStates, kept_bytes, largest_that_fits, step_bytes
from ds_lvxattn.plan.modes import eligible_modes
from ds_lvxattn.plan.profile import load_profile
from ds_lvxattn.plan.zero import StageTime, Work, advice, fastest, gradient_advice, stages_of_run
from ds_lvxattn.training.memory_plan import Frozen, MemoryPlan, memory_plan, model_states
from tests.support.distributed import run
from tests.support.tiny_model import CPU, attach, loss_of, tiny_model, tiny_sample

SAMPLES = ("IItaIIItItaa", "IttaIIttaIItaI")
# What ``routed`` keeps depends on the mask.
MODES = tuple(mode.key for mode in eligible_modes() if not mode.routes_by_mask)


class Kept:
    """Bytes of the storages that autograd saves within each decoder layer, parameters and shared inputs left out."""

    def __init__(self, model: nn.Module) -> None:
        self.layers: list[dict[int, int]] = []
        self.alive: list[Tensor] = []
        self.intervals: list[KVInterval] = []  # of which all layers share what is derived
        self.ignored = {p.untyped_storage().data_ptr() for p in model.parameters()}
        for layer in model.modules():
            if isinstance(layer, GradientCheckpointingLayer):
                layer.register_forward_pre_hook(self._enter, with_kwargs=True)
                layer.register_forward_hook(self._leave)
        self.now: dict[int, int] | None = None

    def _enter(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self.now = {}
        shared = [*kwargs.values(), *(kwargs["position_embeddings"] or ())]
        batch = kwargs["sequence_parallel"]
        for role in batch.roles.values():
            shared += [role.interval.start, role.interval.stop]
            self.intervals.append(role.interval)
            # In which order Ulysses takes what arrives: made once for all layers.
            shared += [padded_order(shards, range(shards.ranks), CPU) for shards in (role.layout.q, role.layout.kv)]
        self.ignored |= {x.untyped_storage().data_ptr() for x in shared if isinstance(x, Tensor)}

    def _leave(self, *unused: object) -> None:
        assert self.now is not None
        self.layers.append(self.now)
        self.now = None

    def pack(self, x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if self.now is not None and storage.data_ptr() not in self.ignored:
            self.now[storage.data_ptr()] = storage.nbytes()
            self.alive.append(x.detach())  # so that no address is used twice
        return x

    def bytes_of_layers(self) -> list[int]:
        shared = {x.untyped_storage().data_ptr() for interval in self.intervals for x in derived_from(interval)}
        return [sum(size for place, size in layer.items() if place not in shared) for layer in self.layers]


def derived_from(interval: KVInterval) -> Iterator[Tensor]:
    """The tensors that ``interval`` keeps for all layers of a batch."""
    for made in interval._made.values():
        if isinstance(made, KVInterval):
            yield from (made.start, made.stop)
            yield from derived_from(made)
        else:
            yield from made


def measured_and_planned(dtype: torch.dtype, policy: str, frames: int = 0) -> list[tuple[list[int], list[int]]]:
    """For each mode: bytes that the layers of this rank keep, as measured and as planned."""
    import torch.distributed as dist

    samples = [tiny_sample("I" * frames + pattern, seed) for seed, pattern in enumerate(SAMPLES)]
    results = []
    for strategy, schedule in MODES if dist.get_world_size() > 1 else MODES[:1]:
        model = tiny_model(dtype=dtype).train()
        mode = (strategy, schedule, "contiguous")
        batches = attach(model, dist.get_world_size(), mode, samples, recompute=policy)
        kept = Kept(model)
        with torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda x: x):
            loss = loss_of(model, samples, batches)
        loss.backward()
        planned = [layer.kept_bytes for layer in batches.planner.plan if layer.role != "local"]
        results.append((kept.bytes_of_layers(), [p[policy] for p in planned]))
    return results


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_layers_keep_what_the_plan_says(ranks: int) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for policy in POLICIES:
            results = run(ranks, measured_and_planned, dtype, policy)[0]
            for mode, (measured, planned) in zip(MODES, results, strict=False):
                assert measured == planned, (dtype, policy, mode)


def cross_layer(keys: int) -> LayerSizes:
    return LayerSizes(
        "cross", "lv_xattn", "gather", 1, 2, 100, 100, 200, keys, 2 * keys, 32, 8, 128, 4096, 14336, 2
    )  # fmt: skip


@pytest.mark.parametrize("policy", ["kv", "layer"])
def test_recomputing_layers_keep_nothing_of_the_length_of_the_keys(policy: str) -> None:
    assert kept_bytes(cross_layer(1_000), policy) == kept_bytes(cross_layer(1_000_000), policy)
    # keys ahead of their norm, the inverse norms, K and V
    grown = kept_bytes(cross_layer(1_001), "none") - kept_bytes(cross_layer(1_000), "none")
    assert grown == 1024 * (2 + 2 + 2) + 8 * 4


@pytest.mark.parametrize(
    ("stage", "offload", "want"),
    [
        (0, (), 1000 * 2 + 100 * 2 + 100 * 12), (1, (), 1000 * 2 + 100 * 2 + 25 * 12),
        (2, (), 1000 * 2 + 25 * 2 + 25 * 12), (3, (), 250 * 2 + 25 * 2 + 25 * 12),
        (2, ("offload_optimizer",), 1000 * 2), (3, ("offload_optimizer", "offload_parameters"), 0),
    ],
)  # fmt: skip
def test_model_states(stage: int, offload: tuple[str, ...], want: int) -> None:
    assert ModelStates(1000, 100, 2, stage, 4, **dict.fromkeys(offload, True)).device_bytes == want


def test_what_one_rank_gathers_takes_no_memory() -> None:
    for ranks, more in ((1, 0), (4, 1000 * 2)):
        states = ModelStates(1000, 100, 2, 3, ranks)
        assert replace(states, gathered=1000).device_bytes == states.device_bytes + more


def test_the_faster_stage_is_told_where_it_fits() -> None:
    layers = [cross_layer(1601 * 24)] * 8
    states = ModelStates(11 * 10**9, 2 * 10**9, 2, 3, 4)

    def found(of: ModelStates, gib: int, host: float = 0.1, keeps: bool = False) -> tuple[int, int] | None:
        work = Work(0.05, host)  # the host binds, and gathers cost it more
        stages = stages_of_run(load_profile("h100"), layers, "kv", of, 0, True, work, gib * 2**30, keeps)
        best = fastest(stages)
        return None if advice(of.stage, stages) is None or best is None else (best.stage, round(best.memory))

    fits = found(states, 80)
    assert fits == (2, step_bytes(layers, "kv", replace(states, stage=2), 0, True))
    assert found(states, 24) is None  # of which its parameters take 20
    assert found(replace(states, stage=2), 80) is None
    assert found(replace(states, offload_parameters=True), 80) is None
    assert found(replace(states, stage=2), 24) == (3, step_bytes(layers, "kv", states, 0, True))
    assert found(replace(states, stage=0), 80) is None
    # With what is frozen kept, stage 3 costs what stage 2 does, where there is room for it.
    assert found(states, 80, keeps=True) is None and found(states, 36, keeps=True) == found(states, 36)


def test_gradients_in_float32_are_named_where_links_are_slow_for_them() -> None:
    layers, fast = [cross_layer(1601 * 24)] * 8, load_profile("h100")
    slow = replace(fast, intra=replace(fast.intra, bandwidth=fast.intra.bandwidth / 20))
    for profile, told in ((fast, False), (slow, True)):
        for stage in (2, 3):
            states = ModelStates(11 * 10**9, 2 * 10**9, 2, stage, 4)
            stages = stages_of_run(profile, layers, "kv", states, 0, True, Work(0.8, 0.1), 80 * 2**30)
            own = stages[stage - 1]
            assert own.narrow is not None and own.narrow < own.seconds
            message = gradient_advice(stage, stages)
            assert ("'seq_parallel_communication_data_type'" in (message or "")) is told
            plan = MemoryPlan("kv", {}, 0, 0, None, stage, stages)
            assert message is None or message in (plan.warning or "")
            halves = stages_of_run(
                profile, layers, "kv", replace(states, gradient=2), 0, True, Work(0.8, 0.1), 80 * 2**30
            )
            assert halves[stage - 1].seconds == own.narrow and gradient_advice(stage, halves) is None


@pytest.mark.parametrize(
    ("config", "want"),
    [
        ({"sequence_parallel_size": 2}, 4), ({"sequence_parallel_size": 2, "communication_data_type": "bf16"}, 4),
        ({"sequence_parallel_size": 2, "seq_parallel_communication_data_type": "bf16"}, 2), ({}, 2),
        ({"communication_data_type": "fp32"}, 4),
    ],
)  # fmt: skip
def test_bytes_of_gradients_are_those_that_deepspeed_sends(config: dict[str, Any], want: int) -> None:
    assert model_states(torch.nn.Linear(2, 2), {"bf16": {"enabled": True}, **config}, 2).gradient == want


def test_what_plan_json_says_of_zero() -> None:
    stages = [StageTime(stage, seconds, 1e9, True) for stage, seconds in ((1, 1.0), (2, 1.0), (3, 1.2))]
    plan = MemoryPlan("kv", {}, 0, 0, None, 3, stages)
    assert plan.zero is not None and plan.zero["fastest_that_fits"] == 1
    assert plan.zero["predicted_s"] == {"1": 1.0, "2": 1.0, "3": 1.2} and plan.zero["warning"] == plan.warning
    assert "'zero_optimization.stage' to 1" in (plan.warning or "")
    assert MemoryPlan("kv", {}, 0, 0, None, 3).zero is None


def test_a_run_on_a_gpu_is_told_of_a_faster_stage() -> None:
    text = SimpleNamespace(total=200)
    layout: Any = SimpleNamespace(
        visual_tokens=1601 * 48, frames=[48], keys_in_text=False, samples_of_rows=[[0]], text=text, rows=1,
        encoder_tokens=1608 * 48, portions=2,
    )  # fmt: skip
    layers, states = [cross_layer(1601 * 24)] * 8, ModelStates(11 * 10**9, 2 * 10**9, 2, 3, 2)

    def plan_of(frozen: Frozen, gib: int = 80, of: ModelStates = states) -> MemoryPlan:
        with mock.patch("torch.cuda.get_device_properties", return_value=SimpleNamespace(total_memory=gib * 2**30)):
            return memory_plan(
                layers, (4096,), "kv", of, layout, torch.device("cuda"), load_profile("h100"), Work(0.05, 0.1),
                frozen=frozen,
            )  # fmt: skip

    plan = plan_of(Frozen(9 * 10**9, wish=False))
    assert plan.frames is not None and [each.stage for each in plan.stages] == [1, 2, 3]
    assert plan.zero is not None and plan.zero["stage"] == 3 and plan.zero["fastest_that_fits"] == 2
    assert "ZeRO-2" in (plan.warning or "") and plan.zero["keeps_frozen"] is False

    kept = plan_of(Frozen(9 * 10**9))
    assert kept.warning is None and kept.zero is not None and kept.zero["gathered_bytes"] == 22 * 10**9
    assert kept.states == plan.states + 22 * 10**9 and kept.zero["gathers_trained_once"] is True
    assert kept.frozen is not None and kept.frozen.kept and kept.frozen.portions is not None
    # As many portions as there is room for: a portion is of 20 frames a rank, a frame of 1601 features of 4096.
    more = kept.frozen.portions * 20 * 1601 * 4096 * 2
    assert kept.states + more < 5 / 6 * 80 * 2**30 and kept.frozen.portions > 2
    for frozen, gib, why in (
        (Frozen(9 * 10**9), 48, "may be taken"), (Frozen(0), 80, "all parameters train"),
        (Frozen(9 * 10**9, obstacle="the reason"), 80, "the reason"),
    ):  # fmt: skip
        fate = plan_of(frozen, gib).frozen
        assert fate is not None and not fate.kept and why in fate.why
    forced = plan_of(Frozen(9 * 10**9, wish=True, trained=False), 48).frozen
    assert forced is not None and forced.kept and forced.portions is None and not forced.trained


def test_frames_that_fit() -> None:
    def step(frames: int) -> int:
        return step_bytes([cross_layer(1601 * frames)] * 8, "kv", ModelStates(10**9, 0, 2, 1, 1), 0, True)

    most = largest_that_fits(step, 80 * 2**30)
    assert step(most) <= 80 * 2**30 < step(most + 1)
    assert largest_that_fits(step, 10**9) == 0
