"""mPLUG-Owl3: the arithmetic of hyper attention, published checkpoints and code, and what its layers keep."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ds_lvxattn.families import family as encoding
from ds_lvxattn.families import family_of
from ds_lvxattn.families.owl import hyper_qwen2, processing
from ds_lvxattn.families.owl.checkpoint_names import kinds, load_processor
from ds_lvxattn.families.owl.mplug_owl3 import MPlugOwl3
from tests.support.distributed import run
from tests.support.parity import Gradients, gradients_of, largest_differences, samples_of, sum_over_ranks
from tests.support.tiny_families import tiny
from tests.support.tiny_model import IMAGE_TOKEN, SIZE, attach, loss_of, tiny_sample

GATHER = ("lv_xattn", "gather", "contiguous")
PATTERNS = ("tItIItttaaItaIIIta", "tta")


# Arithmetic, written out row by row


def turned(vector: Tensor, position: int, theta: float) -> Tensor:
    """Rotary embedding of one vector: pairs of its halves as complex numbers."""
    half = len(vector) // 2
    numbers = torch.complex(vector[:half], vector[half:])
    angles = position / theta ** (torch.arange(half, dtype=torch.float64) / half)
    numbers = numbers * torch.polar(torch.ones_like(angles), angles)
    return torch.cat((numbers.real, numbers.imag))


def softmax_of(query: Tensor, keys: list[Tensor], values: list[Tensor]) -> Tensor:
    scores = torch.stack([query @ key for key in keys]) / math.sqrt(len(query))
    return scores.softmax(0) @ torch.stack(values)


@pytest.mark.parametrize("kind", hyper_qwen2.HYPER_ATTENTION)
def test_hyper_attention_is_what_its_equations_say(kind: str) -> None:
    """Text ``t I t I t``: a fused image is seen from its token on, a gated one behind it."""
    module: Any = tiny(f"mplug_owl3, {kind}", torch.float64).get_submodule("language_model.model.layers.0.self_attn")
    places = [1, 3] if kind == "fused" else [2, 4]
    text, images = torch.randn(5, 32, dtype=torch.float64), torch.randn(2, 3, 32, dtype=torch.float64)
    angles = hyper_qwen2.rotary(torch.arange(5)[None], module, torch.float64)
    got, *_ = module(text[None], angles, images, [torch.tensor(places)])

    size, theta = module.head_dim, module.rope_theta
    q, k, v = (
        projection(text).unflatten(-1, (-1, size)) for projection in (module.q_proj, module.k_proj, module.v_proj)
    )
    kv = module.v_kv_proj(images).unflatten(-1, (-1, 2, size))  # image, token, head, key or value, size
    rows = []
    for row in range(5):
        heads = []
        for head in range(4):
            query, group = turned(q[row, head], row, theta), head // 2
            keys = [turned(k[i, group], i, theta) for i in range(row + 1)]
            values = [v[i, group] for i in range(row + 1)]
            seen = [(image, place) for image, place in enumerate(places) if place <= row]
            visual = [kv[image, token, group] for image, _ in seen for token in range(3)]
            visual_keys = [
                turned(kv[image, token, group, 0], place, theta) for image, place in seen for token in range(3)
            ]
            visual_values = [pair[1] for pair in visual]
            if kind == "fused":
                heads.append(softmax_of(query, keys + visual_keys, values + visual_values))
                continue
            context = softmax_of(query, keys, values)
            if seen:
                if kind == "gate":
                    gate = module.gate[head * size : (head + 1) * size].sigmoid()
                else:
                    gate = module.gate_proj[0](context).sigmoid()
                context = (1 - gate) * context + gate * softmax_of(query, visual_keys, visual_values)
            heads.append(context)
        rows.append(torch.cat(heads))
    torch.testing.assert_close(got[0], module.o_proj(torch.stack(rows)))


@pytest.mark.parametrize("kind", hyper_qwen2.HYPER_ATTENTION)
def test_places_on_the_host_serve_a_model_on_a_device(kind: str) -> None:
    module: Any = tiny(f"mplug_owl3, {kind}").get_submodule("language_model.model.layers.0.self_attn").to("meta")
    text, images = torch.randn(1, 5, 32, device="meta"), torch.randn(2, 3, 32, device="meta")
    angles = hyper_qwen2.rotary(torch.arange(5, device="meta")[None], module, torch.float32)
    got, *_ = module(text, angles, images, [torch.tensor([1, 3])])
    assert got.device.type == "meta" and got.shape == text.shape


def test_what_text_sees_and_where_images_stand() -> None:
    ids, config = [4, IMAGE_TOKEN, IMAGE_TOKEN, 4], tiny("mplug_owl3, fused").config
    ranges = MPlugOwl3(config).frame_ranges(ids, IMAGE_TOKEN)
    assert ranges == [(0, 0), (0, 1), (0, 2), (0, 2)]
    assert MPlugOwl3(config).dense_mask([[*ranges, (0, 0)]], [])["media_offset"][0].tolist() == [1, 2]
    config.hyper_attention = "gate"
    ranges = MPlugOwl3(config).frame_ranges(ids, IMAGE_TOKEN)
    assert ranges == [(0, 0), (0, 0), (0, 1), (0, 2)]
    assert MPlugOwl3(config).dense_mask([ranges], [])["media_offset"][0].tolist() == [2, 3]


def test_an_image_that_no_text_comes_behind_is_not_encoded() -> None:
    model, sample = tiny("mplug_owl3, gate"), tiny_sample("taI")
    text = replace(sample, input_ids=sample.input_ids[:2], labels=sample.labels[:2], num_frames=0)
    torch.testing.assert_close(loss_of(model, [sample]), loss_of(model, [text]))


# Published checkpoints

HYPER_LAYER = {
    "self_attn.q_proj.weight", "self_attn.q_proj.bias", "self_attn.k_proj.weight", "self_attn.k_proj.bias",
    "self_attn.v_proj.weight", "self_attn.v_proj.bias", "self_attn.o_proj.weight", "self_attn.v_kv_proj.weight",
    "self_attn.v_kv_proj.bias", "mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight",
    "input_layernorm.weight", "post_attention_layernorm.weight",
}  # fmt: skip
GATES = {
    "gate": {"self_attn.gate"}, "gate_proj": {"self_attn.gate_proj.0.weight", "self_attn.gate_proj.0.bias"},
    "fused": set(),
}  # fmt: skip


@pytest.mark.parametrize("kind", hyper_qwen2.HYPER_ATTENTION)
def test_parameters_are_named_as_in_published_checkpoints(kind: str, tmp_path: Path) -> None:
    """A checkpoint whose config leaves out the kinds, as published ones do, loads by the names of its parameters."""
    model: Any = tiny(f"mplug_owl3, {kind}")
    names = set(model.state_dict())
    first = "language_model.model.layers.0."
    assert {name.removeprefix(first) for name in names if name.startswith(first)} == HYPER_LAYER | GATES[kind]
    assert not any(name.startswith("language_model.model.layers.2.self_attn.v_kv_proj") for name in names)
    projector = {"0.weight", "0.bias", "2.weight", "2.bias"} if kind == "fused" else {"weight", "bias"}
    assert {name.removeprefix("vision2text_model.") for name in names if name.startswith("vision2")} == projector
    assert {
        "language_model.model.embed_tokens.weight", "language_model.model.norm.weight",
        "language_model.lm_head.weight", "vision_model.embeddings.patch_embedding.weight",
        "vision_model.embeddings.position_embedding.weight", "vision_model.encoder.layers.0.self_attn.k_proj.weight",
        "vision_model.encoder.layers.1.mlp.fc2.bias", "vision_model.post_layernorm.weight",
    } <= names  # fmt: skip
    assert kinds(names) == (kind, model.config.projector)

    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in config.items() if k not in ("hyper_attention", "projector")}))
    loaded = MPlugOwl3(None).load_model(str(tmp_path), torch.float32)
    for name, value in loaded.state_dict().items():
        torch.testing.assert_close(value, model.state_dict()[name])
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_size": SIZE}))
    frames = [torch.zeros(40, 30, 3, dtype=torch.uint8).numpy()]
    pixels = MPlugOwl3(loaded.config).pixels(frames, [], load_processor(str(tmp_path)))["pixel_values"]
    assert pixels.shape == (1, 1, 3, SIZE, SIZE) and (pixels == -1).all()
    of_published = {"image_size": SIZE, "image_processor_type": "mPLUGOwl3ImageProcessor"}
    for settings, prompt in (
        (of_published, "v3" if kind == "fused" else "v2"),
        ({**of_published, "cut_prompt": None}, None),
    ):
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
        assert load_processor(str(tmp_path)).cut_prompt == prompt


def test_pictures_are_cut_as_published() -> None:
    sizes = ((30, 30, (2, 2)), (30, 100, (1, 3)), (30, 200, (1, 4)), (60, 40, (3, 2)), (90, 20, (4, 1)))
    for height, width, grid in sizes:
        assert processing.grid_of(height, width, SIZE) == grid
        squares = processing.squares_of(np.zeros((height, width, 3), np.uint8), SIZE)
        assert [x.shape for x in squares] == [(SIZE, SIZE, 3)] * math.prod(grid) + [(height, width, 3)]
    picture = np.arange(4 * SIZE * SIZE * 3, dtype=np.uint8).reshape(2 * SIZE, 2 * SIZE, 3)
    assert np.array_equal(processing.squares_of(picture, SIZE)[1], picture[:SIZE, SIZE:])
    assert processing.text_of((2, 1), "v2", "X") == (
        "Cut to 2 rows 1 columns with a global view\nsubimg(0,0)X\nsubimg(1,0)X\nglobal_viewX"
    )
    assert processing.text_of((1, 3), "v3", "X") == "<|start_cut|>1*3\nX X X\nX<|end_cut|>"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "hyper_attention is None; choose one of .*'fused'"),
        ({"hyper_attention": "gate", "use_sliding_window": True}, "use_sliding_window True"),
        ({"hyper_attention": "gate", "attention_dropout": 0.1}, "attention_dropout 0.1"),
    ],
)
def test_what_the_model_cannot_be_is_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        hyper_qwen2.mPLUGOwl3Model(hyper_qwen2.MPlugOwl3Config(num_hidden_layers=1, projector="mlp", **settings))


def test_a_published_config() -> None:
    """Keys of the 7B models' ``config.json`` that are not those of a config that transformers 5 writes."""
    vision = {"model_type": "siglip_vision_model", "hidden_size": 1152, "image_size": 384, "patch_size": 14}
    config = hyper_qwen2.MPlugOwl3Config.from_dict(
        {"model_type": "mplugowl3", "rope_theta": 1e6, "hyper_layers": [1, 9, 17, 25], "vision_config": vision}
    )
    assert config.rope_parameters["rope_theta"] == 1e6 and MPlugOwl3(config).frame_tokens() == 729
    assert MPlugOwl3.has_config(config) and config.hyper_attention is None


