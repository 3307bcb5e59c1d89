"""Tiny models of the other families, with open gates and random weights, for the samples of ``tiny_model``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import (
    AriaConfig,
    AriaForConditionalGeneration,
    Blip2Config,
    Blip2ForConditionalGeneration,
    CLIPVisionConfig,
    Idefics2Config,
    Idefics2ForConditionalGeneration,
    IdeficsConfig,
    IdeficsForVisionText2Text,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    OPTConfig,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from ds_lvxattn.families.flamingo.open_flamingo import OpenFlamingoConfig, OpenFlamingoModel
from ds_lvxattn.families.idefics import with_loss_over_all_tokens
from ds_lvxattn.families.owl.hyper_qwen2 import MPlugOwl3Config, mPLUGOwl3Model
from tests.support.tiny_model import IMAGE_TOKEN, SIZE


def idefics(use_resampler: bool, qk_layer_norms: bool) -> nn.Module:
    """Cross-attention ahead of every second layer; the image token is an additional token, as in published models."""
    config = IdeficsConfig(
        vocab_size=IMAGE_TOKEN, additional_vocab_size=1, hidden_size=32, intermediate_size=64, num_hidden_layers=4,
        num_attention_heads=4, cross_layer_interval=2, qk_layer_norms=qk_layer_norms, use_resampler=use_resampler,
        alpha_initializer="normal", alphas_initializer_range=0.7, alpha_type="vector", initializer_range=0.2,
        freeze_text_layers=False, freeze_vision_layers=False, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        max_position_embeddings=64,
        vision_config={
            "embed_dim": 16, "image_size": SIZE, "patch_size": 14, "intermediate_size": 32, "num_hidden_layers": 1,
            "num_attention_heads": 2, "initializer_range": 0.2,
        },
        perceiver_config={
            "use_resampler": use_resampler, "resampler_n_latents": 3, "resampler_depth": 2, "resampler_n_heads": 2,
            "resampler_head_dim": 8, "qk_layer_norms_perceiver": qk_layer_norms,
        },
    )  # fmt: skip
    return with_loss_over_all_tokens(IdeficsForVisionText2Text(config))


def open_flamingo(immediate: bool) -> nn.Module:
    """The package's model around a CLIP and a Llama model; its heads are always 8 of 64, its latents 64."""
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=SIZE, patch_size=14
    )
    text = LlamaConfig(
        vocab_size=IMAGE_TOKEN + 1, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.2,
    )  # fmt: skip
    config = OpenFlamingoConfig(
        vision, text, cross_attn_every_n_layers=2, media_token_id=IMAGE_TOKEN, only_attend_immediate_media=immediate
    )
    return OpenFlamingoModel(config)


def llava() -> nn.Module:
    """Two layers' features side by side, without the class token: four visual tokens a frame in the text."""
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=SIZE, patch_size=14
    )
    text = LlamaConfig(
        vocab_size=IMAGE_TOKEN + 1, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.2,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=IMAGE_TOKEN, vision_feature_layer=[-2, -1]
    )
    return LlavaForConditionalGeneration(config)


def blip2() -> nn.Module:
    """Three visual tokens a frame, in the text of an OPT model with learned positions."""
    vision = {
        "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
        "image_size": SIZE, "patch_size": 14, "initializer_range": 0.2,
    }  # fmt: skip
    q_former = {
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2,
        "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "initializer_range": 0.2,
    }  # fmt: skip
    text = OPTConfig(
        vocab_size=IMAGE_TOKEN + 1, hidden_size=32, word_embed_proj_dim=32, ffn_dim=64, num_hidden_layers=3,
        num_attention_heads=4, max_position_embeddings=128, dropout=0.0, init_std=0.2, pad_token_id=0,
    )  # fmt: skip
    config = Blip2Config(
        vision_config=vision, qformer_config=q_former, text_config=text, num_query_tokens=3,
        image_token_index=IMAGE_TOKEN, initializer_range=0.2,
    )  # fmt: skip
    return Blip2ForConditionalGeneration(config)


