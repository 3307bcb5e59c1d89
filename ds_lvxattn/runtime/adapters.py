"""Visual adapters over a whole video: learned queries on every rank, the visual features divided over the ranks.

A Q-Former, perceiver or resampler reads visual features by cross-attention from a few learned queries. Here each rank
gives it the features of its own frames alone, and every rank gets the output over all of them. Of a cross-attention
only the partial outputs and log-sum-exps of the queries travel; what the adapter computes on its queries beside that
(self-attention among them, feed-forward) is computed by every rank alike, without traffic.

Gradients add up over the ranks, as those of the whole model do: each rank puts the output to use in its own part of
the loss, so every gradient of what all ranks compute alike (the queries, their projections, feed-forward) is a part.
The exchange sums the gradient of its output over the ranks (``gradients="parts"`` of ``sp_attention``), since each
rank's keys take part in the output of all. Nothing is scaled, and no gradient counts twice.

The classes are known by name: the adapters' own code is not imported before it is used, and Qwen-VL's comes with its
checkpoint.
"""

from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import AttentionInterface

from ds_lvxattn.errors import ConfigError
from ds_lvxattn.exchange.attention import sp_attention
from ds_lvxattn.exchange.comm import communicator
from ds_lvxattn.exchange.interval import KVInterval
from ds_lvxattn.exchange.merge_attention import merge_attention
from ds_lvxattn.exchange.shards import SequenceShards, ShardLayout
from ds_lvxattn.kernels.pattern import ALIKE

# Without a mask function of that name, transformers builds no mask for it.
IMPLEMENTATION = "ds_lvxattn_adapter"


@dataclass(frozen=True)
class AdapterKeys:
    """The forward argument ``sequence_parallel`` of a sharded adapter: whose visual tokens lie where.

    Made on the host from metadata that every rank has, once a batch; all layers share it.

    Args:
        group: sequence-parallel process group; None is one rank.
        shards: visual tokens of every rank. Of the features that a rank passes, the first ``lengths[rank]`` tokens are
            its keys; what follows (a blank frame on a rank without one) takes no part.
        visible: int32 ``[B]`` on the device, the number of a sample's tokens, where a batch is padded to its longest:
            the tokens from that position of the whole sequence on are hidden. None: all are visible.
        kernel: local attention kernel.

    Raises:
        ValueError: the number of ranks or the dtype does not fit.
    """

    group: dist.ProcessGroup | None
    shards: SequenceShards
    visible: Tensor | None = None
    kernel: str = "auto"
    _intervals: dict[int, KVInterval] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        ranks = communicator(self.group).ranks
        if self.shards.ranks != ranks:
            raise ValueError(f"AdapterKeys: shards has {self.shards.ranks} lengths for the {ranks} ranks of the group")
        if self.visible is not None and (self.visible.dtype != torch.int32 or self.visible.dim() != 1):
            raise ValueError(
                f"AdapterKeys: visible is {self.visible.dtype} {tuple(self.visible.shape)}; give int32 [B], the visual "
                "tokens of each sample"
            )

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> tuple[Tensor, Tensor]:
        """``sp_attention`` of the rows ``q [B, H_q, s_q, D]``, equal on every rank, over the keys of all ranks.

        ``k, v [B, H_kv, >= own tokens, D]``; returns ``out`` like ``q`` and ``lse [B, H_q, s_q]``.
        """
        comm = communicator(self.group)
        own = self.shards.lengths[comm.rank]
        rows = SequenceShards((q.shape[2],) * comm.ranks)
        return sp_attention(
            q, k[:, :, :own], v[:, :, :own], group=self.group, queries="replicated", gradients="parts",
            interval=self._interval(q.shape[2]), scale=scale, kernel=self.kernel,
            shards=ShardLayout(rows, self.shards),
        )  # fmt: skip

    def _interval(self, rows: int) -> KVInterval | None:
        """What ``rows`` queries see, as one object for all layers: it keeps the bounds of this rank's keys."""
        if self.visible is None:
            return None
        if rows not in self._intervals:
            stop = self.visible[None, :, None].expand(1, -1, rows).contiguous()
            self._intervals[rows] = KVInterval(torch.zeros_like(stop), stop, pattern=ALIKE)
        return self._intervals[rows]


