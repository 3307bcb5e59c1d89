"""Llama 3.2 Vision on several ranks against the unmodified transformers model with its dense mask on one."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers.models.mllama.processing_mllama import (
    convert_sparse_cross_attention_mask_to_dense,
    get_cross_attention_token_mask,
)

from ds_lvxattn.families.mllama import Mllama
from ds_lvxattn.plan.memory import POLICIES
from tests.support.distributed import run
from tests.support.parity import Gradients, gradients_of, largest_differences, samples_of, sum_over_ranks
from tests.support.tiny_model import (
    IMAGE_TOKEN,
    MODES,
    PATTERNS,
    attach,
    frames_in_portions,
    loss_of,
    loss_of_each_alone,
    tiny_batches,
    tiny_config,
    tiny_model,
    tiny_processor,
)

# Micro-batches, as patterns of ``tiny_sample``. Those of BATCHES start with an image where samples are of unequal
# frames: text ahead of the first image sees the padding of the batch in transformers, see ``loss_of_each_alone``.
BATCHES = {
    **{name: (pattern,) for name, pattern in PATTERNS.items()},
    "unequal samples": ("IItaItIIItta", "Ita", "IIttaIItaIIItaI"),
    "equal frames, text first": ("tIItIa", "ttIIItaaa"),
}
UNEQUAL_TEXT_FIRST = ("tItIIta", "ttIa", "tta")


@functools.cache
def on_one_rank(
    patterns: tuple[str, ...], dtype: torch.dtype, tiles: int, loss: Callable[..., Tensor]
) -> tuple[float, Gradients]:
    """Loss and gradients of the unmodified model."""
    model = tiny_model(tiny_config(tiles), dtype)
    value = loss(model, samples_of(patterns))
    value.backward()
    return value.item(), gradients_of(model)


def in_all_modes(
    batches: Sequence[tuple[str, ...]], dtype: torch.dtype, tiles: int = 1
) -> list[list[tuple[float, Gradients]]]:
    """Per batch and mode, the loss and the gradients, summed over the ranks of the group (on rank 0)."""
    results = []
    for patterns in batches:
        samples = samples_of(patterns)
        results.append([])
        for mode in MODES:
            model = tiny_model(tiny_config(tiles), dtype)
            loss = loss_of(model, samples, attach(model, dist.get_world_size(), mode, samples))
            loss.backward()
            results[-1].append(sum_over_ranks(loss, gradients_of(model)))
    return results


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_loss_and_gradients_in_float64(ranks: int) -> None:
    batches = tuple(BATCHES.values())
    if ranks == 4:
        batches = tuple(BATCHES[name] for name in ("several images", "short clip", "unequal samples"))
    for patterns, results in zip(batches, run(ranks, in_all_modes, batches, torch.float64)[0], strict=True):
        want = on_one_rank(patterns, torch.float64, 1, loss_of)
        for mode, got in zip(MODES, results, strict=True):
            loss, gradient = largest_differences(got, want)
            assert loss < 1e-12 and gradient < 1e-11, (patterns, mode, loss, gradient)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_loss_in_float32(ranks: int) -> None:
    batches = (BATCHES["several images"], BATCHES["unequal samples"])
    for patterns, results in zip(batches, run(ranks, in_all_modes, batches, torch.float32)[0], strict=True):
        want = on_one_rank(patterns, torch.float32, 1, loss_of)
        for mode, got in zip(MODES, results, strict=True):
            loss, gradient = largest_differences(got, want)
            assert loss < 1e-5 and gradient < 1e-4, (patterns, mode, loss, gradient)


def test_a_batch_gives_each_sample_what_it_gives_alone() -> None:
    want = on_one_rank(UNEQUAL_TEXT_FIRST, torch.float64, 1, loss_of_each_alone)
    for mode, got in zip(MODES, run(2, in_all_modes, (UNEQUAL_TEXT_FIRST,), torch.float64)[0][0], strict=True):
        loss, gradient = largest_differences(got, want)
        assert loss < 1e-12 and gradient < 1e-11, (mode, loss, gradient)


def by_heads(patterns: tuple[str, ...]) -> list[tuple[tuple[float, Gradients], int, int]]:
    """Loss and gradients by ``ulysses`` under every policy, and the bytes received and planned."""
    samples, results = samples_of(patterns), []
    for recompute in POLICIES:
        model = tiny_model(tiny_config(), torch.float64).train()
        batches = attach(model, 3, ("ulysses", "auto", "striped"), samples, recompute=recompute)
        comm, plan = batches.parallel.comm, [layer for layer in batches.planner.plan if layer.role != "local"]
        comm.reset()
        loss = loss_of(model, samples, batches)
        loss.backward()
        planned = sum(layer.predicted_bytes["ulysses"] for layer in plan)
        results.append((sum_over_ranks(loss, gradients_of(model)), comm.bytes_received, planned))
    return results


def test_four_heads_on_three_ranks() -> None:
    """``ulysses``, whose ranks get two heads, one and one."""
    patterns = BATCHES["several images"]
    want = on_one_rank(patterns, torch.float64, 1, loss_of)
    for rank, results in enumerate(run(3, by_heads, patterns)):
        for policy, (got, received, planned) in zip(POLICIES, results, strict=True):
            assert 0 < received <= planned, policy  # planned for the rank that receives most
            if rank == 0:
                loss, gradient = largest_differences(got, want)
                assert loss < 1e-12 and gradient < 1e-11, (policy, loss, gradient)


def test_padding_tiles_are_dropped() -> None:
    """Two tiles a frame, of which a frame fills one. Every row sees a frame: a row that sees none would see the
    padding tiles in transformers, and the frames here."""
    patterns = ("ItIItttaaItaI", "IIta")
    want = on_one_rank(patterns, torch.float64, 2, loss_of)
    for mode, got in zip(MODES, run(2, in_all_modes, (patterns,), torch.float64, 2)[0][0], strict=True):
        loss, gradient = largest_differences(got, want)
        assert loss < 1e-12 and gradient < 1e-11, (mode, loss, gradient)


def in_portions(patterns: tuple[str, ...]) -> list[tuple[float, Gradients]]:
    with frames_in_portions(2, tiny_config(tiles=2)):
        return in_all_modes((patterns,), torch.float64, 2)[0]


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_frames_are_encoded_in_portions(ranks: int) -> None:
    """Up to three portions; on four ranks one has fewer frames than portions."""
    patterns = ("ItIItttaaItaIII", "IIIta")
    want = on_one_rank(patterns, torch.float64, 2, loss_of)
    for mode, got in zip(MODES, run(ranks, in_portions, patterns)[0], strict=True):
        loss, gradient = largest_differences(got, want)
        assert loss < 1e-12 and gradient < 1e-11, (mode, loss, gradient)


# The one-rank path itself


def test_the_one_rank_inputs_are_those_of_transformers() -> None:
    samples = samples_of(BATCHES["unequal samples"])
    batches = tiny_batches(tiny_model())
    loaded = batches.load(samples)
    inputs = batches.prepare(loaded).inputs
    theirs = tiny_processor()([sample.load_frames(range(sample.num_frames)) for sample in samples], return_tensors="pt")
    masks = [get_cross_attention_token_mask(sample.input_ids, IMAGE_TOKEN) for sample in samples]
    length = inputs["input_ids"].shape[1]
    dense = convert_sparse_cross_attention_mask_to_dense(masks, [[1] * len(mask) for mask in masks], 1, length)

    frames = torch.tensor(
        [[n < sample.num_frames for n in range(max(s.num_frames for s in samples))] for sample in samples]
    )
    for key in ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask"):
        torch.testing.assert_close(inputs[key][frames], theirs[key][frames].to(inputs[key].dtype))
    text = torch.tensor([[n < len(sample.input_ids) for n in range(length)] for sample in samples])
    torch.testing.assert_close(inputs["cross_attention_mask"][text], torch.from_numpy(dense)[text])


@given(st.lists(st.sampled_from([IMAGE_TOKEN, IMAGE_TOKEN, 4, 5]), max_size=30))
def test_frame_ranges_are_the_mask_of_transformers(input_ids: list[int]) -> None:
    mask = get_cross_attention_token_mask(input_ids, IMAGE_TOKEN)
    [dense] = convert_sparse_cross_attention_mask_to_dense([mask], [[1] * len(mask)], 1, len(input_ids))
    ours = np.zeros(dense.shape, dtype=dense.dtype)
    for token, (first, last) in enumerate(Mllama(tiny_config()).frame_ranges(input_ids, IMAGE_TOKEN)):
        ours[token, first:last] = 1
    np.testing.assert_array_equal(ours, dense)
