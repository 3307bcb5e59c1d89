"""Qwen-VL with the parameter names of its published checkpoints, from parts of transformers.

The code that the checkpoints come with is for transformers 4, and opens the image files that the text names; this model
takes their weights, and pixels. Its self-attention looks up transformers' registry of attention functions.

Outside training, queries behind ``seq_length`` tokens are scaled up (``use_logn_attn``). What ``use_dynamic_ntk`` does
to texts longer than that outside training, by the length of each, is refused.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import silu
from transformers import Cache, DynamicCache, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

from ds_lvxattn.families.owl.hyper_qwen2 import rotary, rotate
from ds_lvxattn.families.qwen1.config import QWenConfig
from ds_lvxattn.families.qwen1.vision import PoolAttention, VisionResampler, VisionTransformer


def query_scales(position_ids: Tensor, seq_length: int, dtype: torch.dtype) -> Tensor:
    """What queries at ``position_ids [B, S]`` are multiplied by outside training, ``[B, 1, S, 1]``."""
    tokens = (position_ids + 1).to(torch.promote_types(dtype, torch.float32))
    return (tokens.clamp(min=seq_length).log() / math.log(seq_length))[:, None, :, None].to(dtype)


class QWenAttention(nn.Module):
    """Causal self-attention, queries, keys and values from one projection."""

    def __init__(self, config: QWenConfig, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.head_dim, self.rope_theta = config.kv_channels, config.rotary_emb_base
        self.num_key_value_groups, self.is_causal = 1, True
        self.scaling = self.head_dim**-0.5
        width = self.head_dim * config.num_attention_heads
        self.c_attn = nn.Linear(config.hidden_size, 3 * width)
        self.c_proj = nn.Linear(width, config.hidden_size, bias=False)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        scales: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """``hidden_states [B, S, d]``; cosine and sine ``[B, 1, S, D]``, float32 at least; see ``query_scales``."""
        projected = self.c_attn(hidden_states).chunk(3, dim=-1)
        q, k, v = (x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for x in projected)
        cos, sin = position_embeddings
        q, k = (rotate(x.to(cos.dtype), cos, sin).to(x.dtype) for x in (q, k))
        if scales is not None:
            q = q * scales
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        attended, _ = attend(self, q, k, v, attention_mask, dropout=0.0, scaling=self.scaling, **kwargs)
        made: Tensor = self.c_proj(attended.flatten(2))
        return made


class QWenMLP(nn.Module):
    """A gated feed-forward layer; the gate is ``w2``."""

    def __init__(self, config: QWenConfig) -> None:
        super().__init__()
        width = config.intermediate_size // 2
        self.w1 = nn.Linear(config.hidden_size, width, bias=False)
        self.w2 = nn.Linear(config.hidden_size, width, bias=False)
        self.c_proj = nn.Linear(width, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.c_proj(self.w1(x) * silu(self.w2(x)))
        return made


class QWenBlock(GradientCheckpointingLayer):
    """A decoder layer."""

    def __init__(self, config: QWenConfig, layer_idx: int) -> None:
        super().__init__()
        self.ln_1 = Qwen2RMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.attn = QWenAttention(config, layer_idx)
        self.ln_2 = Qwen2RMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.mlp = QWenMLP(config)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        hidden_states = hidden_states + self.attn(self.ln_1(hidden_states), **kwargs)
        made: Tensor = hidden_states + self.mlp(self.ln_2(hidden_states))
        return made


class QWenPreTrainedModel(PreTrainedModel):
    """What the two models have in common."""

    config: QWenConfig
    config_class = QWenConfig
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    _no_split_modules = ["QWenBlock", "VisionBlock"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _keys_to_ignore_on_load_unexpected = [r"rotary_emb\.", r"masked_bias"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, PoolAttention):
            init.normal_(module.in_proj_weight, std=std)
        elif isinstance(module, VisionResampler):
            init.normal_(module.query, std=std)
        elif isinstance(module, VisionTransformer):
            init.normal_(module.positional_embedding, std=len(module.positional_embedding[0]) ** -0.5)
            init.normal_(module.proj, std=len(module.proj) ** -0.5)


class QWenModel(QWenPreTrainedModel):
    """Vision encoder, token embeddings and decoder layers.

    Raises:
        ValueError: the config has settings of another model.
    """

    def __init__(self, config: QWenConfig) -> None:
        super().__init__(config)
        if others := config.other_settings():
            raise ValueError(f"the config has {', '.join(others)}; choose a checkpoint without")
        self.wte = nn.Embedding(config.vocab_size, config.hidden_size)
        self.h = nn.ModuleList([QWenBlock(config, number) for number in range(config.num_hidden_layers)])
        self.ln_f = Qwen2RMSNorm(config.hidden_size, config.layer_norm_epsilon)
        if config.visual is not None:
            self.visual = VisionTransformer(config.visual)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.wte

    def set_input_embeddings(self, value: Any) -> None:
        self.wte = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Hidden states ``[B, S, d]``; for arguments see ``QWenLMHeadModel.forward``."""
        if inputs_embeds is None:
            assert input_ids is not None
            inputs_embeds = self.wte(input_ids)
            if pixel_values is not None:
                visual = self.visual(pixel_values).to(inputs_embeds.dtype)
                image: Any = self.config.image_token_id
                takes = (input_ids == image)[..., None]
                inputs_embeds = inputs_embeds.masked_scatter(takes, visual)
        assert inputs_embeds is not None
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        if not self.training and self.config.use_dynamic_ntk and inputs_embeds.shape[1] > self.config.seq_length:
            raise ValueError(longer_text(inputs_embeds.shape[1], self.config))
        if position_ids is None:
            position_ids = torch.arange(past, past + inputs_embeds.shape[1], device=inputs_embeds.device)[None]
        mask = create_causal_mask(
            config=self.config, inputs_embeds=inputs_embeds, attention_mask=attention_mask,
            past_key_values=past_key_values, position_ids=position_ids,
        )  # fmt: skip
        cos, sin = (x[:, None] for x in rotary(position_ids, self.h[0].attn, inputs_embeds.dtype))
        scales = None
        if self.config.use_logn_attn and not self.training:
            scales = query_scales(position_ids, self.config.seq_length, inputs_embeds.dtype)
        hidden_states = inputs_embeds
        for layer in self.h:
            hidden_states = layer(
                hidden_states, position_embeddings=(cos, sin), scales=scales, attention_mask=mask,
                past_key_values=past_key_values, position_ids=position_ids, **kwargs,
            )  # fmt: skip
        return BaseModelOutputWithPast(last_hidden_state=self.ln_f(hidden_states), past_key_values=past_key_values)


