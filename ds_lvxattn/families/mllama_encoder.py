"""The vision encoder of Llama 3.2 Vision with intervals instead of its dense mask: same modules, same results.

The encoder pads a frame to as many tiles as the model has, and a tile to a multiple of eight patches. Its mask hides
padding from padding, and nothing else: a real patch sees all patches of its frame, padding too, and a patch of padding
sees the real ones. With the real patches first, both are intervals, so a layer's attention is one call of the project's
kernel. The patches of the tiles stand one tile behind the other, real tiles first as the image processor orders them,
and the padding patches of all tiles behind them; nothing is moved from layer to layer. (A tile has a square and one
patches, which is no multiple of eight, so there is padding in every tile.)

Of the layers' hidden states only those are kept that the model's output holds, and of those only the rows of the tiles
that the caller reads; in the last layer no others are computed. Others are overwritten where nothing is differentiated:
the product behind an attention is then added up in the rows that it belongs to, without a pass over them.
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
from ds_lvxattn.runtime.projections import plus_product
from ds_lvxattn.runtime.registration import ENCODER_IMPLEMENTATION

PATCH_MULTIPLE = 8


def install_encoder(vision: Any) -> None:
    """Let a ``MllamaVisionModel`` compute ``encode_tiles`` if it is called with ``tiles``; other calls stay its own."""
    vision.set_attn_implementation(ENCODER_IMPLEMENTATION)
    vision.forward = functools.partial(_forward, vision, vision.forward)
    for layer in (*vision.transformer.layers, *vision.global_transformer.layers):
        layer.forward = functools.partial(_layer, layer, layer.forward)


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
    states: dict[int, Tensor] = {}
    watched = any(layer._forward_hooks or layer._forward_pre_hooks for layer in vision.transformer.layers)
    for number, layer in enumerate(vision.transformer.layers):
        hidden = layer(hidden, attention_mask=seen, overwrite=not watched and number - 1 not in states)
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


def _layer(
    layer: Any, forward: Callable[..., Any], *args: Any, read: int | None = None, overwrite: bool = False, **named: Any
) -> Tensor:
    """A layer of the encoder; with a mask that is no interval its own forward, whose names differ by release.

    Args:
        layer, forward: the module and its own forward.
        args, named: ``hidden_states [f, rows, d]``, and by its name what each row sees.
        read: rows that are computed, the first ones; they still see all. None: all.
        overwrite: whether ``hidden_states`` are not needed any more.
    """
    seen = named.get("attention_mask")
    if not isinstance(seen, KVInterval):
        own: Tensor = forward(*args, **named)
        return own
    (hidden_states,) = args
    attention, rows = layer.self_attn, hidden_states
    normed = of_rows = layer.input_layernorm(hidden_states)
    if read is not None and read < hidden_states.shape[1]:
        rows, of_rows = hidden_states[:, :read], normed[:, :read]
        seen = KVInterval(seen.start[:, :read], seen.stop[:, :read], pattern=ALIKE)
    q, k, v = attention.q_proj(of_rows), attention.k_proj(normed), attention.v_proj(normed)
    q, k, v = (x.unflatten(-1, (attention.num_heads, attention.head_dim)).transpose(1, 2) for x in (q, k, v))
    attend = ALL_ATTENTION_FUNCTIONS[ENCODER_IMPLEMENTATION]
    attended, _ = attend(attention, q, k, v, seen, scaling=attention.scaling)
    attended = attended.flatten(2)
    if layer.is_gated:
        rows = torch.addcmul(rows, layer.gate_attn.tanh(), attention.o_proj(attended))
        return torch.addcmul(rows, layer.gate_ffn.tanh(), layer.mlp(layer.post_attention_layernorm(rows)))
    rows = plus_product(rows, attended, attention.o_proj, overwrite)
    return rows + layer.mlp(layer.post_attention_layernorm(rows))


def _with_blank(patches: Tensor, tiles: int) -> Tensor:
    """``[f, t, tokens, d]`` with tiles of zeros up to ``tiles``."""
    missing = tiles - patches.shape[1]
    return pad(patches, (0, 0, 0, 0, 0, missing)) if missing else patches


def _visible(mask: Tensor, tokens: int, rows: int) -> KVInterval:
    """What each of ``rows`` patches of a frame sees: real patches, which stand first, all; padding the real ones."""
    real = (mask.sum(dim=1, keepdim=True) * tokens).to(torch.int32)
    place = torch.arange(rows, dtype=torch.int32, device=mask.device)
    stop = torch.where(place < real, rows, real)
    return KVInterval(torch.zeros_like(stop), stop, pattern=ALIKE)
