"""Small models of Qwen, with images and videos of any size."""

from __future__ import annotations

from typing import Any

from transformers import (
    CohereCompassConfig,
    CohereCompassForConditionalGeneration,
    Cosmos3OmniConfig,
    Cosmos3OmniForConditionalGeneration,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5OmniThinkerConfig,
    Qwen2_5OmniThinkerForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
    Qwen3_5MoeConfig,
    Qwen3_5MoeForConditionalGeneration,
    Qwen3OmniMoeThinkerConfig,
    Qwen3OmniMoeThinkerForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from ds_lvxattn.families.processors import ImagesAndVideos
from ds_lvxattn.families.qwen1.config import QWenConfig
from ds_lvxattn.families.qwen1.model import QWenLMHeadModel
from ds_lvxattn.families.videos import VideoProcessor
from ds_lvxattn.needle.small_models.scale import HEADS, IMAGE_ID, PIXELS, SIZE, SQUARE, TOKENS, Scale
from ds_lvxattn.needle.task import VOCABULARY

# Their models look for it, and the needle task has no such token.
NO_START: dict[str, Any] = {"vision_start_token_id": -1}


def qwen_vl_text(scale: Scale) -> dict[str, Any]:
    """The language model of a model of Qwen, whose rotary embedding has three parts."""
    third = scale.width // HEADS // 6
    section = [scale.width // HEADS // 2 - 2 * third, third, third]
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": section}
    return {**scale.text, "rope_parameters": rope}


def qwen1_vl(scale: Scale, queries: int = 4) -> PreTrainedModel:
    """The first Qwen-VL: a resampler makes ``queries`` visual tokens of a frame, a square number."""
    visual = {
        "image_size": SIZE, "patch_size": SIZE // 4, "width": scale.vision_width, "layers": 2,
        "heads": scale.vision_heads, "mlp_ratio": 2.0, "output_dim": scale.width, "n_queries": queries,
        "image_start_id": IMAGE_ID - 2,
    }  # fmt: skip
    config = QWenConfig(
        vocab_size=len(VOCABULARY), hidden_size=scale.width, intermediate_size=4 * scale.width,
        num_hidden_layers=scale.layers, num_attention_heads=HEADS, kv_channels=scale.width // HEADS,
        initializer_range=scale.spread, max_position_embeddings=scale.positions, seq_length=scale.positions,
        visual=visual, **TOKENS,
    )  # fmt: skip
    return QWenLMHeadModel(config)


def qwen2_vl(scale: Scale) -> PreTrainedModel:
    """Qwen2-VL with four visual tokens a frame."""
    config = Qwen2VLConfig(
        image_token_id=IMAGE_ID,
        vision_config={
            "depth": 2, "embed_dim": scale.vision_width, "mlp_ratio": 2, "num_heads": scale.vision_heads,
            "patch_size": SIZE // 4, "hidden_size": scale.width, "image_size": SIZE,
            "initializer_range": scale.spread,
        },
        text_config=qwen_vl_text(scale),
    )  # fmt: skip
    return Qwen2VLForConditionalGeneration(config)


def qwen2_5_vl(scale: Scale) -> PreTrainedModel:
    """Qwen2.5-VL with four visual tokens a frame; the last of its vision layers attends beyond a window."""
    vision, text = qwen2_5_vl_vision(scale), qwen_vl_text(scale)
    config = Qwen2_5_VLConfig(image_token_id=IMAGE_ID, vision_config=vision, text_config=text)
    return Qwen2_5_VLForConditionalGeneration(config)


def qwen2_5_vl_vision(scale: Scale) -> dict[str, Any]:
    return {
        "depth": 2, "hidden_size": scale.vision_width, "intermediate_size": 2 * scale.vision_width,
        "num_heads": scale.vision_heads, "patch_size": SIZE // 4, "window_size": SIZE // 2,
        "out_hidden_size": scale.width, "fullatt_block_indexes": [1], "image_size": SIZE,
        "initializer_range": scale.spread,
    }  # fmt: skip


def qwen2_5_omni(scale: Scale) -> PreTrainedModel:
    """Qwen2.5-Omni's thinker: Qwen2.5-VL beside an audio encoder."""
    config = Qwen2_5OmniThinkerConfig(
        image_token_index=IMAGE_ID, vision_config=qwen2_5_vl_vision(scale), text_config=qwen_vl_text(scale),
        audio_config={**audio(scale), "n_window": 8}, **NO_START,
    )  # fmt: skip
    return Qwen2_5OmniThinkerForConditionalGeneration(config)


def audio(scale: Scale) -> dict[str, Any]:
    """An audio encoder, which nothing here calls."""
    return {
        "d_model": scale.vision_width, "encoder_layers": 1, "encoder_attention_heads": scale.vision_heads,
        "encoder_ffn_dim": scale.vision_width, "num_mel_bins": 8, "max_source_positions": 16,
        "output_dim": scale.width,
    }  # fmt: skip


def qwen3_vl(scale: Scale) -> PreTrainedModel:
    """Qwen3-VL with four visual tokens a frame, and features of two vision layers added behind two text layers."""
    text = {**qwen_vl_text(scale), "head_dim": scale.width // HEADS}
    config = Qwen3VLConfig(image_token_id=IMAGE_ID, vision_config=qwen3_vl_vision(scale), text_config=text)
    return Qwen3VLForConditionalGeneration(config)


def cosmos3_omni(scale: Scale) -> PreTrainedModel:
    """The same as Cosmos 3 Omni."""
    text = {**qwen_vl_text(scale), "head_dim": scale.width // HEADS, "model_type": "qwen3_vl_text"}
    config = Cosmos3OmniConfig(image_token_id=IMAGE_ID, vision_config=qwen3_vl_vision(scale), text_config=text)
    return Cosmos3OmniForConditionalGeneration(config)


def cohere_compass(scale: Scale, window: int = 64) -> PreTrainedModel:
    """Qwen3-VL with the text of Cohere 2: every third layer sees beyond a window, and has no rotary positions."""
    of_qwen = qwen_vl_text(scale)
    kinds = ["full_attention" if layer % 3 == 2 else "sliding_attention" for layer in range(scale.layers)]
    text = {
        **of_qwen, "rope_parameters": {"sliding_attention": of_qwen["rope_parameters"], "full_attention": None},
        "layer_types": kinds, "sliding_window": window, "head_dim": scale.width // HEADS, "logit_scale": 0.5,
    }  # fmt: skip
    config = CohereCompassConfig(image_token_id=IMAGE_ID, vision_config=qwen3_vl_vision(scale), text_config=text)
    return CohereCompassForConditionalGeneration(config)


def qwen3_vl_moe(scale: Scale, **options: Any) -> PreTrainedModel:
    """Qwen3-VL with four experts, two for each token."""
    vision, text = qwen3_vl_vision(scale), qwen3_vl_moe_text(scale)
    config = Qwen3VLMoeConfig(image_token_id=IMAGE_ID, vision_config=vision, text_config=text)
    return Qwen3VLMoeForConditionalGeneration._from_config(config, **options)


def qwen3_vl_moe_text(scale: Scale) -> dict[str, Any]:
    return {
        **qwen_vl_text(scale), "head_dim": scale.width // HEADS, "num_experts": 4, "num_experts_per_tok": 2,
        "moe_intermediate_size": scale.width,
    }  # fmt: skip


def qwen3_omni(scale: Scale, **options: Any) -> PreTrainedModel:
    """Qwen3-Omni's thinker: Qwen3-VL with experts beside an audio encoder."""
    config = Qwen3OmniMoeThinkerConfig(
        image_token_id=IMAGE_ID, vision_config=qwen3_vl_vision(scale), text_config=qwen3_vl_moe_text(scale),
        audio_config={**audio(scale), "downsample_hidden_size": 8}, **NO_START,
    )  # fmt: skip
    return Qwen3OmniMoeThinkerForConditionalGeneration._from_config(config, **options)


def qwen3_5(scale: Scale) -> PreTrainedModel:
    """Qwen3.5 with four visual tokens a frame; its layers but the second one are linear attention."""
    config = Qwen3_5Config(
        image_token_id=IMAGE_ID, vision_config=qwen3_5_vision(scale), text_config=qwen3_5_text(scale)
    )
    return Qwen3_5ForConditionalGeneration(config)


def qwen3_5_moe(scale: Scale, **options: Any) -> PreTrainedModel:
    """Qwen3.5 with four experts, two for each token, and one for all."""
    text = {
        **qwen3_5_text(scale), "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": scale.width,
        "shared_expert_intermediate_size": scale.width,
    }  # fmt: skip
    config = Qwen3_5MoeConfig(image_token_id=IMAGE_ID, vision_config=qwen3_5_vision(scale), text_config=text)
    return Qwen3_5MoeForConditionalGeneration._from_config(config, **options)


def qwen3_5_text(scale: Scale) -> dict[str, Any]:
    """Four value heads of linear attention, two of which read a key head; a quarter of a head rotates."""
    kinds = ["full_attention" if layer == 1 else "linear_attention" for layer in range(scale.layers)]
    rope = {
        "rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.75, "mrope_section": [1, 1, 1],
    }  # fmt: skip
    return {
        **scale.text, "head_dim": scale.width // HEADS, "rope_parameters": rope, "layer_types": kinds,
        "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": scale.width // HEADS,
        "linear_value_head_dim": scale.width // HEADS, "linear_conv_kernel_dim": 4,
    }  # fmt: skip


def qwen3_5_vision(scale: Scale) -> dict[str, Any]:
    """That of Qwen3-VL, without features for several layers."""
    vision = qwen3_vl_vision(scale)
    del vision["deepstack_visual_indexes"]
    return vision


def qwen3_vl_vision(scale: Scale) -> dict[str, Any]:
    return {
        "depth": 3, "hidden_size": scale.vision_width, "intermediate_size": 2 * scale.vision_width,
        "num_heads": scale.vision_heads, "patch_size": SIZE // 4, "out_hidden_size": scale.width,
        "num_position_embeddings": 36, "deepstack_visual_indexes": [0, 1], "image_size": SIZE,
        "initializer_range": scale.spread,
    }  # fmt: skip


def qwen_vl_processor(kind: str, pixels: int) -> Any:
    """Images and videos for a model of Qwen.

    Args:
        kind: transformers' class of the video processor.
        pixels: of a frame, or of a video, at most.
    """
    images = Qwen2VLImageProcessorPil(patch_size=SIZE // 4, **PIXELS)
    settings = {
        "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True, **PIXELS, "resample": 3,
        "patch_size": SIZE // 4, "merge_size": 2, "temporal_patch_size": 2, "video_processor_type": kind,
        "size": {"shortest_edge": SQUARE["height"] ** 2, "longest_edge": pixels},
    }  # fmt: skip
    return ImagesAndVideos(images, VideoProcessor(settings))
