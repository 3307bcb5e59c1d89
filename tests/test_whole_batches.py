"""Small batches that every rank computes whole: exact, without exchange, and chosen where that is predicted faster."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_lvxattn.plan.planner import Planner
from ds_lvxattn.plan.profile import load_profile
from ds_lvxattn.plan.replicated_compute import replicating_is_faster
from ds_lvxattn.plan.traffic import LayerShape
from tests.support.distributed import run
from tests.support.parity import (
    Gradients,
    batches_of,
    gradients_of,
    largest_differences,
    limits_of,
    on_one_rank,
    samples_of,
    sum_over_ranks,
)
from tests.support.tiny_families import FAMILIES, tiny
from tests.support.tiny_model import attach, loss_of
from tests.support.training import Case, metrics_in, one_rank, train

AUTO = ("auto", "auto", "contiguous")


def whole(families: tuple[str, ...]) -> list[tuple[tuple[float, Gradients], int]]:
    """Per family, loss and gradients of one batch, summed over the ranks (on rank 0), and bytes exchanged."""
    results = []
    for family in families:
        samples, model = samples_of(batches_of(family)[4]), tiny(family, torch.float64).train()
        batches = attach(model, 2, AUTO, samples)
        with mock.patch.object(Planner, "undivided", return_value=True):
            layout = batches.layout(samples)
        assert layout.text.ranks == 1
        batches.parallel.comm.reset()
        loss = loss_of(model, samples, batches, layout)
        loss.backward()
        results.append((sum_over_ranks(loss, gradients_of(model)), batches.parallel.comm.bytes_received))
    return results


@pytest.mark.slow
def test_loss_and_gradients_are_those_of_one_rank() -> None:
    for family, (got, received) in zip(FAMILIES, run(2, whole, tuple(FAMILIES))[0], strict=True):
        patterns = batches_of(family)[4]
        loss, gradient = largest_differences(got, on_one_rank(family, patterns, torch.float64))
        limits = limits_of(family)
        assert loss < limits[0] and gradient < limits[1] and not received, (family, loss, gradient, received)


def train_with_small_batches_whole(case: Case, folder: Path) -> None:
    """The loop, where batches of up to 8 text tokens count as small."""
    with mock.patch.object(Planner, "undivided", lambda self, sizes: sizes.shape_class[1] <= 3):
        train(case, folder)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [3])
def test_training_with_some_batches_whole(stage: int, tmp_path: Path) -> None:
    case = Case(2, 2, stage, AUTO, steps=8, micro_batch=1, recompute="kv")
    run(2, train_with_small_batches_whole, case, tmp_path)
    losses, norms = zip(*one_rank(case.steps, case.batch, case.micro_batch), strict=True)
    assert metrics_in(tmp_path) == pytest.approx(losses, rel=1e-5)
    assert metrics_in(tmp_path, "grad_norm") == pytest.approx(norms, rel=1e-3)
    received = metrics_in(tmp_path, "comm_bytes")
    assert min(received) == 0 < max(received)


def llama_11b(text: int, frames: int) -> tuple[list[LayerShape], float]:
    """Sizes of a batch of Llama-3.2-11B-Vision over two ranks, and its other operations, encoder frozen."""
    rows, keys = (text // 2, text // 2), (1601 * frames // 2, 1601 * frames // 2)
    cross = LayerShape(1, 32, 8, 128, rows, keys, 2, None, None, "kv")
    own = LayerShape(1, 32, 8, 128, rows, rows, 2)
    return [cross] * 8 + [own] * 32, 6 * 8e9 * text + 2 * 0.9e9 * 4 * 1608 * frames


@given(
    text=st.sampled_from([16, 64, 256, 1024]), frames=st.integers(0, 4), others=st.floats(0, 1e12),
    more=st.tuples(st.floats(0, 1e15), st.floats(0, 1e9)), pixels=st.floats(0, 1e8),
)  # fmt: skip
@settings(max_examples=100, deadline=None)
def test_what_encoding_costs_never_speaks_for_whole_batches(
    text: int, frames: int, others: float, more: tuple[float, float], pixels: float
) -> None:
    layers, operations = llama_11b(text, frames)
    profile = load_profile("h200")
    with_more = replicating_is_faster(layers, operations + others + more[0], profile, pixels + more[1])
    assert not with_more or replicating_is_faster(layers, operations + others, profile, pixels)


def test_pixels_that_a_loader_cannot_make_in_time_are_divided() -> None:
    layers, operations = llama_11b(64, 1)
    profile = load_profile("h200")
    assert replicating_is_faster(layers, operations, profile, pixels=4 * 560**2)
    assert not replicating_is_faster(layers, operations, profile, pixels=20 * 4 * 560**2)


@pytest.mark.parametrize(
    ("profile", "text", "frames", "want"),
    [("h200", 64, 1, True), ("h200", 64, 0, True), ("h200", 4096, 64, False), ("h200", 64, 512, False),
     ("h200", 8192, 0, False), ("cpu", 64, 1, False)],
)  # fmt: skip
def test_small_batches_are_told_from_large_ones(profile: str, text: int, frames: int, want: bool) -> None:
    assert replicating_is_faster(*llama_11b(text, frames), load_profile(profile)) == want