def shard_adapter(adapter: nn.Module) -> None:
    """Attach to an unmodified adapter, in place: its forward then takes ``sequence_parallel``, an ``AdapterKeys``.

    All other arguments stay, but features are those of the rank's own frames, ``[B, own tokens, d]`` (none too), and
    masks of features are refused. Every rank of the group calls it with the same queries, and uses its output in its
    own part of the loss; features of a rank without frames need a gradient where those of other ranks do.

    - ``Blip2QFormerModel``, ``InstructBlipQFormerModel``, ``InstructBlipVideoQFormerModel``, ``Idefics2Perceiver-
      Resampler`` of transformers: as they are. The last takes no ``attention_mask`` then.
    - ``AriaProjector`` of transformers: ``patch_to_query_dict`` is asked for the tokens of all ranks.
    - ``Resampler`` of Qwen-VL: features ``[B, own frames, tokens, d]``, as it adds positions frame by frame.

    Raises:
        ConfigError: an adapter of another class, or one with dropout.
    """
    names = [base.__name__ for base in type(adapter).__mro__]
    attach = next((ADAPTERS[name] for name in names if name in ADAPTERS), None)
    if attach is None:
        raise ConfigError(f"{names[0]} is no adapter that can be sharded: those are {', '.join(ADAPTERS)}")
    for name, part in adapter.named_modules():
        dropout = part.p if isinstance(part, nn.Dropout) else getattr(part, "attention_dropout", 0.0)
        dropout = part.dropout if isinstance(part, nn.MultiheadAttention) else dropout
        if dropout:
            raise ConfigError(
                f"{names[0]} drops out with probability {dropout} in {name}; each rank would draw a mask of its own "
                "for the same queries: set it to 0 in the config"
            )
    AttentionInterface.register(IMPLEMENTATION, adapter_attention)
    attach(adapter)


def adapter_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sequence_parallel: AdapterKeys | None = None,
    **unused: Any,
) -> tuple[Tensor, None]:
    """Attention function of transformers: ``query [B, H_q, s_q, D]``, ``key, value [B, H_kv, s_kv, D]``.

    Returns:
        ``[B, s_q, H_q, D]`` and None (no attention weights).
    """
    keys = _given(module, sequence_parallel, attention_mask)
    out, lse = keys.attend(query, key, value, scaling)
    if type(module).__name__ == "Idefics2PerceiverAttention":
        # Its queries are keys too, behind the features, on every rank: they count once, as a source of their own.
        rows = query.shape[2]
        among = sp_attention(query, key[:, :, -rows:], value[:, :, -rows:], scale=scaling, kernel=keys.kernel)
        out, _ = merge_attention([(out, lse), among])
    return out.transpose(1, 2), None


def _given(module: nn.Module, keys: AdapterKeys | None, mask: Tensor | None) -> AdapterKeys:
    """``keys``. Raises ``ValueError`` where they are not given, or a mask is."""
    if keys is None:
        raise ValueError(
            f"{type(module).__name__} belongs to a sharded adapter, which needs the forward argument "
            "sequence_parallel=AdapterKeys(group, shards); with group=None and one shard it runs on one rank"
        )
    if mask is not None:
        raise ValueError(
            f"a mask of the visual features was given to {type(module).__name__}; leave it out, and give the number "
            "of each sample's tokens as AdapterKeys(visible=...), or keep hidden tokens off the shard"
        )
    return keys


def _without_mask(adapter: nn.Module, kwargs: dict[str, Any], mask: str, features: str) -> dict[str, Any]:
    """The arguments of a call without the mask of the features, which then have at least one token.

    Some adapters cannot reshape the keys of no token. A row of zeros, which no query sees, stands in for it; it is
    appended, not made anew, so that it keeps the graph.
    """
    rest = dict(kwargs)
    _given(adapter, rest.get("sequence_parallel"), rest.pop(mask, None))
    if rest.get(features) is None:
        raise ValueError(f"{type(adapter).__name__} needs the features of the rank's frames as {features}=...")
    if not rest[features].shape[1]:
        rest[features] = nn.functional.pad(rest[features], (0, 0, 0, 1))
    return rest


# Q-Formers of BLIP-2 and InstructBLIP


def _attach_q_former(adapter: Any) -> None:
    """Cross-attention alone, by a config of its own: self-attention among the queries stays what it was."""
    for layer in adapter.encoder.layer:
        if layer.has_cross_attention:
            attention = layer.crossattention.attention
            attention.config = copy.copy(attention.config)
            attention.config._attn_implementation = IMPLEMENTATION
    adapter.register_forward_pre_hook(_fit_q_former, with_kwargs=True)


