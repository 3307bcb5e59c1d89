"""Registration with Hugging Face transformers: the attention function called ``ds_lvxattn``.

A model whose attention implementation is ``ds_lvxattn`` gets its exchanges from the forward argument
``sequence_parallel`` (a ``SequenceParallelBatch``, or a ``DecodingStep`` while text is generated), which transformers
hands down to every attention function. So no model file is patched and no state is global.

An encoder's attention exchanges nothing; with the implementation ``ds_lvxattn_encoder`` its mask may be an interval.

There is no mask function of that name: transformers then makes no mask, and does not look at positions for packed
documents, for which it would wait for the device. What a caller hands over as a mask is refused before the forward.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from ds_lvxattn.exchange.interval import KVInterval
from ds_lvxattn.kernels.operator import as_kernels_take, local_attention
from ds_lvxattn.kernels.torch_internals import never_compiled
from ds_lvxattn.runtime.batch import Exchanging, SequenceParallelBatch
from ds_lvxattn.runtime.temperature import with_temperature

# The attention functions are never part of a compiled graph: see ``runtime.compiled``.
IMPLEMENTATION = "ds_lvxattn"
ENCODER_IMPLEMENTATION = "ds_lvxattn_encoder"

# Arguments of transformers' attention functions that change the scores, which no kernel here computes.
UNSUPPORTED = ("position_bias",)


def register_with_transformers() -> None:
    """Make ``attn_implementation="ds_lvxattn"``, and that of encoders, known to transformers."""
    AttentionInterface.register(IMPLEMENTATION, exchanged_attention)
    AttentionInterface.register(ENCODER_IMPLEMENTATION, encoder_attention)


@never_compiled
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
            "inputs that prepare made of the batch, or model.set_attn_implementation('sdpa') to run without it. (If "
            f"those were passed, the layers of this model do not hand them on to their {type(module).__name__}: it "
            "cannot be sequence-parallel)"
        )
    if dropout:
        raise ValueError(f"attention dropout is {dropout}; sequence-parallel attention has none, set it to 0")
    if attention_mask is not None:
        raise ValueError(
            f"{type(module).__name__} was given a dense attention mask; sequence-parallel attention takes intervals. "
            "Leave a mask of yours out; a model that makes one itself cannot be sequence-parallel"
        )
    for name in UNSUPPORTED:
        if others.get(name) is not None:
            raise ValueError(
                f"{type(module).__name__} attends with {name}, which sequence-parallel attention does not compute; set "
                "it to None in the model's config, or 'sequence_parallel_size' to 1"
            )
    plan = sequence_parallel.plans.get(module)
    if plan is None:
        raise ValueError(
            f"this {type(module).__name__} is not of the model that sequence_parallel was prepared for: it is another "
            "model's, or came after attach; give each model the inputs of its own prepare"
        )
    given, planned = others.get("sliding_window"), plan.window
    if given != planned:
        raise ValueError(
            f"{type(module).__name__} attends with a sliding window of {given}, and its family says {planned}; let "
            "Family.window_of give what the module passes on"
        )
    query = with_temperature(module, query, sequence_parallel.position_ids)
    out, lse = sequence_parallel.attend(module, query, key, value, scaling, softcap)
    if s_aux is not None:
        # One more term in the sum of exponentials: exp(lse) / (exp(lse) + exp(s_aux)) of the weights stay.
        out = (out * torch.sigmoid(lse - s_aux.to(lse.dtype)[:, None])[..., None]).to(out.dtype)
    return out.transpose(1, 2), None


@never_compiled
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
    query, key, value = as_kernels_take(query, key, value)
    ranges = attention_mask.start, attention_mask.stop
    out, _lse = local_attention(query, key, value, *ranges, scale, "auto", pattern=attention_mask.pattern)
    return out.transpose(1, 2), None


# Arguments of transformers' attention functions and models that say what a row sees, apart from masks; see what they
# ask for in ``_OTHERWISE``.
PACKED = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")
# Of the models with ears (Qwen's Omni).
AUDIO = ("input_features", "feature_attention_mask", "audio_feature_lengths", "use_audio_in_video")
# Arguments of a model's forward beside a batch: why it does not follow them, and what to do.
_OTHERWISE = {
    **dict.fromkeys(PACKED, "documents that share a row are samples of their own, see packing of ds_lvxattn.attach"),
    "is_causal": "what a row sees are the batch's intervals; leave it out",
    **dict.fromkeys(AUDIO, "no rank encodes audio, which has no rows among the batch's; leave it out"),
    "output_attentions": "no rank has the weights of whole rows; leave it out",
    "output_router_logits": "the loss that balances experts is not a sum over the ranks' tokens; set it to False",
}


def refuse_other_masks(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Before a forward with ``sequence_parallel``, of the model or of one in it: another mask is refused.

    Raises:
        ValueError: naming the argument: ``attention_mask``, or one of ``PACKED``.
    """
    batch = kwargs.get("sequence_parallel")
    if not isinstance(batch, SequenceParallelBatch) or batch.checked:
        return
    given = _named(model, args, kwargs)
    mask = given.get("attention_mask")
    if mask is not None and not (isinstance(mask, dict) and all(each is None for each in mask.values())):
        raise ValueError(
            "attention_mask was given beside sequence_parallel, whose intervals say what each row sees: they leave out "
            "what stands behind a sample's end. Leave the argument out, and give samples without padding on their left"
        )
    for name in PACKED:
        if given.get(name) is not None:
            raise ValueError(f"{name} was given beside sequence_parallel: {_OTHERWISE[name]}")


