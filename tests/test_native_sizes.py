"""Qwen2.5-VL with pictures of any size: on several ranks against the model fed by its own processor."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy

from ds_lvxattn.data.sample import IGNORE, FrameSize, Sample
from ds_lvxattn.families.family import ANY_SIZE, FrameLimits
from ds_lvxattn.families.qwen2_5_vl import Qwen25VL
from ds_lvxattn.needle.small_models import SMALL_MODELS
from tests.support.distributed import run
from tests.support.parity import Gradients, gradients_of, largest_differences, sum_over_ranks
from tests.support.tiny_families import tiny
from tests.support.tiny_model import IMAGE_TOKEN, MODES, attach, loss_of, tiny_sample

# Patterns of text, with text between pictures as in every prompt of the model, and heights and widths in pixels.
BATCH = (("ttItIttaItta", ((56, 70), (98, 60), (30, 31))), ("tItaa", ((64, 200),)), ("ttta", ()))


def processor() -> Any:
    return SMALL_MODELS["small-qwen2.5-vl"][1]()


def samples() -> list[Sample]:
    made = []
    for seed, (pattern, sizes) in enumerate(BATCH):
        rng, text = np.random.default_rng(seed), tiny_sample(pattern, seed)
        frames = [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]
        take = functools.partial(_take, frames)
        made.append(
            Sample(text.input_ids, text.labels, len(sizes), take, pattern, [FrameSize(*size) for size in sizes])
        )
    return made


def _take(frames: Sequence[np.ndarray], wanted: Sequence[int]) -> list[np.ndarray]:
    return [frames[index] for index in wanted]


@functools.cache
def in_transformers() -> tuple[float, Gradients]:
    """Loss and gradients of the unmodified model, with all that its own processor gives it, a sample at a time."""
    model: Any = tiny("qwen2.5-vl", torch.float64)
    losses, items = [], 0
    for sample in samples():
        pictures = sample.load_frames(range(sample.num_frames))
        made = processor()(pictures, return_tensors="pt") if pictures else {}
        counts = iter([int(grid.prod()) // 4 for grid in made.get("image_grid_thw", ())])
        ids, labels = [], []
        for token, label in zip(sample.input_ids, sample.labels, strict=True):
            times = next(counts) if token == IMAGE_TOKEN else 1
            ids += [token] * times
            labels += [label] * times
        rows, targets = torch.tensor([ids]), torch.tensor([*labels[1:], IGNORE])
        pixels = {key: x.double() if x.is_floating_point() else x for key, x in made.items()}
        logits = model(input_ids=rows, mm_token_type_ids=(rows == IMAGE_TOKEN).int(), **pixels).logits
        losses.append(cross_entropy(logits[0], targets, ignore_index=IGNORE, reduction="sum"))
        items += int((targets != IGNORE).sum())
    loss = torch.stack(losses).sum() / items
    loss.backward()
    return loss.item(), gradients_of(model)


def in_modes() -> list[tuple[float, Gradients]]:
    results = []
    for mode in MODES:
        model = tiny("qwen2.5-vl", torch.float64).train()
        loss = loss_of(model, samples(), attach(model, dist.get_world_size(), mode, samples(), recompute="layer"))
        loss.backward()
        results.append(sum_over_ranks(loss, gradients_of(model)))
    return results


def test_loss_and_gradients_are_those_of_the_model_with_its_own_processor() -> None:
    for mode, got in zip(MODES, run(2, in_modes)[0], strict=True):
        loss, gradient = largest_differences(got, in_transformers())
        assert loss < 1e-12 and gradient < 1e-11, (mode, loss, gradient)


@settings(max_examples=20)
@given(st.integers(10, 300), st.integers(10, 300))
def test_a_picture_has_the_tokens_that_its_size_tells(height: int, width: int) -> None:
    model: Any = tiny("qwen2.5-vl")
    family, size = Qwen25VL(model.config), FrameSize(height, width)
    shape = family.shape_of(size, processor(), ANY_SIZE)
    frame = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    ours, theirs = family.pixels([frame], [shape], processor()), processor()([frame], return_tensors="pt")
    assert torch.equal(ours["image_grid_thw"][0], theirs["image_grid_thw"])
    assert torch.equal(ours["pixel_values"][0], theirs["pixel_values"])
    assert shape.encoder_tokens == len(theirs["pixel_values"]) == 4 * shape.tokens


def test_a_frame_of_a_video_is_smaller_unless_asked_otherwise() -> None:
    model: Any = tiny("qwen2.5-vl")
    family, size = Qwen25VL(model.config), FrameSize(720, 1280, video=True)
    assert family.shape_of(size, processor(), ANY_SIZE).encoder_tokens * 7**2 <= 280**2
    assert family.shape_of(size, processor(), FrameLimits(frame_pixels=10**6)).encoder_tokens * 7**2 > 280**2
