"""Feed-forward parts and logits by tiles: the losses and gradients of whole rows, in every ZeRO stage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import deepspeed
import pytest
import torch
import torch.distributed as dist
from torch import nn

from ds_lvxattn.batches.sequence_parallel import tile_rows
from ds_lvxattn.config import sequence_parallel_config
from ds_lvxattn.errors import ConfigError
from ds_lvxattn.families import family_of
from ds_lvxattn.plan.layer_sizes import LayerSizes
from ds_lvxattn.plan.memory import kept_bytes, logits_bytes
from ds_lvxattn.plan.tiling import FEED_FORWARD_VALUES, rows_of_tile
from ds_lvxattn.runtime.tiled import TiledLogits, first_choices, in_tiles
from ds_lvxattn.training.loading import loss_factor, parameter_groups, partition_over_all_ranks, select_trainable
from tests.support.distributed import run
from tests.support.parity import losses_of_batches, samples_of
from tests.support.tiny_families import tiny
from tests.support.tiny_model import MODES, attach, ds_config, groups_of, tiny_batches, tiny_model

# Uneven rows, then fewer rows than tiles on a rank and one on the other.
STEPS = (("tItIItttaaItaIIIta",), ("Ita",), ("IItaItIIItta",), ("tItIItttaaItaIIIta",))
TILES = {"tiled_mlp": 3, "tiled_logits": 4}
# Family, ZeRO stage, what trains, recompute policy, settings.
CASES: tuple[tuple[str, int, Any, str, dict[str, Any]], ...] = (
    ("mllama", 2, "default", "kv", TILES),
    ("mllama", 3, "default", "layer", TILES),
    ("mllama", 3, ["*.mlp.*", "*lm_head*"], "kv", {"tiled_mlp": "auto", "tiled_logits": "auto"}),
    ("idefics", 3, "default", "none", TILES),
)


def made(family: str, trainable: Any) -> nn.Module:
    model = tiny_model() if family == "mllama" else tiny(family, torch.float32)
    select_trainable(model, "pretrained", trainable)
    return model.train()


def on_ranks(cases: Sequence[tuple[str, int, Any, str, dict[str, Any]]]) -> list[list[float]]:
    """Losses of each case."""
    results, ranks = [], dist.get_world_size()
    for family, stage, trainable, policy, tiles in cases:
        model, config = made(family, trainable), ds_config(stage, 1, 1, ranks)
        batches = attach(model, ranks, MODES[0], samples_of(STEPS[0]), recompute=policy, text="divided", **tiles)
        partition_over_all_ranks(model, config, groups_of(ranks))
        engine, *_ = deepspeed.initialize(
            model=model, model_parameters=parameter_groups(model), config=config, mpu=groups_of(ranks)
        )
        losses = []
        for patterns in STEPS:
            samples = samples_of(patterns)
            output = engine(**batches.prepare(batches.load(samples, batches.collator.layout(samples))).inputs)
            assert output.logits is None
            engine.backward(output.loss * loss_factor(config, ranks))
            engine.step()
            whole = output.loss.detach().clone()
            dist.all_reduce(whole)
            losses.append(whole.item())
        engine.destroy()
        results.append(losses)
    return results


@pytest.mark.slow
def test_losses_are_those_of_one_rank() -> None:
    for case, losses in zip(CASES, run(2, on_ranks, CASES)[0], strict=True):
        want = losses_of_batches(made(case[0], case[2]), STEPS)
        assert losses == pytest.approx(want, rel=1e-5), case


def gradients(model: nn.Module, tiles: dict[str, Any]) -> list[torch.Tensor]:
    """Of a step of the unattached model."""
    config = sequence_parallel_config({"sequence_parallel": tiles}, 1)
    tile_rows(model, family_of(model).attention_layers(model), config)
    torch.manual_seed(0)
    loss = model(**tiny_batches(model).prepare(samples_of(("tItIItttaaItaIIIta",))).inputs).loss
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


def test_one_rank_with_dropout_draws_the_same_again() -> None:
    """As many tiles as rows, or another number, draw differently; so each row's gradients are compared by hand."""
    part = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 4))
    x = torch.randn(2, 5, 4, requires_grad=True)
    torch.manual_seed(3)
    out = in_tiles(part, part, 3, x)
    got = torch.autograd.grad(out.square().sum(), [x, *part.parameters()])
    torch.manual_seed(3)
    rows = x.flatten(0, 1)
    again = torch.cat([part(rows[first : first + 3][None])[0] for first in range(0, 10, 3)])
    torch.testing.assert_close(out.flatten(0, 1), again)
    torch.testing.assert_close(got, torch.autograd.grad(again.square().sum(), [x, *part.parameters()]))


