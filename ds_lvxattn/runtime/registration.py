"""Registration with Hugging Face transformers: attention and mask functions called ``ds_lvxattn``.

A model whose attention implementation is ``ds_lvxattn`` gets its exchanges from the forward argument
``sequence_parallel`` (a ``SequenceParallelBatch``, or a ``DecodingStep`` while text is generated), which transformers
hands down to every attention function. So no model file is patched and no state is global.

An encoder's attention exchanges nothing; with the implementation ``ds_lvxattn_encoder`` its mask may be an interval.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from ds_lvxattn.exchange.interval import KVInterval
from ds_lvxattn.kernels.operator import local_attention
from ds_lvxattn.runtime.batch import Exchanging

IMPLEMENTATION = "ds_lvxattn"
ENCODER_IMPLEMENTATION = "ds_lvxattn_encoder"

# Arguments of transformers' attention functions that change the scores, which no kernel here computes.
UNSUPPORTED = ("softcap", "s_aux", "position_bias")


def register_with_transformers() -> None:
    """Make ``attn_implementation="ds_lvxattn"``, and that of encoders, known to transformers."""
    AttentionInterface.register(IMPLEMENTATION, exchanged_attention)
    AttentionInterface.register(ENCODER_IMPLEMENTATION, encoder_attention)
    AttentionMaskInterface.register(IMPLEMENTATION, no_dense_mask)


def exchanged_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sequence_parallel: Exchanging | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention function of transformers: ``query [B, H_q, s_q, D]``, ``key, value [B, H_kv, s_kv, D]``.

    Returns:
        ``[B, s_q, H_q, D]`` and None (no attention weights).

    Raises:
        ValueError: called without ``sequence_parallel``, with dropout, with a dense mask or with one of
            ``UNSUPPORTED``, or with another sliding window than planned.
    """
    if sequence_parallel is None:
        raise ValueError(
            f"attention implementation '{IMPLEMENTATION}' needs the forward argument sequence_parallel; pass the "
            "batch that the collator made, or model.set_attn_implementation('sdpa') to run without it"
        )
    if dropout:
        raise ValueError(f"attention dropout is {dropout}; sequence-parallel attention has none, set it to 0")
    if attention_mask is not None:
        raise ValueError("a dense attention mask was given; sequence-parallel attention takes intervals")
    for name in UNSUPPORTED:
        if others.get(name) is not None:
            raise ValueError(
                f"{type(module).__name__} attends with {name}, which sequence-parallel attention does not compute; set "
                "it to None in the model's config, or 'sequence_parallel_size' to 1"
            )
    given, planned = others.get("sliding_window"), sequence_parallel.plans[module].window
    if given != planned:
        raise ValueError(
            f"{type(module).__name__} attends with a sliding window of {given}, and its family says {planned}; let "
            "Family.window_of give what the module passes on"
        )
    return sequence_parallel.attend(module, query, key, value, scaling).transpose(1, 2), None


def encoder_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | KVInterval | None,
    scaling: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention function of transformers for an encoder, whose rows see keys of their own rank alone.

    Args:
        attention_mask: an interval, with one start and stop for each row of ``query [B, H, s, D]``; or what the
            unmodified encoder gives, which goes to torch's own attention.

    Returns:
        ``[B, s, H, D]`` and None (no attention weights).
    """
    if not isinstance(attention_mask, KVInterval):
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **others)
    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    out, _lse = local_attention(query, key, value, attention_mask.start, attention_mask.stop, scale, "auto")
    return out.transpose(1, 2), None


def no_dense_mask(*unused: Any, **unused_too: Any) -> None:
    """Mask function of transformers: intervals come with the batch, so no mask is built."""
    return None
