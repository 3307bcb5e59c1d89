"""Small models whose visual tokens stand in the text, frames of one size."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    AriaConfig,
    AriaForConditionalGeneration,
    Blip2Config,
    Blip2ForConditionalGeneration,
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Idefics2Config,
    Idefics2ForConditionalGeneration,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    InstructBlipVideoConfig,
    InstructBlipVideoForConditionalGeneration,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    OPTConfig,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PreTrainedModel,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

from ds_lvxattn.families.instructblip import InstructedImages, with_features_of_frames_alone
from ds_lvxattn.needle.small_models.scale import HEADS, IMAGE_ID, PIXELS, SIZE, SQUARE, TOKENS, Scale
from ds_lvxattn.needle.task import VOCABULARY, build_tokenizer


def llava(scale: Scale, feature_layer: int | list[int] = -1) -> PreTrainedModel:
    """LLaVA around a CLIP and a Llama model: four visual tokens a frame, without the class token, in the text."""
    vision = CLIPVisionConfig(**scale.vision, num_hidden_layers=2)
    config = LlavaConfig(
        vision_config=vision, text_config=LlamaConfig(**scale.text), image_token_index=IMAGE_ID,
        vision_feature_layer=feature_layer,
    )  # fmt: skip
    return LlavaForConditionalGeneration(config)


def blip2(scale: Scale, queries: int = 4) -> PreTrainedModel:
    """BLIP-2 around an OPT model: a Q-Former makes ``queries`` visual tokens of a frame, which stand in the text."""
    config = Blip2Config(**_q_former_around_opt(scale, queries), image_token_index=IMAGE_ID)
    return _with_random_queries(Blip2ForConditionalGeneration(config))


def instructblip(scale: Scale, queries: int = 4, video: bool = False) -> PreTrainedModel:
    """InstructBLIP, likewise; its Q-Former reads the instruction too."""
    parts = _q_former_around_opt(scale, queries)
    parts["qformer_config"]["vocab_size"] = len(VOCABULARY)
    if video:
        of_video = InstructBlipVideoConfig(**parts, video_token_index=IMAGE_ID)
        return _with_random_queries(with_features_of_frames_alone(InstructBlipVideoForConditionalGeneration(of_video)))
    config = InstructBlipConfig(**parts, image_token_index=IMAGE_ID)
    return _with_random_queries(InstructBlipForConditionalGeneration(config))


def _q_former_around_opt(scale: Scale, queries: int) -> dict[str, Any]:
    q_former = {
        "hidden_size": scale.vision_width, "intermediate_size": 2 * scale.vision_width, "num_hidden_layers": 3,
        "num_attention_heads": scale.vision_heads, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
        "initializer_range": scale.spread,
    }  # fmt: skip
    text = OPTConfig(
        vocab_size=len(VOCABULARY), hidden_size=scale.width, word_embed_proj_dim=scale.width, ffn_dim=2 * scale.width,
        num_hidden_layers=scale.layers, num_attention_heads=HEADS, max_position_embeddings=scale.positions,
        dropout=0.0, init_std=scale.spread, **TOKENS,
    )  # fmt: skip
    return {
        "vision_config": {**scale.vision, "num_hidden_layers": 2, "initializer_range": scale.spread},
        "qformer_config": q_former, "text_config": text, "num_query_tokens": queries,
        "initializer_range": scale.spread,
    }  # fmt: skip


def _with_random_queries(model: Any) -> PreTrainedModel:
    """They start at 0, and equal queries stay equal."""
    with torch.no_grad():
        model.query_tokens.normal_()
    return model


def instructed_images() -> InstructedImages:
    """The image processor of ``instructblip``, whose Q-Former has the tokenizer of the language model."""
    return InstructedImages(BlipImageProcessorPil(size=SQUARE, **PIXELS), build_tokenizer(), build_tokenizer())


def idefics2(scale: Scale, latents: int = 4) -> PreTrainedModel:
    """Idefics2 around a Mistral model: a perceiver makes ``latents`` of a frame, which stand in the text."""
    perceiver = {
        "hidden_size": scale.width, "resampler_n_latents": latents, "resampler_depth": 1,
        "resampler_n_heads": scale.vision_heads, "resampler_head_dim": scale.vision_width // scale.vision_heads,
        "num_key_value_heads": scale.vision_heads // 2, "initializer_range": scale.spread,
    }  # fmt: skip
    config = Idefics2Config(
        vision_config={**scale.vision, "num_hidden_layers": 2, "initializer_range": scale.spread},
        perceiver_config=perceiver, text_config=MistralConfig(**scale.text, sliding_window=None),
        image_token_id=IMAGE_ID,
    )  # fmt: skip
    model = Idefics2ForConditionalGeneration(config)
    with torch.no_grad():
        model.model.connector.perceiver_resampler.latents.normal_()  # they start at 1, and equal latents stay equal
    return model


def idefics3(scale: Scale, smol: bool = False) -> PreTrainedModel:
    """Idefics3, or SmolVLM, around a Llama model: four visual tokens a square, which stand in the text."""
    vision = {
        **scale.vision, "patch_size": SIZE // 4, "num_hidden_layers": 2, "initializer_range": scale.spread,
    }  # fmt: skip
    sizes: dict[str, Any] = {
        "vision_config": vision, "text_config": LlamaConfig(**scale.text), "image_token_id": IMAGE_ID,
        "scale_factor": 2, "initializer_range": scale.spread,
    }  # fmt: skip
    if smol:
        return SmolVLMForConditionalGeneration(SmolVLMConfig(**sizes))
    return Idefics3ForConditionalGeneration(Idefics3Config(**sizes))


def aria(scale: Scale, queries: int = 4, **options: Any) -> PreTrainedModel:
    """Aria with four experts: its projector makes ``queries`` visual tokens of a frame, which stand in the text.

    Its image processor makes images of 490 pixels at least, so patches are large and the vision encoder is narrow.
    """
    side = 490
    vision = {
        **scale.vision, "model_type": "idefics3_vision", "hidden_size": scale.vision_width // 4,
        "num_hidden_layers": 2, "image_size": side, "patch_size": side // 2, "initializer_range": scale.spread,
    }  # fmt: skip
    text = {
        **scale.text, "model_type": "aria_text", "intermediate_size": scale.width, "moe_num_experts": 4, "moe_topk": 2,
        "moe_num_shared_experts": 1,
    }  # fmt: skip
    config = AriaConfig(
        vision_config=vision, text_config=text, projector_patch_to_query_dict={4: queries},
        image_token_index=IMAGE_ID, initializer_range=scale.spread,
    )  # fmt: skip
    return AriaForConditionalGeneration._from_config(config, **options)


def gemma3(scale: Scale, window: int = 64, head: bool = False) -> PreTrainedModel:
    """Gemma 3 with four visual tokens a frame, which see each other; every third layer sees beyond a window.

    Args:
        head: whether the vision encoder has the pooling head that the model does not use.
    """
    size = scale.width // HEADS
    kinds = ["full_attention" if layer % 3 == 2 else "sliding_attention" for layer in range(scale.layers)]
    config = Gemma3Config(
        vision_config={**scale.vision, "model_type": "siglip_vision_model", "num_hidden_layers": 2,
                       "vision_use_head": head},
        text_config={**scale.text, "head_dim": size, "query_pre_attn_scalar": size, "sliding_window": window,
                     "layer_types": kinds},
        mm_tokens_per_image=4, image_token_index=IMAGE_ID, initializer_range=scale.spread,
        boi_token_index=TOKENS["bos_token_id"], eoi_token_index=TOKENS["eos_token_id"],
    )  # fmt: skip
    return Gemma3ForConditionalGeneration(config)


def paligemma(scale: Scale, **text: Any) -> PreTrainedModel:
    """PaliGemma around Gemma with four visual tokens a frame; what is ahead of the first answer sees each other."""
    config = PaliGemmaConfig(
        vision_config={**scale.vision, "model_type": "siglip_vision_model", "num_hidden_layers": 2,
                       "projection_dim": scale.width, "vision_use_head": False},
        text_config={**scale.text, "model_type": "gemma", "head_dim": scale.width // HEADS, **text},
        projection_dim=scale.width, hidden_size=scale.width, image_token_index=IMAGE_ID,
    )  # fmt: skip
    return PaliGemmaForConditionalGeneration(config)
