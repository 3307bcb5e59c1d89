"""Text on every rank and frames divided: exact, with no exchange but of partial results, chosen or forced."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from ds_lvxattn.config import sequence_parallel_config
from ds_lvxattn.errors import ConfigError
from ds_lvxattn.plan.profile import load_profile
from ds_lvxattn.plan.replicated_compute import copying_text_is_faster
from ds_lvxattn.plan.traffic import LayerShape
from tests.support.distributed import run
from tests.support.marks import slow
from tests.support.parity import (
    Gradients,
    gradients_of,
    largest_differences,
    loss_and_gradients,
    norms_in_float64,
    samples_of,
    sum_over_ranks,
)
from tests.support.tiny_families import tiny
from tests.support.tiny_model import attach, loss_of, tiny_model
from tests.support.training import Case, metrics_in, one_rank, train

FAMILIES = ("mllama", "idefics, perceiver, norms", "open_flamingo, immediate", "mplug_owl3, gate")
BATCHES = (("tItIItttaaItaIIIta",), ("tItta",), ("ttatta",), ("IItaItIIItta", "Ita"))


def made(family: str) -> nn.Module:
    """Exact in float64 though partial gradients of a row pass its norms on every rank, and are summed behind them."""
    return norms_in_float64(tiny_model(dtype=torch.float64) if family == "mllama" else tiny(family, torch.float64))


def on_every_rank(families: tuple[str, ...], placement: str, recompute: str) -> list[tuple[float, Gradients]]:
    """Per family and batch, loss and gradients, summed over the ranks (on rank 0)."""
    results = []
    for family in families:
        for patterns in BATCHES:
            samples, model = samples_of(patterns), made(family).train()
            mode = ("auto", "auto", placement)
            batches = attach(model, 2, mode, samples, text="replicated", recompute=recompute)
            layout = batches.layout(samples)
            assert (layout.text.ranks, layout.keys.ranks, layout.copies) == (1, 2, 2)
            plans = batches.plans(layout).values()
            assert {plan.schedule for plan in plans if plan.role == "self"} <= {"auto"}
            batches.parallel.comm.reset()
            loss = loss_of(model, samples, batches, layout)
            loss.backward()
            planned = sum(plan.predicted_bytes.get(plan.strategy, 0) for plan in plans)
            assert batches.parallel.comm.bytes_received == planned, family
            results.append(sum_over_ranks(loss, gradients_of(model)))
    return results


@pytest.mark.parametrize(
    ("families", "placement", "recompute"), [slow(FAMILIES, "contiguous", "none"), (FAMILIES[:1], "striped", "kv")]
)
def test_loss_and_gradients_are_those_of_one_rank(families: tuple[str, ...], placement: str, recompute: str) -> None:
    results = iter(run(2, on_every_rank, families, placement, recompute)[0])
    for family in families:
        for patterns in BATCHES:
            want = loss_and_gradients(made(family), patterns)
            loss, gradient = largest_differences(next(results), want)
            assert loss < 1e-12 and gradient < 1e-11, (family, patterns, loss, gradient)


@pytest.mark.parametrize("stage", [slow(1), 2, slow(3)])
def test_training(stage: int, tmp_path: Path) -> None:
    case = Case(2, 2, stage, ("auto", "auto", "contiguous"), steps=3, micro_batch=1, recompute="kv", text="replicated")
    run(2, train, case, tmp_path)
    losses, norms = zip(*one_rank(case.steps, case.batch, case.micro_batch), strict=True)
    assert metrics_in(tmp_path) == pytest.approx(losses, rel=1e-5)
    assert metrics_in(tmp_path, "grad_norm") == pytest.approx(norms, rel=1e-3)


# The choice


def layers(text: int, frames: int, ranks: int) -> list[tuple[str, LayerShape]]:
    """Of Llama-3.2-11B-Vision."""
    rows, keys = (text // ranks,) * ranks, (1601 * frames // ranks,) * ranks
    cross = LayerShape(1, 32, 8, 128, rows, keys, 2, recompute="kv")
    return [("cross", cross)] * 8 + [("self", LayerShape(1, 32, 8, 128, rows, rows, 2))] * 32


def test_short_text_is_copied_and_long_text_divided() -> None:
    profile = load_profile("h200")
    assert copying_text_is_faster(layers(64, 96, 4), 4.4 * 8e9, 64, profile)
    assert not copying_text_is_faster(layers(16_384, 96, 4), 4.4 * 8e9, 16_384, profile)


def test_what_cannot_be_is_refused() -> None:
    block = {"text": "replicated", "strategy": "ulysses"}
    with pytest.raises(ConfigError, match="'sequence_parallel.text' is 'replicated'.*'ulysses'"):
        sequence_parallel_config({"sequence_parallel_size": 2, "sequence_parallel": block}, 2)
    with pytest.raises(ConfigError, match="literal|choose|text"):
        sequence_parallel_config({"sequence_parallel_size": 2, "sequence_parallel": {"text": "copied"}}, 2)


def keys_in_text() -> None:
    attach(tiny("llava"), 2, ("auto", "auto", "contiguous"), samples_of(("IIta",)), text="replicated")


def test_models_whose_visual_tokens_stand_in_the_text_are_refused() -> None:
    with pytest.raises(AssertionError, match="visual tokens of this model stand in its text"):
        run(2, keys_in_text)
