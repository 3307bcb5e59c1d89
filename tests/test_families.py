"""What a family knows of its models, and what is refused with a message that says what to do."""

from __future__ import annotations

import functools
import importlib.util
import json
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import (
    CONFIG_MAPPING,
    Blip2Config,
    CLIPVisionConfig,
    GPT2Config,
    LlamaConfig,
    OPTConfig,
    Qwen3Config,
    T5Config,
)
from transformers.models.idefics.processing_idefics import (
    image_attention_mask_for_packed_input_ids_pt,
    incremental_to_binary_attention_mask,
)
from transformers.models.opt.modeling_opt import OPTAttention

from ds_lvxattn import merge_attention, sp_attention
from ds_lvxattn.batches.prepare import Batches
from ds_lvxattn.batches.sequence_parallel import attention_dropout
from ds_lvxattn.data.sample import IGNORE, FrameShape, FrameSize, Sample, SampleError
from ds_lvxattn.errors import ConfigError
from ds_lvxattn.exchange.interval import KVInterval
from ds_lvxattn.families import FAMILIES, VisualFamily, family_of, family_of_config, idefics, mllama
from ds_lvxattn.families.blip2 import Blip2
from ds_lvxattn.families.family import ANY_SIZE
from ds_lvxattn.families.flamingo.model import OpenFlamingoConfig, OpenFlamingoModel
from ds_lvxattn.families.flamingo.open_flamingo import OpenFlamingo
from ds_lvxattn.families.idefics import Idefics
from ds_lvxattn.families.rotary import check_positions, self_attention_role
from ds_lvxattn.families.text_only import TextOnly
from ds_lvxattn.needle.small_models import SMALL_MODELS
from ds_lvxattn.needle.small_models.own_processors import OWN_PROCESSORS
from ds_lvxattn.needle.task import IMAGE, build_tokenizer
from ds_lvxattn.runtime.registration import exchanged_attention
from ds_lvxattn.training.check_data import encode_for
from ds_lvxattn.training.loading import load_model
from tests.support.text_models import LINEAR, SIZES
from tests.support.tiny_families import CUTTING, REFUSED, tiny
from tests.support.tiny_families import FAMILIES as SMALL_FAMILIES
from tests.support.tiny_model import CPU, IMAGE_TOKEN, TINY, tiny_batches, tiny_model, tiny_processor, tiny_sample

# Masks


class _Tokenizer:
    eos_token_id = 2

    @staticmethod
    def convert_tokens_to_ids(token: str) -> int:
        return IMAGE_TOKEN


@given(st.lists(st.sampled_from([IMAGE_TOKEN, 4, 5]), max_size=20))
def test_ranges_of_idefics_are_the_mask_of_its_processor(text: list[int]) -> None:
    """Where no two images are adjacent: a video is one group of images here, and the last image there."""
    ids = [token for token in text for token in ([4, token] if token == IMAGE_TOKEN else [token])]
    images = ids.count(IMAGE_TOKEN)
    if not images:
        return
    counted, _ = image_attention_mask_for_packed_input_ids_pt(torch.tensor([ids]), _Tokenizer())
    [theirs] = incremental_to_binary_attention_mask(counted, "pt", num_classes=images)
    ranges = Idefics(None).frame_ranges(ids, IMAGE_TOKEN)
    ours = Idefics(None).dense_mask([ranges], [[FrameShape(1, 1)] * images])["image_attention_mask"][0]
    torch.testing.assert_close(ours, theirs.to(ours.dtype))


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=5))
def test_intervals_of_a_mask(bounds: list[tuple[int, int]]) -> None:
    mask = torch.zeros(1, len(bounds), 6, dtype=torch.bool)
    for row, (start, stop) in enumerate(bounds):
        mask[0, row, start:stop] = True
    interval = KVInterval.from_mask(mask)
    for row in range(len(bounds)):
        seen = mask[0, row].nonzero().flatten().tolist()
        assert list(range(int(interval.start[0, row]), int(interval.stop[0, row]))) == seen


def test_a_mask_with_a_hole_names_the_row() -> None:
    mask = torch.ones(2, 3, 5, dtype=torch.bool)
    mask[1, 2] = torch.tensor([False, True, False, True, True])
    with pytest.raises(ValueError, match=r"row 2 of sample 1 sees 3 of the keys 1 to 4"):
        KVInterval.from_mask(mask)


