"""LLaVA: ``LlavaForConditionalGeneration`` of transformers, unmodified, around a CLIP or a SigLIP vision tower."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration
from transformers.models.clip.modeling_clip import CLIPAttention
from transformers.models.siglip.modeling_siglip import SiglipAttention

from ds_lvxattn.families.concatenation import Concatenation
from ds_lvxattn.families.frames import encode_in_portions, patches_of
from ds_lvxattn.runtime.batch import SequenceParallelBatch
from ds_lvxattn.runtime.recompute import Recomputation

# Tokens that a tower puts before those of the patches.
CLASS_TOKENS = {"clip_vision_model": 1, "siglip_vision_model": 0}


class Llava(Concatenation):
    """The LLaVA family; see ``VisualFamily``."""

    name = "LLaVA"
    model_class = LlavaForConditionalGeneration
    image_token = "<image>"
    pixels_apart = True

    @classmethod
    def has_config(cls, config: Any) -> bool:
        # Other towers (Pixtral's) have no fixed number of tokens: ``ImageFeatures`` takes them.
        return super().has_config(config) and config.vision_config.model_type in CLASS_TOKENS

    @classmethod
    def has_model(cls, model: nn.Module) -> bool:
        return super().has_model(model) and cls.has_config(model.config)

    def is_local(self, module: nn.Module) -> bool:
        # The last stands in a head that is left out.
        return isinstance(module, (CLIPAttention, SiglipAttention, nn.MultiheadAttention))

    def encode(
        self, model: Any, pixels: Sequence[Tensor], batch: SequenceParallelBatch, recomputation: Recomputation
    ) -> Tensor:
        tower = model.vision_tower
        select = functools.partial(_selected, model.config, tower)
        return model.multi_modal_projector(encode_in_portions(tower, select, pixels, batch, recomputation))

    def visual_widths(self) -> tuple[int, ...]:
        return (
            self.config.text_config.hidden_size,
            len(_layers(self.config)) * self.config.vision_config.hidden_size,
        )

    def frame_tokens(self) -> int:
        return _vision_tokens(self.config.vision_config) - _dropped(self.config)

    def encoder_tokens(self) -> int:
        return _vision_tokens(self.config.vision_config)

    def complete_processor(self, processor: Any, image_token: str) -> None:
        """It counts the visual tokens of an image by these."""
        vision = self.config.vision_config
        processor.patch_size = vision.patch_size
        processor.num_additional_image_tokens = CLASS_TOKENS[vision.model_type]
        processor.vision_feature_select_strategy = self.config.vision_feature_select_strategy
        processor.image_token = image_token
        processor.image_token_id = processor.tokenizer.convert_tokens_to_ids(image_token)


def _selected(config: Any, tower: nn.Module, pixels: Tensor) -> Tensor:
    """What the projector takes of a portion of frames: some layers' states side by side, ``[f, tokens, d]``."""
    states = tower(pixel_values=pixels, output_hidden_states=True).hidden_states
    return torch.cat([states[layer][:, _dropped(config) :] for layer in _layers(config)], dim=-1)


def _layers(config: Any) -> list[int]:
    layer = config.vision_feature_layer
    return [layer] if isinstance(layer, int) else list(layer)


def _dropped(config: Any) -> int:
    """Tokens before the patches that the model drops, whatever the tower has there."""
    return 1 if config.vision_feature_select_strategy == "default" else 0


def _vision_tokens(vision: Any) -> int:
    return patches_of(vision) + CLASS_TOKENS[vision.model_type]
