"""The vision encoder of Llama 3.2 Vision with intervals instead of its dense mask: same modules, same results.

The encoder pads a frame to as many tiles as the model has, and a tile to a multiple of eight patches. Its mask hides
padding from padding, and nothing else: a real patch sees all patches of its frame, padding too, and a patch of padding
sees the real ones. With the real patches first, both are intervals, so a layer's attention is one call of the project's
kernel. The patches of the tiles stand one tile behind the other, real tiles first as the image processor orders them,
and the padding patches of all tiles behind them; nothing is moved from layer to layer. (A tile has a square and one
patches, which is no multiple of eight, so there is padding in every tile.)

Of the layers' hidden states only those are kept that the model's output holds, and of those only the rows of the tiles
that the caller reads; in the last layer no others are computed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ds_lvxattn.exchange.interval import KVInterval
from ds_lvxattn.kernels.pattern import ALIKE
from ds_lvxattn.runtime.registration import ENCODER_IMPLEMENTATION

PATCH_MULTIPLE = 8


def install_encoder(vision: Any) -> None:
    """Let a ``MllamaVisionModel`` compute ``encode_tiles`` if it is called with ``tiles``; other calls stay its own."""
    vision.set_attn_implementation(ENCODER_IMPLEMENTATION)
    vision.forward = functools.partial(_forward, vision, vision.forward)
    last = vision.global_transformer.layers[-1]
    last.forward = functools.partial(_last_layer, last, last.forward)


def _forward(
    vision: nn.Module, forward: Callable[..., Any], *args: Any, tiles: int | None = None, **kwargs: Any
) -> Any:
    return forward(*args, **kwargs) if tiles is None else encode_tiles(vision, *args, tiles=tiles, **kwargs)


def encode_tiles(vision: Any, pixels: Tensor, ids: Tensor, mask: Tensor, *, tiles: int) -> Tensor:
    """Features of the first ``tiles`` tiles of each frame.

    Args:
        vision: the encoder, after ``install_encoder``.
        pixels: ``[f, t, channels, height, width]``; tiles beyond ``t``, up to the model's count, are blank.
        ids: int64 ``[f]``, aspect ratio of each frame.
        mask: ``[f, t]``, 1 for real tiles, which stand before the others.
        tiles: tiles of a frame that are read.

    Returns:
        ``[f, tiles, tokens of a tile, d]``, as the tiles of the model's ``last_hidden_state``; contiguous.
    """
    weight, ids = vision.patch_embedding.weight, ids[:, None]
    patches = vision.patch_embedding(pixels.flatten(0, 1).to(weight.dtype)).flatten(2).transpose(1, 2)
    # The embedding has no bias: patches of blank tiles are zero.
    patches = _with_blank(patches.unflatten(0, pixels.shape[:2]), vision.max_num_tiles)
    hidden = vision.pre_tile_positional_embedding(patches, ids)
    first = vision.class_embedding.expand(*hidden.shape[:2], 1, hidden.shape[3])
    hidden = vision.gated_positional_embedding(torch.cat((first, hidden), dim=2), ids)
    hidden = vision.layernorm_pre(hidden)

    count, tokens = hidden.shape[1:3]
    padding = -tokens % PATCH_MULTIPLE
    hidden = pad(hidden.flatten(1, 2), (0, 0, 0, count * padding))
    seen = _visible(mask, tokens, hidden.shape[1])
    read = tiles * tokens
    wanted = [number % len(vision.transformer.layers) for number in vision.intermediate_layers_indices]
    states = {}
    for number, layer in enumerate(vision.transformer.layers):
        hidden = layer(hidden, attention_mask=seen)
        if number in wanted:
            states[number] = hidden[:, :read]

    hidden = vision.layernorm_post(hidden)
    embed = vision.post_tile_positional_embedding
    parts = hidden.split((count * tokens, count * padding), dim=1)
    hidden = torch.cat([embed(part.unflatten(1, (count, -1)), ids).flatten(1, 2) for part in parts], dim=1)
    for layer in vision.global_transformer.layers[:-1]:
        hidden = layer(hidden, attention_mask=seen)
    hidden = vision.global_transformer.layers[-1](hidden, attention_mask=seen, read=read)
    # The model stacks the states along the last dimension, behind the features.
    between = torch.stack([states[number] for number in wanted], dim=-1)
    features = torch.cat((hidden, between.flatten(2)), dim=-1)
    return features.unflatten(1, (tiles, tokens))


def _last_layer(
    layer: Any, forward: Callable[..., Any], hidden_states: Tensor, attention_mask: Any = None, read: int | None = None
) -> Tensor:
    """The layer's own forward, or with ``read`` its first rows alone; they still see all."""
    if read is None or read == hidden_states.shape[1]:
        rows: Tensor = forward(hidden_states, attention_mask=attention_mask)
        return rows
    attention = layer.self_attn
    normed = layer.input_layernorm(hidden_states)
    q, k, v = attention.q_proj(normed[:, :read]), attention.k_proj(normed), attention.v_proj(normed)
    q, k, v = (x.unflatten(-1, (attention.num_heads, attention.head_dim)).transpose(1, 2) for x in (q, k, v))
    seen = KVInterval(attention_mask.start[:, :read], attention_mask.stop[:, :read], pattern=ALIKE)
    attend = ALL_ATTENTION_FUNCTIONS[ENCODER_IMPLEMENTATION]
    attended, _ = attend(attention, q, k, v, seen, scaling=attention.scaling)
    rows = hidden_states[:, :read] + _gated(layer, "gate_attn", attention.o_proj(attended.flatten(2)))
    return rows + _gated(layer, "gate_ffn", layer.mlp(layer.post_attention_layernorm(rows)))


def _gated(layer: Any, gate: str, x: Tensor) -> Tensor:
    return getattr(layer, gate).tanh() * x if layer.is_gated else x


def _with_blank(patches: Tensor, tiles: int) -> Tensor:
    """``[f, t, tokens, d]`` with tiles of zeros up to ``tiles``."""
    return pad(patches, (0, 0, 0, 0, 0, tiles - patches.shape[1]))


def _visible(mask: Tensor, tokens: int, rows: int) -> KVInterval:
    """What each of ``rows`` patches of a frame sees: real patches, which stand first, all; padding the real ones."""
    real = (mask.sum(dim=1, keepdim=True) * tokens).to(torch.int32)
    place = torch.arange(rows, dtype=torch.int32, device=mask.device)
    stop = torch.where(place < real, rows, real)
    return KVInterval(torch.zeros_like(stop), stop, pattern=ALIKE)
