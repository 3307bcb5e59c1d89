"""Qwen2.5-Omni: ``Qwen2_5OmniThinkerForConditionalGeneration`` of transformers, unmodified; see ``Thinker``."""

from __future__ import annotations

import numpy as np
from transformers import Qwen2_5OmniConfig, Qwen2_5OmniThinkerForConditionalGeneration
from transformers.models.qwen2_5_omni.modeling_qwen2_5_omni import Qwen2_5OmniAudioAttention, Qwen2_5OmniVisionAttention

from ds_lvxattn.families.qwen2_5_vl import Qwen25VL
from ds_lvxattn.families.qwen_omni import Thinker


class Qwen25Omni(Thinker, Qwen25VL):
    """The Qwen2.5-Omni family: the vision encoder of Qwen2.5-VL; positions in time are whole numbers."""

    name = "Qwen2.5-Omni"
    model_class = Qwen2_5OmniThinkerForConditionalGeneration
    whole_config = Qwen2_5OmniConfig
    vision_attention = Qwen2_5OmniVisionAttention
    audio_attention = Qwen2_5OmniAudioAttention
    image_token = "<|IMAGE|>"
    frame_text = "<|vision_bos|><|IMAGE|><|vision_eos|>"
    video_token = "<|VIDEO|>"
    video_text = "<|vision_bos|><|VIDEO|><|vision_eos|>"
    audio_token = "<|AUDIO|>"
    position_type = np.int64
