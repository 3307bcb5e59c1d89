"""Idefics: ``IdeficsForVisionText2Text`` of transformers, unmodified, with and without its perceiver resampler.

Gated cross-attention layers stand before every few decoder layers. A token sees the last group of adjacent images;
for one image that is what the processor of transformers writes into ``image_attention_mask``, and it lets text see
all frames of a video. A token that sees no image gets exactly 0 from cross-attention, by a gate of the model.

Each rank resamples its own frames: the perceiver works frame by frame.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import IdeficsForVisionText2Text, PreTrainedModel
from transformers.models.idefics.image_processing_pil_idefics import IdeficsImageProcessorPil
from transformers.models.idefics.modeling_idefics import IdeficsAttention, IdeficsGatedCrossAttentionLayer
from transformers.models.idefics.perceiver import IdeficsPerceiverAttention
from transformers.models.idefics.vision import IdeficsVisionAttention

from ds_lvxattn.data.sample import FrameShape, FrameSize
from ds_lvxattn.families.family import FrameLimits, VisualFamily, dense_frame_mask
from ds_lvxattn.families.frames import encode_in_portions, in_samples, last_hidden_states, patches_of, refuse_mask
from ds_lvxattn.runtime.batch import SequenceParallelBatch
from ds_lvxattn.runtime.recompute import Recomputation

FAKE = "<fake_token_around_image>"
GROUP = re.compile(
    rf"(?:{FAKE})?((?:<image>)+)(?:{FAKE})?"
)  # of adjacent images, which a row may have written so itself


class Idefics(VisualFamily):
    """The Idefics family; see ``VisualFamily``."""

    name = "Idefics"
    model_class = IdeficsForVisionText2Text
    image_token = "<image>"
    needs_frames = True
    pixels_apart = True
    image_processor = IdeficsImageProcessorPil

    def role_of(self, module: nn.Module) -> str | None:
        if isinstance(module, IdeficsAttention):
            return "cross" if module.is_cross_attention else "self"
        return "local" if isinstance(module, (IdeficsVisionAttention, IdeficsPerceiverAttention)) else None

    def sizes_of(self, module: Any) -> tuple[int, int, int]:
        heads = module.n_heads if isinstance(module, IdeficsPerceiverAttention) else module.num_heads
        return heads, heads, module.head_dim

    def install_hooks(self, model: nn.Module, recomputation: Recomputation) -> None:
        encode = functools.partial(encode_frames, recomputation)
        model.get_submodule("model").register_forward_pre_hook(encode, with_kwargs=True)
        for module in model.modules():
            if isinstance(module, IdeficsGatedCrossAttentionLayer):
                module.register_forward_pre_hook(drop_dense_mask, with_kwargs=True)

    def trainable_by_default(self) -> tuple[str, ...]:
        resampler = ("*perceiver_resampler.*",) if self.config.use_resampler else ()
        return ("*gated_cross_attn_layers.*", *resampler)

    def visual_widths(self) -> tuple[int, ...]:
        return (self.config.vision_config.embed_dim,)

    def write(self, text: str, sizes: Sequence[FrameSize], processor: Any, limits: FrameLimits) -> str:
        """With the tokens that the processor puts around images, around each group of adjacent ones."""
        return GROUP.sub(lambda found: FAKE + found[1] + FAKE, text)

    def frame_tokens(self) -> int:
        if self.config.use_resampler:
            return self.config.perceiver_config.resampler_n_latents
        return _vision_tokens(self.config.vision_config)

    def encoder_tokens(self) -> int:
        return _vision_tokens(self.config.vision_config)

    def load_model(self, name: str, dtype: torch.dtype) -> PreTrainedModel:
        return with_loss_over_all_tokens(super().load_model(name, dtype))

    def pixels(
        self, frames: Sequence[np.ndarray], shapes: Sequence[FrameShape], processor: Any
    ) -> Mapping[str, Tensor]:
        return {"pixel_values": processor.preprocess(list(frames), return_tensors="pt")[None]}

    def dense_mask(
        self, ranges: Sequence[Sequence[tuple[int, int]]], shapes: Sequence[Sequence[FrameShape]]
    ) -> Mapping[str, Tensor]:
        return {"image_attention_mask": dense_frame_mask(ranges, max(1, *map(len, shapes)))}


def encode_frames(
    recomputation: Recomputation, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Before the model: its visual features from the pixels, in the portions that the batch asks for.

    The model takes features as ``[B, images, tokens, d]`` and expands ``image_attention_mask [B, s_q, images]`` over
    the tokens. Handed over as images of one token each, under the mask of one image that every row with a frame
    sees, they give the gate of the cross-attention layers and no mask of the length of the keys.
    """
    batch: SequenceParallelBatch | None = kwargs.get("sequence_parallel")
    if batch is None:
        return None
    refuse_mask(kwargs, "image_attention_mask")
    rest = dict(kwargs)
    model: Any = module
    name = "perceiver_embeddings" if model.config.use_resampler else "image_encoder_embeddings"
    samples, seen = batch.sees_frame.shape[0], batch.sees_frame[:, 0]
    if not batch.brings_frames:
        # The model would project the features of all frames for each new token. Keys and values of the prefill are
        # used, so it gets one feature for form's sake.
        feature = seen.new_zeros(samples, 1, 1, model.config.vision_config.embed_dim)
        return args, {**rest, "pixel_values": None, name: feature, "image_attention_mask": seen}
    pixels = rest.pop("pixel_values")[0]
    states = last_hidden_states(model.vision_model, [pixels], batch, recomputation)
    if model.config.use_resampler:
        resampler = model.perceiver_resampler
        states = encode_in_portions(resampler, resampler, [states], batch, recomputation)
    features = in_samples(states.flatten(0, 1), samples).unsqueeze(2)
    return args, {**rest, name: features, "image_attention_mask": seen}


def drop_dense_mask(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Before a cross-attention layer: intervals take the place of the mask that the model expanded."""
    if kwargs.get("sequence_parallel") is None:
        return None
    return args, {**kwargs, "image_attention_mask": None}


def with_loss_over_all_tokens(model: Any) -> PreTrainedModel:
    """``model`` with a loss for logits that include its additional tokens.

    transformers 5.23 reshapes them to ``vocab_size`` columns, which fails where ``additional_vocab_size`` is above 0,
    as it is in every published Idefics model.
    """
    model.loss_function = functools.partial(_loss, model.loss_function)
    return model


def _loss(loss: Any, logits: Tensor, labels: Tensor, vocab_size: int, **kwargs: Any) -> Tensor:
    return loss(logits=logits, labels=labels, vocab_size=logits.shape[-1], **kwargs)


def _vision_tokens(vision: Any) -> int:
    return patches_of(vision) + 1
