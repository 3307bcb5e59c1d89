"""OpenFlamingo: ``Flamingo`` of the package ``open-flamingo`` 2.0.1, unmodified, in a transformers model.

Its masked cross-attention computes its scores itself; ``reach_attention`` lets it call the exchanged attention with its
own norms and projections. The model is in ``model.py``.

Where the image processor cuts images into tiles and a thumbnail, as in NVLM, the perceiver resamples each tile, and
the text sees those of an image as one medium.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
)
from transformers.models.clip.modeling_clip import CLIPAttention

from ds_lvxattn.data.sample import FrameShape, FrameSize
from ds_lvxattn.families.family import FrameLimits, VisualFamily
from ds_lvxattn.families.flamingo.model import OpenFlamingoModel, heads_of, is_cross_attention
from ds_lvxattn.families.frames import encode_in_portions, in_samples, patches_of
from ds_lvxattn.families.processors import cut_into, cuts, limited_to
from ds_lvxattn.families.rotary import (
    self_attention_chunk,
    self_attention_role,
    self_attention_sizes,
    self_attention_window,
)
from ds_lvxattn.families.text_only import OF_LAYERS, mixing, refuse
from ds_lvxattn.plan.layer_plan import AttentionLayer
from ds_lvxattn.runtime.batch import Exchanging, SequenceParallelBatch
from ds_lvxattn.runtime.recompute import Recomputation
from ds_lvxattn.runtime.registration import exchanged_attention

LATENTS = 64  # of a tile: the package leaves its perceiver's number at that


class OpenFlamingo(VisualFamily):
    """The OpenFlamingo family; see ``VisualFamily``.

    ``FrameShape.grid``, where the image processor cuts images: tiles, the thumbnail among them, and how many the
    processor may make at most.
    """

    name = "OpenFlamingo"
    model_class = OpenFlamingoModel
    image_token = "<image>"
    attention_config = "text_config"
    needs_frames = True
    pixels_apart = True

    def role_of(self, module: nn.Module) -> str | None:
        if is_cross_attention(module):
            return "cross"
        if isinstance(module, CLIPAttention) or type(module).__name__ == "PerceiverAttention":
            return "local"
        return self_attention_role(module)

    def attention_layers(self, model: Any) -> dict[nn.Module, AttentionLayer]:
        """See ``Family``. A text whose layers would be computed wrongly is refused, with the reason."""
        refuse(model, (hinders(model.flamingo.lang_encoder) for hinders in (mixing, *OF_LAYERS)))
        return super().attention_layers(model)

    def sizes_of(self, module: Any) -> tuple[int, int, int]:
        if self.role_of(module) == "self":
            return self_attention_sizes(module)
        if isinstance(module, CLIPAttention):
            return super().sizes_of(module)
        return module.heads, module.heads, module.to_q.out_features // module.heads

    def window_of(self, module: Any) -> int | None:
        return self_attention_window(module) if self.role_of(module) == "self" else None

    def chunk_of(self, module: Any) -> int | None:
        return self_attention_chunk(module) if self.role_of(module) == "self" else None

    def reach_attention(self, model: nn.Module) -> None:
        module: Any
        for module in model.modules():
            if is_cross_attention(module):
                module.forward = functools.partial(exchanged_cross_attention, module, module.forward)

    def install_hooks(self, model: nn.Module, recomputation: Recomputation) -> None:
        model.register_forward_pre_hook(functools.partial(encode_frames, recomputation), with_kwargs=True)
        decoder = self.decoder(model)
        decoder.register_forward_pre_hook(condition_on_step, with_kwargs=True)
        decoder.register_forward_hook(end_step, with_kwargs=True)

    def decoder(self, model: nn.Module) -> Any:
        return model.get_submodule("flamingo.lang_encoder")

    def trainable_by_default(self) -> tuple[str, ...]:
        return ("*perceiver.*", "*gated_cross_attn_layer.*")

    def visual_widths(self) -> tuple[int, ...]:
        return (self.config.vision_config.hidden_size,)

    def frame_tokens(self) -> int:
        return LATENTS

    def encoder_tokens(self) -> int:
        return patches_of(self.config.vision_config) + 1

    def frame_ranges(self, input_ids: Sequence[int], image_id: int) -> list[tuple[int, int]]:
        """The last image at or before the token, or all of them."""
        ranges, seen = [], 0
        for token in input_ids:
            seen += token == image_id
            first = max(seen - 1, 0) if self.config.only_attend_immediate_media else 0
            ranges.append((first, seen))
        return ranges

    def hidden_rows_see_all(self) -> bool:
        # Where text sees all previous images, the package hides all keys alike from a token ahead of the first one,
        # which then gets the mean of all values.
        return not self.config.only_attend_immediate_media

    def load_model(self, name: str, dtype: torch.dtype) -> PreTrainedModel:
        return OpenFlamingoModel.from_pretrained(name, dtype=dtype)

    def tile_limits(self, processor: Any) -> tuple[str, ...]:
        return ("image_tiles", "frame_tiles") if cuts(processor) else ()

    def limited(self, processor: Any, limits: FrameLimits) -> Any:
        return limited_to(limits.image_tiles, processor) if cuts(processor) else processor

    def shape_of(self, size: FrameSize | None, processor: Any, limits: FrameLimits) -> FrameShape:
        if not cuts(processor):
            return super().shape_of(size, processor, limits)
        most, tiles = 1, 1
        if size is not None:
            limit = limits.frame_tiles if size.video else limits.image_tiles
            most = limit or (processor.max_patches if processor.crop_to_patches else 1)
            tiles = processor.get_number_of_image_patches(size.height, size.width, cut_into(most, processor))
        return FrameShape(tiles * LATENTS, tiles * self.encoder_tokens(), (tiles, most))

    def pixels(
        self, frames: Sequence[np.ndarray], shapes: Sequence[FrameShape], processor: Any
    ) -> Mapping[str, Tensor]:
        """``vision_x [1, images, 1, C, H, W]``; of a processor that cuts them, their tiles, and how many each has."""
        if not cuts(processor):
            return {"vision_x": processor(list(frames), return_tensors="pt")["pixel_values"][None, :, None]}
        images = [
            processor([frame], **cut_into(shape.grid[1], processor), return_tensors="pt")["pixel_values"]
            for frame, shape in zip(frames, shapes, strict=True)
        ]
        return {"vision_x": torch.cat(images)[None, :, None], "tiles": torch.tensor([[len(x) for x in images]])}

    def blank(self, processor: Any, limits: FrameLimits) -> Mapping[str, Tensor]:
        pixels = self.blank_pixels()
        return {**pixels, "tiles": torch.ones(1, 1, dtype=torch.long)} if cuts(processor) else pixels

    def blank_pixels(self) -> Mapping[str, Tensor]:
        vision = self.config.vision_config
        return {"vision_x": torch.zeros(1, 1, 1, vision.num_channels, vision.image_size, vision.image_size)}

    def dense_mask(
        self, ranges: Sequence[Sequence[tuple[int, int]]], shapes: Sequence[Sequence[FrameShape]]
    ) -> Mapping[str, Tensor]:
        return {}  # the model finds the image tokens itself


def encode_frames(
    recomputation: Recomputation, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Before the model: features ``[B, rows, d]`` of the rank's frames, in the portions the batch asks for."""
    batch: SequenceParallelBatch | None = kwargs.get("sequence_parallel")
    if batch is None:
        return None
    rest = dict(kwargs)
    rest.pop("tiles", None)  # the batch has them
    flamingo: Any = module.flamingo
    batch_of_tiles = replace(batch, shapes=tuple(tile for shape in batch.shapes for tile in _tiles(shape)))
    with torch.no_grad():  # as the package has it
        vision = functools.partial(_patches, flamingo.vision_encoder)
        patches = encode_in_portions(
            flamingo.vision_encoder, vision, [rest.pop("vision_x")[0, :, 0]], batch_of_tiles, recomputation
        )
    resample = functools.partial(_resample, flamingo.perceiver)
    features = encode_in_portions(flamingo.perceiver, resample, [patches], batch_of_tiles, recomputation)
    samples = batch.sees_frame.shape[0]
    return args, {**rest, "media": (in_samples(features.flatten(0, 1), samples), batch)}