def refuse_replaced(
    divided: Mapping[str, tuple[nn.Module, Callable[..., Any]]],
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    """Before a forward with ``sequence_parallel``: modules that mix tokens otherwise still take divided text.

    Args:
        divided: by name, those modules and what takes it, their ``forward`` or what that wraps.

    Raises:
        ValueError: naming the first module whose forward is another one.
    """
    batch = kwargs.get("sequence_parallel")
    if not isinstance(batch, SequenceParallelBatch) or batch.checked:
        return
    for name, (module, forward) in divided.items():
        if not _is_or_wraps(module.forward, forward):
            raise ValueError(
                f"the forward of {name} ({type(module).__name__}) was replaced after the model was attached, and would "
                "mix this rank's part of the text alone: load the model without use_kernels, and attach it as the last"
            )


def _is_or_wraps(found: Any, wanted: Callable[..., Any]) -> bool:
    while found is not None and found is not wanted:
        found = getattr(found, "__wrapped__", None)
    return found is wanted


def refuse_other_arguments(
    config: Any, registered: bool, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Before a forward with ``sequence_parallel``: what would be computed otherwise than asked is refused.

    Of the model, or of one in it that is called by itself; the models inside take what it hands them.

    Args:
        config: of the language model.
        registered: whether its attention is found in transformers' registry.

    Raises:
        ValueError: naming the argument, and what to do.
    """
    batch = kwargs.get("sequence_parallel")
    if not isinstance(batch, SequenceParallelBatch) or batch.checked:
        return None
    given = _named(model, args, kwargs)
    if registered and config._attn_implementation != IMPLEMENTATION:
        raise ValueError(
            f"the attention implementation was set to '{config._attn_implementation}' after the model was attached, "
            "which would attend to this rank's part alone: set it back with "
            f"model.set_attn_implementation('{IMPLEMENTATION}'), or leave sequence_parallel out"
        )
    if batch.position_ids is not None:
        _check_rows(batch.position_ids, given)
    for name, tensor in batch.block_arguments.items():
        if given.get(name, tensor) is not tensor:
            raise ValueError(
                f"{name} were given that are not those of the batch beside sequence_parallel, whose intervals say what "
                "each row sees; pass the batch's inputs as they are"
            )
    for name, why in _OTHERWISE.items():
        switch = name.startswith(("output_", "use_"))  # which the config may set too
        value = given.get(name, getattr(config, name, None) if switch else None)
        if value is not None and not (switch and value is False):
            raise ValueError(f"{name} is {value!r} beside sequence_parallel: {why}")
    cached = given.get("past_key_values")
    if torch.is_grad_enabled() and (cached is not None or given.get("use_cache", getattr(config, "use_cache", False))):
        raise ValueError(
            "use_cache is set, or past_key_values given, in a forward that trains beside sequence_parallel: layers "
            "that are computed again in the backward pass would find their own keys in the cache; leave both out"
        )
    if given.get("labels") is not None:
        for name, why in (
            ("shift_labels", "each rank would shift the labels of its own rows, and lose those at their ends"),
            ("num_items_in_batch", "each rank would divide its part of the loss by its own number of labels"),
        ):
            if given.get(name) is None:
                raise ValueError(f"labels were given without {name} beside sequence_parallel: {why}; pass the batch's")
        if given["labels"] is not given["shift_labels"]:
            raise ValueError(
                "labels were given that are not shift_labels beside sequence_parallel, and the loss is taken on "
                "shift_labels, those that the rank's rows predict: pass the batch's, or labels of yours, shifted over "
                "the whole text, under both names"
            )
        kept = given.get("logits_to_keep")
        if isinstance(kept, Tensor) or kept not in (0, None):
            raise ValueError(
                f"logits_to_keep is {kept!r} beside labels and sequence_parallel: each rank would "
                "keep the last of its own rows; leave it out, or for memory set 'sequence_parallel.tiled_logits'"
            )
    return args, {**kwargs, "sequence_parallel": replace(batch, checked=True)}


def _named(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a forward by name."""
    return {**dict(zip(_parameters(type(model).forward), args, strict=False)), **kwargs} if args else kwargs


@functools.cache
def _parameters(forward: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(inspect.signature(forward).parameters)[1:]  # without self


def _check_rows(position_ids: Tensor, given: Mapping[str, Any]) -> None:
    """Raise ``ValueError`` unless the rows that are given are those of the batch, with its ``position_ids``."""
    if given.get("position_ids") is not position_ids:
        raise ValueError(
            "position_ids were given that are not those of the batch beside sequence_parallel: transformers would take "
            "restarting positions for packed documents. Pass the batch's inputs as they are; documents that are to "
            "share a row are samples of their own, see packing of ds_lvxattn.attach"
            if given.get("position_ids") is not None
            else "position_ids are missing beside sequence_parallel: each rank would count its own rows from 0. Pass "
            "the batch's inputs as they are"
        )
    for name in ("input_ids", "inputs_embeds", "shift_labels"):
        rows = given.get(name)
        if rows is not None and rows.shape[:2] != position_ids.shape[-2:]:
            raise ValueError(
                f"{name} of shape {list(rows.shape)} was given beside sequence_parallel, whose batch has "
                f"{list(position_ids.shape[-2:])} rows on this rank; pass the batch's inputs as they are"
            )