def longer_text(tokens: int, config: QWenConfig) -> str:
    """What there is to say of a text that is longer than the weights were trained with."""
    return (
        f"a text has {tokens} tokens, visual ones included, and 'use_dynamic_ntk' of the config would stretch the "
        f"rotary embedding of texts longer than {config.seq_length} outside training, which is not done here; set "
        "'use_dynamic_ntk' to false in the model's config.json, which leaves training as it is, or shorten the text"
    )


class QWenLMHeadModel(QWenPreTrainedModel, GenerationMixin):
    """Qwen-VL, or Qwen of text alone, with its head."""

    _tied_weights_keys = {"lm_head.weight": "transformer.wte.weight"}  # noqa: RUF012

    def __init__(self, config: QWenConfig) -> None:
        super().__init__(config)
        self.transformer = QWenModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.loss_type = "ForCausalLM"
        self.post_init()

    def get_decoder(self) -> nn.Module:
        return self.transformer

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: Any) -> None:
        self.lm_head = new_embeddings

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        shift_labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits and, for labels, the loss of transformers.

        Args:
            input_ids: int64 ``[B, S]``, with an ``<imgpad>`` for each visual token.
            pixel_values: ``[images, 3, H, W]`` of all images of the batch, in the order of the text.
            attention_mask: int64 ``[B, keys]``, 0 for padding; None: there is none ahead of a text.
            position_ids: int64 ``[B, S]``; None: places in the text.
            inputs_embeds: ``[B, S, d]``, in the place of ``input_ids`` and ``pixel_values``.
            logits_to_keep: rows that logits are made of: as many last ones, or these; 0: all.

        Raises:
            ValueError: a text that ``use_dynamic_ntk`` is about, outside training.
        """
        outputs = self.transformer(
            input_ids=input_ids, pixel_values=pixel_values, attention_mask=attention_mask, position_ids=position_ids,
            past_key_values=past_key_values, inputs_embeds=inputs_embeds, use_cache=use_cache, **kwargs,
        )  # fmt: skip
        rows = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, rows])
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, shift_labels=shift_labels,
                num_items_in_batch=num_items_in_batch,
            )  # fmt: skip
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=outputs.past_key_values)

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """As of transformers; images come with the prompt, and later tokens are text."""
        made: dict[str, Any] = super().prepare_inputs_for_generation(*args, **kwargs)  # type: ignore[misc]
        past = made.get("past_key_values")
        if past is not None and past.get_seq_length():
            made["pixel_values"] = None
        return made
