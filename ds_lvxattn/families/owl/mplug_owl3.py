"""mPLUG-Owl3: ``mPLUGOwl3Model`` of ``hyper_qwen2``, or of the code that a checkpoint comes with, known by name.

A hyper layer attends twice with the same queries: to the text, role ``self``, and to the visual tokens, role
``cross``, which is planned under the name of its ``v_kv_proj``. Both are exchanged, each as its plan says. The two
parts are joined by the layer's gate or, in the fused kind, by their log-sum-exp, which makes them one softmax over all
keys.

Each rank projects the keys of its own frames, with the rotary position of each frame's place in the whole text. The
layer's input norm of the visual tokens is computed inside the attention, so that it is recomputed with the keys: kept,
its output would take more memory than they.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel, SiglipPreTrainedModel

from ds_lvxattn.data.sample import FrameShape, FrameSize
from ds_lvxattn.exchange.merge_attention import merge_attention
from ds_lvxattn.families.crops import Crops
from ds_lvxattn.families.frames import encode_in_portions, patches_of
from ds_lvxattn.families.owl import checkpoint_names, hyper_qwen2, processing, published
from ds_lvxattn.plan.layer_plan import AttentionLayer
from ds_lvxattn.runtime.batch import Exchanging, SequenceParallelBatch
from ds_lvxattn.runtime.recompute import Recomputation


@dataclass(frozen=True)
class VisualFeatures:
    """This rank's visual tokens, as the model's layers hand them down to hyper attention.

    Attributes:
        states: ``[frames, L, d]``, before the norm of a layer; in a decoding step ``[0, d]``.
    """

    states: Tensor


class MPlugOwl3(Crops):
    """The mPLUG-Owl3 family; see ``Crops``."""

    name = "mPLUG-Owl3"
    model_class = hyper_qwen2.mPLUGOwl3Model
    image_token = "<|image|>"
    attention_config = None
    pixels_apart = True

    @classmethod
    def has_model(cls, model: nn.Module) -> bool:
        return type(model).__name__ == "mPLUGOwl3Model"

    @classmethod
    def has_config(cls, config: Any) -> bool:
        return config.model_type == "mplugowl3"

    def role_of(self, module: nn.Module) -> str | None:
        name = type(module).__name__
        if _is_hyper_qwen2(module):
            return "self"
        return "local" if name.lower().startswith("siglip") and "Attention" in name else None

    def sizes_of(self, module: Any) -> tuple[int, int, int]:
        if "Pooling" in type(module).__name__:
            module = module.attention
        return super().sizes_of(module)

    def attention_layers(self, model: nn.Module) -> dict[nn.Module, AttentionLayer]:
        layers: dict[nn.Module, AttentionLayer] = {}
        for module, layer in super().attention_layers(model).items():
            layers[module] = layer
            projection: Any = getattr(module, "v_kv_proj", None)
            if projection is not None:
                layers[projection] = replace(layer, name=f"{layer.name}.v_kv_proj", role="cross", shares_layer=True)
        return layers

    def recomputed(self, layers: Mapping[nn.Module, AttentionLayer]) -> list[nn.Module]:
        return [module for module in layers if hasattr(module, "v_kv_proj")]

    def reach_attention(self, model: nn.Module) -> None:
        config: Any = model.config
        if getattr(config, "hyper_attention", None) is None:  # the config of published code, which has one kind only
            config.hyper_attention, _ = checkpoint_names.kinds([name for name, _ in model.named_parameters()])
        for layer in model.modules():
            attention: Any = getattr(layer, "self_attn", None)
            if _is_hyper_qwen2(attention):
                planned = getattr(attention, "v_kv_proj", None)  # adapters may take its place in the layer
                attention.forward = functools.partial(
                    exchanged_hyper_attention, attention, attention.forward, layer, planned
                )

    def install_hooks(self, model: nn.Module, recomputation: Recomputation) -> None:
        language_model = model.get_submodule("language_model")
        model.register_forward_pre_hook(functools.partial(encode_frames, recomputation), with_kwargs=True)
        language_model.register_forward_pre_hook(give_features, with_kwargs=True)
        attention = [module for module in model.modules() if _is_hyper_qwen2(module)]
        published.fit(language_model, attention)

    def trainable_by_default(self) -> tuple[str, ...]:
        gate = () if self.config.hyper_attention == "fused" else ("*.self_attn.gate*",)
        return ("*vision2text_model.*", "*.v_kv_proj.*", *gate)

    def visual_widths(self) -> tuple[int, ...]:
        return (self.config.hidden_size, self.config.vision_config.hidden_size)

    def encoder(self, model: nn.Module) -> nn.Module | None:
        return None  # its layers are called one by one, see ``hyper_qwen2.vision_states``

    def frame_tokens(self) -> int:
        return patches_of(self.config.vision_config)

    def encoder_tokens(self) -> int:
        return self.frame_tokens()

    def frame_ranges(self, input_ids: Sequence[int], image_id: int) -> list[tuple[int, int]]:
        """All images so far: fused attention lets the token of an image see it, the other kinds the token after it."""
        ranges, before = [], 0
        for token in input_ids:
            seen = before + (token == image_id)
            ranges.append((0, seen if self.config.hyper_attention == "fused" else before))
            before = seen
        return ranges

    def grid_of(self, size: FrameSize, processor: Any) -> tuple[int, ...]:
        if getattr(processor, "cut_prompt", None) is None:
            return ()
        return processing.grid_of(size.height, size.width, processor.size["height"])

    def cut(self, frame: np.ndarray, processor: Any) -> list[np.ndarray]:
        return processing.squares_of(frame, processor.size["height"])

    def image_text(self, grid: Sequence[int], processor: Any) -> str:
        if not grid:
            return self.image_token
        return processing.text_of((grid[0], grid[1]), processor.cut_prompt, self.image_token)

    def complete_processor(self, processor: Any, image_token: str) -> None:
        processor.image_token = image_token
        processor.seen_behind = 0 if self.config.hyper_attention == "fused" else 1

    def load_model(self, name: str, dtype: torch.dtype) -> PreTrainedModel:
        return checkpoint_names.load_model(name, dtype)

    def load_processor(self, name: str) -> Any:
        return checkpoint_names.load_processor(name)

    def dense_mask(
        self, ranges: Sequence[Sequence[tuple[int, int]]], shapes: Sequence[Sequence[FrameShape]]
    ) -> Mapping[str, Any]:
        """The places of each sample's images, from which the model makes its masks and its rotary positions."""
        places = []
        for rows in ranges:
            seen = np.maximum.accumulate([stop for _, stop in rows])  # the padding behind a sample sees nothing
            places.append(torch.from_numpy(np.searchsorted(seen, np.arange(seen[-1]), side="right")))
        return {"media_offset": places}