# The code that published checkpoints come with: its arguments, around the arithmetic of this package's model


class HyperQwen2SdpaAttention(hyper_qwen2.HyperQwen2Attention):
    def forward(
        self, hidden_states, attention_mask=None, position_ids=None, image_embeds=None, media_offset=None,
        past_key_value=None, output_attentions=False, use_cache=False,
    ):  # fmt: skip
        angles = hyper_qwen2.rotary(position_ids, self, hidden_states.dtype)
        return super().forward(hidden_states, angles, image_embeds, media_offset)


class HyperQwen2DecoderLayer(hyper_qwen2.HyperQwen2DecoderLayer):
    def forward(
        self, hidden_states, attention_mask=None, position_ids=None, image_embeds=None, media_offset=None,
        past_key_value=None, output_attentions=False, use_cache=False,
    ):  # fmt: skip
        return super().forward(
            hidden_states, image_embeds, media_offset, attention_mask=attention_mask, position_ids=position_ids,
            past_key_value=past_key_value, output_attentions=output_attentions, use_cache=use_cache,
        )  # fmt: skip


class HyperQwen2ForCausalLM(hyper_qwen2.HyperQwen2ForCausalLM):
    def forward(
        self, input_ids=None, attention_mask=None, position_ids=None, image_embeds=None, media_offset=None,
        labels=None, use_cache=None,
    ):  # fmt: skip
        assert labels is None
        states = self.model.embed_tokens(input_ids)
        for layer in self.model.layers:
            states = layer(
                states, attention_mask=attention_mask, position_ids=position_ids, image_embeds=image_embeds,
                media_offset=media_offset, past_key_value=None, output_attentions=None, use_cache=use_cache,
            )  # fmt: skip
        return hyper_qwen2.CausalLMOutputWithPast(logits=self.lm_head(self.model.norm(states)))


