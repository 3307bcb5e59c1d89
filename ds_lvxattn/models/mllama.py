"""Llama 3.2 Vision: ``MllamaForConditionalGeneration`` of transformers, unmodified.

Its cross-attention layers see the visual tokens of the images before a token, by groups of adjacent images. Two
corners are kept: the tiles that pad an image up to the model's tile count are masked there, and dropped here before
K and V are projected; a token that sees no image attends to every visual token there (and its feed-forward output
is zeroed), so its interval is the whole key sequence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import MllamaForConditionalGeneration
from transformers.models.mllama.modeling_mllama import (
    MllamaTextCrossAttention,
    MllamaTextSelfAttention,
    MllamaVisionAttention,
)

from ds_lvxattn.batch import SequenceParallelBatch
from ds_lvxattn.plan.plan import AttentionLayer

ROLES = {MllamaTextCrossAttention: "cross", MllamaTextSelfAttention: "self", MllamaVisionAttention: "local"}


class Mllama:
    """The Llama 3.2 Vision family; see ``Family``."""

    name = "Llama 3.2 Vision"
    attention_config = "text_config"

    def matches(self, model: nn.Module) -> bool:
        return isinstance(model, MllamaForConditionalGeneration)

    def attention_layers(self, model: nn.Module) -> dict[nn.Module, AttentionLayer]:
        layers = {}
        for name, module in model.named_modules():
            role = ROLES.get(type(module))
            if role is not None:
                kv_heads = getattr(module, "num_key_value_heads", module.num_heads)
                layers[module] = AttentionLayer(name, role, module.num_heads, kv_heads, module.head_dim)
        return layers

    def install_hooks(self, model: nn.Module) -> None:
        model.get_submodule("model.language_model").register_forward_pre_hook(fit_visual_inputs, with_kwargs=True)

    def frame_tokens(self, model_config: Any) -> int:
        vision = model_config.vision_config
        return (vision.image_size // vision.patch_size) ** 2 + 1

    def frame_ranges(self, input_ids: Sequence[int], model_config: Any) -> list[tuple[int, int]]:
        """A token sees the images of the last group of adjacent image tokens at or before it."""
        ranges, first, last, adjacent = [], 0, 0, False
        for token in input_ids:
            is_image = token == model_config.image_token_index
            if is_image:
                first = first if adjacent else last
                last += 1
            adjacent = is_image
            ranges.append((first, last))
        return ranges

    def hidden_rows_see_all(self) -> bool:
        return True

    def blank_pixels(self, model_config: Any) -> Mapping[str, Tensor]:
        vision = model_config.vision_config
        tiles, size = vision.max_num_tiles, vision.image_size
        mask = torch.zeros(1, 1, tiles, dtype=torch.long)
        mask[..., 0] = 1
        return {
            "pixel_values": torch.zeros(1, 1, tiles, vision.num_channels, size, size),
            "aspect_ratio_ids": torch.ones(1, 1, dtype=torch.long),
            "aspect_ratio_mask": mask,
        }

    def pixels(self, frames: Sequence[np.ndarray], processor: Any, model_config: Any) -> Mapping[str, Tensor]:
        # The frames of all samples go through the encoder as one list; a frame is one tile, as videos have many.
        # Aspect ratio 1 x 1 has the id 1 for every tile limit, so the ids need no translation.
        tiles = model_config.vision_config.max_num_tiles
        encoded = processor([list(frames)], max_image_tiles=1, return_tensors="pt")
        padding = (0, tiles - 1)
        return {
            "pixel_values": nn.functional.pad(encoded["pixel_values"], (0, 0, 0, 0, 0, 0, *padding)),
            "aspect_ratio_ids": encoded["aspect_ratio_ids"],
            "aspect_ratio_mask": nn.functional.pad(encoded["aspect_ratio_mask"], padding),
        }

    def tiles_per_frame(self, model_config: Any) -> int:
        return model_config.vision_config.max_num_tiles

    def dense_mask(
        self, ranges: Sequence[Sequence[tuple[int, int]]], frames: int, model_config: Any
    ) -> Mapping[str, Tensor]:
        tokens = max(len(sample) for sample in ranges)
        tiles = model_config.vision_config.max_num_tiles
        mask = torch.zeros(len(ranges), tokens, frames, tiles, dtype=torch.long)
        for sample, rows in enumerate(ranges):
            for token, (first, last) in enumerate(rows):
                mask[sample, token, first:last, 0] = 1
        return {"cross_attention_mask": mask}

    def trainable_by_default(self, model_config: Any) -> tuple[str, ...]:
        layers = model_config.text_config.cross_attention_layers
        return ("*multi_modal_projector.*", *(f"*language_model.layers.{layer}.*" for layer in layers))


def fit_visual_inputs(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Before the language model: drop padding tiles from the visual features, and say which rows see a frame.

    ``cross_attention_states`` is ``[frames * tiles, tokens, d]``; what the layers get is
    ``[B * slots, tokens, d]``, the frames of this rank in the order of its keys. The row mask takes the place of
    the one that the model derives from a dense mask: ``[B, 1, s_q, 1]``.
    """
    batch: SequenceParallelBatch | None = kwargs.get("sequence_parallel")
    if batch is None:
        return None
    states = kwargs["cross_attention_states"]
    return args, {
        **kwargs,
        "cross_attention_states": states.index_select(0, batch.tiles),
        "full_text_row_masked_out_mask": batch.sees_frame.to(states.dtype),
    }