def _fit_q_former(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return args, _without_mask(module, kwargs, "encoder_attention_mask", "encoder_hidden_states")


# Idefics2's perceiver


def _attach_perceiver(adapter: Any) -> None:
    adapter.config._attn_implementation = IMPLEMENTATION
    adapter.register_forward_pre_hook(_fit_perceiver, with_kwargs=True)


def _fit_perceiver(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The perceiver insists on a mask, of which it makes none for this attention."""
    named = dict(zip(("context", "attention_mask"), args, strict=False)) | kwargs
    rest = _without_mask(module, named, "attention_mask", "context")
    return (), {**rest, "attention_mask": rest["context"].new_ones(rest["context"].shape[:2])}


# Adapters around torch's own multi-head attention


def _attach_projector(adapter: Any) -> None:
    _replace_forward(adapter, _project)
    _reach_multihead(adapter.cross_attn.multihead_attn)


def _project(
    module: Any, key_value_states: Tensor, attn_mask: Tensor | None = None, sequence_parallel: AdapterKeys | None = None
) -> Tensor:
    """``AriaProjector.forward``, with as many queries as it has for the tokens of all ranks."""
    keys = _given(module, sequence_parallel, attn_mask)
    tokens = keys.shards.total
    if tokens not in module.patch_to_query_dict:
        raise ValueError(
            f"AriaProjector has no number of queries for {tokens} visual tokens: patch_to_query_dict knows "
            f"{sorted(module.patch_to_query_dict)}; add it to the config's projector_patch_to_query_dict"
        )
    queries = module.query[: module.patch_to_query_dict[tokens]].expand(key_value_states.shape[0], -1, -1)
    # The projector's attention hands its mask down as it is.
    attended = module.cross_attn(key_value_states, queries, attn_mask=keys)
    return module.feed_forward(module.layer_norm(attended))


def _attach_resampler(adapter: Any) -> None:
    """Qwen-VL's: other resamplers of that name have more parts."""
    parts = {name for name, _ in adapter.named_children()}
    code = sys.modules[type(adapter).__module__]
    if parts != {"attn", "kv_proj", "ln_q", "ln_kv"} or not hasattr(code, "get_abs_pos"):
        raise ConfigError(
            f"{type(adapter).__name__} of {code.__name__} is not Qwen-VL's: it has the parts {sorted(parts)}, that one "
            "attn, kv_proj, ln_kv, ln_q, and get_abs_pos beside it"
        )
    _replace_forward(adapter, functools.partial(_resample, code.get_abs_pos))
    _reach_multihead(adapter.attn)


def _resample(
    get_abs_pos: Callable[[Tensor, int], Tensor],
    module: Any,
    x: Tensor,
    attn_mask: Tensor | None = None,
    sequence_parallel: AdapterKeys | None = None,
) -> Tensor:
    """``Resampler.forward`` for frames ``x [B, own frames, tokens, d]``, each with the positions of an image."""
    keys = _given(module, sequence_parallel, attn_mask)
    if x.dim() != 4:
        raise ValueError(f"Resampler got features {tuple(x.shape)}; give [B, own frames, tokens of a frame, d]")
    values = module.ln_kv(module.kv_proj(x))
    positions = get_abs_pos(module.pos_embed, x.shape[2])
    queries = (module.ln_q(module.query) + module.pos_embed).expand(x.shape[0], -1, -1)
    # Its attention has the sequence first.
    operands = (y.transpose(0, 1) for y in (queries, (values + positions).flatten(1, 2), values.flatten(1, 2)))
    out, _ = module.attn(*operands, attn_mask=keys)
    return out.transpose(0, 1)


def _reach_multihead(module: nn.MultiheadAttention) -> None:
    if module.bias_k is not None or module.bias_v is not None or module.add_zero_attn:
        raise ConfigError("MultiheadAttention with add_bias_kv or add_zero_attn cannot be sharded: each rank adds keys")
    _replace_forward(module, _multihead)


def _multihead(
    module: nn.MultiheadAttention, query: Tensor, key: Tensor, value: Tensor, attn_mask: AdapterKeys
) -> tuple[Tensor, None]:
    """``MultiheadAttention.forward`` over keys that are divided over the ranks.

    Args:
        attn_mask: what the adapter above hands down in the mask's place.
    """
    if module._qkv_same_embed_dim:
        weights: Any = module.in_proj_weight.chunk(3)
    else:
        weights = module.q_proj_weight, module.k_proj_weight, module.v_proj_weight
    biases = (None,) * 3 if module.in_proj_bias is None else module.in_proj_bias.chunk(3)
    heads = (module.num_heads, module.head_dim)
    if not module.batch_first:
        query, key, value = (x.transpose(0, 1) for x in (query, key, value))
    q, k, v = (
        nn.functional.linear(x, weight, bias).unflatten(-1, heads).transpose(1, 2)
        for x, weight, bias in zip((query, key, value), weights, biases, strict=True)
    )
    out, _ = attn_mask.attend(q, k, v, None)
    out = module.out_proj(out.transpose(1, 2).flatten(2))
    return out if module.batch_first else out.transpose(0, 1), None


def _replace_forward(module: nn.Module, forward: Callable[..., Any]) -> None:
    """On this instance; hooks of the module, such as ZeRO-3's, still run around it."""
    vars(module)["forward"] = functools.partial(forward, module)


ADAPTERS: dict[str, Callable[[Any], None]] = {
    "Blip2QFormerModel": _attach_q_former,
    "InstructBlipQFormerModel": _attach_q_former,
    "InstructBlipVideoQFormerModel": _attach_q_former,
    "Idefics2PerceiverResampler": _attach_perceiver,
    "AriaProjector": _attach_projector,
    "Resampler": _attach_resampler,
}
