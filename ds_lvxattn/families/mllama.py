"""Llama 3.2 Vision: ``MllamaForConditionalGeneration`` of transformers, unmodified.

A picture has up to four tiles, in one of the aspect ratios that the image processor chooses from. An image has as many
as the processor gives it; a frame of a video has one, scaled into a tile.

Its cross-attention layers see the visual tokens of the images before a token, by groups of adjacent images. Two corners
are kept. A token that sees no image attends to every visual token there (and its feed-forward output is zeroed), so its
interval is the whole key sequence of its sample. A picture is padded to the model's number of tiles, and the padding is
masked there, but not for such tokens: here it stands behind the keys of a sample that has such tokens. That is for
images; what pads a video's frames is dropped unless it is asked for (``FrameLimits``), as it would cost several times
the memory of the frames for the few tokens of a conversation ahead of its video.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import MllamaForConditionalGeneration
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.mllama.image_processing_pil_mllama import (
    MllamaImageProcessorPil,
    get_image_size_fit_to_canvas,
    get_optimal_tiled_canvas,
)
from transformers.models.mllama.modeling_mllama import (
    MllamaTextCrossAttention,
    MllamaTextSelfAttention,
    MllamaVisionAttention,
)

from ds_lvxattn.data.sample import FrameShape, FrameSize
from ds_lvxattn.errors import ConfigError
from ds_lvxattn.families.family import TILE_LIMITS, FrameLimits, VisualFamily, dense_frame_mask
from ds_lvxattn.families.frames import encode_in_portions, in_samples, patches_of, refuse_mask
from ds_lvxattn.families.mllama_encoder import install_encoder
from ds_lvxattn.runtime.batch import Exchanging, SequenceParallelBatch
from ds_lvxattn.runtime.projections import both_products
from ds_lvxattn.runtime.recompute import Recomputation

ROLES = {MllamaTextCrossAttention: "cross", MllamaTextSelfAttention: "self", MllamaVisionAttention: "local"}

PIXELS = ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")


class Mllama(VisualFamily):
    """The Llama 3.2 Vision family; see ``VisualFamily``."""

    name = "Llama 3.2 Vision"
    model_class = MllamaForConditionalGeneration
    image_token = "<|image|>"
    attention_config = "text_config"
    pixels_apart = True
    image_processor = MllamaImageProcessorPil

    def role_of(self, module: nn.Module) -> str | None:
        return ROLES.get(type(module))

    def reach_attention(self, model: nn.Module) -> None:
        for module in model.modules():
            if isinstance(module, MllamaTextCrossAttention):
                vars(module)["forward"] = functools.partial(cross_attention, module, module.forward)

    def install_hooks(self, model: nn.Module, recomputation: Recomputation) -> None:
        install_encoder(model.get_submodule("model.vision_model"))
        encode = functools.partial(encode_frames, recomputation)
        model.get_submodule("model").register_forward_pre_hook(encode, with_kwargs=True)
        model.get_submodule("model.language_model").register_forward_pre_hook(mask_rows, with_kwargs=True)

    def frame_tokens(self) -> int:
        return patches_of(self.config.vision_config) + 1

    def hidden_rows_see_all(self) -> bool:
        return True  # their feed-forward output is dropped

    def tile_limits(self, processor: Any) -> tuple[str, ...]:
        return tuple(TILE_LIMITS)

    def refuse_unheeded(self, processor: Any, limits: FrameLimits) -> None:
        """See ``VisualFamily``. Fewer tiles of an image than the processor makes are refused too.

        No processor could serve them: it numbers aspect ratios by its ``max_image_tiles`` and fills up to as many
        tiles, and real tiles see those that fill up, so that number is the model's, and shapes its weights.
        """
        super().refuse_unheeded(processor, limits)
        tiles = limits.image_tiles
        if tiles is not None and tiles < (most := processor.max_image_tiles):
            side = self.config.vision_config.image_size
            raise ConfigError(
                f"'finetuning.image_tiles' is {tiles}, and {self.name}'s image processor makes up to {most} of an "
                "image: it cannot be told fewer, so what is exported would be served with other images than it was "
                "trained on; leave it out, and scale the images of your rows down beforehand (within "
                f"{side} x {side} pixels one has one tile), in training as in serving"
            )

    def shape_of(self, size: FrameSize | None, processor: Any, limits: FrameLimits) -> FrameShape:
        grid = (1, 1)
        if size is not None:
            tile, most = self.config.vision_config.image_size, processor.max_image_tiles
            limit = limits.frame_tiles if size.video else limits.image_tiles
            grid = _grid(size.height, size.width, most, tile)
            if limit and grid[0] * grid[1] > limit:
                grid, shown = (0, 0), _grid(size.height, size.width, limit, tile)
                while shown != grid:  # what is scaled into fewer tiles may then need fewer still
                    grid, shown = shown, _grid(*_fit(size.height, size.width, shown, tile), most, tile)
        padding = 0
        if size is not None and (limits.frame_padding or not size.video):
            padding = self.config.vision_config.max_num_tiles - grid[0] * grid[1]
        tokens = self.frame_tokens()
        return FrameShape(grid[0] * grid[1] * tokens, self.encoder_tokens(), grid, padding * tokens)

    def blank_pixels(self) -> Mapping[str, Tensor]:
        vision = self.config.vision_config
        return {
            "pixel_values": torch.zeros(1, 1, 1, vision.num_channels, vision.image_size, vision.image_size),
            "aspect_ratio_ids": torch.ones(1, 1, dtype=torch.long),
            "aspect_ratio_mask": torch.ones(1, 1, 1, dtype=torch.long),
        }

    def pixels(
        self, frames: Sequence[np.ndarray], shapes: Sequence[FrameShape], processor: Any
    ) -> Mapping[str, Tensor]:
        """Those of the processor, of frames scaled into their tiles, with as many tiles as the largest frame has.

        The processor numbers aspect ratios by its own limit, which has to be the model's, so it is not lowered.
        """
        tile, most = self.config.vision_config.image_size, self.config.vision_config.max_num_tiles
        fitting = [
            _fitted(frame, shape.grid, most, tile, processor) for frame, shape in zip(frames, shapes, strict=True)
        ]
        # The frames of all samples go through the encoder as one list.
        made = dict(processor([fitting], max_image_tiles=most, return_tensors="pt"))
        tiles = max(height * width for height, width in (shape.grid for shape in shapes))
        return {key: made[key] if key == "aspect_ratio_ids" else made[key][:, :, :tiles] for key in PIXELS}

    def joined(self, parts: Sequence[Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
        tiles = max(part["aspect_ratio_mask"].shape[2] for part in parts)
        return super().joined([self._padded(part, tiles) for part in parts])

    def pad_tiles(self, pixels: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return self._padded(pixels, self.config.vision_config.max_num_tiles)

    def _padded(self, pixels: Mapping[str, Tensor], tiles: int) -> Mapping[str, Tensor]:
        values, ids, mask = (pixels[key] for key in PIXELS)
        missing = (0, tiles - mask.shape[2])
        values, mask = nn.functional.pad(values, (0, 0, 0, 0, 0, 0, *missing)), nn.functional.pad(mask, missing)
        return dict(zip(PIXELS, (values, ids, mask), strict=True))

    def visual_widths(self) -> tuple[int, ...]:
        return (self.config.text_config.hidden_size, self.config.vision_config.vision_output_dim)

    def encoder_tokens(self) -> int:
        padded = -(-self.frame_tokens() // 8) * 8
        return self.config.vision_config.max_num_tiles * padded

    def dense_mask(
        self, ranges: Sequence[Sequence[tuple[int, int]]], shapes: Sequence[Sequence[FrameShape]]
    ) -> Mapping[str, Tensor]:
        frames = max(1, *map(len, shapes))
        tiles = torch.zeros(len(shapes), 1, frames, self.config.vision_config.max_num_tiles, dtype=torch.long)
        for sample, of_frames in enumerate(shapes):
            for frame, shape in enumerate(of_frames):
                tiles[sample, 0, frame, : shape.tokens // self.frame_tokens()] = 1
        return {"cross_attention_mask": dense_frame_mask(ranges, frames)[..., None] * tiles}

    def trainable_by_default(self) -> tuple[str, ...]:
        layers = self.config.text_config.cross_attention_layers
        return ("*multi_modal_projector.*", *(f"*language_model.layers.{layer}.*" for layer in layers))


def encode_frames(
    recomputation: Recomputation, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Before the model: its visual features from the pixels, in the portions that the batch asks for.

    The model would encode all frames at once. What its layers get is ``[keys, d]``, the frames of this rank in the
    order of its keys.
    """
    batch: SequenceParallelBatch | None = kwargs.get("sequence_parallel")
    if batch is None or not batch.brings_frames:  # then the keys and values are in the model's cache
        return None
    refuse_mask(kwargs, "cross_attention_mask")
    if kwargs.get("cross_attention_states") is not None:
        raise ValueError(
            "cross_attention_states were given beside sequence_parallel: the rank's frames are encoded here, from the "
            "batch's pixel_values; leave them out"
        )
    rest = dict(kwargs)
    inputs = [rest.pop(key)[0] for key in PIXELS]
    vision = module.get_submodule("vision_model")
    encode = functools.partial(_encode, vision)
    states = encode_in_portions(vision, encode, inputs, batch, recomputation, ragged=True)
    # Without the frames' dimension the projections are plain matrix products, whose gradients autograd adds up in
    # place: as views they would take once more the memory of the features.
    states = module.get_submodule("multi_modal_projector")(states)
    if batch.key_order is not None:
        states = states.index_select(0, batch.key_order)
    return args, {**rest, "cross_attention_states": in_samples(states, batch.sees_frame.shape[0]).flatten(0, 1)}