def encode_frames(
    recomputation: Recomputation, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Before the model: visual tokens of the rank's frames, in the portions that the batch asks for."""
    batch: Any = kwargs.get("sequence_parallel")
    if batch is None:
        return None
    rest = dict(kwargs)
    if not batch.brings_frames:
        rest.pop("attention_mask", None)  # of the padding ahead of the prompts, which the step knows
        model: Any = module
        no_states = model.get_input_embeddings().weight.new_empty(0, model.config.hidden_size)
        return args, {**rest, "media_offset": VisualFeatures(no_states)}
    vision, projector = module.get_submodule("vision_model"), module.get_submodule("vision2text_model")
    known = isinstance(vision, SiglipPreTrainedModel)
    encode = functools.partial(hyper_qwen2.vision_states if known else published.vision_states, vision)
    pixels = rest.pop("pixel_values")[0]
    states = projector(encode_in_portions(vision, encode, [pixels], batch, recomputation))
    return args, {**rest, "media_offset": VisualFeatures(states)}


def give_features(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Before the language model: no visual tokens in place of those that the model would have encoded.

    Hyper layers put them through their input norm; the features pass it by as ``media_offset``, which no layer touches.
    """
    features = kwargs.get("media_offset")
    if not isinstance(features, VisualFeatures):
        return None
    return args, {**kwargs, "image_embeds": features.states.new_empty(0, features.states.shape[-1])}


def exchanged_hyper_attention(
    module: Any,
    forward: Callable[..., Any],
    layer: Any,
    planned: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    position_ids: Any = None,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    image_embeds: Any = None,
    media_offset: Any = None,
    past_key_values: Cache | None = None,
    sequence_parallel: Exchanging | None = None,
    **others: Any,
) -> Any:
    """``forward`` of ``module``, the attention of one decoder layer, over text and frames that are divided over ranks.

    Args:
        forward: the module's own, for whole samples.
        layer: the decoder layer, whose input norm the visual tokens go through.
        planned: the module by which attention to visual tokens is planned; None in layers without it.
        hidden_states: ``[B, s_q, d]``, the rank's rows.
        position_ids: int64 ``[B, s_q]``, their positions in the whole text; or ``position_embeddings``.
        media_offset: the rank's ``VisualFeatures`` in a hyper layer, None in others.
        past_key_values: the model's cache, while text is generated.
        sequence_parallel: the micro-batch or decoding step; None computes ``forward``.

    Raises:
        ValueError: a dense mask is given.
    """
    if sequence_parallel is None:
        given = {
            "attention_mask": attention_mask, "position_ids": position_ids, "position_embeddings": position_embeddings,
            "image_embeds": image_embeds, "media_offset": media_offset, "past_key_values": past_key_values,
        }  # fmt: skip
        return forward(hidden_states, **{key: value for key, value in given.items() if value is not None}, **others)
    if attention_mask is not None:
        raise ValueError("a dense attention mask was given; sequence-parallel attention takes intervals")
    angles = position_embeddings or hyper_qwen2.rotary(position_ids, module, hidden_states.dtype)
    q, k, v = hyper_qwen2.text_projections(module, hidden_states, angles)
    if past_key_values is not None:
        k, v = past_key_values.update(k, v, module.layer_idx)
    out, lse = sequence_parallel.attend(module, q, k, v)
    if media_offset is None:
        return module.o_proj(out.transpose(1, 2).flatten(2)), None, None
    visual_k, visual_v = k, v  # which a decoding step does not read: it has those of the prefill
    if isinstance(sequence_parallel, SequenceParallelBatch):
        projected = module.v_kv_proj(layer.input_layernorm(media_offset.states))
        places = hyper_qwen2.rotary(sequence_parallel.places, module, projected.dtype)
        visual_k, visual_v = hyper_qwen2.visual_keys(module, projected, places)
    visual, visual_lse = sequence_parallel.attend(planned, q, visual_k, visual_v)
    if hyper_qwen2.is_fused(module):
        out, _ = merge_attention([(out, lse), (visual, visual_lse)])
        context = out.transpose(1, 2)
    else:
        # Text ahead of the first image passes no gate.
        text = out.transpose(1, 2)
        sees = sequence_parallel.sees_frame.transpose(1, 2).bool()
        context = torch.where(sees, hyper_qwen2.gated(module, text, visual.transpose(1, 2)), text)
    return module.o_proj(context.flatten(2)), None, None


def _is_hyper_qwen2(module: Any) -> bool:
    name = type(module).__name__
    return name.startswith("HyperQwen2") and "Attention" in name
