"""Registration with Hugging Face transformers: the attention function called ``ds_lvxattn``.

A model whose attention implementation is ``ds_lvxattn`` gets its exchanges from the forward argument
``sequence_parallel`` (a ``SequenceParallelBatch``, or a ``DecodingStep`` while text is generated), which transformers
hands down to every attention function. So no model file is patched and no state is global.

An encoder's attention exchanges nothing; with the implementation ``ds_lvxattn_encoder`` its mask may be an interval.

There is no mask function of that name: transformers then makes no mask, and does not look at positions for packed
documents, for which it would wait for the device. What a caller hands over as a mask is refused before the forward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from ds_lvxattn.exchange.interval import KVInterval
from ds_lvxattn.kernels.operator import local_attention
from ds_lvxattn.runtime.batch import Exchanging, SequenceParallelBatch

# The attention functions are never part of a compiled graph: see ``runtime.compiled``.
IMPLEMENTATION = "ds_lvxattn"
ENCODER_IMPLEMENTATION = "ds_lvxattn_encoder"

# Arguments of transformers' attention functions that change the scores, which no kernel here computes.
UNSUPPORTED = ("position_bias",)


def register_with_transformers() -> None:
    """Make ``attn_implementation="ds_lvxattn"``, and that of encoders, known to transformers."""
    AttentionInterface.register(IMPLEMENTATION, exchanged_attention)
    AttentionInterface.register(ENCODER_IMPLEMENTATION, encoder_attention)


@torch._disable_dynamo
def exchanged_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    s_aux: Tensor | None = None,
    softcap: float | None = None,
    sequence_parallel: Exchanging | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention function of transformers: ``query [B, H_q, s_q, D]``, ``key, value [B, H_kv, s_kv, D]``.

    Args:
        s_aux: ``[H_q]``, a score of each head that takes its share of the weights and adds nothing (attention sink).
        softcap: soft cap of the scores, ``softcap * tanh(scaling * q k / softcap)``.

    Returns:
        ``[B, s_q, H_q, D]`` and None (no attention weights).

    Raises:
        ValueError: called without ``sequence_parallel``, with dropout, with a dense mask or with one of
            ``UNSUPPORTED``, or with another sliding window than planned.
    """
    if sequence_parallel is None:
        raise ValueError(
            f"attention implementation '{IMPLEMENTATION}' needs the forward argument sequence_parallel; pass the "
            "inputs that prepare made of the batch, or model.set_attn_implementation('sdpa') to run without it"
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
    out, lse = sequence_parallel.attend(module, query, key, value, scaling, softcap)
    if s_aux is not None:
        # One more term in the sum of exponentials: exp(lse) / (exp(lse) + exp(s_aux)) of the weights stay.
        out = (out * torch.sigmoid(lse - s_aux.to(lse.dtype)[:, None])[..., None]).to(out.dtype)
    return out.transpose(1, 2), None


@torch._disable_dynamo
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


def refuse_other_masks(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Before the model's forward, with ``sequence_parallel``: what would be a mask beside its intervals is refused.

    Raises:
        ValueError: naming the argument: ``attention_mask``, or ``position_ids`` that are not those of the batch.
    """
    batch = kwargs.get("sequence_parallel")
    if not isinstance(batch, SequenceParallelBatch):
        return
    if kwargs.get("attention_mask") is not None:
        raise ValueError(
            "attention_mask was given beside sequence_parallel, whose intervals say what each row sees: they leave out "
            "what stands behind a sample's end. Leave the argument out, and give samples without padding on their left"
        )
    given = kwargs.get("position_ids")
    if given is not batch.position_ids and batch.position_ids is not None:
        raise ValueError(
            "position_ids were given that are not those of the batch beside sequence_parallel: transformers would take "
            "restarting positions for packed documents. Pass the batch's inputs as they are; documents that are to "
            "share a row are samples of their own, see packing of ds_lvxattn.attach"
        )