def qwen2_5_vl() -> nn.Module:
    """Four visual tokens a frame; one vision layer attends within windows of two by two patches, one to all."""
    config = Qwen2_5_VLConfig(
        image_token_id=IMAGE_TOKEN,
        vision_config={
            "depth": 2, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "patch_size": SIZE // 4,
            "window_size": SIZE // 2, "out_hidden_size": 32, "fullatt_block_indexes": [1], "image_size": SIZE,
            "initializer_range": 0.2,
        },
        text_config={
            "vocab_size": IMAGE_TOKEN + 1, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
            "initializer_range": 0.2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]},
        },
    )  # fmt: skip
    return Qwen2_5_VLForConditionalGeneration(config)


def idefics2() -> nn.Module:
    """Three latents a frame, in the text of a Mistral model without a window."""
    text = MistralConfig(
        vocab_size=IMAGE_TOKEN + 1, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.2, sliding_window=None, pad_token_id=0,
    )  # fmt: skip
    vision = {
        "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
        "image_size": SIZE, "patch_size": 14, "initializer_range": 0.2,
    }  # fmt: skip
    perceiver = {
        "hidden_size": 32, "resampler_n_latents": 3, "resampler_depth": 2, "resampler_n_heads": 2,
        "resampler_head_dim": 8, "num_key_value_heads": 1, "initializer_range": 0.2,
    }  # fmt: skip
    config = Idefics2Config(
        vision_config=vision, perceiver_config=perceiver, text_config=text, image_token_id=IMAGE_TOKEN
    )
    return Idefics2ForConditionalGeneration(config)


def aria() -> nn.Module:
    """Three visual tokens of the four patches of a frame; the processor knows no images smaller than 490 pixels."""
    config = AriaConfig(
        vision_config={
            "model_type": "idefics3_vision", "hidden_size": 4, "intermediate_size": 8, "num_hidden_layers": 1,
            "num_attention_heads": 2, "image_size": 490, "patch_size": 245,
        },
        text_config={
            "model_type": "aria_text", "vocab_size": IMAGE_TOKEN + 1, "hidden_size": 32, "intermediate_size": 16,
            "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
            "moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1, "initializer_range": 0.2,
        },
        projector_patch_to_query_dict={4: 3}, image_token_index=IMAGE_TOKEN,
    )  # fmt: skip
    # torch's grouped products of the experts have no float64.
    return AriaForConditionalGeneration._from_config(config, experts_implementation="eager")


def text_only() -> nn.Module:
    """The second and third layer see the last five tokens."""
    config = Qwen2Config(
        use_sliding_window=True, sliding_window=5, max_window_layers=1,
        vocab_size=IMAGE_TOKEN, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.2,
    )  # fmt: skip
    return Qwen2ForCausalLM(config)


def mplug_owl3(hyper_attention: str) -> nn.Module:
    """Hyper layers: the first, the second and the last of four."""
    config = MPlugOwl3Config(
        vocab_size=IMAGE_TOKEN + 1, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.2, hyper_layers=[1, 2, 4],
        hyper_attention=hyper_attention, projector="mlp" if hyper_attention == "fused" else "linear",
        vision_config={
            "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
            "image_size": SIZE, "patch_size": 14,
        },
    )  # fmt: skip
    return mPLUGOwl3Model(config)


FAMILIES: dict[str, Callable[[], Any]] = {
    "idefics": lambda: idefics(use_resampler=False, qk_layer_norms=False),
    "idefics, perceiver, norms": lambda: idefics(use_resampler=True, qk_layer_norms=True),
    "open_flamingo, immediate": lambda: open_flamingo(immediate=True),
    "open_flamingo, all previous": lambda: open_flamingo(immediate=False),
    "llava": llava,
    "blip2": blip2,
    "idefics2": idefics2,
    "aria": aria,
    "qwen2.5-vl": qwen2_5_vl,
    "text only": text_only,
    "mplug_owl3, fused": lambda: mplug_owl3("fused"),
    "mplug_owl3, gate": lambda: mplug_owl3("gate"),
    "mplug_owl3, gate_proj": lambda: mplug_owl3("gate_proj"),
}


def tiny(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The model called ``name``, with the same weights at every call: norms and embeddings at random too."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(1)
        model = FAMILIES[name]()
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        for name, parameter in model.named_parameters():
            if name.endswith("_gate"):  # OpenFlamingo starts with closed gates
                parameter.fill_(0.7)
    return nn.Module.to(model, dtype)
