"""Models with images in their text, on several ranks, against the model fed by its own processor."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText

from ds_lvxattn.data.sample import IGNORE, FrameSize, Sample, SampleError
from ds_lvxattn.errors import ConfigError
from ds_lvxattn.families import VisualFamily, family_of
from ds_lvxattn.families.family import ANY_SIZE
from ds_lvxattn.families.image_features import ImageFeatures
from ds_lvxattn.families.processors import ChannelsLast
from ds_lvxattn.needle.task import IMAGE
from tests.support.distributed import run
from tests.support.image_models import IMAGE_MODELS, image_model
from tests.support.marks import slow_but
from tests.support.parity import Gradients, gradients_of, largest_differences, losses_of_steps, sum_over_ranks
from tests.support.tiny_model import IMAGE_TOKEN, MODES, attach, loss_of, tiny_sample

# Patterns of text, and heights and widths of their pictures in pixels.
BATCH = (("ttItIttaItta", ((56, 70), (98, 60), (30, 31))), ("tItaa", ((64, 200),)), ("ttta", ()))
# Of one picture alone LLaVA-OneVision's processor makes tiles.
ONE_EACH = (("ttItta", ((56, 70),)), ("tItaa", ((120, 117),)), ("ttta", ()))


def samples(model: Any) -> list[Sample]:
    """As the family of ``model`` writes them."""
    processor, family, made = ChannelsLast(model.own_processor), family_of(model), []
    assert isinstance(family, VisualFamily)
    for seed, (pattern, sizes) in enumerate(ONE_EACH if model.config.model_type == "llava_onevision" else BATCH):
        rng, text = np.random.default_rng(seed), tiny_sample(pattern, seed)
        frames = [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]
        pictures = [FrameSize(*size) for size in sizes]
        ids = processor.tokenizer(
            family.write(words_of(model, text.input_ids), pictures, processor, ANY_SIZE), add_special_tokens=False
        )["input_ids"]
        take, labels = functools.partial(_take, frames), labels_of(text, ids)
        made.append(Sample(ids, labels, len(sizes), take, pattern, pictures))
    return made


def words_of(model: Any, ids: Sequence[int]) -> str:
    return " ".join(model.own_processor.tokenizer.convert_ids_to_tokens(ids))


def _take(frames: Sequence[np.ndarray], wanted: Sequence[int]) -> list[np.ndarray]:
    return [frames[index] for index in wanted]


@functools.cache
def in_transformers(kind: str) -> tuple[float, Gradients]:
    """Loss and gradients of the unmodified model, with all that its own processor gives it, a sample at a time."""
    model = image_model(kind, torch.float64)
    processor = model.own_processor
    losses, items = [], 0
    for seed, sample in enumerate(samples(model)):
        plain = tiny_sample(sample.name, seed)
        text = words_of(model, plain.input_ids).replace(IMAGE, processor.image_token)
        pictures = sample.load_frames(range(sample.num_frames))
        with_pictures = {"images": [pictures]} if pictures else {}
        made = processor(text=[text], return_tensors="pt", **with_pictures)
        labels = labels_of(plain, made["input_ids"][0].tolist())
        made = {key: x.double() if x.is_floating_point() else x for key, x in made.items()}
        logits = model(**made).logits
        targets = torch.tensor([*labels[1:], IGNORE])
        losses.append(cross_entropy(logits[0], targets, ignore_index=IGNORE, reduction="sum"))
        items += int((targets != IGNORE).sum())
    loss = torch.stack(losses).sum() / items
    loss.backward()
    return loss.item(), gradients_of(model)


def labels_of(sample: Sample, rows: list[int]) -> list[int]:
    """Labels of ``rows``, which are the tokens of ``sample`` with what its pictures add; they count from behind."""
    labels, at = [IGNORE] * len(rows), len(rows)
    for token, label in zip(reversed(sample.input_ids), reversed(sample.labels), strict=True):
        if token != IMAGE_TOKEN:
            at = max(place for place in range(at) if rows[place] == token)
            labels[at] = label
    return labels


def in_modes(kind: str) -> list[tuple[float, Gradients]]:
    results = []
    for mode in MODES[:3]:
        model = image_model(kind, torch.float64).train()
        batches = attach(model, dist.get_world_size(), mode, samples(model), recompute="layer")
        loss = loss_of(model, samples(model), batches)
        loss.backward()
        results.append(sum_over_ranks(loss, gradients_of(model)))
    return results


@pytest.mark.parametrize("kind", slow_but(IMAGE_MODELS, "llava_next"))
def test_loss_and_gradients_are_those_of_the_model_with_its_own_processor(kind: str) -> None:
    for mode, got in zip(MODES, run(2, in_modes, kind)[0], strict=False):
        loss, gradient = largest_differences(got, in_transformers(kind))
        assert loss < 1e-12 and gradient < 1e-11, (mode, loss, gradient)


def train(kind: str, ranks: int) -> list[float]:
    model = image_model(kind)
    return losses_of_steps(model, samples(model), ranks, steps=3)


@pytest.mark.slow
def test_losses_under_zero3() -> None:
    """With the line breaks, parameters of the model around its parts."""
    want, got = train("llava_next", 1), run(2, train, "llava_next", 2)[0]
    assert want[-1] < want[0]
    assert got == pytest.approx(want, rel=1e-4)


def test_several_images_are_refused_where_they_have_other_pixels_than_one() -> None:
    model = image_model("llava_onevision")
    family, processor = family_of(model), ChannelsLast(model.own_processor)
    assert isinstance(family, VisualFamily)
    with pytest.raises(SampleError, match="2 images and frames, of which the model's processor makes other pixels"):
        family.write(2 * IMAGE, [FrameSize(56, 70)] * 2, processor, ANY_SIZE)


@pytest.mark.parametrize(
    ("kind", "others", "reason"),
    [
        ("gemma3", {}, "tokens of an image see each other in both directions"),
        ("paligemma", {}, "tokens of an image see each other in both directions"),
        ("molmo2", {}, "what its rows see, or where they stand, follows from which are of images"),
        ("gemma4", {}, "what its rows see, or where they stand, follows from which are of images"),
        ("glm4v", {}, "its rotary positions follow from the places of its images"),
        ("lfm2_vl", {"text_config": {"model_type": "lfm2", "layer_types": ["conv"], "num_hidden_layers": 1}},
         "it has layers of the types ['conv']"),
        ("granite4_vision", {"deepstack_layer_map": [[0, 1]], "downsample_rate": "1/2"},
         "visual features go into several of its layers"),
        ("florence2", {}, "it is an encoder and a decoder"),
    ],
)  # fmt: skip
def test_models_that_would_be_wrong_are_refused_by_reason(kind: str, others: dict[str, Any], reason: str) -> None:
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(CONFIG_MAPPING[kind](**others))
    with pytest.raises(ConfigError, match=f"cannot be sequence-parallel: {re.escape(reason)}"):
        ImageFeatures(model.config).attention_layers(model)
