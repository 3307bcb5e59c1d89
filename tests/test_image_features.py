"""Models with images in their text, on several ranks, against the model fed by its own processor."""

from __future__ import annotations

import functools
import re
import warnings
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText

from ds_lvxattn.batches.generation import generate
from ds_lvxattn.data.chat import NO_VIDEOS
from ds_lvxattn.data.model_text import ModelText
from ds_lvxattn.data.sample import IGNORE, FrameSize, Part, Sample, SampleError, in_one_row
from ds_lvxattn.errors import ConfigError
from ds_lvxattn.families import VisualFamily, family_of, family_of_config, image_features
from ds_lvxattn.families.family import ANY_SIZE
from ds_lvxattn.families.image_features import ImageFeatures
from ds_lvxattn.families.processors import ChannelsLast
from ds_lvxattn.needle.small_models.own_processors import molmo2
from ds_lvxattn.needle.task import IMAGE
from ds_lvxattn.training.dataset import load_sources, text_of_family, text_of_model
from ds_lvxattn.training.loading import load_model
from ds_lvxattn.training.settings import FinetuningConfig
from tests.support.distributed import run
from tests.support.image_models import AROUND, IMAGE_MODELS, image_model
from tests.support.marks import slow, slow_but
from tests.support.parity import Gradients, gradients_of, largest_differences, losses_of_steps, sum_over_ranks
from tests.support.text_models import LIGHTNING, SIZES
from tests.support.tiny_model import IMAGE_TOKEN, MODES, TINY, attach, loss_of, tiny_batches, tiny_sample

# Patterns of text, and heights and widths of their images in pixels; of videos the number of frames is ahead of them.
BATCH = (("ttItIttaItta", ((56, 70), (98, 60), (30, 31))), ("tItaa", ((64, 200),)), ("ttta", ()))
# Of an image that is alone in its row LLaVA-OneVision's processor makes tiles, of several it does not.
WITH_VIDEOS = (("tIItItaIIa", ((2, 40, 61), (120, 117), (2, 30, 33))), ("IIItta", ((3, 28, 28),)), *BATCH)
BATCHES = {"llava_onevision": WITH_VIDEOS, "internvl": WITH_VIDEOS, "llava_next_video": WITH_VIDEOS}
# Rotary positions of GLM's patches, and Gemma's norms, are computed in float32, whatever the model.
SINGLE = ("glm4v", "gemma4")
NEW = 3  # tokens that are generated
OF_IMAGE, OF_VIDEO = "<of an image>", "<of a video>"


def samples(model: Any) -> list[Sample]:
    """As the family of ``model`` writes them."""
    processor, family, made = ChannelsLast(model.own_processor), family_of(model), []
    assert isinstance(family, VisualFamily)
    for seed, (pattern, sizes) in enumerate(BATCHES.get(model.config.model_type, BATCH)):
        text, media = tiny_sample(pattern, seed), media_of(seed, sizes)
        frames = [frame for medium in media for frame in (medium[:, None] if medium.ndim == 4 else medium[None])]
        pictures = in_one_row(size for medium in media for size in sizes_of(medium))
        words = text_of(model, seed, pattern, sizes).replace(OF_IMAGE, IMAGE)
        for medium in media:
            if medium.ndim == 4:
                parts = family.video_parts(range(len(medium)), len(medium)).replace(family.image_token, IMAGE)
                words = words.replace(OF_VIDEO, parts, 1)
        ids = processor.tokenizer(family.write(words, pictures, processor, ANY_SIZE), add_special_tokens=False)[
            "input_ids"
        ]
        take, labels = functools.partial(_take, frames), labels_of(text, ids)
        made.append(Sample(ids, labels, len(frames), take, pattern, pictures))
    return made


def text_of(model: Any, seed: int, pattern: str, sizes: Sequence[tuple[int, ...]]) -> str:
    """The words of a row, with a mark for each of its images and videos."""
    text = words_of(model, tiny_sample(pattern, seed).input_ids)
    for frames, *sides in ((1, *size) if len(size) == 2 else size for size in sizes):
        text = text.replace(" ".join([IMAGE] * frames), OF_VIDEO if (frames, *sides) in sizes else OF_IMAGE, 1)
    return text


def media_of(seed: int, sizes: Sequence[tuple[int, ...]]) -> list[np.ndarray]:
    """Images, and videos of some frames each."""
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]


def sizes_of(medium: np.ndarray) -> list[FrameSize]:
    if medium.ndim == 3:
        return [FrameSize(*medium.shape[:2])]
    frames, *sides = medium.shape[:3]
    return [FrameSize(*sides, True, Part(number, 1, frames, 1.0)) for number in range(frames)]


