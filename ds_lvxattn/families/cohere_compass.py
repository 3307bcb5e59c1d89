"""Cohere Compass: ``CohereCompassForConditionalGeneration`` of transformers, unmodified; see ``Qwen3VL``.

Vision encoder, deep-stack features, positions and videos are Qwen3-VL's; around them is the text of Cohere 2, with
sliding windows, and perhaps without rotary positions in some of its layers.
"""

from __future__ import annotations

from transformers import CohereCompassForConditionalGeneration
from transformers.models.cohere_compass.modeling_cohere_compass import CohereCompassVisionAttention

from ds_lvxattn.families.qwen3_vl import Qwen3VL


class CohereCompass(Qwen3VL):
    """The Cohere Compass family (North Vision)."""

    name = "Cohere Compass"
    model_class = CohereCompassForConditionalGeneration
    vision_attention = CohereCompassVisionAttention
    image_token = "<|IMAGE_PAD|>"
    frame_text = "<|VISION_START|><|IMAGE_PAD|><|VISION_END|>"
    video_token = "<|VIDEO_PAD|>"
    video_text = "<|VISION_START|><|VIDEO_PAD|><|VISION_END|>"
    video_processor = ("CohereCompassVideoProcessor", Qwen3VL.video_processor[1])