@pytest.mark.parametrize("family", ["mllama", "qwen2.5-vl", "blip2", "mplug_owl3, fused"])
def test_gradients_of_one_rank(family: str) -> None:
    tiles = {"tiled_logits": 4} if family == "blip2" else TILES
    torch.testing.assert_close(gradients(made(family, "all"), tiles), gradients(made(family, "all"), {}))


def test_evaluation_has_the_first_choices_and_whole_logits_where_they_are_asked_for() -> None:
    model = made("mllama", "all").eval()
    inputs = tiny_batches(model).prepare(samples_of(STEPS[0])).inputs
    tiled = TiledLogits(model, 4)
    with torch.no_grad():
        output = model(**inputs)
        with tiled.whole_logits():
            whole = model(**inputs)
        assert model(**{key: x for key, x in inputs.items() if "labels" not in key}).logits is not None
    assert output.logits is None and output.loss == pytest.approx(whole.loss.item(), rel=1e-6)
    assert first_choices(output).equal(first_choices(whole)) and first_choices(whole).equal(whole.logits.argmax(-1))


@pytest.mark.parametrize(
    ("family", "key", "words"),
    [
        ("blip2", "tiled_mlp", "OPTDecoderLayer has no feed-forward module"),
        ("aria", "tiled_mlp", "AriaTextDecoderLayer sends its rows to experts"),
        ("open_flamingo, immediate", "tiled_logits", "does not say which its output layer is"),
    ],
)
def test_what_cannot_be_tiled_is_refused_by_name(family: str, key: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        gradients(made(family, "all"), {key: "auto"})


def test_logits_that_a_model_changes_are_refused() -> None:
    model = made("text only", "all")
    model.config.final_logit_softcapping = 30.0
    with pytest.raises(ConfigError, match="final_logit_softcapping"):
        TiledLogits(model, 4)
    del model.config.final_logit_softcapping
    TiledLogits(model, 4)
    model.get_output_embeddings().register_forward_hook(lambda module, args, output: 2 * output)
    with pytest.raises(ConfigError, match="changes its logits ahead of the loss"):
        model(**tiny_batches(model).prepare(samples_of(("ttatta",))).inputs)


def test_a_tuple_and_another_output_layer_are_refused() -> None:
    model = made("text only", "all")
    TiledLogits(model, 4)
    inputs = tiny_batches(model).prepare(samples_of(("ttatta",))).inputs
    with pytest.raises(ConfigError, match="return_dict=False"):
        model(**inputs, return_dict=False)
    model.resize_token_embeddings(200, mean_resizing=False)  # type: ignore[operator]
    with pytest.raises(ConfigError, match="had its output layer replaced"):
        model(**inputs)


@pytest.mark.parametrize("value", [0, -1, 1.5, True, "many"])
def test_values(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"sequence_parallel\.tiled_mlp.*choose 'auto', null or a number >= 1"):
        sequence_parallel_config({"sequence_parallel": {"tiled_mlp": value}}, 1)


def test_the_memory_plan_counts_what_tiles_save() -> None:
    sizes = LayerSizes(
        "self", "local", "auto", 2, 1, 100_000, 100_000, 100_000, 100_000, 100_000, 8, 8, 64, 512, 2048, 2
    )
    tiled = replace(sizes, tiled_mlp="auto")
    assert tiled.feed_forward_tile * 2048 == FEED_FORWARD_VALUES
    assert kept_bytes(sizes, "none") - kept_bytes(tiled, "none") == 200_000 * 4 * 2048 * 2
    assert replace(tiled, rows=16, tiled_mlp="auto").feed_forward_tile == 32  # of two sequences
    assert logits_bytes(1000, 128_000, 2, 10) * 10 == logits_bytes(1000, 128_000, 2, None) == 1000 * 128_000 * 10
    assert [rows_of_tile(rows, 1, 3, 0) for rows in (0, 1, 7)] == [1, 1, 3]