def words_of(model: Any, ids: Sequence[int]) -> str:
    return " ".join(model.own_processor.tokenizer.convert_ids_to_tokens(ids))


def _take(frames: Sequence[np.ndarray], wanted: Sequence[int]) -> list[np.ndarray]:
    return [frames[index] for index in wanted]


@functools.cache
def in_transformers(kind: str) -> tuple[float, Gradients]:
    """Loss and gradients of the unmodified model, with all that its own processor gives it, a sample at a time."""
    model = image_model(kind, torch.float64)
    losses, items = [], 0
    for seed, (pattern, sizes) in enumerate(BATCHES.get(kind, BATCH)):
        plain, made = tiny_sample(pattern, seed), made_by_transformers(model, seed, pattern, sizes)
        labels = labels_of(plain, made["input_ids"][0].tolist())
        logits = model(**in_float64(made)).logits
        targets = torch.tensor([*labels[1:], IGNORE])
        losses.append(cross_entropy(logits[0], targets, ignore_index=IGNORE, reduction="sum"))
        items += int((targets != IGNORE).sum())
    loss = torch.stack(losses).sum() / items
    loss.backward()
    return loss.item(), gradients_of(model)


def in_float64(arguments: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: x.double() if x.is_floating_point() else x for key, x in arguments.items()}


def made_by_transformers(model: Any, seed: int, pattern: str, sizes: Sequence[tuple[int, ...]]) -> dict[str, Any]:
    """What the model's own processor makes of a row."""
    processor, media = model.own_processor, media_of(seed, sizes)
    text = text_of(model, seed, pattern, sizes)
    text = text.replace(OF_IMAGE, OF_IMAGE.join(AROUND.get(model.config.model_type, ("", ""))))
    for mark, name in ((OF_IMAGE, "image_token"), (OF_VIDEO, "video_token")):
        text = text.replace(mark, getattr(processor, name, ""))
    images, videos = ([medium for medium in media if medium.ndim == axes] for axes in (3, 4))
    given = ({"images": [images]} if images else {}) | ({"videos": videos} if videos else {})
    return processor(text=[text], return_tensors="pt", **given)


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


@pytest.mark.parametrize("ranks", [2, slow(4)])
@pytest.mark.parametrize("kind", slow_but(IMAGE_MODELS, "llava_next", "llava_onevision"))
def test_loss_and_gradients_are_those_of_the_model_with_its_own_processor(kind: str, ranks: int) -> None:
    for mode, got in zip(MODES, run(ranks, in_modes, kind)[0], strict=False):
        loss, gradient = largest_differences(got, in_transformers(kind))
        assert loss < 1e-12 and gradient < (1e-6 if kind in SINGLE else 1e-11), (mode, loss, gradient)


def train(kind: str, ranks: int) -> list[float]:
    model = image_model(kind)
    return losses_of_steps(model, samples(model), ranks, steps=3)


def answers(kind: str) -> torch.Tensor:
    model, ranks = image_model(kind, torch.float64), dist.get_world_size() if dist.is_initialized() else 1
    prompts = samples(model)
    batches = attach(model, ranks, MODES[0], prompts) if ranks > 1 else tiny_batches(model)
    return generate(model, batches, prompts, max_new_tokens=NEW, do_sample=False, eos_token_id=10_000)


@pytest.mark.parametrize("kind", slow_but(IMAGE_MODELS, "llava_onevision"))
def test_answers_are_those_of_the_model_with_its_own_processor(kind: str) -> None:
    model, want = image_model(kind, torch.float64).eval(), []
    for seed, row in enumerate(BATCHES.get(kind, BATCH)):
        made = in_float64(made_by_transformers(model, seed, *row))
        tokens = model.generate(**made, max_new_tokens=NEW, do_sample=False, eos_token_id=10_000, pad_token_id=0)
        want.append(tokens[0, -NEW:].tolist())
    assert answers(kind).tolist() == want
    assert run(2, answers, kind)[0].tolist() == want


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llava_next", "llava_next_video", "llava_onevision", "internvl"])
def test_losses_under_zero3(kind: str) -> None:
    """With line breaks, parameters of the model around its parts."""
    want, got = train(kind, 1), run(2, train, kind, 2)[0]
    assert want[-1] < want[0]
    assert got == pytest.approx(want, rel=1e-4)