class mPLUGOwl3Model(hyper_qwen2.mPLUGOwl3Model):
    def forward(self, pixel_values=None, **kwargs):
        image_embeds = None if pixel_values is None else self.forward_image(pixel_values)
        return self.language_model(image_embeds=image_embeds, **kwargs)


def as_published(model: Any) -> nn.Module:
    model.__class__, model.language_model.__class__ = mPLUGOwl3Model, HyperQwen2ForCausalLM
    for layer in model.language_model.model.layers:
        layer.__class__, layer.self_attn.__class__ = HyperQwen2DecoderLayer, HyperQwen2SdpaAttention
    del model.config.hyper_attention
    return model


def published_on_two_ranks(kind: str) -> tuple[tuple[float, Gradients], float]:
    """Loss and gradients, summed over ranks, and the loss that the model returns; the roles attend differently."""
    samples, model = samples_of(PATTERNS), as_published(tiny(f"mplug_owl3, {kind}").train())
    batches = attach(model, 2, GATHER, samples, recompute="kv", layers={"*.v_kv_proj": "ring"})
    assert {(plan.role, plan.strategy) for plan in batches.planner.plan} == {
        ("self", "lv_xattn"), ("cross", "ring"), ("local", "local")
    }  # fmt: skip
    loss = loss_of(model, samples, batches)
    loss.backward()
    found = sum_over_ranks(loss, gradients_of(model))
    with torch.no_grad():
        own = model(**batches.prepare(samples).inputs).loss
    return found, sum_over_ranks(own, {})[0]


