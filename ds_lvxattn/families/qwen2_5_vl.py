"""Qwen2.5-VL: ``Qwen2_5_VLForConditionalGeneration`` of transformers, unmodified, with frames as images.

Rotary positions have three parts (time, row, column): the visual tokens of an image share one time, and text goes on
behind the largest position of the image. They follow from the whole sequence, so they are made on the host.

A picture keeps its proportions, scaled as the image processor scales it: an image by the processor's own limits, a
frame of a video to at most ``IMAGE_SIZE ** 2`` pixels, unless told otherwise. A frame whose size is not known becomes a
square: of ``image_size`` pixels of the vision config if it has such an entry (published ones have not), of
``IMAGE_SIZE`` otherwise. The model's video input, which merges pairs of frames, is not used.
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
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from ds_lvxattn.data.sample import FrameShape, FrameSize
from ds_lvxattn.errors import ConfigError
from ds_lvxattn.families.concatenation import Concatenation
from ds_lvxattn.families.family import FrameLimits
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
        encode = functools.partial(_encoded, model.visual)
        return encode_in_portions(model.visual, encode, pixels, batch, recomputation, ragged=True, patches=1)

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

    def shape_of(self, size: FrameSize | None, processor: Any, limits: FrameLimits) -> FrameShape:
        vision = self.config.vision_config
        if size is None:
            grid = (_side(vision) * vision.spatial_merge_size,) * 2
        else:
            least, most = processor.size["shortest_edge"], processor.size["longest_edge"]
            if size.video:
                most = min(limits.frame_pixels or IMAGE_SIZE**2, most)
            factor = vision.patch_size * vision.spatial_merge_size
            sides = smart_resize(size.height, size.width, factor, min(least, most), most)
            grid = (sides[0] // vision.patch_size, sides[1] // vision.patch_size)
        patches = grid[0] * grid[1]
        return FrameShape(patches // vision.spatial_merge_size**2, patches, grid)

    def positions(self, visual: np.ndarray, shapes: Sequence[FrameShape]) -> np.ndarray:
        merge = self.config.vision_config.spatial_merge_size
        is_text = visual < 0
        # Of each visual token its row and column in the frame; text moves on by one, a frame by its longer side once
        # all its tokens have their positions.
        rows, columns, moves = (np.zeros(max(len(visual), 1), dtype=np.int64) for _ in range(3))
        at = 0
        for shape in shapes:
            height, width = (side // merge for side in shape.grid)
            part = slice(at, at + shape.tokens)
            rows[part], columns[part] = np.divmod(np.arange(shape.tokens), width)
            at += shape.tokens
            moves[at - 1] = max(height, width)
        moves = np.where(is_text, 1, moves[visual])
        first = np.cumsum(moves) - moves
        return np.stack((first, *(np.where(is_text, first, first + part[visual]) for part in (rows, columns))))

    def load_processor(self, name: str) -> Any:
        return AutoImageProcessor.from_pretrained(name, backend="pil", trust_remote_code=False)

    def pixels(
        self, frames: Sequence[np.ndarray], shapes: Sequence[FrameShape], processor: Any
    ) -> Mapping[str, Tensor]:
        """``pixel_values [1, patches, ...]`` of all frames one after another, and their grids ``[1, frames, 3]``."""
        patch = self.config.vision_config.patch_size
        scaled = [
            np.asarray(
                Image.fromarray(frame).resize((shape.grid[1] * patch, shape.grid[0] * patch), processor.resample)
            )
            for frame, shape in zip(frames, shapes, strict=True)
        ]
        made = processor(scaled, do_resize=False, return_tensors="pt")
        return {key: made[key][None] for key in self.pixel_arguments}

    def blank_pixels(self) -> Mapping[str, Tensor]:
        vision = self.config.vision_config
        side = _side(vision) * vision.spatial_merge_size
        values = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        return {
            "pixel_values": torch.zeros(1, side**2, values),
            "image_grid_thw": torch.tensor([[[1, side, side]]]),
        }

    def prompt_arguments(self, visual: np.ndarray) -> Mapping[str, Tensor]:
        return {"mm_token_type_ids": torch.from_numpy((visual >= 0).astype(np.int64))}  # 1: image


def _encoded(vision: nn.Module, pixels: Tensor, grid: Tensor, shapes: Sequence[FrameShape]) -> Tensor:
    """The tokens of a portion of frames, ``[tokens, d]``."""
    return vision(pixels, grid_thw=grid).pooler_output


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