@pytest.mark.parametrize("kind", ["llava_next_video", "llava_onevision"])
def test_the_path_without_exchange_is_exact_too(kind: str) -> None:
    """With videos that the model's own code would want equally long."""
    model = image_model(kind, torch.float64)
    loss = loss_of(model, samples(model))
    loss.backward()
    got = loss.item(), gradients_of(model)
    assert max(largest_differences(got, in_transformers(kind))) < 1e-11


@pytest.mark.parametrize(
    ("kind", "others", "reason"),
    [
        ("gemma3", {}, "tokens of an image see each other in both directions"),
        ("paligemma", {}, "tokens of an image see each other in both directions"),
        ("gemma4_unified", {}, "its images see themselves in other layers in its forward"),
        ("ernie4_5_vl_moe", {}, "its layers compute rows of images in another way ['moe_mm_token_type_ids']"),
        ("qwen2_5_omni_thinker", {}, "its rotary positions follow from more than the places of its images"),
        ("lfm2_vl", {"text_config": {**SIZES, **LIGHTNING}},
         "it has layers of the types ['linear_attention']"),
        ("granite4_vision", {"deepstack_layer_map": [[0, 1]], "downsample_rate": "1/2"},
         "visual features go into several of its layers"),
        ("ovis2", {"vision_config": {"num_visual_indicator_tokens": 2}, "visual_indicator_token_ids": [1]},
         "its config names 1 'visual_indicator_token_ids', and its vision config has 2 of them"),
        ("florence2", {}, "it is an encoder and a decoder"),
    ],
)  # fmt: skip
def test_models_that_would_be_wrong_are_refused_by_reason(kind: str, others: dict[str, Any], reason: str) -> None:
    if kind not in CONFIG_MAPPING:
        pytest.skip(f"this release of transformers has no {kind}")
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(CONFIG_MAPPING[kind](**others))
    with pytest.raises(ConfigError, match=f"cannot be sequence-parallel: {re.escape(reason)}"):
        ImageFeatures(model.config).attention_layers(model)


def test_a_processor_that_would_fail_at_its_first_image_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers.models.molmo2")
    config, processor = molmo2(TINY)
    monkeypatch.setattr(image_features.AutoProcessor, "from_pretrained", lambda *args, **kwargs: processor)
    monkeypatch.setattr(image_features, "is_torchvision_available", lambda: False)
    with pytest.raises(ConfigError, match="Molmo2ImageProcessor needs torchvision: pip install torchvision"):
        family_of_config(config).load_processor("molmo2")


def test_rows_of_the_needle_task_have_what_the_processor_writes_around_an_image() -> None:
    loaded = load_model("small-glm4v", {}, seed=1)
    train, _ = load_sources("needle", loaded, FinetuningConfig(eval_examples=0), rows=1, seed=1)
    words = loaded.tokenizer.convert_ids_to_tokens(train.sample(0).input_ids)
    images = [at for at, word in enumerate(words) if word == IMAGE]
    start, end = AROUND["glm4v"]
    assert images and all(words[at - 1 : at + 2] == [start, IMAGE, end] for at in images)


VIDEO: Any = SimpleNamespace(is_video=True)


@pytest.mark.parametrize("kind", ["glm4v", "qwen2_vl"])
def test_videos_that_go_in_as_images_are_said_to(kind: str) -> None:
    if kind == "glm4v":
        model, said = image_model(kind), "Glm4vForConditionalGeneration of transformers takes them as such"
        text = text_of_family(family_of(model), model.own_processor.tokenizer, model.own_processor)
    else:
        small = load_model("small-qwen2-vl", {}, seed=1)
        text, said = text_of_model(small), "the tokenizer lacks a token of"
    with pytest.warns(UserWarning, match=f"^videos go in as images, frame by frame; {re.escape(said)}"):
        assert text.videos_of([VIDEO]) is NO_VIDEOS
    image: Any = SimpleNamespace(is_video=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert text.videos_of([image]) is NO_VIDEOS


def test_videos_for_an_encoder_that_does_not_train_are_refused() -> None:
    try:
        family = family_of_config(CONFIG_MAPPING["video_llava"]())
    except ConfigError:
        pytest.skip("this release of transformers has another Video-LLaVA, which is refused")
    assert isinstance(family, VisualFamily)
    text = ModelText("<image>", refuses_videos=family.refuses_videos())
    with pytest.raises(SampleError, match="encoder of its own for videos .'video_tower'.*give the frames as images"):
        text.videos_of([VIDEO])
    assert image_model("llava_next").config.model_type and not family_of(image_model("llava_next")).refuses_videos()
