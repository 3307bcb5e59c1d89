"""BLIP-2: ``Blip2ForConditionalGeneration`` of transformers, unmodified, around a decoder-only language model.

Its Q-Former reads each frame by itself, so each rank runs it over its own frames. The 32 tokens that it makes of a
frame stand in the text, as in LLaVA. A Q-Former over all frames of a video is ``runtime.adapters``.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import Blip2ForConditionalGeneration, PreTrainedModel
from transformers.models.blip_2.modeling_blip_2 import (
    BaseModelOutputWithVisionQformerOutputs,
    Blip2Attention,
    Blip2QFormerMultiHeadAttention,
)

from ds_lvxattn.errors import ConfigError
from ds_lvxattn.families.concatenation import Concatenation
from ds_lvxattn.families.frames import encode_in_portions, last_hidden_states, patches_of
from ds_lvxattn.families.handed_on import hand_down
from ds_lvxattn.runtime.batch import SequenceParallelBatch
from ds_lvxattn.runtime.recompute import Recomputation


class Blip2(Concatenation):
    """The BLIP-2 family; see ``VisualFamily``.

    Attributes:
        features: the method that the model's forward asks for its visual tokens.
        q_former_attention: classes of the Q-Former's attention.
        vision_attention: the class of the vision encoder's.
    """

    name = "BLIP-2"
    model_class: type[PreTrainedModel] = Blip2ForConditionalGeneration
    image_token = "<image>"
    needs_frames = True
    pixels_apart = True
    features = "get_image_features"
    q_former_attention: tuple[type[nn.Module], ...] = (Blip2QFormerMultiHeadAttention,)
    vision_attention: tuple[type[nn.Module], ...] = (Blip2Attention,)

    @property
    def text_config(self) -> Any:
        text = super().text_config
        if not self.config.use_decoder_only_language_model:
            raise ConfigError(
                f"the language model of {self.name} is a {text.model_type!r}, an encoder-decoder, whose visual tokens "
                "no causal text holds; choose a checkpoint with a decoder-only one (OPT), or set "
                "'sequence_parallel_size' to 1"
            )
        return text

    def is_local(self, module: nn.Module) -> bool:
        return isinstance(module, (*self.vision_attention, *self.q_former_attention))

    def sizes_of(self, module: Any) -> tuple[int, int, int]:
        if isinstance(module, self.q_former_attention):
            module = cast(Any, module)
            return module.num_attention_heads, module.num_attention_heads, module.attention_head_size
        return super().sizes_of(module)

    def install_hooks(self, model: nn.Module, recomputation: Recomputation) -> None:
        """The model's forward asks ``features`` for the visual tokens, and puts them into the text itself."""
        blip: Any = model
        hand_down(model, self.role_of)
        tokens = functools.partial(_visual_tokens, self, blip, getattr(blip, self.features), recomputation)
        setattr(blip, self.features, tokens)
        blip.register_forward_pre_hook(_hand_down_batch, with_kwargs=True)

    def decoder(self, model: nn.Module) -> Any:
        return model.get_submodule("language_model")  # the model's own takes pixels alone

    def encode(
        self, model: Any, pixels: Sequence[Tensor], batch: SequenceParallelBatch, recomputation: Recomputation
    ) -> Tensor:
        states = last_hidden_states(model.vision_model, pixels[:1], batch, recomputation)
        # An input, not a part of what is computed again: ZeRO-3 knows it as a parameter of the model around.
        queries = model.query_tokens.expand(states.shape[0], -1, -1)
        read = functools.partial(self.read, model.qformer)
        tokens = encode_in_portions(model.qformer, read, [queries, states, *pixels[1:]], batch, recomputation)
        return model.language_projection(tokens.to(states.dtype))

    def read(self, q_former: nn.Module, queries: Tensor, states: Tensor, *told: Tensor) -> Tensor:
        """What the Q-Former makes of frames, ``[f, queries, d]``, by their vision tokens ``states [f, tokens, d]``."""
        return q_former(query_embeds=queries, encoder_hidden_states=states).last_hidden_state

    def trainable_by_default(self) -> tuple[str, ...]:
        return ("query_tokens", "qformer.*", "language_projection.*")

    def visual_widths(self) -> tuple[int, ...]:
        # The Q-Former's input is a frame's vision tokens, shared here by the few that it makes of them.
        vision = self.config.vision_config
        per_token = -(-_vision_tokens(vision) * vision.hidden_size // self.config.num_query_tokens)
        return (self.config.text_config.hidden_size, self.config.qformer_config.hidden_size, per_token)

    def frame_tokens(self) -> int:
        return self.config.num_query_tokens

    def encoder_tokens(self) -> int:
        return _vision_tokens(self.config.vision_config)

    def complete_processor(self, processor: Any, image_token: str) -> None:
        """It writes as many visual tokens ahead of a text."""
        processor.num_query_tokens = self.config.num_query_tokens

    def blank_pixels(self) -> Mapping[str, Tensor]:
        size = self.config.vision_config.image_size
        return {"pixel_values": torch.zeros(1, 1, 3, size, size)}


def _hand_down_batch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Before the model: its pixels together with the batch, which its forward does not hand to the vision encoder."""
    batch: SequenceParallelBatch | None = kwargs.get("sequence_parallel")
    if batch is None:
        return None
    return args, {**kwargs, "pixel_values": (kwargs["pixel_values"][0], batch)}


def _visual_tokens(
    family: Blip2, model: Any, features: Any, recomputation: Recomputation, pixels: Any, **options: Any
) -> Any:
    """``features`` of the model; for pixels with a batch, the tokens that stand in the rank's own rows.

    In the order of those rows, which is that in which the model's forward puts tokens into the text.
    """
    if not isinstance(pixels, tuple):
        return features(pixels, **options)
    own_pixels, batch = pixels
    told = [options[name][0] for name in family.pixel_arguments[1:]]
    tokens = family.encoded(model, [own_pixels, *told], batch, recomputation)
    in_rows = batch.visual_rows.fetch(tokens, batch.comm)
    return BaseModelOutputWithVisionQformerOutputs(pooler_output=in_rows)


def _vision_tokens(vision: Any) -> int:
    return patches_of(vision) + 1
