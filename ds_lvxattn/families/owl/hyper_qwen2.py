"""mPLUG-Owl3 (arXiv 2408.04840) with the parameter names of its published checkpoints, from parts of transformers.

The code that the checkpoints come with is for transformers 4; this model takes their weights, and is small where a test
or ``--model`` needs it. An export takes this file along, which imports torch and transformers alone.

Some decoder layers are *hyper layers*: text attends to text and, with the same queries, to the visual tokens of the
images so far, whose keys and values come from ``v_kv_proj``. The visual keys carry MI-Rope: all tokens of an image take
the rotary position of its *place*, the first text token that sees it.

Each kind of hyper attention is one of ``HYPER_ATTENTION``. This forward is plain dense attention on one rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import (
    AutoConfig,
    Cache,
    DynamicCache,
    GenerationMixin,
    PreTrainedModel,
    Qwen2Config,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP, Qwen2RMSNorm

# How a hyper layer joins text and visual attention: by a gate of its own, by a gate that it computes from the text's
# part of each head (both are in code published for the 7B-240728, 2B and 1B checkpoints), or as one softmax over text
# and visual keys (7B-241101).
HYPER_ATTENTION = ("gate", "gate_proj", "fused")


class MPlugOwl3Config(Qwen2Config):
    """Config of ``mPLUGOwl3Model``: that of Qwen2, and

    Args:
        vision_config: of a ``SiglipVisionModel``.
        hyper_layers: numbers of the hyper layers; the first decoder layer has the number 1.
        hyper_attention: one of ``HYPER_ATTENTION``. Published configs leave it out, as their code has only one.
        projector: ``linear``, or ``mlp`` for two layers, from visual features to the text's width. Left out, too.
    """

    model_type = "mplugowl3"
    sub_configs = {"vision_config": SiglipVisionConfig}  # noqa: RUF012

    def __init__(
        self,
        vision_config: Any = None,
        hyper_layers: Sequence[int] = (1, 9, 17, 25),
        hyper_attention: str | None = None,
        projector: str | None = None,
        **kwargs: Any,
    ) -> None:
        given = isinstance(vision_config, SiglipVisionConfig)
        self.vision_config = vision_config if given else SiglipVisionConfig(**(vision_config or {}))
        self.hyper_layers = list(hyper_layers)
        self.hyper_attention, self.projector = hyper_attention, projector
        super().__init__(**kwargs)


AutoConfig.register(MPlugOwl3Config.model_type, MPlugOwl3Config, exist_ok=True)
MPlugOwl3Config.register_for_auto_class()


# Visual keys and values of a hyper layer, for each sample, by the number of the layer.
VisualCache = dict[int, list[tuple[Tensor, Tensor]]]


# What an attention module computes, from the parameters that published modules have


def rotary(positions: Tensor, module: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the rotary embedding at ``positions``, ``[*positions, D]`` each, at least float32."""
    wide = torch.promote_types(dtype, torch.float32)
    steps = torch.arange(0, module.head_dim, 2, device=positions.device, dtype=wide) / module.head_dim
    angles = positions.to(wide)[..., None] / module.rope_theta**steps
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """``x`` with its rotary embedding; the halves of its last dimension are the components."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def text_projections(
    module: Any, hidden_states: Tensor, angles: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries ``[B, H_q, S, D]``, keys and values ``[B, H_kv, S, D]`` of text, rotated by ``angles [B, S, D]``."""
    cos, sin = (x.to(hidden_states.dtype).unsqueeze(1) for x in angles)
    q, k, v = (
        projection(hidden_states).unflatten(-1, (-1, module.head_dim)).transpose(1, 2)
        for projection in (module.q_proj, module.k_proj, module.v_proj)
    )
    return rotate(q, cos, sin), rotate(k, cos, sin), v


