"""The thinkers of Qwen's Omni models: their positions, whole checkpoints, and the audio that they are not given."""

from __future__ import annotations

import functools
import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForImageTextToText,
    Qwen2_5OmniConfig,
    Qwen2_5OmniForConditionalGeneration,
    Qwen3OmniMoeConfig,
    Qwen3OmniMoeForConditionalGeneration,
)

from ds_lvxattn.data.sample import FrameShape, Part, SampleError
from ds_lvxattn.errors import ConfigError
from ds_lvxattn.families import family_of, family_of_config
from ds_lvxattn.families.qwen_omni import Thinker
from ds_lvxattn.needle.small_models import SMALL_MODELS
from ds_lvxattn.needle.task import build_tokenizer
from ds_lvxattn.runtime.kept_parameters import KeptParameters
from ds_lvxattn.training.check_data import encode_for
from ds_lvxattn.training.loading import load_model, parameter_groups, partition_over_all_ranks, select_trainable
from tests.support.distributed import run
from tests.support.marks import slow_but
from tests.support.parity import losses_of_engine
from tests.support.qwen_videos import loaded, model_of, source_of, write_rows
from tests.support.tiny_families import REFUSED, tiny
from tests.support.tiny_model import MODES, attach, ds_config, groups_of, loss_of, tiny_batches, tiny_sample

pytestmark = pytest.mark.skipif(bool(REFUSED), reason="refused with this release of transformers")

WHOLE: dict[str, tuple[Any, Any]] = {
    "qwen2.5-omni": (Qwen2_5OmniConfig, Qwen2_5OmniForConditionalGeneration),
    "qwen3-omni": (Qwen3OmniMoeConfig, Qwen3OmniMoeForConditionalGeneration),
}
# Text ahead, rows and columns of tokens, and of a video how many parts, seconds between them: none for an image.
PICTURE = st.tuples(
    st.integers(0, 5), st.integers(1, 4), st.integers(1, 4), st.integers(0, 4), st.floats(1 / 128, 900.0, width=32)
)


@functools.cache
def the_model(name: str) -> Any:
    return model_of(name)


@pytest.mark.parametrize("name", WHOLE)
@settings(max_examples=40)
@given(pictures=st.lists(PICTURE, max_size=6), behind=st.integers(1, 5))
def test_positions_are_those_of_the_model(name: str, pictures: list[tuple[Any, ...]], behind: int) -> None:
    """Bit by bit, also where float32 rounds the time of a video."""
    model: Any = the_model(name)
    config, family = model.config, family_of(model)
    tokens = {"image": config.image_token_id, "video": config.video_token_id, "start": config.vision_start_token_id}
    ids: list[int] = []
    visual: list[int] = []
    shapes: list[FrameShape] = []
    grids: dict[str, list[tuple[int, ...]]] = {"image": [], "video": []}
    seconds = []
    for ahead, rows, columns, parts, between in pictures:
        kind, number = ("video", parts) if parts else ("image", 1)
        made = range(sum(x >= 0 for x in visual), sum(x >= 0 for x in visual) + number * rows * columns)
        ids += [3] * ahead + [tokens["start"]] + [tokens[kind]] * len(made) + [config.vision_end_token_id]
        visual += [-1] * (ahead + 1) + [*made] + [-1]
        for part in range(number):
            time = family.time_of(Part(part, 2, 2 * parts, between)) if part else None  # type: ignore[attr-defined]
            shapes.append(FrameShape(rows * columns, 4 * rows * columns, (2 * rows, 2 * columns), time=time))
        grids[kind].append((number, 2 * rows, 2 * columns))
        seconds += [between] if parts else []
    ids, visual = [*ids, *[3] * behind], [*visual, *[-1] * behind]
    rows_of = torch.tensor([ids])
    want, _ = model.get_rope_index(
        rows_of,
        image_grid_thw=torch.tensor(grids["image"]) if grids["image"] else None,
        video_grid_thw=torch.tensor(grids["video"]) if grids["video"] else None,
        attention_mask=torch.ones_like(rows_of),
        second_per_grids=torch.tensor(seconds),
    )
    got = torch.from_numpy(family.positions(torch.tensor(visual).numpy(), shapes))
    assert torch.equal(got, want[:, 0].to(got.dtype))


def test_fractions_of_positions_survive_the_training_dtype(tmp_path: Path) -> None:
    source, model = source_of(loaded("qwen3-omni"), write_rows(tmp_path)), model_of("qwen3-omni")
    samples, batches = [source.sample(0)], tiny_batches(model)
    want = batches.prepare(samples).inputs["position_ids"]
    batches.collator = replace(batches.collator, dtype=torch.bfloat16)
    inputs = batches.prepare(samples).inputs
    assert inputs["pixel_values"].dtype == torch.bfloat16
    assert torch.equal(inputs["position_ids"], want) and (want % 1).any()
    assert want.dtype == torch.float32


def save_whole(name: str, folder: Path) -> Any:
    """A checkpoint of a whole model, with what it has beside the thinker; returns that."""
    thinker, (config, kind) = tiny(name), WHOLE[name]
    whole = kind(config(thinker_config=thinker.config, enable_audio_output=False))
    whole.thinker.load_state_dict(thinker.state_dict())
    whole.save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    assert all(key.startswith("thinker.") for key in weights)
    more = {"talker.model.norm.weight": torch.ones(4), "token2wav.code.weight": torch.ones(4)}
    save_file({**weights, **more}, folder / "model.safetensors", {"format": "pt"})
    tokenizer = build_tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(folder)
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))
    SMALL_MODELS[f"small-{name}"][1]().save_pretrained(folder)
    return thinker