def condition_on_step(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Before the language model in a decoding step: its layers get the step in the place of features."""
    step: Exchanging | None = kwargs.get("sequence_parallel")
    if step is not None and not step.brings_frames:
        for layer in module._get_decoder_layers():
            layer.condition_vis_x((None, step))


def end_step(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    """After it: the layers hold on to nothing."""
    step: Exchanging | None = kwargs.get("sequence_parallel")
    if step is not None and not step.brings_frames:
        module.clear_conditioned_layers()


def exchanged_cross_attention(
    module: Any, forward: Any, x: Tensor, media: Any, media_locations: Any = None, use_cached_media: bool = False
) -> Tensor:
    """``MaskedCrossAttention.forward`` over keys that are divided over the ranks.

    Args:
        forward: the module's own, for features that are not divided.
        media: from ``encode_frames``, features and batch; in a decoding step None and the step.
    """
    if not isinstance(media, tuple):
        return forward(x, media, media_locations=media_locations, use_cached_media=use_cached_media)
    features, batch = media
    query = module.to_q(module.norm(x))
    if not module.only_attend_immediate_media:
        # Equal scores for tokens that see nothing: they get the mean of the values, and give no other gradient.
        query = query * batch.sees_frame[:, 0]
    # Where no frames come, the keys and values of the prefill are used.
    key, value = module.to_kv(features).chunk(2, dim=-1) if batch.brings_frames else (query, query)
    q, k, v = heads_of(module, query, key, value)
    out, _ = exchanged_attention(module, q, k, v, None, scaling=module.scale, sequence_parallel=batch)
    return module.to_out(out.flatten(2))


def _tiles(shape: FrameShape) -> list[FrameShape]:
    """An image by its tiles, each of which the encoder and the perceiver take by itself."""
    count = shape.tokens // LATENTS
    return [replace(shape, tokens=LATENTS, encoder_tokens=shape.encoder_tokens // count)] * count


def _patches(vision: nn.Module, pixels: Tensor) -> Tensor:
    return vision(pixels)[1]


def _resample(perceiver: nn.Module, patches: Tensor) -> Tensor:
    """``[f, v, d]`` to ``[f, 64, d]``; the perceiver takes ``[B, images, frames, v, d]``."""
    return perceiver(patches[:, None, None])[:, 0]
