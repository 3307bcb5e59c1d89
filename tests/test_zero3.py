"""ZeRO-3 with what is frozen gathered as a whole: the same losses, and fewer gathers, whatever the batches are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import deepspeed
import pytest
import torch
import torch.distributed as dist
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
from deepspeed.utils import z3_leaf_module

from ds_lvxattn.data.sample import Sample
from ds_lvxattn.training.loading import parameter_groups, partition_over_all_ranks, select_trainable
from ds_lvxattn.training.zero3 import LIVE, PREFETCH, take_as_wholes
from tests.support.distributed import run
from tests.support.parity import losses_of_batches, samples_of
from tests.support.tiny_families import tiny
from tests.support.tiny_model import (
    MODES,
    attach,
    ds_config,
    frames_in_portions,
    groups_of,
    tiny_config,
    tiny_model,
)

# One portion of the encoder's frames, then three, then one frame on one rank.
STEPS = (("tIIta",), ("IItaItIIItta",), ("tItta",), ("tIIta",), ("IItaItIIItta",), ("tIIta",))
GATHER = "_PartitionedParameterCoordinator__all_gather_params_"


def made(family: str) -> torch.nn.Module:
    model = tiny_model() if family == "mllama" else tiny(family, torch.float32)
    select_trainable(model, "pretrained", "default")
    return model.train()


def on_ranks(cases: Sequence[tuple[str, str]]) -> list[tuple[list[float], list[int], int]]:
    """Losses, gathers of each step, and modules that are taken as a whole."""
    return [of_family(*case) for case in cases]


def of_family(family: str, policy: str) -> tuple[list[float], list[int], int]:
    gathers, gather = [0], getattr(PartitionedParameterCoordinator, GATHER)

    def counted(*args: Any, **kwargs: Any) -> Any:
        gathers[0] += 1
        return gather(*args, **kwargs)

    ranks = dist.get_world_size()
    model, config = made(family), ds_config(3, 1, 1, ranks)
    batches = attach(model, ranks, MODES[0], samples_of(STEPS[0]), recompute=policy)
    partition_over_all_ranks(model, config, groups_of(ranks))
    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=parameter_groups(model), config=config, mpu=groups_of(ranks)
    )
    losses, of_steps = [], []
    setattr(PartitionedParameterCoordinator, GATHER, counted)
    try:
        with frames_in_portions(1, tiny_config()):
            for patterns in STEPS:
                gathers[0] = 0
                losses.append(step(engine, batches, samples_of(patterns)))
                of_steps.append(gathers[0])
    finally:
        setattr(PartitionedParameterCoordinator, GATHER, gather)
        engine.destroy()
    return losses, of_steps, sum(map(z3_leaf_module, model.modules()))


def step(engine: Any, batches: Any, samples: Sequence[Sample]) -> float:
    layout = batches.collator.layout(samples)
    loss = engine(**batches.prepare(batches.load(samples, layout)).inputs).loss
    engine.backward(loss)
    engine.step()
    whole = loss.detach().clone()
    dist.all_reduce(whole)
    return whole.item()


def test_losses_and_gathers() -> None:
    cases = (("mllama", "layer"), ("llava", "none"))
    for (family, _), (losses, gathers, wholes) in zip(cases, run(2, on_ranks, cases)[0], strict=True):
        assert losses == pytest.approx(losses_of_batches(made(family), STEPS), rel=1e-5)
        assert wholes == (3 if family == "mllama" else 1), "the encoder, and the layers without cross-attention"
        # DeepSpeed knows the order of the modules from the first step, whatever the number of portions.
        assert len(set(gathers[1:])) == 1 and gathers[1] < gathers[0] / 2, gathers


def test_sizes_that_the_config_has_stay() -> None:
    model = made("mllama")
    assert take_as_wholes(model, {"stage": 3, PREFETCH: 7})[PREFETCH] == 7
    assert take_as_wholes(model, {"stage": 3})[LIVE] > 1_000_000_000