@pytest.mark.parametrize("name", WHOLE)
def test_of_a_whole_checkpoint_the_thinker_trains(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    thinker = save_whole(name, tmp_path)
    encode_for(str(tmp_path))
    with caplog.at_level(logging.WARNING):
        made = load_model(str(tmp_path), {}, seed=0)
    assert "the thinker alone of the whole Qwen" in caplog.text
    assert made.tokenizer.chat_template == "{{ messages }}"  # of the processor, which does not load
    made.save(tmp_path / "export", {key: p.detach().clone() for key, p in made.model.named_parameters()})
    config = json.loads((tmp_path / "export" / "config.json").read_text())
    assert config["model_type"].endswith("_thinker") and config["architectures"] == [type(thinker).__name__]
    for again in (made.model, AutoModelForImageTextToText.from_pretrained(tmp_path / "export")):
        assert type(again) is type(thinker)
        theirs = dict(again.named_parameters())
        assert all(torch.equal(theirs[key], p) for key, p in thinker.named_parameters())


def test_limits_of_a_frame_are_those_of_the_processor(tmp_path: Path) -> None:
    """Which asks its video processor for them; those in a file may be of an image."""
    processor = SMALL_MODELS["small-qwen2.5-omni"][1]()
    family: Any = family_of(tiny("qwen2.5-omni"))
    for longest, want in ((12845056, (128 * 28**2, 768 * 28**2)), (5000, (3136, 5000))):
        size = {"shortest_edge": 3136, "longest_edge": longest}
        processor.with_video(processor.video.with_settings(size=size)).save_pretrained(tmp_path)
        got = family.load_processor(str(tmp_path)).video.settings["size"]
        assert (got["shortest_edge"], got["longest_edge"]) == want


@pytest.mark.parametrize("name", WHOLE)
def test_a_whole_model_is_refused_with_what_to_attach(name: str) -> None:
    config, kind = WHOLE[name]
    with torch.device("meta"):
        whole = kind(config(thinker_config=tiny(name).config, enable_audio_output=False))
    with pytest.raises(ConfigError, match=r"several models in one; attach the \w+Thinker\w+ in it \('thinker'\)"):
        family_of(whole)
    assert isinstance(family_of_config(whole.config), Thinker)
    assert isinstance(family_of(whole.thinker), Thinker)


def test_an_earlier_release_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("qwen2.5-omni")
    monkeypatch.setattr(type(model), "base_model_prefix", "thinker")
    with pytest.raises(ConfigError, match=r"install transformers 5\.21 or newer"):
        family_of(model).attention_layers(model)


def on_ranks(name: str) -> list[str]:
    """What an attached thinker says of audio, and which of its parameters train."""
    samples = [tiny_sample("tItta")]
    model = tiny(name).train()
    batches = attach(model, 2, MODES[0], samples)
    loss_of(model, samples, batches).backward()
    with pytest.raises(ValueError, match="input_features is .* beside sequence_parallel: no rank encodes audio"):
        model(**batches.prepare(samples).inputs, input_features=torch.zeros(1))
    with pytest.raises(ValueError, match="use_audio_in_video is True"):
        model(**batches.prepare(samples).inputs, use_audio_in_video=True)
    model(**batches.prepare(samples).inputs, use_audio_in_video=False)
    return [name for name, parameter in model.named_parameters() if not parameter.requires_grad]


@pytest.mark.parametrize("name", WHOLE)
def test_audio_is_refused_and_its_encoder_stays_as_it_is(name: str) -> None:
    frozen = run(2, on_ranks, name)[0]
    assert frozen and all(key.startswith("model.audio_tower.") for key in frozen)


def test_audio_in_a_text_is_refused(tmp_path: Path) -> None:
    made = loaded("qwen2.5-omni")
    answer = {"role": "assistant", "content": "Yes."}
    (tmp_path / "rows.jsonl").write_text(
        json.dumps({"messages": [{"role": "user", "content": "Hear <|AUDIO|>!"}, answer]})
    )
    with pytest.raises(SampleError, match=r"'<\|AUDIO\|>', which stands for audio"):
        source_of(made, tmp_path / "rows.jsonl").sample(0)
    model: Any = tiny("qwen2.5-omni")
    model.config.audio_token_id = 4
    with pytest.raises(SampleError, match=r"clip 7 holds the token of audio \(4\)"):
        tiny_batches(model).collator.check(replace(tiny_sample("tta"), input_ids=[3, 4, 5], name="clip 7"))


def kept_under_zero3(name: str) -> tuple[list[str], list[float]]:
    """Which frozen parameters stay gathered, and losses meanwhile."""
    samples, ranks = [tiny_sample("tItta")], 2
    model, config = tiny(name).train(), ds_config(3, 1, 1, ranks)
    select_trainable(model, "pretrained", "default")
    batches = attach(model, ranks, MODES[0], samples)
    partition_over_all_ranks(model, config, groups_of(ranks))
    groups = groups_of(ranks)
    engine, *_ = deepspeed.initialize(model=model, model_parameters=parameter_groups(model), config=config, mpu=groups)
    kept = KeptParameters(engine.module)
    names = {p: key for key, p in engine.module.named_parameters()}
    kept.keep()
    losses = losses_of_engine(engine, lambda: engine(**batches.prepare(samples).inputs).loss, 3)
    return [names[p] for p in kept.parameters], losses


@pytest.mark.parametrize("name", slow_but(WHOLE, "qwen2.5-omni"))
def test_zero3_keeps_nothing_of_the_audio_encoder(name: str) -> None:
    names, losses = run(2, kept_under_zero3, name)[0]
    assert names and not [key for key in names if "audio_tower" in key]
    assert losses[-1] < losses[0]
