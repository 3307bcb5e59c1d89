"""The config of Qwen-VL, under the names of its published checkpoints."""

from __future__ import annotations

import types
from collections.abc import Mapping
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

# What ``visual`` says, and what the model makes of it where a checkpoint leaves it out.
VISUAL: dict[str, Any] = {
    "image_size": 448, "patch_size": 14, "width": 1664, "layers": 48, "heads": 16, "mlp_ratio": 4.9231,
    "output_dim": 4096, "n_queries": 256, "image_start_id": 151857,
}  # fmt: skip
# Settings that would make it another model, and the only values that this one has.
FIXED: dict[str, Any] = {
    "no_bias": True, "rotary_pct": 1.0, "scale_attn_weights": True, "attn_dropout_prob": 0.0, "emb_dropout_prob": 0.0,
    "softmax_in_fp32": False, "use_cache_quantization": False, "quantization_config": None,
}  # fmt: skip


class QWenConfig(PreTrainedConfig):
    """Config of ``QWenLMHeadModel``.

    Args:
        kv_channels: size of a head.
        intermediate_size: twice the width of the feed-forward layers.
        seq_length: tokens of the texts that the weights were trained with.
        use_logn_attn: whether queries further back than that are scaled up outside training.
        use_dynamic_ntk: whether the rotary embedding is stretched for longer texts outside training.
        visual: of the vision encoder and its resampler, see ``VISUAL``; None: a model of text alone.
    """

    model_type = "qwen"

    def __init__(
        self,
        vocab_size: int = 151936,
        hidden_size: int = 4096,
        num_hidden_layers: int = 32,
        num_attention_heads: int = 32,
        kv_channels: int = 128,
        intermediate_size: int = 22016,
        layer_norm_epsilon: float = 1e-6,
        initializer_range: float = 0.02,
        rotary_emb_base: float = 10000.0,
        max_position_embeddings: int = 8192,
        seq_length: int = 2048,
        use_logn_attn: bool = True,
        use_dynamic_ntk: bool = True,
        visual: Mapping[str, Any] | None = types.MappingProxyType(VISUAL),
        tie_word_embeddings: bool = False,
        **kwargs: Any,
    ) -> None:
        self.vocab_size, self.hidden_size = vocab_size, hidden_size
        self.num_hidden_layers, self.num_attention_heads = num_hidden_layers, num_attention_heads
        self.kv_channels, self.intermediate_size = kv_channels, intermediate_size
        self.layer_norm_epsilon, self.initializer_range = layer_norm_epsilon, initializer_range
        self.rotary_emb_base, self.max_position_embeddings = rotary_emb_base, max_position_embeddings
        self.seq_length, self.use_logn_attn, self.use_dynamic_ntk = seq_length, use_logn_attn, use_dynamic_ntk
        self.visual = None if visual is None else {**VISUAL, **visual}
        super().__init__(**{"tie_word_embeddings": tie_word_embeddings, **kwargs})

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As of transformers; a model of text alone says nothing of ``visual``."""
        return super().from_dict({"visual": None, **config_dict}, **kwargs)

    @property
    def image_token_id(self) -> int | None:
        """Id of ``<imgpad>``, which stands for a visual token; None for a model of text alone."""
        return None if self.visual is None else self.visual["image_start_id"] + 2

    def other_settings(self) -> list[str]:
        """Settings that the model does not have, each with its value and the one that it has."""
        values = ((key, getattr(self, key, only), only) for key, only in FIXED.items())
        found = [f"{key} {value!r} (not {only!r})" for key, value, only in values if value != only]
        unknown = sorted(set(self.visual or ()) - {*VISUAL})
        return found + [f"visual.{key} {(self.visual or {})[key]!r}" for key in unknown]


AutoConfig.register(QWenConfig.model_type, QWenConfig, exist_ok=True)