def visual_keys(module: Any, kv: Tensor, angles: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Visual keys, with MI-Rope, and values of samples that have equally many images.

    Args:
        kv: what ``v_kv_proj`` returns, ``[B * images, L, H_kv * 2 * D]``.
        angles: ``rotary`` of the places of the images in the text, ``[B, images, D]`` each.

    Returns:
        Twice ``[B, H_kv, images * L, D]``.
    """
    tokens = kv.shape[1]
    heads = kv.view(*angles[0].shape[:2], tokens, module.num_key_value_heads, 2, module.head_dim)
    keys, values = heads.unbind(-2)
    cos, sin = (x[:, :, None, None] for x in angles)
    keys = rotate(keys.to(cos.dtype), cos, sin).to(kv.dtype)
    by_head = [x.permute(0, 3, 1, 2, 4).flatten(2, 3) for x in (keys, values)]
    return by_head[0], by_head[1]


def is_fused(module: nn.Module) -> bool:
    """Whether a hyper layer's attention is one softmax over text and visual keys."""
    return not hasattr(module, "gate") and not hasattr(module, "gate_proj")


def gated(module: Any, text: Tensor, visual: Tensor) -> Tensor:
    """Text's and visual part of hyper attention joined by the module's gate; ``[B, S, H_q, D]`` each."""
    gate = module.gate_proj(text) if hasattr(module, "gate_proj") else module.gate.sigmoid().view(text.shape[2:])
    return text * (1 - gate) + visual * gate


def seen_text(rows: int, keys: int, attention_mask: Tensor | None, device: torch.device) -> Tensor:
    """Which text the last ``rows`` of ``keys`` tokens see, bool ``[1 or B, rows, keys]``.

    Args:
        attention_mask: int64 ``[B, keys]``, 0 for padding ahead of a sample, each token of which sees itself alone.
    """
    positions = torch.arange(keys, device=device)
    own = positions[keys - rows :, None]
    causal = (own >= positions)[None]
    if attention_mask is None:
        return causal
    return causal & (attention_mask[:, None].bool() | (own == positions))


class HyperQwen2Attention(nn.Module):
    """Causal self-attention of Qwen2; in a hyper layer over visual tokens too."""

    def __init__(self, config: Any, hyper: bool, layer_idx: int) -> None:
        super().__init__()
        width = config.hidden_size
        self.layer_idx = layer_idx
        self.num_heads, self.num_key_value_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = width // self.num_heads
        self.rope_theta = config.rope_parameters["rope_theta"]
        kv_width = self.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, kv_width)
        self.v_proj = nn.Linear(width, kv_width)
        self.o_proj = nn.Linear(width, width, bias=False)
        if not hyper:
            return
        self.v_kv_proj = nn.Linear(width, 2 * kv_width)
        if config.hyper_attention == "gate":
            self.gate = nn.Parameter(torch.zeros(width))
        elif config.hyper_attention == "gate_proj":
            self.gate_proj = nn.Sequential(nn.Linear(self.head_dim, self.head_dim), nn.Sigmoid())

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        image_embeds: Tensor | None = None,
        media_offset: Sequence[Tensor] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        visual_cache: VisualCache | None = None,
    ) -> tuple[Tensor, None, None]:
        """Attention of whole samples, causal over text.

        Args:
            hidden_states: ``[B, S, d]``, behind what ``past_key_values`` has.
            position_embeddings: ``rotary`` of the rows' positions, ``[B, S, D]`` each.
            image_embeds: ``[images, L, d]`` of all samples one after another, normalised; None outside hyper layers,
                and where ``visual_cache`` has their keys.
            media_offset: for each sample int64 ``[images]``, their places, ascending.
            attention_mask: int64 ``[B, keys]``, 0 for padding ahead of a sample; None: it stands behind it, if at all.
            past_key_values: of the text so far; the rows' own join them.
            visual_cache: of the images; those of ``image_embeds`` join it.
        """
        q, k, v = text_projections(self, hidden_states, position_embeddings)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        sees = None
        if attention_mask is not None or q.shape[2] not in (1, k.shape[2]):
            sees = seen_text(q.shape[2], k.shape[2], attention_mask, q.device)
        images = self._images(position_embeddings, image_embeds, media_offset, visual_cache)
        if images is None:
            mask = None if sees is None else sees[:, None]
            causal = sees is None and q.shape[2] > 1
            context = scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=True).transpose(1, 2)
        else:
            if sees is None:
                sees = seen_text(q.shape[2], k.shape[2], None, q.device)
            places = [None] * len(images) if image_embeds is None or media_offset is None else media_offset
            rows = zip(q.split(1), k.split(1), v.split(1), sees.expand(len(q), -1, -1), images, places, strict=True)
            context = torch.stack([self._sample(*row) for row in rows])
        return self.o_proj(context.flatten(2)), None, None

    def _images(
        self,
        angles: tuple[Tensor, Tensor],
        image_embeds: Tensor | None,
        media_offset: Sequence[Tensor] | None,
        cache: VisualCache | None,
    ) -> list[tuple[Tensor, Tensor]] | None:
        """Visual keys and values of each sample, ``[1, H_kv, images * L, D]`` each; None: there are no images."""
        if image_embeds is None or media_offset is None:
            return None if cache is None else cache.get(self.layer_idx)
        kv = self.v_kv_proj(image_embeds).split([len(places) for places in media_offset])
        made = []
        for sample, places in enumerate(media_offset):
            cos, sin = (x[sample : sample + 1, places.to(x.device)] for x in angles)
            made.append(visual_keys(self, kv[sample], (cos, sin)))
        if cache is not None:
            cache[self.layer_idx] = made
        return made

    def _sample(
        self, q: Tensor, k: Tensor, v: Tensor, sees: Tensor, images: tuple[Tensor, Tensor], places: Tensor | None
    ) -> Tensor:
        """Hyper attention of one sample, ``[S, H_q, D]``; with ``places`` None, rows see all of its images."""
        visual_k, visual_v = images
        rows, count = q.shape[2], visual_k.shape[2]
        if places is None:
            ahead, sees_images = 0, sees.new_ones(rows, count)
        else:
            ahead = int(places[0]) if len(places) else 0  # places come on the host
            sees_images = torch.arange(rows, device=q.device)[:, None] >= places.to(q.device)
            sees_images = sees_images.repeat_interleave(count // max(len(places), 1), dim=1)
        if is_fused(self):
            keys, values = torch.cat((visual_k, k), dim=2), torch.cat((visual_v, v), dim=2)
            mask = torch.cat((sees_images, sees), dim=1)
            return scaled_dot_product_attention(q, keys, values, mask, enable_gqa=True)[0].transpose(0, 1)
        text = scaled_dot_product_attention(q, k, v, sees, enable_gqa=True).transpose(1, 2)
        if not count:
            return text[0]
        # Text ahead of the first image passes no gate.
        visual = scaled_dot_product_attention(q[:, :, ahead:], visual_k, visual_v, sees_images[ahead:], enable_gqa=True)
        return torch.cat((text[:, :ahead], gated(self, text[:, ahead:], visual.transpose(1, 2))), dim=1)[0]


class HyperQwen2DecoderLayer(GradientCheckpointingLayer):
    """A decoder layer of Qwen2, whose input norm serves the visual tokens too."""

    def __init__(self, config: MPlugOwl3Config, number: int) -> None:
        super().__init__()
        self.is_hyper_enabled = number in config.hyper_layers
        self.self_attn = HyperQwen2Attention(config, self.is_hyper_enabled, number - 1)
        self.mlp = Qwen2MLP(config)
        self.input_layernorm = Qwen2RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = Qwen2RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self, hidden_states: Tensor, image_embeds: Any = None, media_offset: Any = None, **kwargs: Any
    ) -> Tensor:
        if self.is_hyper_enabled and image_embeds is not None:
            kwargs |= {"image_embeds": self.input_layernorm(image_embeds), "media_offset": media_offset}
        attended, *_ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class HyperQwen2Model(nn.Module):
    """Token embeddings, decoder layers and a norm."""

    def __init__(self, config: MPlugOwl3Config) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        numbers = range(1, config.num_hidden_layers + 1)
        self.layers = nn.ModuleList([HyperQwen2DecoderLayer(config, number) for number in numbers])
        self.norm = Qwen2RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Hidden states ``[B, S, d]`` of ``input_ids [B, S]``, which come behind those of ``past_key_values``."""
        if position_ids is None:
            past = 0 if past_key_values is None else past_key_values.get_seq_length()
            position_ids = torch.arange(past, past + input_ids.shape[1], device=input_ids.device)
        hidden_states = self.embed_tokens(input_ids)
        angles = rotary(position_ids.expand_as(input_ids), self.layers[0].self_attn, hidden_states.dtype)
        for layer in self.layers:
            hidden_states = layer(hidden_states, position_embeddings=angles, past_key_values=past_key_values, **kwargs)
        return self.norm(hidden_states)


class HyperQwen2ForCausalLM(nn.Module):
    """``HyperQwen2Model`` with logits ``[B, S, vocabulary]``."""

    def __init__(self, config: MPlugOwl3Config) -> None:
        super().__init__()
        self.model = HyperQwen2Model(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, input_ids: Tensor, logits_to_keep: int = 0, **kwargs: Any) -> HyperOutput:
        return HyperOutput(logits=self.lm_head(self.model(input_ids, **kwargs)[:, -logits_to_keep:]))


@dataclass
class HyperOutput(CausalLMOutputWithPast):
    """What the model gives.

    Attributes:
        visual_cache: what the next tokens need of the images beside ``past_key_values``.
    """

    visual_cache: VisualCache | None = None


class mPLUGOwl3Model(PreTrainedModel, GenerationMixin):
    """mPLUG-Owl3, named like the published class.

    Raises:
        ValueError: ``hyper_attention`` or ``projector`` of the config is not one of those there are, or it asks for
            sliding windows, scaled rotary positions or dropout, which this attention does not have.
    """

    config_class = MPlugOwl3Config
    base_model_prefix = "language_model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["HyperQwen2DecoderLayer", "SiglipEncoderLayer"]  # noqa: RUF012
    _tied_weights_keys = {  # noqa: RUF012
        "language_model.lm_head.weight": "language_model.model.embed_tokens.weight"
    }
    _supports_sdpa = True
    _supports_attention_backend = True

    def __init__(self, config: MPlugOwl3Config) -> None:
        super().__init__(config)
        for key, known in (("hyper_attention", HYPER_ATTENTION), ("projector", ("linear", "mlp"))):
            if getattr(config, key) not in known:
                raise ValueError(f"the config's {key} is {getattr(config, key)!r}; choose one of {known}")
        rope_type = (config.rope_parameters or {}).get("rope_type", "default")
        if config.use_sliding_window or rope_type != "default" or config.attention_dropout:
            raise ValueError(
                f"the config has use_sliding_window {config.use_sliding_window}, rope_type {rope_type!r} and "
                f"attention_dropout {config.attention_dropout}; this model has False, 'default' and 0.0"
            )
        self.loss_type = "ForCausalLM"
        self.language_model = HyperQwen2ForCausalLM(config)
        vision = SiglipVisionModel._from_config(config.vision_config)
        self.vision_model = getattr(vision, "vision_model", vision)  # transformers had it one module deeper
        features, width = config.vision_config.hidden_size, config.hidden_size
        self.vision2text_model: nn.Module = nn.Linear(features, width)
        if config.projector == "mlp":
            self.vision2text_model = nn.Sequential(nn.Linear(features, width), nn.GELU(), nn.Linear(width, width))
        self.post_init()

    def forward_image(self, pixel_values: Tensor) -> Tensor:
        """Visual tokens ``[images, L, d]`` of ``pixel_values [images, C, H, W]``."""
        return self.vision2text_model(vision_states(self.vision_model, pixel_values))

    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        media_offset: Any = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        visual_cache: VisualCache | None = None,
        labels: Tensor | None = None,
        shift_labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> HyperOutput:
        """Logits and, for labels, the loss of transformers.

        Args:
            input_ids: int64 ``[B, S]``.
            pixel_values: ``[images, C, H, W]``, those of all samples one after another; or ``[B, images, C, H, W]``,
                of which each sample uses the first. They come with the prompt, not with later tokens.
            media_offset: for each sample int64 ``[images]``, the places of its images among the rows of ``input_ids``,
                ascending.
            attention_mask: int64 ``[B, keys]``, 0 for padding ahead of a sample; None: it stands behind it, if at all.
            past_key_values, visual_cache: what the forward of the rows before gave.
            logits_to_keep: rows that logits are made of, the last ones; 0: all.

        Raises:
            ValueError: images behind a prompt.
        """
        if use_cache:
            past_key_values = DynamicCache() if past_key_values is None else past_key_values
            visual_cache = {} if visual_cache is None else visual_cache
        image_embeds = None
        if pixel_values is not None:
            if past_key_values is not None and past_key_values.get_seq_length():
                raise ValueError("pixel_values were given with a cache that holds text; give all images at the prompt")
            if pixel_values.dim() == 5:
                samples = zip(pixel_values, media_offset, strict=True)
                pixel_values = torch.cat([images[: len(places)] for images, places in samples])
            if len(pixel_values):  # none where no token comes behind them: in most kinds those see an image
                image_embeds = self.forward_image(pixel_values)
        cached = {"attention_mask": attention_mask, "past_key_values": past_key_values, "visual_cache": visual_cache}
        output = self.language_model(
            input_ids, image_embeds=image_embeds, media_offset=media_offset, position_ids=position_ids,
            **({"logits_to_keep": logits_to_keep} if logits_to_keep else {}),
            **{key: value for key, value in cached.items() if value is not None}, **kwargs,
        )  # fmt: skip
        if labels is not None:
            output.loss = self.loss_function(
                logits=output.logits, labels=labels, vocab_size=self.config.vocab_size,
                shift_labels=shift_labels, num_items_in_batch=num_items_in_batch,
            )  # fmt: skip
        output.past_key_values, output.visual_cache = past_key_values, visual_cache
        return output

    # What transformers' ``generate`` does not know of: the keys of the images, and which images are whose.

    def _update_model_kwargs_for_generation(self, outputs: Any, model_kwargs: Any, *args: Any, **kwargs: Any) -> Any:
        updated = super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **kwargs)
        if outputs.visual_cache is None:  # without a cache, each forward takes the images again
            return updated
        return {**updated, "visual_cache": outputs.visual_cache, "pixel_values": None, "media_offset": None}

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: Any = None,
        pixel_values: Tensor | None = None,
        media_offset: Sequence[Tensor] | None = None,
        **model_kwargs: Any,
    ) -> Any:
        """Each sample ``expand_size`` times; the copies see the same images."""
        if pixel_values is not None and media_offset is not None:
            if pixel_values.dim() == 5:
                pixel_values = pixel_values.repeat_interleave(expand_size, dim=0)
            else:
                of_samples = pixel_values.split([len(places) for places in media_offset])
                pixel_values = torch.cat([images for images in of_samples for _ in range(expand_size)])
            media_offset = [places for places in media_offset for _ in range(expand_size)]
        input_ids, model_kwargs = super()._expand_inputs_for_generation(  # type: ignore[misc]
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **model_kwargs
        )
        return input_ids, {**model_kwargs, "pixel_values": pixel_values, "media_offset": media_offset}

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.model.embed_tokens

    def get_output_embeddings(self) -> nn.Module:
        return self.language_model.lm_head

    def set_input_embeddings(self, value: Any) -> None:
        self.language_model.model.embed_tokens = value

    def set_output_embeddings(self, new_embeddings: Any) -> None:
        self.language_model.lm_head = new_embeddings

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, HyperQwen2Attention) and hasattr(module, "gate"):
            module.gate.zero_()


def vision_states(vision: Any, pixel_values: Tensor) -> Tensor:
    """What the last but one layer of transformers' SigLIP encoder returns, ``[images, L, d_vision]``.

    Nothing behind it is computed; ZeRO-3 could not, as the pooling head there takes its weights past their module.
    """
    states = vision.embeddings(pixel_values)
    for layer in vision.encoder.layers[:-1]:
        states = layer(states, attention_mask=None)
    return states


mPLUGOwl3Model.register_for_auto_class("AutoModelForImageTextToText")
