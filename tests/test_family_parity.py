"""Each model family on several ranks against its unmodified model with its own dense mask on one."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
import torch.distributed as dist

from ds_lvxattn.families import family_of
from tests.support.distributed import run
from tests.support.marks import slow_but
from tests.support.parity import (
    BATCHES,
    Gradients,
    batches_of,
    gradients_of,
    largest_differences,
    limits_of,
    losses_of_steps,
    on_one_rank,
    samples_of,
    sum_over_ranks,
)
from tests.support.tiny_families import FAMILIES, tiny
from tests.support.tiny_model import MODES, attach, loss_of

ZERO3 = (
    "idefics, perceiver, norms",
    "open_flamingo, immediate",
    "llava",
    "qwen-vl",
    "qwen2.5-vl",
    "qwen3-vl-moe",
    *(family for family in FAMILIES if family.endswith("omni")),
    "qwen3.5",
    "qwen3.5-moe",
    "blip2",
    "idefics2",
    "instructblip",
    "aria",
    "gemma3",
    "paligemma",
    "mplug_owl3, gate",
    "mplug_owl3, fused",
)


def roles_of(family: str) -> set[str]:
    model = tiny(family)
    return {layer.role for layer in family_of(model).attention_layers(model).values()}


def in_modes(
    family: str, batches: Sequence[tuple[str, ...]], dtype: torch.dtype, recompute: str
) -> list[tuple[float, Gradients]]:
    """Per batch, in the modes in turn, the loss and the gradients, summed over the ranks (on rank 0)."""
    results = []
    for number, patterns in enumerate(batches):
        samples, model = samples_of(patterns), tiny(family, dtype).train()
        mode = MODES[number % len(MODES)]
        loss = loss_of(model, samples, attach(model, dist.get_world_size(), mode, samples, recompute=recompute))
        loss.backward()
        results.append(sum_over_ranks(loss, gradients_of(model)))
    return results


def check(family: str, ranks: int, batches: Sequence[tuple[str, ...]]) -> None:
    results = run(ranks, in_modes, family, batches, torch.float64, "none")[0]
    for number, (patterns, got) in enumerate(zip(batches, results, strict=True)):
        loss, gradient = largest_differences(got, on_one_rank(family, patterns, torch.float64))
        limits = limits_of(family)
        assert loss < limits[0] and gradient < limits[1], (patterns, MODES[number % len(MODES)], loss, gradient)


# One of each way that frames come in.
QUICK = ("idefics, perceiver, norms", "open_flamingo, immediate", "llava", "qwen2.5-vl", "gemma3", "mplug_owl3, gate")


@pytest.mark.parametrize("family", slow_but(FAMILIES, *QUICK))
def test_loss_and_gradients_on_two_ranks(family: str) -> None:
    # The first batch has all that is special.
    first, *others = batches_of(family)
    check(family, 2, (*[first] * (len(MODES) - len(others)), *others))


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_on_four_ranks(family: str) -> None:
    batches = batches_of(family)
    check(family, 4, (batches[0], batches[2], batches[4]))


@pytest.mark.slow
@pytest.mark.parametrize("family", ZERO3)
def test_loss_and_gradients_in_float32_with_recomputation(family: str) -> None:
    batches = batches_of(family)
    policy = "kv" if "cross" in roles_of(family) else "layer"
    for patterns, got in zip(batches, run(2, in_modes, family, batches, torch.float32, policy)[0], strict=True):
        # One rank's own rounding in float32 differs from machine to machine.
        loss, gradient = largest_differences(got, on_one_rank(family, patterns, torch.float64))
        assert loss < 1e-5 and gradient < 1e-4, (patterns, loss, gradient)


STEPS = 3


def train(family: str, ranks: int) -> list[float]:
    return losses_of_steps(tiny(family), samples_of(BATCHES[4]), ranks, STEPS)


@pytest.mark.slow
@pytest.mark.parametrize("family", ZERO3)
def test_losses_under_zero3(family: str) -> None:
    want, got = train(family, 1), run(2, train, family, 2)[0]
    assert want[-1] < want[0]
    assert got == pytest.approx(want, rel=1e-4)