@pytest.mark.parametrize("kind", ["gate", "fused"])
def test_published_code_is_attached_by_name(kind: str) -> None:
    model, samples = tiny(f"mplug_owl3, {kind}", torch.float64), samples_of(PATTERNS)
    want = loss_of(model, samples)
    want.backward()
    found, own = run(2, published_on_two_ranks, kind)[0]
    loss, gradient = largest_differences(found, (want.item(), gradients_of(model)))
    assert loss < 1e-5 and gradient < 1e-4
    assert own == pytest.approx(want.item(), rel=1e-5)


# Two roles of one module, and what recomputation keeps


def kept_and_gradients(policy: str) -> tuple[int, int, Gradients]:
    """Bytes that the forward pass keeps, those of all K and V, and gradients."""
    samples, model = samples_of(("IIIIIIIIta",)), tiny("mplug_owl3, fused").train()
    for parameter in model.get_submodule("vision_model").parameters():
        parameter.requires_grad_(False)
    batches = attach(model, 1, GATHER, samples, recompute=policy)
    kept: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    usual, encoding.TOKENS_AT_ONCE = encoding.TOKENS_AT_ONCE, 12  # three frames a portion
    try:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            loss = loss_of(model, samples, batches)
        loss.backward()
    finally:
        encoding.TOKENS_AT_ONCE = usual
    keys = 8 * 4 * (2 * 2 * 8) * 4  # frames, tokens, width of K and V, bytes
    return sum(kept.values()), 3 * keys, gradients_of(model)


def kept_by_policy() -> dict[str, tuple[int, int, Gradients]]:
    return {policy: kept_and_gradients(policy) for policy in ("none", "kv", "layer")}


def test_recomputation_keeps_no_visual_keys() -> None:
    [found] = run(1, kept_by_policy)
    kept, keys, want = found.pop("none")
    for policy, (less, _, gradients) in found.items():
        assert less < kept - keys, policy
        for name, gradient in gradients.items():
            assert torch.equal(gradient, want[name]), (policy, name)


def test_both_roles_of_a_module_are_planned() -> None:
    model = tiny("mplug_owl3, fused")
    layers = family_of(model).attention_layers(model)
    roles = {layer.name.removeprefix("language_model.model."): layer.role for layer in layers.values()}
    assert roles["layers.0.self_attn"] == roles["layers.2.self_attn"] == "self"
    assert roles["layers.0.self_attn.v_kv_proj"] == "cross" and "layers.2.self_attn.v_kv_proj" not in roles
    assert roles["vision_model.head"] == "local"
