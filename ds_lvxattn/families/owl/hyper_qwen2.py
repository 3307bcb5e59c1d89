"""mPLUG-Owl3 (arXiv 2408.04840) with the parameter names of its published checkpoints, from parts of transformers.

The code that the checkpoints come with is for transformers 4; this model takes their weights, and is small where a test
or ``--model`` needs it. Some decoder layers are *hyper layers*: text attends to text and, with the same queries, to the
visual tokens of the images so far, whose keys and values come from ``v_kv_proj``. The visual keys carry MI-Rope: all
tokens of an image take the rotary position of its *place*, the first text token that sees it.

Each kind of hyper attention is one of ``HYPER_ATTENTION``. This forward is plain dense attention on one rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoConfig, PreTrainedModel, Qwen2Config, SiglipVisionConfig, SiglipVisionModel
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


def visual_keys(module: Any, kv: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    """Visual keys, with MI-Rope, and values of samples that have equally many images.

    Args:
        kv: what ``v_kv_proj`` returns, ``[B * images, L, H_kv * 2 * D]``.
        places: int64 ``[B, images]``, places of the images in the text.

    Returns:
        Twice ``[B, H_kv, images * L, D]``.
    """
    tokens = kv.shape[1]
    heads = kv.view(*places.shape, tokens, module.num_key_value_heads, 2, module.head_dim)
    keys, values = heads.unbind(-2)
    cos, sin = (x[:, :, None, None] for x in rotary(places, module, kv.dtype))
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


class HyperQwen2Attention(nn.Module):
    """Causal self-attention of Qwen2; in a hyper layer over visual tokens too."""

    def __init__(self, config: Any, hyper: bool) -> None:
        super().__init__()
        width = config.hidden_size
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
    ) -> tuple[Tensor, None, None]:
        """Attention of whole samples, causal over text; padding stands behind a sample.

        Args:
            hidden_states: ``[B, S, d]``.
            position_embeddings: ``rotary`` of the rows' positions, ``[B, S, D]`` each.
            image_embeds: ``[images, L, d]`` of all samples one after another, normalised; None outside hyper layers.
            media_offset: for each sample int64 ``[images]``, their places, ascending.
        """
        q, k, v = text_projections(self, hidden_states, position_embeddings)
        if image_embeds is None or media_offset is None:
            context = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)
        else:
            kv = self.v_kv_proj(image_embeds).split([len(places) for places in media_offset])
            rows = zip(q.split(1), k.split(1), v.split(1), kv, media_offset, strict=True)
            context = torch.stack([self._sample(*row) for row in rows])
        return self.o_proj(context.flatten(2)), None, None

    def _sample(self, q: Tensor, k: Tensor, v: Tensor, kv: Tensor, places: Tensor) -> Tensor:
        """Hyper attention of one sample, ``[S, H_q, D]``."""
        positions = torch.arange(q.shape[2], device=q.device)
        causal = positions[:, None] >= positions
        ahead = int(places[0]) if len(places) else 0  # places come on the host
        places = places.to(q.device)
        visual_k, visual_v = visual_keys(self, kv, places[None])
        sees = (positions[:, None] >= places).repeat_interleave(kv.shape[1], dim=1)
        if is_fused(self):
            keys, values = torch.cat((visual_k, k), dim=2), torch.cat((visual_v, v), dim=2)
            mask = torch.cat((sees, causal), dim=1)
            return scaled_dot_product_attention(q, keys, values, mask, enable_gqa=True)[0].transpose(0, 1)
        text = scaled_dot_product_attention(q, k, v, causal, enable_gqa=True).transpose(1, 2)
        if not len(places):
            return text[0]
        # Text ahead of the first image passes no gate.
        visual = scaled_dot_product_attention(q[:, :, ahead:], visual_k, visual_v, sees[ahead:], enable_gqa=True)
        return torch.cat((text[:, :ahead], gated(self, text[:, ahead:], visual.transpose(1, 2))), dim=1)[0]


class HyperQwen2DecoderLayer(GradientCheckpointingLayer):
    """A decoder layer of Qwen2, whose input norm serves the visual tokens too."""

    def __init__(self, config: MPlugOwl3Config, number: int) -> None:
        super().__init__()
        self.is_hyper_enabled = number in config.hyper_layers
        self.self_attn = HyperQwen2Attention(config, self.is_hyper_enabled)
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

    def forward(self, input_ids: Tensor, position_ids: Tensor | None = None, **kwargs: Any) -> Tensor:
        """Hidden states ``[B, S, d]`` of ``input_ids [B, S]``."""
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
        hidden_states = self.embed_tokens(input_ids)
        angles = rotary(position_ids, self.layers[0].self_attn, hidden_states.dtype)
        for layer in self.layers:
            hidden_states = layer(hidden_states, position_embeddings=angles, **kwargs)
        return self.norm(hidden_states)


class HyperQwen2ForCausalLM(nn.Module):
    """``HyperQwen2Model`` with logits ``[B, S, vocabulary]``."""

    def __init__(self, config: MPlugOwl3Config) -> None:
        super().__init__()
        self.model = HyperQwen2Model(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, input_ids: Tensor, **kwargs: Any) -> CausalLMOutputWithPast:
        return CausalLMOutputWithPast(logits=self.lm_head(self.model(input_ids, **kwargs)))


class mPLUGOwl3Model(PreTrainedModel):
    """mPLUG-Owl3, named like the published class. It trains; it has no cache of keys to generate with.

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
        labels: Tensor | None = None,
        shift_labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits and, for labels, the loss of transformers.

        Args:
            input_ids: int64 ``[B, S]``.
            pixel_values: ``[images, C, H, W]``, those of all samples one after another; or ``[B, images, C, H, W]``,
                of which each sample uses the first.
            media_offset: for each sample int64 ``[images]``, the places of its images, ascending.
        """
        image_embeds = None
        if pixel_values is not None:
            if pixel_values.dim() == 5:
                samples = zip(pixel_values, media_offset, strict=True)
                pixel_values = torch.cat([images[: len(places)] for images, places in samples])
            image_embeds = self.forward_image(pixel_values)
        output = self.language_model(input_ids, image_embeds=image_embeds, media_offset=media_offset, **kwargs)
        if labels is not None:
            output.loss = self.loss_function(
                logits=output.logits, labels=labels, vocab_size=self.config.vocab_size,
                shift_labels=shift_labels, num_items_in_batch=num_items_in_batch,
            )  # fmt: skip
        return output

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.model.embed_tokens

    def get_output_embeddings(self) -> nn.Module:
        return self.language_model.lm_head

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