def _encode(vision: Any, *inputs: Tensor, shapes: Sequence[FrameShape]) -> Tensor:
    """The tiles of the frames of a portion that are keys, ``[tokens, d_vision]``."""
    tiles = [(shape.tokens + shape.padding) // vision.num_patches for shape in shapes]
    encoded = vision(*inputs, tiles=max(tiles))
    if min(tiles) == max(tiles):
        return encoded.flatten(0, 2)
    return torch.cat([frame[:count].flatten(0, 1) for frame, count in zip(encoded, tiles, strict=True)])


def _grid(height: int, width: int, most: int, tile: int) -> tuple[int, int]:
    """Rows and columns of tiles, at most ``most``, that the processor gives a picture."""
    rows, columns = get_optimal_tiled_canvas(height, width, most, tile)
    return int(rows) // tile, int(columns) // tile


def _fit(height: int, width: int, grid: tuple[int, ...], tile: int) -> tuple[int, int]:
    """Height and width of a picture that is no larger than its tiles, scaled down as the processor does."""
    rows, columns = get_image_size_fit_to_canvas(height, width, grid[0] * tile, grid[1] * tile, tile)
    return (height, width) if rows >= height and columns >= width else (int(rows), int(columns))


def _fitted(frame: np.ndarray, grid: tuple[int, ...], most: int, tile: int, processor: Any) -> np.ndarray:
    """``frame``, scaled down if the processor would not give it the tiles of ``grid`` as it is."""
    height, width = frame.shape[:2]
    if _grid(height, width, most, tile) == grid:
        return frame
    height, width = _fit(height, width, grid, tile)
    return np.asarray(Image.fromarray(frame).resize((width, height), processor.resample))


def cross_attention(
    module: Any,
    forward: Callable[..., Any],
    hidden_states: Tensor,
    cross_attention_states: Tensor | None = None,
    past_key_values: Any = None,
    attention_mask: Tensor | None = None,
    **others: Any,
) -> Any:
    """``forward`` of ``module``; where it trains, keys and values of the features by ``both_products``.

    Args:
        forward: the module's own.
        hidden_states: ``[B, s_q, d]``, the rank's rows.
        cross_attention_states: ``[B * s_kv, d]``, its features.
    """
    if cross_attention_states is None or past_key_values is not None or "sequence_parallel" not in others:
        return forward(
            hidden_states, cross_attention_states=cross_attention_states, past_key_values=past_key_values,
            attention_mask=attention_mask, **others,
        )  # fmt: skip
    rows = (module.q_proj(hidden_states), *both_products(cross_attention_states, module.k_proj, module.v_proj))
    batch, size = len(hidden_states), module.head_dim
    q, k, v = (x.view(batch, -1, x.shape[-1] // size, size).transpose(1, 2) for x in rows)
    q, k = module.q_norm(q), module.k_norm(k)
    attend = ALL_ATTENTION_FUNCTIONS[module.config._attn_implementation]
    dropout = module.dropout if module.training else 0.0
    out, weights = attend(module, q, k, v, attention_mask, dropout=dropout, scaling=module.scaling, **others)
    return module.o_proj(out.flatten(2)), weights


def mask_rows(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Before the language model: say which rows see a frame, ``[B, 1, s_q, 1]``, as the model derives it from a
    dense mask."""
    batch: Exchanging | None = kwargs.get("sequence_parallel")
    if batch is None:
        return None
    states = kwargs.get("cross_attention_states")
    mask = batch.sees_frame if states is None else batch.sees_frame.to(states.dtype)
    return args, {**kwargs, "full_text_row_masked_out_mask": mask}
