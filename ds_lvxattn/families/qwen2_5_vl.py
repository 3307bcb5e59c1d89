"""Qwen2.5-VL: ``Qwen2_5_VLForConditionalGeneration`` of transformers, unmodified, with frames as images.

Rotary positions have three parts (time, row, column): the visual tokens of an image share one time, and text goes on
behind the largest position of the image. They follow from the whole sequence, so they are made on the host.

Every frame is scaled to a square of the same size, so that all have the same number of tokens: ``image_size`` pixels of
the vision config if it has such an entry (published ones have not), ``IMAGE_SIZE`` otherwise. The model's video input,
which merges pairs of frames, is not used.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import AutoImageProcessor, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLVisionAttention

from ds_lvxattn.data.sample import FrameShape
from ds_lvxattn.errors import ConfigError
from ds_lvxattn.families.concatenation import Concatenation
from ds_lvxattn.families.frames import encode_in_portions
from ds_lvxattn.runtime.batch import SequenceParallelBatch
from ds_lvxattn.runtime.recompute import Recomputation

IMAGE_SIZE = 280  # pixels: 100 tokens with the published patches


class Qwen25VL(Concatenation):
    """The Qwen2.5-VL family; see ``VisualFamily``."""

    name = "Qwen2.5-VL"
    model_class = Qwen2_5_VLForConditionalGeneration
    image_token = "<|image_pad|>"
    frame_text = "<|vision_start|><|image_pad|><|vision_end|>"
    pixel_arguments = ("pixel_values", "image_grid_thw")

    def is_local(self, module: nn.Module) -> bool:
        return isinstance(module, Qwen2_5_VLVisionAttention)

    def sizes_of(self, module: Any) -> tuple[int, int, int]:
        if self.is_local(module):
            return module.num_heads, module.num_heads, module.head_dim
        return super().sizes_of(module)

    def encode(
        self, model: Any, pixels: Sequence[Tensor], batch: SequenceParallelBatch, recomputation: Recomputation
    ) -> Tensor:
        return encode_in_portions(model.visual, functools.partial(_encoded, model.visual), pixels, batch, recomputation)

    def trainable_by_default(self) -> tuple[str, ...]:
        return (*super().trainable_by_default(), "*visual.merger.*")

    def visual_widths(self) -> tuple[int, ...]:
        vision = self.config.vision_config
        return (vision.out_hidden_size, vision.hidden_size * vision.spatial_merge_size**2)

    def frame_tokens(self) -> int:
        return _side(self.config.vision_config) ** 2

    def encoder_tokens(self) -> int:
        vision = self.config.vision_config
        return (_side(vision) * vision.spatial_merge_size) ** 2

    def positions(self, visual: np.ndarray) -> np.ndarray:
        side = _side(self.config.vision_config)
        part = visual % side**2
        is_text = visual < 0
        # Text moves on by one, a frame by its side, once all its tokens have their positions.
        moves = np.where(is_text, 1, np.where(part == side**2 - 1, side, 0))
        first = np.cumsum(moves) - moves
        row, column = np.divmod(part, side)
        return np.stack((first, *(np.where(is_text, first, first + place) for place in (row, column))))

    def load_processor(self, name: str) -> Any:
        return AutoImageProcessor.from_pretrained(name, backend="pil", trust_remote_code=False)

    def pixels(
        self, frames: Sequence[np.ndarray], shapes: Sequence[FrameShape], processor: Any
    ) -> Mapping[str, Tensor]:
        size = (_image_size(self.config.vision_config),) * 2
        squares = [np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.BICUBIC)) for frame in frames]
        made = processor(squares, do_resize=False, return_tensors="pt")
        return {
            "pixel_values": made["pixel_values"].unflatten(0, (len(frames), -1))[None],
            "image_grid_thw": made["image_grid_thw"][None],
        }

    def blank_pixels(self) -> Mapping[str, Tensor]:
        vision = self.config.vision_config
        side = _side(vision) * vision.spatial_merge_size
        values = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        return {
            "pixel_values": torch.zeros(1, 1, side**2, values),
            "image_grid_thw": torch.tensor([[[1, side, side]]]),
        }

    def prompt_arguments(self, visual: np.ndarray) -> Mapping[str, Tensor]:
        return {"mm_token_type_ids": torch.from_numpy((visual >= 0).astype(np.int64))}  # 1: image

    def pad_tiles(self, pixels: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return {"pixel_values": pixels["pixel_values"][0].flatten(0, 1), "image_grid_thw": pixels["image_grid_thw"][0]}


def _encoded(vision: nn.Module, pixels: Tensor, grid: Tensor) -> Tensor:
    """The tokens of a portion of frames, ``[f, tokens, d]``."""
    return vision(pixels.flatten(0, 1), grid_thw=grid).pooler_output.unflatten(0, (len(grid), -1))


def _image_size(vision: Any) -> int:
    return getattr(vision, "image_size", IMAGE_SIZE)


def _side(vision: Any) -> int:
    """Visual tokens along a side of a frame."""
    size, token = _image_size(vision), vision.patch_size * vision.spatial_merge_size
    if size % token or not size:
        raise ConfigError(
            f"frames of {size} pixels do not divide into tokens of {token}; set 'image_size' of the model's vision "
            f"config to a multiple of {token}"
        )
    return size // token
