"""Qwen3-Omni: ``Qwen3OmniMoeThinkerForConditionalGeneration`` of transformers, unmodified; see ``Thinker``."""

from __future__ import annotations

import numpy as np
from transformers import Qwen3OmniMoeConfig, Qwen3OmniMoeThinkerForConditionalGeneration
from transformers.models.qwen3_omni_moe.modeling_qwen3_omni_moe import (
    Qwen3OmniMoeAudioAttention,
    Qwen3OmniMoeVisionAttention,
)

from ds_lvxattn.families.qwen3_vl import Qwen3VLMoe
from ds_lvxattn.families.qwen_omni import Thinker
from ds_lvxattn.families.qwen_vl import QwenVL


class Qwen3Omni(Thinker, Qwen3VLMoe):
    """The Qwen3-Omni family: vision encoder, deep-stack features and experts of Qwen3-VL.

    Its videos are those of Qwen2.5-Omni, all parts side by side without times in the text, and positions in time have
    fractions.
    """

    name = "Qwen3-Omni"
    model_class = Qwen3OmniMoeThinkerForConditionalGeneration
    whole_config = Qwen3OmniMoeConfig
    vision_attention = Qwen3OmniMoeVisionAttention
    audio_attention = Qwen3OmniMoeAudioAttention
    audio_token = "<|audio_pad|>"
    position_type = np.float32
    trained = (*QwenVL.trained, "*visual.merger_list.*")
    video_processor = ("Qwen2VLVideoProcessor", {"shortest_edge": 128 * 32 * 32, "longest_edge": 768 * 32 * 32})

    video_sides = QwenVL.video_sides
    limited_video = QwenVL.limited_video
    video_parts = QwenVL.video_parts
