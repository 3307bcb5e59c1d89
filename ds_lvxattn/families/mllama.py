"""Llama 3.2 Vision: ``MllamaForConditionalGeneration`` of transformers, unmodified.

Its cross-attention layers see the visual tokens of the images before a token, by groups of adjacent images. Two
corners are kept: the tiles that pad an image up to the model's tile count are masked there, and dropped here behind
the vision encoder (whose real tiles do see them); a token that sees no image attends to every visual token there (and
its feed-forward output is zeroed), so its interval is the whole key sequence.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import MllamaForConditionalGeneration
from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil
from transformers.models.mllama.modeling_mllama import (
    MllamaTextCrossAttention,
    MllamaTextSelfAttention,
    MllamaVisionAttention,
)

from ds_lvxattn.families.family import VisualFamily, dense_frame_mask
from ds_lvxattn.families.frames import encode_in_portions, refuse_mask
from ds_lvxattn.families.mllama_encoder import install_encoder
from ds_lvxattn.runtime.batch import Exchanging, SequenceParallelBatch
from ds_lvxattn.runtime.recompute import Recomputation, recompute

ROLES = {MllamaTextCrossAttention: "cross", MllamaTextSelfAttention: "self", MllamaVisionAttention: "local"}

# Keys that the norm of the keys takes at once: its float32 intermediates, for all keys at once, would be the peak of
# the backward pass. Under every policy, so that all sum the gradient of its weight alike.
KEYS_AT_ONCE = 1 << 16

PIXELS = ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")


class Mllama(VisualFamily):
    """The Llama 3.2 Vision family; see ``VisualFamily``."""

    name = "Llama 3.2 Vision"
    model_class = MllamaForConditionalGeneration
    image_token = "<|image|>"
    attention_config = "text_config"

    def role_of(self, module: nn.Module) -> str | None:
        return ROLES.get(type(module))

    def install_hooks(self, model: nn.Module, recomputation: Recomputation) -> None:
        install_encoder(model.get_submodule("model.vision_model"))
        encode = functools.partial(encode_frames, recomputation)
        model.get_submodule("model").register_forward_pre_hook(encode, with_kwargs=True)
        model.get_submodule("model.language_model").register_forward_pre_hook(mask_rows, with_kwargs=True)
        for module in model.modules():
            if isinstance(module, MllamaTextCrossAttention):
                norm: Any = module.k_norm
                norm.forward = functools.partial(_norm_keys, recomputation, norm, norm.forward)

    def frame_tokens(self) -> int:
        vision = self.config.vision_config
        return (vision.image_size // vision.patch_size) ** 2 + 1

    def hidden_rows_see_all(self) -> bool:
        return True  # their feed-forward output is dropped

    def load_processor(self, name: str) -> Any:
        return MllamaImageProcessorPil.from_pretrained(name)

    def blank_pixels(self) -> Mapping[str, Tensor]:
        vision = self.config.vision_config
        return {
            "pixel_values": torch.zeros(1, 1, 1, vision.num_channels, vision.image_size, vision.image_size),
            "aspect_ratio_ids": torch.ones(1, 1, dtype=torch.long),
            "aspect_ratio_mask": torch.ones(1, 1, 1, dtype=torch.long),
        }

    def pixels(self, frames: Sequence[np.ndarray], processor: Any) -> Mapping[str, Tensor]:
        # The frames of all samples go through the encoder as one list; a frame is one tile, as videos have many.
        # Aspect ratio 1 x 1 has the id 1 for every tile limit, so the ids need no translation.
        return dict(processor([list(frames)], max_image_tiles=1, return_tensors="pt"))

    def pad_tiles(self, pixels: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        tiles = self.config.vision_config.max_num_tiles
        return dict(zip(PIXELS, _with_blank_tiles(tiles, *(pixels[key] for key in PIXELS)), strict=True))

    def visual_widths(self) -> tuple[int, ...]:
        return (self.config.text_config.hidden_size, self.config.vision_config.vision_output_dim)

    def encoder_tokens(self) -> int:
        padded = -(-self.frame_tokens() // 8) * 8
        return self.config.vision_config.max_num_tiles * padded

    def dense_mask(self, ranges: Sequence[Sequence[tuple[int, int]]], frames: int) -> Mapping[str, Tensor]:
        seen = dense_frame_mask(ranges, frames)
        tiles = (1,) + (0,) * (self.config.vision_config.max_num_tiles - 1)
        return {"cross_attention_mask": seen[..., None] * torch.tensor(tiles)}

    def trainable_by_default(self) -> tuple[str, ...]:
        layers = self.config.text_config.cross_attention_layers
        return ("*multi_modal_projector.*", *(f"*language_model.layers.{layer}.*" for layer in layers))


def encode_frames(
    recomputation: Recomputation, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Before the model: its visual features from the pixels, in the portions that the batch asks for.

    The model would encode all frames at once. What its layers get is ``[B * slots * tokens, d]``, the frames of this
    rank in the order of its keys, without padding tiles. A rank with fewer frames than portions encodes its first
    one again, so that every rank calls the encoder as often; no row sees that.
    """
    batch: SequenceParallelBatch | None = kwargs.get("sequence_parallel")
    if batch is None or not batch.brings_frames:  # then the keys and values are in the model's cache
        return None
    refuse_mask(kwargs, "cross_attention_mask")
    rest = dict(kwargs)
    inputs = [rest.pop(key)[0] for key in PIXELS]
    vision = module.get_submodule("vision_model")
    encoded = encode_in_portions(vision, functools.partial(_encode, vision), inputs, batch.portions, recomputation)
    states = module.get_submodule("multi_modal_projector")(encoded)
    if batch.slots is not None:
        states = states.index_select(0, batch.slots)
    # Without the frames' dimension the projections are plain matrix products, whose gradients autograd adds up in
    # place: as views they would take once more the memory of the features.
    return args, {**rest, "cross_attention_states": states.flatten(0, 1)}


def _encode(vision: Any, *inputs: Tensor) -> Tensor:
    """Tile 0 of each frame of a portion, ``[f, tokens, d_vision]``."""
    return vision(*inputs, tiles=1).squeeze(1)


def _with_blank_tiles(tiles: int, pixels: Tensor, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``PIXELS`` with one tile a frame to as many as the model has."""
    padding = (0, tiles - 1)
    return nn.functional.pad(pixels, (0, 0, 0, 0, 0, 0, *padding)), ids, nn.functional.pad(mask, padding)


def _norm_keys(recomputation: Recomputation, norm: nn.Module, forward: Callable[[Tensor], Tensor], k: Tensor) -> Tensor:
    """The norm of keys ``k [B, H_kv, S_kv, D]``, in portions; recomputed, they keep nothing but ``k``."""
    if not norm.training or k.shape[2] <= KEYS_AT_ONCE:
        return forward(k)
    if recomputation.policy != "none":
        forward = functools.partial(recompute, norm, forward)
    return torch.cat([forward(portion) for portion in k.split(KEYS_AT_ONCE, dim=2)], dim=2)


def mask_rows(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Before the language model: say which rows see a frame, ``[B, 1, s_q, 1]``, as the model derives it from a
    dense mask."""
    batch: Exchanging | None = kwargs.get("sequence_parallel")
    if batch is None:
        return None
    states = kwargs.get("cross_attention_states")
    mask = batch.sees_frame if states is None else batch.sees_frame.to(states.dtype)
    return args, {**kwargs, "full_text_row_masked_out_mask": mask}
