"""Frames of several tiles and sizes: Llama 3.2 Vision on several ranks against the model fed by its own processor."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil
from transformers.models.mllama.processing_mllama import (
    convert_sparse_cross_attention_mask_to_dense,
    get_cross_attention_token_mask,
)

from ds_lvxattn.batches.layout import lay_out
from ds_lvxattn.batches.prepare import Batches
from ds_lvxattn.data.sample import IGNORE, FrameShape, FrameSize, Sample, SampleError
from ds_lvxattn.errors import ConfigError
from ds_lvxattn.families.family import ANY_SIZE, FrameLimits
from ds_lvxattn.families.mllama import Mllama
from ds_lvxattn.needle.small_models import SIZE, SQUARE, small_model
from tests.support.distributed import run
from tests.support.marks import slow
from tests.support.parity import Gradients, gradients_of, largest_differences, sum_over_ranks
from tests.support.tiny_model import (
    CPU,
    IMAGE_TOKEN,
    MODES,
    attach,
    frames_in_portions,
    tiny_config,
    tiny_model,
    tiny_sample,
)

TILES = 4
# Heights and widths in tiles: every aspect ratio that the processor knows, and pictures that fill no tile.
RATIOS = ((1, 1), (1, 2), (1, 3), (1, 4), (2, 1), (2, 2), (3, 1), (4, 1), (0.4, 0.7), (1.7, 0.3))
# Samples: pattern of the text, and the sizes of its pictures. Text stands ahead of the first image, as in every
# conversation; in the last batch all samples have equally many, as transformers pads a batch with blank images.
BATCHES = (
    (("ttItIItttaaItaIIIta", RATIOS[:7]),),
    (("IIIIIIIttataa", (RATIOS[5],) * 7),),
    (("ttIta", (RATIOS[8],)),),
    (("tIItta", RATIOS[3:5]), ("ttIttIa", RATIOS[8:]), ("IIta", RATIOS[:2])),
)


def processor(**changes: Any) -> MllamaImageProcessorPil:
    return MllamaImageProcessorPil(
        size=SQUARE, max_image_tiles=TILES, image_mean=[0.5] * 3, image_std=[0.5] * 3, **changes
    )


def sample_of(pattern: str, ratios: Sequence[tuple[float, float]], seed: int = 0, video: bool = False) -> Sample:
    """A sample with pictures of such heights and widths, in tiles."""
    rng = np.random.default_rng([seed, len(pattern)])
    sizes = [FrameSize(round(height * SIZE), round(width * SIZE), video) for height, width in ratios]
    frames = [rng.integers(0, 256, (size.height, size.width, 3), dtype=np.uint8) for size in sizes]
    text = tiny_sample(pattern, seed)
    return Sample(text.input_ids, text.labels, len(frames), functools.partial(_take, frames), pattern, sizes)


def _take(frames: Sequence[np.ndarray], wanted: Sequence[int]) -> list[np.ndarray]:
    return [frames[index] for index in wanted]


def samples_of(batch: Sequence[tuple[str, Sequence[tuple[float, float]]]]) -> list[Sample]:
    return [sample_of(*one, seed=seed) for seed, one in enumerate(batch)]


def model_of(dtype: torch.dtype = torch.float64) -> Any:
    return tiny_model(tiny_config(TILES), dtype)


def summed_loss(logits: Tensor, labels: Tensor, items: int) -> Tensor:
    return cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="sum") / items


@functools.cache
def in_transformers(number: int) -> tuple[float, Gradients]:
    """Loss and gradients of the unmodified model, with all that its own processor gives it and nothing of this
    package."""
    samples, model = samples_of(BATCHES[number]), model_of()
    pictures = [sample.load_frames(range(sample.num_frames)) for sample in samples]
    made = processor()(pictures, return_tensors="pt")
    length = max(len(sample.input_ids) for sample in samples)
    masks = [get_cross_attention_token_mask(sample.input_ids, IMAGE_TOKEN) for sample in samples]
    dense = convert_sparse_cross_attention_mask_to_dense(masks, made["num_tiles"], TILES, length)
    ids, labels = np.zeros((len(samples), length), dtype=np.int64), np.full((len(samples), length), IGNORE)
    for row, sample in enumerate(samples):
        ids[row, : len(sample.input_ids)] = sample.input_ids
        labels[row, : len(sample.input_ids) - 1] = sample.labels[1:]
    logits = model(
        input_ids=torch.from_numpy(ids), pixel_values=made["pixel_values"].double(),
        aspect_ratio_ids=made["aspect_ratio_ids"], aspect_ratio_mask=made["aspect_ratio_mask"],
        cross_attention_mask=torch.from_numpy(dense), use_cache=False,
    ).logits  # fmt: skip
    loss = summed_loss(logits, torch.from_numpy(labels), int((labels != IGNORE).sum()))
    loss.backward()
    return loss.item(), gradients_of(model)


def loss_of(model: Any, samples: Sequence[Sample], batches: Batches) -> Tensor:
    inputs = batches.prepare(samples).inputs
    labels, items = inputs.pop("shift_labels"), inputs.pop("num_items_in_batch")
    del inputs["labels"]
    return summed_loss(model(**inputs).logits, labels, items)


def attached(model: Any, mode: tuple[str, str, str], samples: Sequence[Sample], **block: Any) -> Batches:
    parallel = attach(model, dist.get_world_size(), mode, samples, **block).parallel
    return Batches(model, processor(), 0, IMAGE_TOKEN, CPU, next(model.parameters()).dtype, parallel)


def in_modes(modes: Sequence[tuple[str, str, str]], portions: int) -> list[list[tuple[float, Gradients]]]:
    """Per batch and mode, the loss and the gradients, summed over the ranks of the group (on rank 0)."""
    results: list[list[tuple[float, Gradients]]] = []
    with frames_in_portions(portions, tiny_config(TILES)):
        for batch in BATCHES:
            samples = samples_of(batch)
            results.append([])
            for mode in modes:
                model = model_of().train()
                loss = loss_of(model, samples, attached(model, mode, samples, recompute="kv"))
                loss.backward()
                results[-1].append(sum_over_ranks(loss, gradients_of(model)))
    return results


@pytest.mark.parametrize(
    ("ranks", "modes", "portions"), [(2, MODES[:1], 2), slow(2, MODES[1:], 2), slow(4, MODES[:2], 100)]
)
def test_loss_and_gradients_are_those_of_the_model_with_its_own_processor(
    ranks: int, modes: Sequence[tuple[str, str, str]], portions: int
) -> None:
    for number, results in enumerate(run(ranks, in_modes, modes, portions)[0]):
        want = in_transformers(number)
        for mode, got in zip(modes, results, strict=True):
            loss, gradient = largest_differences(got, want)
            assert loss < 1e-12 and gradient < 1e-11, (number, mode, loss, gradient)


def test_the_path_without_exchange_is_exact_too() -> None:
    for number in range(len(BATCHES)):
        samples, model = samples_of(BATCHES[number]), model_of()
        loss = loss_of(model, samples, Batches(model, processor(), 0, IMAGE_TOKEN, CPU, torch.float64, None))
        loss.backward()
        differences = largest_differences((loss.item(), gradients_of(model)), in_transformers(number))
        assert max(differences) < 1e-11, number


# Which tiles a picture has


@settings(max_examples=30)
@given(st.integers(1, 300), st.integers(1, 300), st.sampled_from([None, 1, 2, 3, 4]))
def test_a_picture_has_the_tiles_that_its_size_tells(height: int, width: int, limit: int | None) -> None:
    family, size = Mllama(tiny_config(TILES)), FrameSize(height, width)
    shape = family.shape_of(size, processor(), FrameLimits(image_tiles=limit))
    assert shape.grid[0] * shape.grid[1] <= (limit or TILES)
    frame = np.zeros((height, width, 3), dtype=np.uint8)
    pixels = family.pixels([frame], [shape], processor())
    assert pixels["aspect_ratio_mask"].sum() * 5 == shape.tokens == TILES * 5 - shape.padding
    if limit in (None, TILES):
        theirs = processor()([[frame]], return_tensors="pt")
        assert torch.equal(pixels["aspect_ratio_ids"], theirs["aspect_ratio_ids"])
        assert torch.equal(pixels["pixel_values"], theirs["pixel_values"][:, :, : shape.tokens // 5])


def test_a_limit_of_tiles_that_no_export_can_say_is_refused() -> None:
    family = Mllama(tiny_config(TILES))
    family.refuse_unheeded(processor(), FrameLimits(image_tiles=TILES))
    with pytest.raises(ConfigError, match=r"'finetuning.image_tiles' is 2, .* up to 4 .*within 28 x 28 pixels"):
        Batches(tiny_model(tiny_config(TILES)), processor(), 0, 1, torch.device("cpu"), torch.float32, None,
                FrameLimits(image_tiles=2))  # fmt: skip
    # What the message says to do: such an image has one tile, trained and served.
    shape = family.shape_of(FrameSize(SIZE, SIZE), processor(), ANY_SIZE)
    assert shape.grid == (1, 1)


@pytest.mark.parametrize(
    ("name", "limits"),
    [
        ("small-llava", {"image_tiles": 2}),
        ("small-idefics3", {"frame_tiles": 4}),
        ("small-qwen2.5-vl", {"frame_padding": True}),
    ],
)
def test_a_limit_that_a_family_does_not_follow_is_refused(name: str, limits: dict[str, int]) -> None:
    model, images = small_model(name, 0)
    [(key, value)] = limits.items()
    cpu = torch.device("cpu")
    with pytest.raises(ConfigError, match=f"'finetuning.{key}' is {value}, which .* does not follow"):
        Batches(model, images, 0, 1, cpu, torch.float32, None, FrameLimits(**limits))
    Batches(model, images, 0, 1, cpu, torch.float32, None, FrameLimits(frame_tiles=None))


def test_a_frame_of_a_video_has_one_tile_without_padding() -> None:
    family, size = Mllama(tiny_config(TILES)), FrameSize(3 * SIZE, 2 * SIZE, video=True)
    assert family.shape_of(size, processor(), ANY_SIZE) == FrameShape(5, 32, (1, 1))
    assert family.shape_of(size, processor(), FrameLimits(frame_tiles=None, frame_padding=True)).tokens == 20
    assert family.shape_of(size, processor(), FrameLimits(frame_padding=True)).padding == 15
    frame = np.full((3 * SIZE, 2 * SIZE, 3), 200, dtype=np.uint8)
    [pixels] = family.pixels([frame], [FrameShape(5, 32, (1, 1))], processor())["pixel_values"][0, 0]
    # Scaled as a whole: two thirds of the tile are the picture.
    assert (pixels[:, :, : SIZE * 2 // 3] > 0.5).all() and (pixels[:, :, SIZE * 2 // 3 + 1 :] == pixels.min()).all()


def test_a_file_that_says_another_size_than_it_has_is_a_bad_sample() -> None:
    whole = sample_of("Ita", RATIOS[:1])
    sample = replace(whole, sizes=[FrameSize(SIZE, 2 * SIZE)])
    with pytest.raises(SampleError, match="frame 0 has 28 x 28 pixels, and its file says 56 x 28"):
        sample.pictures([0])


# Frames to ranks by their tokens


@given(
    st.lists(st.integers(1, 4), min_size=1, max_size=40), st.integers(1, 4), st.sampled_from(["contiguous", "striped"])
)
def test_frames_go_to_ranks_by_their_tokens(tiles: list[int], ranks: int, striped: bool) -> None:
    """The largest share is at most a frame above the mean."""
    family = Mllama(tiny_config(TILES))
    shapes = [FrameShape(5 * count, 32, (1, count)) for count in tiles]
    sample = Sample([IMAGE_TOKEN] * len(tiles) + [4], [IGNORE] * (len(tiles) + 1), len(tiles))
    layout = lay_out([sample], [shapes], family, ranks, "striped" if striped else "contiguous", 0, IMAGE_TOKEN)
    assert layout.keys.total == 5 * sum(tiles)
    assert layout.keys.longest <= layout.keys.total / ranks + 5 * max(tiles)
    for rank in range(ranks):
        assert sum(shape.tokens for shape in layout.own_shapes(rank)) == layout.keys.lengths[rank]


def test_shares_of_a_long_sample_are_within_a_twentieth_of_the_mean() -> None:
    rng, family = np.random.default_rng(0), Mllama(tiny_config(TILES))
    shapes = [FrameShape(5 * int(count), 32, (1, int(count))) for count in rng.integers(1, 5, 200)]
    sample = Sample([IMAGE_TOKEN] * 200 + [4], [IGNORE] * 201, 200)
    for placement in ("contiguous", "striped"):
        keys = lay_out([sample], [shapes], family, 4, placement, 0, IMAGE_TOKEN).keys
        assert keys.longest <= 1.05 * keys.total / 4
