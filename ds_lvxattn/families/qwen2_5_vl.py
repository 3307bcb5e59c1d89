"""Qwen2.5-VL: ``Qwen2_5_VLForConditionalGeneration`` of transformers, unmodified; see ``QwenVL``."""

from __future__ import annotations

import functools
import inspect

import numpy as np
from torch import Tensor, nn
from transformers import PreTrainedModel, Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLModel
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLVisionAttention
from transformers.vision_utils import get_vision_window_index

from ds_lvxattn.data.sample import Part
from ds_lvxattn.families.qwen2_vl import VIDEO_SIZE
from ds_lvxattn.families.qwen_vl import QwenVL


class Qwen25VL(QwenVL):
    """The Qwen2.5-VL family: positions in time are seconds, and most layers of its encoder attend within windows."""

    name = "Qwen2.5-VL"
    model_class: type[PreTrainedModel] = Qwen2_5_VLForConditionalGeneration
    vision_attention: type[nn.Module] = Qwen2_5_VLVisionAttention
    video_processor = ("Qwen2VLVideoProcessor", VIDEO_SIZE)

    def encoder_arguments(self, grid: Tensor) -> dict[str, Tensor]:
        config = self.config.vision_config
        index, lengths = get_vision_window_index(grid, config.spatial_merge_size, config.window_size, config.patch_size)
        return {**super().encoder_arguments(grid), "window_index": index, "cu_window_seqlens": lengths}

    def time_of(self, part: Part) -> float | None:
        # The model multiplies in float32, and what it rounds down may be as near to a whole number as that is exact.
        seconds = np.float32(int(part.seconds) if _takes_whole_seconds() else part.seconds)
        return int(np.float32(part.number) * (np.float32(self.config.vision_config.tokens_per_second) * seconds))


@functools.cache
def _takes_whole_seconds() -> bool:
    """Whether the model counts the seconds between pairs of frames in whole ones, as that of transformers 5.17 does."""
    return "int" in inspect.unwrap(Qwen2_5_VLModel.get_rope_index).__code__.co_names