def test_a_mask_with_holes_is_attended_to_in_pieces() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, heads, rows, 4, dtype=torch.float64) for heads, rows in ((4, 6), (2, 9), (2, 9)))
    mask = torch.rand(2, 6, 9) < 0.5
    mask[0, 1] = False
    pieces = KVInterval.pieces_of_mask(mask)
    assert len(pieces) == max(len(runs(row)) for row in mask.flatten(0, 1).tolist()) > 1
    merged, _ = merge_attention([sp_attention(q, k, v, interval=piece) for piece in pieces])
    together, _ = sp_attention(q, k, v, interval=pieces)
    want = scaled_dot_product_attention(q, k, v, mask[:, None], enable_gqa=True)
    for out in (merged, together):
        torch.testing.assert_close(out, want.masked_fill(~mask.any(-1)[:, None, :, None], 0.0))
    with pytest.raises(ValueError, match=r"row \[0, 0\]: the intervals of a row overlap"):
        sp_attention(q, k, v, interval=[pieces[0], pieces[0]])
    assert len(KVInterval.pieces_of_mask(torch.zeros(1, 2, 3, dtype=torch.bool))) == 1


@pytest.mark.parametrize(
    ("name", "types"),
    [
        ("gemma3", [0, 1, 1, 1, 1, 0, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0]),  # images
        ("paligemma", [0] * 14 + [1] * 3),  # all but what begins with the first answer
    ],
)
def test_the_model_is_told_which_tokens_see_each_other(name: str, types: list[int]) -> None:
    model = tiny(name)
    samples = [tiny_sample("tItIIata"), tiny_sample("ta")]
    got = tiny_batches(model).prepare(samples).inputs["token_type_ids"].tolist()
    assert got == [types, [0] + [1 if name == "paligemma" else 0] * 16]


def runs(row: list[bool]) -> list[str]:
    return "".join("1" if seen else " " for seen in row).split()


@pytest.mark.parametrize(
    ("encode", "argument"),
    [(idefics.encode_frames, "image_attention_mask"), (mllama.encode_frames, "cross_attention_mask")],
)
def test_a_mask_beside_the_intervals_is_refused(encode: Callable[..., Any], argument: str) -> None:
    arguments = {"sequence_parallel": SimpleNamespace(brings_frames=True), argument: torch.ones(1, 2, 3)}
    with pytest.raises(ValueError, match=f"{argument} was given: .* leave the argument out"):
        encode(None, nn.Identity(), (), arguments)


# Modules


class StrangeAttention(nn.Module):
    """An attention that no family knows."""


@pytest.mark.parametrize("name", ["idefics", "open_flamingo, immediate"])
def test_an_unknown_attention_is_named(name: str) -> None:
    model: Any = tiny(name)
    assert {layer.role for layer in family_of(model).attention_layers(model).values()} == {"cross", "self", "local"}
    model.strange = StrangeAttention()
    with pytest.raises(ConfigError, match="module strange is of class StrangeAttention.*'cross'.*'local'"):
        family_of(model).attention_layers(model)


def test_alibi_is_refused() -> None:
    module = type("MptAttention", (nn.Module,), {})()
    with pytest.raises(ConfigError, match="ALiBi"):
        self_attention_role(module)


def test_an_encoder_decoder_in_blip2_is_refused() -> None:
    with pytest.raises(ConfigError, match="'t5', an encoder-decoder.*decoder-only"):
        Blip2(Blip2Config(text_config=T5Config())).text_config  # noqa: B018


def test_dropout_beside_the_attention_is_not_that_of_attention() -> None:
    for config, want in ((OPTConfig(dropout=0.1), 0.0), (OPTConfig(dropout=0.0, attention_dropout=0.2), 0.2)):
        assert attention_dropout(OPTAttention(config, layer_idx=0)) == want


@pytest.mark.parametrize("layers", [False, True])
def test_rotary_frequencies_that_follow_the_length_are_refused(layers: bool) -> None:
    of_a_layer = {"rope_type": "dynamic", "factor": 2.0}
    config = SimpleNamespace(rope_parameters={"full_attention": of_a_layer} if layers else of_a_layer)
    with pytest.raises(ConfigError, match="'dynamic'.*longest text.*'sequence_parallel_size' to 1"):
        check_positions(config)
    check_positions(SimpleNamespace(rope_parameters={"rope_type": "llama3", "factor": 8.0}))


def test_scores_that_no_kernel_computes_are_refused() -> None:
    q = torch.zeros(1, 1, 1, 4)
    batch: Any = object()
    with pytest.raises(ValueError, match="Identity attends with position_bias"):
        exchanged_attention(nn.Identity(), q, q, q, None, sequence_parallel=batch, position_bias=8)


