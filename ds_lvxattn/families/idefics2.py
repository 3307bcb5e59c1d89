"""Idefics2: ``Idefics2ForConditionalGeneration`` of transformers, unmodified.

Its perceiver resamples each image by itself, so each rank runs it over its own frames; the latents of a frame stand in
the text, as in LLaVA. A perceiver over all frames of a video is ``runtime.adapters``.

Where its image processor splits images, an image is five to the model: its quarters, and the whole behind them. Each is
scaled and encoded by itself, so those of one image may lie on several ranks. A frame of a video stays whole.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Idefics2ForConditionalGeneration
from transformers.models.idefics2.image_processing_pil_idefics2 import Idefics2ImageProcessorPil
from transformers.models.idefics2.modeling_idefics2 import Idefics2PerceiverAttention, Idefics2VisionAttention

from ds_lvxattn.data.sample import FrameShape, FrameSize
from ds_lvxattn.families.concatenation import Concatenation
from ds_lvxattn.families.crops import Crops
from ds_lvxattn.families.family import FrameLimits
from ds_lvxattn.families.frames import encode_in_portions, patches_of
from ds_lvxattn.runtime.batch import SequenceParallelBatch
from ds_lvxattn.runtime.recompute import Recomputation

FAKE = "<fake_token_around_image>"
# The processor puts a blank between the images and a word that stands at their end.
BEFORE_WORD = re.compile(rf"{re.escape(FAKE)}(?=[^\s<])")


class Idefics2(Crops, Concatenation):
    """The Idefics2 family; see ``VisualFamily``."""

    name = "Idefics2"
    model_class = Idefics2ForConditionalGeneration
    image_token = "<image>"
    pixel_arguments = ("pixel_values", "pixel_attention_mask")
    trained = ("*text_model.*", "*connector.*")
    image_processor = Idefics2ImageProcessorPil  # transformers 5.17 takes it for one that needs torchvision

    def is_local(self, module: nn.Module) -> bool:
        return isinstance(module, (Idefics2VisionAttention, Idefics2PerceiverAttention))

    def encode(
        self, model: Any, pixels: Sequence[Tensor], batch: SequenceParallelBatch, recomputation: Recomputation
    ) -> Tensor:
        values, mask = pixels
        patch = model.config.vision_config.patch_size
        # A patch counts if no pixel of it is padding, as in the model.
        patches = mask.unfold(1, patch, patch).unfold(2, patch, patch).all(dim=-1).all(dim=-1)
        vision = functools.partial(_states, model.vision_model)
        states = encode_in_portions(model.vision_model, vision, [values, patches], batch, recomputation)
        inputs = [states, patches.flatten(1)]
        return encode_in_portions(model.connector, model.connector, inputs, batch, recomputation)

    def visual_widths(self) -> tuple[int, ...]:
        # The perceiver's input is a frame's patches, shared here by the few latents that it makes of them.
        hidden = self.config.text_config.hidden_size
        return (hidden, -(-patches_of(self.config.vision_config) * hidden // self.frame_tokens()))

    def frame_tokens(self) -> int:
        return self.config.perceiver_config.resampler_n_latents

    def encoder_tokens(self) -> int:
        return patches_of(self.config.vision_config)

    def grid_of(self, size: FrameSize, processor: Any) -> tuple[int, ...]:
        return (2, 2) if processor.do_image_splitting else ()

    def cut(self, frame: np.ndarray, processor: Any) -> list[np.ndarray]:
        height, width = frame.shape[0] // 2, frame.shape[1] // 2
        halves = frame[:height], frame[height:]
        return [part for half in halves for part in (half[:, :width], half[:, width:])] + [frame]

    def image_text(self, grid: Sequence[int], processor: Any) -> str:
        return FAKE + (self.image_token + FAKE) * self.images_in(grid)

    def write(self, text: str, sizes: Sequence[FrameSize], processor: Any, limits: FrameLimits) -> str:
        text = super().write(text, sizes, processor, limits).replace(FAKE + FAKE, FAKE)
        return BEFORE_WORD.sub(f"{FAKE} ", text)

    def pixels(
        self, frames: Sequence[np.ndarray], shapes: Sequence[FrameShape], processor: Any
    ) -> Mapping[str, Tensor]:
        processed = processor([list(frames)], return_tensors="pt", do_image_splitting=False)
        return {key: processed[key] for key in self.pixel_arguments}

    def blank_pixels(self) -> Mapping[str, Tensor]:
        vision = self.config.vision_config
        sides = (vision.image_size, vision.image_size)
        return {
            "pixel_values": torch.zeros(1, 1, vision.num_channels, *sides),
            "pixel_attention_mask": torch.ones(1, 1, *sides, dtype=torch.long),
        }

    def pad_tiles(self, pixels: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return pixels  # the model takes the images of a batch one after the other


def _states(vision: nn.Module, values: Tensor, patches: Tensor) -> Tensor:
    return vision(pixel_values=values, patch_attention_mask=patches).last_hidden_state
