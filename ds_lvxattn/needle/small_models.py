"""Small random models of the families, for the vocabulary and the image size of ``data.needle``: ``--model NAME``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
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
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)
from transformers.models.aria.image_processing_pil_aria import AriaImageProcessorPil
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.idefics.image_processing_pil_idefics import IdeficsImageProcessorPil
from transformers.models.idefics2.image_processing_pil_idefics2 import Idefics2ImageProcessorPil
from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from ds_lvxattn.families.flamingo.open_flamingo import OpenFlamingoConfig, OpenFlamingoModel
from ds_lvxattn.families.idefics import with_loss_over_all_tokens
from ds_lvxattn.families.owl.hyper_qwen2 import MPlugOwl3Config, mPLUGOwl3Model
from ds_lvxattn.needle.quickstart_model import WIDTH, build_quickstart
from ds_lvxattn.needle.task import BOS, EOS, IMAGE, PAD, VOCABULARY, NeedleTask

PIXELS: dict[str, Any] = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
SIZE = NeedleTask().image_size
TOKENS: dict[str, Any] = {
    "bos_token_id": VOCABULARY.index(BOS),
    "eos_token_id": VOCABULARY.index(EOS),
    "pad_token_id": VOCABULARY.index(PAD),
}


def quickstart(seed: int) -> tuple[PreTrainedModel, Any]:
    """The model of ``models.quickstart`` and its image processor."""
    size = {"height": SIZE, "width": SIZE}
    return build_quickstart(seed), MllamaImageProcessorPil(size=size, max_image_tiles=1, **PIXELS)


def idefics(seed: int) -> tuple[PreTrainedModel, Any]:
    """Idefics with a resampler of 4 latents a frame and open gates; the image token is an additional one, as there."""
    image = VOCABULARY.index(IMAGE)
    config = IdeficsConfig(
        vocab_size=image, additional_vocab_size=len(VOCABULARY) - image, hidden_size=WIDTH,
        intermediate_size=2 * WIDTH, num_hidden_layers=4, num_attention_heads=4, cross_layer_interval=2,
        qk_layer_norms=True, alpha_initializer="ones", alpha_type="vector", use_resampler=True,
        freeze_text_layers=False, freeze_vision_layers=False, initializer_range=0.1, **TOKENS,
        vision_config={
            "embed_dim": WIDTH, "image_size": SIZE, "patch_size": SIZE // 2, "intermediate_size": 2 * WIDTH,
            "num_hidden_layers": 2, "num_attention_heads": 4, "initializer_range": 0.1,
        },
        perceiver_config={
            "use_resampler": True, "resampler_n_latents": 4, "resampler_depth": 1, "resampler_n_heads": 4,
            "resampler_head_dim": WIDTH // 4,
        },
    )  # fmt: skip
    processor = IdeficsImageProcessorPil(image_size=SIZE, **PIXELS)
    return with_loss_over_all_tokens(_random(IdeficsForVisionText2Text, config, seed)), processor


def open_flamingo(seed: int) -> tuple[PreTrainedModel, Any]:
    """OpenFlamingo around a Llama and a CLIP model, with open gates; text sees all images before it.

    The package trains no vision encoder, so that of this model stays at its random weights.
    """
    vision = CLIPVisionConfig(
        hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=1, num_attention_heads=4, image_size=SIZE,
        patch_size=SIZE // 4,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=len(VOCABULARY), hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=4096, initializer_range=0.1, **TOKENS,
    )  # fmt: skip
    config = OpenFlamingoConfig(
        vision, text, cross_attn_every_n_layers=2, media_token_id=VOCABULARY.index(IMAGE),
        eoc_token_id=VOCABULARY.index(EOS), only_attend_immediate_media=False,
    )  # fmt: skip
    model = _random(OpenFlamingoModel, config, seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("attn_gate", "ff_gate")):  # they start closed
                parameter.fill_(1.0)
    square = {"height": SIZE, "width": SIZE}
    return model, CLIPImageProcessorPil(size=square, crop_size=square, **PIXELS)


def mplug_owl3(seed: int) -> tuple[PreTrainedModel, Any]:
    """mPLUG-Owl3 with fused hyper attention in two of four layers, one of them the first."""
    config = MPlugOwl3Config(
        vocab_size=len(VOCABULARY), hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=4096, initializer_range=0.1,
        hyper_layers=[1, 3], hyper_attention="fused", projector="mlp", **TOKENS,
        vision_config={
            "hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_hidden_layers": 3, "num_attention_heads": 4,
            "image_size": SIZE, "patch_size": SIZE // 2, "vision_use_head": False,
        },
    )  # fmt: skip
    processor = SiglipImageProcessorPil(size={"height": SIZE, "width": SIZE}, **PIXELS)
    return _random(mPLUGOwl3Model, config, seed), processor


def llava(seed: int) -> tuple[PreTrainedModel, Any]:
    """LLaVA around a CLIP and a Llama model: four visual tokens a frame in the text."""
    vision = CLIPVisionConfig(
        hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=2, num_attention_heads=4, image_size=SIZE,
        patch_size=SIZE // 2,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=len(VOCABULARY), hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=4096, initializer_range=0.1, **TOKENS,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=VOCABULARY.index(IMAGE), vision_feature_layer=-1
    )
    square = {"height": SIZE, "width": SIZE}
    return _random(LlavaForConditionalGeneration, config, seed), CLIPImageProcessorPil(
        size=square, crop_size=square, **PIXELS
    )


def qwen2_5_vl(seed: int) -> tuple[PreTrainedModel, Any]:
    """Qwen2.5-VL with four visual tokens a frame; the last of its vision layers attends beyond a window."""
    config = Qwen2_5_VLConfig(
        image_token_id=VOCABULARY.index(IMAGE),
        vision_config={
            "depth": 2, "hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_heads": 4, "patch_size": SIZE // 4,
            "window_size": SIZE // 2, "out_hidden_size": WIDTH, "fullatt_block_indexes": [1], "image_size": SIZE,
            "initializer_range": 0.1,
        },
        text_config={
            "vocab_size": len(VOCABULARY), "hidden_size": WIDTH, "intermediate_size": 2 * WIDTH,
            "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
            "max_position_embeddings": 4096, "initializer_range": 0.1, **TOKENS,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 4, 4]},
        },
    )  # fmt: skip
    processor = Qwen2VLImageProcessorPil(patch_size=SIZE // 4, **PIXELS)
    return _random(Qwen2_5_VLForConditionalGeneration, config, seed), processor


def blip2(seed: int) -> tuple[PreTrainedModel, Any]:
    """BLIP-2 around an OPT model: a Q-Former makes four visual tokens of a frame, which stand in the text."""
    vision = {
        "hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4,
        "image_size": SIZE, "patch_size": SIZE // 2, "initializer_range": 0.1,
    }  # fmt: skip
    q_former = {
        "hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4,
        "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "initializer_range": 0.1,
    }  # fmt: skip
    text = OPTConfig(
        vocab_size=len(VOCABULARY), hidden_size=WIDTH, word_embed_proj_dim=WIDTH, ffn_dim=2 * WIDTH,
        num_hidden_layers=4, num_attention_heads=4, max_position_embeddings=4096, dropout=0.0, init_std=0.1, **TOKENS,
    )  # fmt: skip
    config = Blip2Config(
        vision_config=vision, qformer_config=q_former, text_config=text, num_query_tokens=4,
        image_token_index=VOCABULARY.index(IMAGE), initializer_range=0.1,
    )  # fmt: skip
    model = _random(Blip2ForConditionalGeneration, config, seed)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model.query_tokens.normal_()  # they start at 0, and equal queries stay equal
    return model, BlipImageProcessorPil(size={"height": SIZE, "width": SIZE}, **PIXELS)


def idefics2(seed: int) -> tuple[PreTrainedModel, Any]:
    """Idefics2 around a Mistral model: a perceiver makes four latents of a frame, which stand in the text."""
    vision = {
        "hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4,
        "image_size": SIZE, "patch_size": SIZE // 2, "initializer_range": 0.1,
    }  # fmt: skip
    perceiver = {
        "hidden_size": WIDTH, "resampler_n_latents": 4, "resampler_depth": 1, "resampler_n_heads": 4,
        "resampler_head_dim": WIDTH // 4, "num_key_value_heads": 2, "initializer_range": 0.1,
    }  # fmt: skip
    text = MistralConfig(
        vocab_size=len(VOCABULARY), hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=4096, initializer_range=0.1,
        sliding_window=None, **TOKENS,
    )  # fmt: skip
    config = Idefics2Config(
        vision_config=vision, perceiver_config=perceiver, text_config=text, image_token_id=VOCABULARY.index(IMAGE)
    )
    model = _random(Idefics2ForConditionalGeneration, config, seed)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model.model.connector.perceiver_resampler.latents.normal_()  # they start at 1, and equal latents stay equal
    size = {"shortest_edge": SIZE, "longest_edge": SIZE}
    return model, Idefics2ImageProcessorPil(size=size, do_image_splitting=False, **PIXELS)


def aria(seed: int) -> tuple[PreTrainedModel, Any]:
    """Aria with four experts: its projector makes four visual tokens of a frame, which stand in the text.

    Its image processor makes images of 490 pixels at least, so patches are large and the vision encoder is narrow.
    """
    side = 490
    vision = {
        "model_type": "idefics3_vision", "hidden_size": WIDTH // 3, "intermediate_size": WIDTH, "num_hidden_layers": 2,
        "num_attention_heads": 4, "image_size": side, "patch_size": side // 2, "initializer_range": 0.1,
    }  # fmt: skip
    text = {
        "model_type": "aria_text", "vocab_size": len(VOCABULARY), "hidden_size": WIDTH, "intermediate_size": WIDTH,
        "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096,
        "moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1, "initializer_range": 0.1, **TOKENS,
    }  # fmt: skip
    config = AriaConfig(
        vision_config=vision, text_config=text, projector_patch_to_query_dict={4: 4},
        image_token_index=VOCABULARY.index(IMAGE), initializer_range=0.1,
    )  # fmt: skip
    return _random(AriaForConditionalGeneration, config, seed), AriaImageProcessorPil(max_image_size=side, **PIXELS)


SMALL_MODELS: dict[str, Callable[[int], tuple[PreTrainedModel, Any]]] = {
    "quickstart": quickstart,
    "small-idefics": idefics,
    "small-openflamingo": open_flamingo,
    "small-mplug-owl3": mplug_owl3,
    "small-llava": llava,
    "small-blip2": blip2,
    "small-idefics2": idefics2,
    "small-aria": aria,
    "small-qwen2.5-vl": qwen2_5_vl,
}


def _random(model: type[Any], config: Any, seed: int) -> Any:
    """``model(config)`` with weights of ``seed``, in float32 on the CPU; the caller's random state stays as it is."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return model(config)
