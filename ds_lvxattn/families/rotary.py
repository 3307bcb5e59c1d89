"""Causal self-attention of the language models of transformers, whichever model they are part of."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

from ds_lvxattn.errors import ConfigError
from ds_lvxattn.families.handed_on import names

# Their scores carry a bias by distance (ALiBi), and their attention does not go through transformers' registry.
ALIBI = ("MptAttention", "BloomAttention", "FalconAttention", "MPTAttention", "MultiheadAttentionMPT")

# Rotary embeddings whose frequencies the model chooses by the largest position that it is given.
BY_LENGTH = ("dynamic", "longrope")


def check_positions(config: Any) -> None:
    """Refuse a language model whose rotary frequencies depend on the length of the text: a rank knows only its rows.

    Args:
        config: of the language model.

    Raises:
        ConfigError: naming the type.
    """
    parameters = getattr(config, "rope_parameters", None) or {}
    for some in (parameters, *parameters.values()):  # of the model, or for each of its types of layers
        kind = some.get("rope_type") if isinstance(some, dict) else None
        if kind in BY_LENGTH:
            raise ConfigError(
                f"the model's rotary embedding is of type {kind!r}, whose frequencies follow from the longest text "
                "at hand, which differs between the ranks that share it; choose a model with another 'rope_type', or "
                "set 'sequence_parallel_size' to 1"
            )


def self_attention_role(module: Any) -> str | None:
    """``self`` for a decoder's attention that goes through transformers' attention registry.

    Raises:
        ConfigError: an attention with ALiBi.
    """
    name = type(module).__name__
    if name in ALIBI:
        raise ConfigError(
            f"{name} biases its scores by distance (ALiBi), which sequence-parallel self-attention does not compute; "
            "choose a language model with rotary or learned positions, or set 'sequence_parallel_size' to 1"
        )
    decoder = isinstance(module, nn.Module) and name.endswith(("Attention", "MLA")) and hasattr(module, "layer_idx")
    return "self" if decoder and hasattr(module, "config") and _head_dim(module) is not None else None


def self_attention_window(module: Any) -> int | None:
    """The sliding window of such a module, as it hands it to its attention function; None: none.

    Where the config has a type for each layer, modules of other layers may name the window too (EXAONE 4).
    """
    if _layer_type(module) not in (None, "sliding_attention"):
        return None
    if not hasattr(module, "sliding_window") and not names(module, "sliding_window"):
        return None  # Moshi's config has one, which nothing reads
    return getattr(module, "sliding_window", getattr(module.config, "sliding_window", None))


def self_attention_chunk(module: Any) -> int | None:
    """The rows of a chunk, where such a module's mask leaves a row its own chunk alone (Llama 4); None: no chunks."""
    return module.config.attention_chunk_size if _layer_type(module) == "chunked_attention" else None


def window_is_unknown(module: Any) -> bool:
    """Whether the config of such a module has a sliding window that the model's masks may follow, and it does not."""
    if self_attention_window(module) is not None or getattr(module.config, "sliding_window", None) is None:
        return False
    follows = hasattr(module, "sliding_window") or names(module, "sliding_window")
    return not follows and any("sliding_window" in name for name in vars(sys.modules[type(module).__module__]))


def self_attention_sizes(module: Any) -> tuple[int, int, int]:
    """Query heads, key heads and head size, that of its keys, of such a module."""
    config = module.config
    heads = config.num_attention_heads
    if hasattr(module, "kv_lora_rank"):  # latent attention: keys and values of every head, from what they share
        return heads, heads, _head_dim(module)
    # Of the module where it says so: layers of one model may differ.
    groups = getattr(module, "num_key_value_groups", heads // (getattr(config, "num_key_value_heads", None) or heads))
    return heads, heads // groups, _head_dim(module)


def _layer_type(module: Any) -> str | None:
    """The type of the module's layer, by transformers' names; None: the config has none."""
    types = getattr(module.config, "layer_types", None)
    return types[min(module.layer_idx, len(types) - 1)] if types else None


def _head_dim(module: Any) -> Any:
    names = ("qk_head_dim", "head_dim", "head_size")
    return next((getattr(module, name) for name in names if hasattr(module, name)), None)