def test_a_window_that_the_plan_does_not_know_is_refused() -> None:
    q, module = torch.zeros(1, 1, 1, 4), nn.Identity()
    batch: Any = SimpleNamespace(plans={module: SimpleNamespace(window=None)})
    with pytest.raises(ValueError, match="Identity attends with a sliding window of 8.*window_of"):
        exchanged_attention(module, q, q, q, None, sequence_parallel=batch, sliding_window=8)


def test_a_model_of_no_family_lists_those_there_are() -> None:
    with pytest.raises(ConfigError, match="Linear belongs to no known model family.*Idefics.*OpenFlamingo"):
        family_of(nn.Linear(1, 1))


def test_code_of_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    code = {"AutoConfig": "configuration_another.AnotherConfig"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "another", "auto_map": code}))
    load: Any
    for load in (functools.partial(load_model, ds_config={}, seed=0), encode_for):
        with pytest.raises(
            ConfigError, match="type 'another', code .* is not run here: load it in a script of your own"
        ):
            load(str(tmp_path))


def test_the_family_of_a_config() -> None:
    for family in FAMILIES:
        if family.model_class.config_class is not None:  # the others are of any model of a kind
            assert type(family_of_config(family.model_class.config_class())) is family
    for text in (LlamaConfig(), Qwen3Config(), GPT2Config()):
        assert type(family_of_config(text)) is FAMILIES[-1] is TextOnly


def test_open_flamingo_says_how_to_install_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "open_flamingo_src", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="--no-deps open-flamingo"):
        OpenFlamingoModel(OpenFlamingoConfig())


