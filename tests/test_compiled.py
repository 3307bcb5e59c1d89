"""Layers under ``torch.compile``: the losses of one rank, with every strategy, recompute policy and ZeRO stage."""

from __future__ import annotations

from collections.abc import Sequence

import deepspeed
import pytest
import torch
import torch.distributed as dist

from ds_lvxattn.runtime import compiled
from ds_lvxattn.runtime.kept_parameters import KeptParameters
from ds_lvxattn.training.loading import loss_factor, parameter_groups, partition_over_all_ranks, select_trainable
from tests.support.distributed import run
from tests.support.parity import losses_of_batches, samples_of
from tests.support.tiny_model import attach, ds_config, groups_of, tiny_config, tiny_model

STEPS = (("tIIta",), ("IItaItII",))
# Backend, ZeRO stage, strategy, schedule and recompute policy, and whether parameters stay whole.
CASES = (
    ("eager", 1, "ring", "ring", "none", False),
    ("eager", 3, "ulysses", "auto", "kv", True),
    ("eager", 3, "lv_xattn", "ring", "layer", False),
)


def made() -> torch.nn.Module:
    # A layer of each kind: what is compiled is a layer.
    model = tiny_model(tiny_config(num_hidden_layers=2, cross_attention_layers=[1]))
    select_trainable(model, "pretrained", "default")
    return model.train()


def on_ranks(cases: Sequence[tuple[str, int, str, str, str, bool]]) -> list[tuple[list[float], int]]:
    """Losses of each case, and the graphs that it compiled."""
    usual, results = compiled.BACKEND, []
    for backend, stage, strategy, schedule, policy, keeps in cases:
        compiled.BACKEND = backend
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        model, config = made(), ds_config(stage, 1, 1, 2)
        mode = (strategy, schedule, "contiguous")
        batches = attach(model, 2, mode, samples_of(STEPS[0]), recompute=policy, compile=True)
        partition_over_all_ranks(model, config, groups_of(2))
        engine, *_ = deepspeed.initialize(
            model=model, model_parameters=parameter_groups(model), config=config, mpu=groups_of(2)
        )
        if keeps:
            KeptParameters(model).keep()
        losses = []
        for patterns in STEPS:
            samples = samples_of(patterns)
            inputs = batches.prepare(batches.load(samples, batches.collator.layout(samples))).inputs
            loss = engine(**inputs).loss
            engine.backward(loss * loss_factor(config, 2))
            engine.step()
            whole = loss.detach().clone()
            dist.all_reduce(whole)
            losses.append(whole.item())
        engine.destroy()
        results.append((losses, torch._dynamo.utils.counters["stats"]["unique_graphs"]))
    compiled.BACKEND = usual
    return results


@pytest.mark.slow
def test_losses_are_those_of_one_rank() -> None:
    want = losses_of_batches(made(), STEPS)
    found = run(2, on_ranks, CASES)[0]
    for case, (losses, graphs) in zip(CASES, found, strict=True):
        assert losses == pytest.approx(want, rel=1e-5), case
        assert graphs, case
    whole, piece_by_piece = (graphs for _, graphs in found[1:])
    assert whole > piece_by_piece, "layers that train are compiled where no module has hooks"
