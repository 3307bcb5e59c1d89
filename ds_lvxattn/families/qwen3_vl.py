"""Qwen3-VL and Qwen3.5: ``Qwen3VLForConditionalGeneration``, ``Qwen3_5ForConditionalGeneration`` of transformers,
unmodified, and those with experts; see ``QwenVL``.

Each part of a video has its time in the text ahead of it, and positions of its own.

In Qwen3-VL, what some layers of the vision encoder give is added to the visual rows behind the first layers of the
language model (deep-stack). These features belong to a visual token as its embedding does, and travel to its row with
it. Most layers of Qwen3.5 are linear attention; see ``families/gated_delta.py``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    Cosmos3OmniForConditionalGeneration,
    PreTrainedModel,
    Qwen3_5ForConditionalGeneration,
    Qwen3_5MoeForConditionalGeneration,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeForConditionalGeneration,
)
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5VisionAttention
from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import Qwen3_5MoeVisionAttention
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionAttention
from transformers.models.qwen3_vl.video_processing_qwen3_vl import smart_resize
from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import Qwen3VLMoeVisionAttention
from transformers.vision_utils import get_vision_interpolation_indices_and_weights

from ds_lvxattn.data.sample import FrameSize, Part
from ds_lvxattn.families.family import FrameLimits
from ds_lvxattn.families.qwen_vl import QwenVL
from ds_lvxattn.families.videos import VideoProcessor
from ds_lvxattn.runtime.batch import SequenceParallelBatch
from ds_lvxattn.runtime.recompute import Recomputation

DEEP_STACK = "deep_stack"  # argument that the model hands down to its language model


class Qwen3Vision(QwenVL):
    """What the families have in common: the encoder's positions, and the times of videos."""

    # Pixels of all frames of a video.
    video_processor = ("Qwen3VLVideoProcessor", {"shortest_edge": 128 * 32 * 32, "longest_edge": 32 * 32 * 768})

    def encoder_arguments(self, grid: Tensor) -> dict[str, Tensor]:
        config = self.config.vision_config
        places, weights = get_vision_interpolation_indices_and_weights(
            grid,
            num_grid_per_side=int(config.num_position_embeddings**0.5),
            mode="bilinear",
            align_corners=True,
            spatial_merge_size=config.spatial_merge_size,
        )
        return {**super().encoder_arguments(grid), "interp_indices": places, "interp_weights": weights}

    def video_sides(self, video: VideoProcessor, part: Part, size: FrameSize) -> tuple[int, int]:
        """As the processor does: its limits are those of a whole video."""
        token, frames = self._token(), max(part.frames, part.merged)
        least, most = video.settings["size"]["shortest_edge"], video.settings["size"]["longest_edge"]
        if video.settings.get("cap_pixels_per_frame"):
            of_frame = min(video.settings["max_video_tokens"] * token**2, most // frames)
            most = max(of_frame, int(least * 1.05)) * frames
        return smart_resize(frames, size.height, size.width, part.merged, token, least, most)

    def limited_video(self, video: VideoProcessor, limits: FrameLimits) -> VideoProcessor:
        if limits.frame_pixels is None:
            return video
        tokens = max(limits.frame_pixels // self._token() ** 2, 1)
        if video.settings.get("cap_pixels_per_frame"):
            tokens = min(tokens, video.settings["max_video_tokens"])
        return video.with_settings(cap_pixels_per_frame=True, max_video_tokens=tokens)

    def video_parts(self, times: Sequence[float], seconds: float) -> str:
        return "".join(f"<{time:.1f} seconds>{self.frame_text}" for time in times)


class Qwen3VL(Qwen3Vision):
    """The Qwen3-VL family."""

    name = "Qwen3-VL"
    model_class: type[PreTrainedModel] = Qwen3VLForConditionalGeneration
    vision_attention: type[nn.Module] = Qwen3VLVisionAttention
    trained = (*QwenVL.trained, "*visual.deepstack_merger_list.*")

    def install_hooks(self, model: nn.Module, recomputation: Recomputation) -> None:
        super().install_hooks(model, recomputation)
        language_model: Any = model.get_submodule("model.language_model")
        language_model.register_forward_pre_hook(_hand_over, with_kwargs=True)
        own = language_model._deepstack_process

        def add(hidden_states: Tensor, visual_pos_masks: Tensor, visual_embeds: Tensor) -> Tensor:
            if visual_pos_masks.dtype == torch.bool:
                return own(hidden_states, visual_pos_masks, visual_embeds)
            # The rows by their numbers: a mask would have to be counted on the device first.
            added = hidden_states.flatten(0, 1).index_add(0, visual_pos_masks, visual_embeds.to(hidden_states.dtype))
            return added.view_as(hidden_states)

        setattr(language_model, "_deepstack_process", add)  # noqa: B010

    def features(self, encoded: Any) -> Tensor:
        """A visual token's embedding and its deep-stack features side by side."""
        return torch.cat((encoded.pooler_output, *encoded.deepstack_features), dim=-1)

    def placed(self, text: Tensor, visual: Tensor, batch: SequenceParallelBatch) -> Mapping[str, Any]:
        rows = batch.visual_rows
        assert rows is not None
        embeddings, *deep = rows.travel(visual.to(text.dtype), batch.comm).split(text.shape[-1], dim=-1)
        whole = text.flatten(0, 1).index_copy(0, rows.rows, embeddings).view_as(text)
        return {"inputs_embeds": whole, DEEP_STACK: (rows.rows, deep)}

    def visual_widths(self) -> tuple[int, ...]:
        features, inner = super().visual_widths()
        return (features * (1 + len(self.config.vision_config.deepstack_visual_indexes)), inner)


class Cosmos3Omni(Qwen3VL):
    """The Cosmos 3 Omni family: Qwen3-VL by another name, in a checkpoint that may hold a generator of videos too."""

    name = "Cosmos 3 Omni"
    model_class: type[PreTrainedModel] = Cosmos3OmniForConditionalGeneration


class Qwen3VLMoe(Qwen3VL):
    """The Qwen3-VL family with experts, which work token by token on the rank of the token."""

    name = "Qwen3-VL with experts"
    model_class: type[PreTrainedModel] = Qwen3VLMoeForConditionalGeneration
    vision_attention: type[nn.Module] = Qwen3VLMoeVisionAttention


class Qwen35(Qwen3Vision):
    """The Qwen3.5 family."""

    name = "Qwen3.5"
    model_class: type[PreTrainedModel] = Qwen3_5ForConditionalGeneration
    vision_attention: type[nn.Module] = Qwen3_5VisionAttention


class Qwen35Moe(Qwen35):
    """The Qwen3.5 family with experts."""

    name = "Qwen3.5 with experts"
    model_class = Qwen3_5MoeForConditionalGeneration
    vision_attention = Qwen3_5MoeVisionAttention


def _hand_over(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Before the language model: the deep-stack features of the rank's rows, by the names of its arguments."""
    if DEEP_STACK not in kwargs:
        return None
    rest = dict(kwargs)
    rows, deep = rest.pop(DEEP_STACK)
    return args, {**rest, "visual_pos_masks": rows, "deepstack_visual_embeds": deep}