def test_open_flamingo_is_saved_as_by_transformers(tmp_path: Path) -> None:
    """Each parameter under one of the names that the package gives it."""
    model: Any = tiny("open_flamingo, immediate")
    model.save_pretrained(tmp_path)
    again = dict(OpenFlamingoModel.from_pretrained(tmp_path).named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.equal(again[name], parameter), name


def test_a_text_that_would_be_wrong_is_refused_in_open_flamingo() -> None:
    vision, text = CLIPVisionConfig(**TINY.vision), {**SIZES, **LINEAR}
    with torch.device("meta"):
        model = OpenFlamingoModel(OpenFlamingoConfig(vision, CONFIG_MAPPING["olmo_hybrid"](**text)))
    with pytest.raises(ConfigError, match=r"layers\.0.*\(OlmoHybridGatedDeltaNet\) mixes neighbouring tokens outside"):
        family_of(model).attention_layers(model)


def test_what_text_sees_in_open_flamingo() -> None:
    ids = [4, IMAGE_TOKEN, 4, IMAGE_TOKEN, IMAGE_TOKEN, 4]
    config: Any = type("Config", (), {"only_attend_immediate_media": True})
    assert OpenFlamingo(config).frame_ranges(ids, IMAGE_TOKEN) == [(0, 0), (0, 1), (0, 1), (1, 2), (2, 3), (2, 3)]
    config.only_attend_immediate_media = False
    assert OpenFlamingo(config).frame_ranges(ids, IMAGE_TOKEN) == [(0, 0), (0, 1), (0, 1), (0, 2), (0, 3), (0, 3)]


# Data


@pytest.mark.parametrize(("pattern", "frames"), [("tIIta", 0), ("tta", 2)])
def test_image_tokens_and_frames_must_match(pattern: str, frames: int) -> None:
    whole = tiny_sample(pattern)
    sample = Sample(whole.input_ids, whole.labels, frames, name="clip 7")
    with pytest.raises(SampleError, match=rf"clip 7: {pattern.count('I')} image tokens .* for {frames} frames"):
        tiny_batches(tiny_model()).collator.check(sample)


@pytest.mark.parametrize(
    ("ids", "labels", "message"),
    [
        ([], [], "clip 7: no tokens"),
        ([3, 25], [IGNORE, 3], "clip 7: token 25, and the model has 25 embeddings; .*another model's tokenizer"),
        ([3, -1], [IGNORE, 3], "clip 7: token -1, and the model has 25 embeddings"),
        ([3, 4], [IGNORE, IMAGE_TOKEN], f"clip 7: label {IMAGE_TOKEN}, and the model has {IMAGE_TOKEN} logits"),
    ],
)
def test_tokens_that_the_model_does_not_know_are_named(ids: list[int], labels: list[int], message: str) -> None:
    with pytest.raises(SampleError, match=message):
        tiny_batches(tiny_model()).collator.check(Sample(ids, labels, name="clip 7"))


def test_a_padding_token_without_an_embedding_is_refused() -> None:
    with pytest.raises(ConfigError, match="padding token has the id 25, and the model 25 embeddings.*resize_token"):
        Batches(tiny_model(), tiny_processor(), 25, IMAGE_TOKEN, CPU, torch.float32, None)


@pytest.mark.parametrize("name", [name for name in SMALL_FAMILIES if name != "text only"])
def test_channels_are_last_however_small_a_frame(name: str) -> None:
    batches = tiny_batches(tiny(name))
    layout = batches.layout([tiny_sample("Ita")])
    colour = np.array([200, 100, 10], dtype=np.uint8)

    def pixels(side: int) -> dict[str, Any]:
        return batches.collator.pixels(layout, [[np.tile(colour, (side, side, 1))]])

    want = pixels(40)
    for side in (1, 3):
        for key, value in pixels(side).items():
            if isinstance(value, torch.Tensor):
                torch.testing.assert_close(value, want[key])


@pytest.mark.parametrize("name", [*(name for name in SMALL_FAMILIES if name != "text only"), "smolvlm", "mllama"])
def test_pixels_are_the_same_from_threads(name: str) -> None:
    """Bit by bit, with frames of several sizes, tiles and samples; without exchange as well."""
    rng = np.random.default_rng(0)
    sizes = [[(40, 30), (30, 90), (64, 64), (120, 41), (28, 28)], [(33, 77), (90, 30)]]
    model: Any = tiny_model() if name == "mllama" else tiny(CUTTING.get(name, SMALL_FAMILIES.get(name)))
    collator: Any = tiny_batches(model).collator
    samples = []
    for some in sizes:
        frames = [FrameSize(height, width) for height, width in some]
        crops = [crop for size in frames for crop in collator.family.crops_of(size, collator.processor, ANY_SIZE)]
        samples.append(replace(tiny_sample("I" * len(crops) + "ta"), num_frames=len(some), sizes=frames))
    images = [[rng.integers(0, 256, (height, width, 3), dtype=np.uint8) for height, width in some] for some in sizes]
    division: Any = SimpleNamespace(comm=SimpleNamespace(rank=0))
    for each in (collator, replace(collator, division=division, dtype=torch.bfloat16)):
        layout = each.undivided_layout(samples)
        want = each.pixels(layout, images)
        with ThreadPoolExecutor(3) as threads:
            got = each.pixels(layout, images, threads)
        assert want
        torch.testing.assert_close(got, want, rtol=0, atol=0)


@pytest.mark.parametrize("split", [False, True])
def test_an_export_cuts_images_as_training_did(split: bool) -> None:
    model: Any = tiny("aria")
    family, processor = family_of(model), SimpleNamespace(image_processor=SimpleNamespace(split_image=split))
    assert isinstance(family, VisualFamily)
    family.complete_processor(processor, IMAGE)
    assert vars(processor.image_processor) == {"split_image": split, "max_image_size": 490}


# Models by name

# Whose image processor is saved apart; those with a whole one are served in tests/test_serving.py.
PLAIN = [
    name
    for name in SMALL_MODELS
    if name not in {"quickstart", *(f"small-{kind.replace('_', '-')}" for kind in (*OWN_PROCESSORS, *REFUSED))}
]


@pytest.mark.parametrize("name", PLAIN)
def test_a_saved_small_model_loads_by_its_folder(name: str, tmp_path: Path) -> None:
    saved = load_model(name, {}, seed=3)
    saved.save(tmp_path, {key: p.detach().clone() for key, p in saved.model.named_parameters()})
    loaded = load_model(str(tmp_path), {}, seed=0)
    assert type(loaded.model) is type(saved.model) and loaded.image_token == IMAGE
    theirs = dict(loaded.model.named_parameters())
    for key, parameter in saved.model.named_parameters():
        torch.testing.assert_close(theirs[key], parameter)
    frames = [np.zeros((40, 30, 3), dtype=np.uint8)]
    family = family_of(loaded.model)
    assert isinstance(family, VisualFamily)
    shapes = [family.shape_of(None, loaded.processor, ANY_SIZE)]
    for key, value in family.pixels(frames, shapes, loaded.processor).items():
        assert value.shape == family.blank_pixels()[key].shape
    assert build_tokenizer().get_vocab() == loaded.tokenizer.get_vocab()
