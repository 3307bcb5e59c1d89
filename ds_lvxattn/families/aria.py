"""Aria: ``AriaForConditionalGeneration`` of transformers, unmodified.

Its projector reads each image by itself with learned queries, so each rank runs it over its own frames; the tokens of a
frame stand in the text, as in LLaVA. A projector over all frames of a video is ``runtime.adapters``.

Where its image processor splits images (``split_image``), an image is scaled to the best of the processor's
resolutions and cut into squares, which ranks share. A frame of a video stays whole.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AriaForConditionalGeneration
from transformers.models.idefics3.modeling_idefics3 import Idefics3VisionAttention

from ds_lvxattn.data.sample import FrameShape, FrameSize
from ds_lvxattn.errors import ConfigError
from ds_lvxattn.families.concatenation import Concatenation
from ds_lvxattn.families.crops import Crops
from ds_lvxattn.families.frames import encode_in_portions, patches_of
from ds_lvxattn.runtime.batch import SequenceParallelBatch
from ds_lvxattn.runtime.recompute import Recomputation


class Aria(Crops, Concatenation):
    """The Aria family; see ``Crops``. Frames are padded to squares of the vision config's ``image_size``.

    ``FrameShape.grid``: of an image that is split, the number of its squares.
    """

    name = "Aria"
    model_class = AriaForConditionalGeneration
    image_token = "<|img|>"
    pixel_arguments = ("pixel_values", "pixel_mask")
    pixels_apart = True
    whole_behind = False

    def is_local(self, module: nn.Module) -> bool:
        return isinstance(module, (Idefics3VisionAttention, nn.MultiheadAttention))

    def encode(
        self, model: Any, pixels: Sequence[Tensor], batch: SequenceParallelBatch, recomputation: Recomputation
    ) -> Tensor:
        values, mask = pixels
        tower, patch = model.vision_tower, model.config.vision_config.patch_size
        # A patch counts if a pixel of it is no padding, as in the model.
        patches = mask.unfold(1, patch, patch).unfold(2, patch, patch).any(dim=-1).any(dim=-1)
        vision = functools.partial(_states, tower, model.config.vision_feature_layer)
        states = encode_in_portions(tower, vision, [values, patches], batch, recomputation)
        hidden = (~patches).flatten(1)
        projector = model.multi_modal_projector
        return encode_in_portions(projector, projector, [states, hidden], batch, recomputation)

    def visual_widths(self) -> tuple[int, ...]:
        # The projector's input is a frame's patches, shared here by the few tokens that it makes of them.
        vision = self.config.vision_config
        per_token = -(-patches_of(vision) * vision.hidden_size // self.frame_tokens())
        return (self.config.text_config.hidden_size, per_token)

    def frame_tokens(self) -> int:
        patches, queries = patches_of(self.config.vision_config), self.config.projector_patch_to_query_dict
        if patches not in queries:
            raise ConfigError(
                f"Aria's projector_patch_to_query_dict {queries} has no entry for the {patches} patches of a frame of "
                f"{self.config.vision_config.image_size} pixels; add it, or choose another image_size"
            )
        return queries[patches]

    def encoder_tokens(self) -> int:
        return patches_of(self.config.vision_config)

    def grid_of(self, size: FrameSize, processor: Any) -> tuple[int, ...]:
        if not processor.split_image:
            return ()
        settings = {"max_image_size": self.config.vision_config.image_size, "split_image": True}
        return (processor.get_number_of_image_patches(size.height, size.width, settings),)

    def cut(self, frame: np.ndarray, processor: Any) -> list[np.ndarray]:
        squares = processor.get_image_patches(
            frame.transpose(2, 0, 1),
            processor.split_resolutions,
            self.config.vision_config.image_size,
            processor.resample,
        )
        return [np.ascontiguousarray(square.transpose(1, 2, 0)) for square in squares]

    def complete_processor(self, processor: Any, image_token: str) -> None:
        """An image is served as it was trained, of this size."""
        processor.size_conversion = {self.config.vision_config.image_size: self.frame_tokens()}
        processor.image_processor.max_image_size = self.config.vision_config.image_size

    def pixels(
        self, frames: Sequence[np.ndarray], shapes: Sequence[FrameShape], processor: Any
    ) -> Mapping[str, Tensor]:
        side = self.config.vision_config.image_size
        # One that is split into a single square is scaled and padded all the same.
        images = [
            self.cut(frame, processor)[0] if shape.grid == (1,) else frame
            for frame, shape in zip(frames, shapes, strict=True)
        ]
        processed = processor(images, return_tensors="pt", max_image_size=side, split_image=False)
        return {key: processed[key][None] for key in self.pixel_arguments}

    def blank_pixels(self) -> Mapping[str, Tensor]:
        vision = self.config.vision_config
        sides = (vision.image_size, vision.image_size)
        return {
            "pixel_values": torch.zeros(1, 1, vision.num_channels, *sides),
            "pixel_mask": torch.ones(1, 1, *sides, dtype=torch.bool),
        }


def _states(tower: nn.Module, layer: int, values: Tensor, patches: Tensor) -> Tensor:
    return tower(values, patch_attention_mask=patches, output_hidden_states=True).hidden_states[layer]
