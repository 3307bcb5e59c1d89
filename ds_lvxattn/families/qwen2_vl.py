"""Qwen2-VL: ``Qwen2VLForConditionalGeneration`` of transformers, unmodified; see ``QwenVL``."""

from __future__ import annotations

from transformers import Qwen2VLForConditionalGeneration
from transformers.models.qwen2_vl.modeling_qwen2_vl import VisionAttention

from ds_lvxattn.data.sample import Part
from ds_lvxattn.families.qwen_vl import QwenVL

VIDEO_SIZE = {"shortest_edge": 128 * 28 * 28, "longest_edge": 768 * 28 * 28}  # pixels of a frame


class Qwen2VL(QwenVL):
    """The Qwen2-VL family: the parts of a video follow one another in time, however long it is."""

    name = "Qwen2-VL"
    model_class = Qwen2VLForConditionalGeneration
    vision_attention = VisionAttention
    video_processor = ("Qwen2VLVideoProcessor", VIDEO_SIZE)

    def time_of(self, part: Part) -> float | None:
        return part.number

    def visual_widths(self) -> tuple[int, ...]:
        vision = self.config.vision_config
        return (vision.hidden_size, vision.embed_dim * vision.spatial_merge_size**2)
