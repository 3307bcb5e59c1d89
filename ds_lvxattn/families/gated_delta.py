"""Linear attention by the gated delta rule (``GatedDeltaNet`` of Qwen3-Next, Qwen3.5 and OLMo Hybrid) on divided text.

The module projects each token by itself; a causal convolution and a recurrence run along the text (``HeadMixer``); what
that gives is gated and projected, again token by token.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus

from ds_lvxattn.families.head_mixing import Channels, HeadMixer
from ds_lvxattn.families.mixer_kind import Functions, MixerKind
from ds_lvxattn.runtime.batch import SequenceParallelBatch

CONVOLUTION, RULE = "causal_conv1d_fn", "torch_chunk_gated_delta_rule"
PARTS = (
    "num_k_heads", "num_v_heads", "head_k_dim", "head_v_dim", "activation", "conv1d", "conv_kernel_size", "A_log",
    "dt_bias",
)  # fmt: skip


@dataclass(frozen=True)
class _Projected:
    """What a module projects tokens to, ``[B, s, H, D]``: keys and values ahead of the convolution; ``rates [B, s, H_v,
    2]``, from which update and decay follow; and the gate."""

    query: Tensor
    key: Tensor
    value: Tensor
    rates: Tensor
    gate: Tensor


def _by_groups(module: Any, x: Tensor) -> _Projected:
    """Qwen3-Next: one projection, group of heads by group."""
    q, k, v, gate, b, a = module.fix_query_key_value_ordering(module.in_proj_qkvz(x), module.in_proj_ba(x))
    return _Projected(q, k, v, torch.stack((b, a), dim=-1), gate)


def _together(module: Any, x: Tensor) -> _Projected:
    """Qwen3.5: one projection for all that is convolved."""
    keys, values = module.num_k_heads * module.head_k_dim, module.num_v_heads * module.head_v_dim
    parts = module.in_proj_qkv(x).split([keys, keys, values], dim=-1)
    return _by_heads(module, parts, module.in_proj_b(x), module.in_proj_a(x), module.in_proj_z(x))


def _separately(module: Any, x: Tensor) -> _Projected:
    """OLMo Hybrid."""
    parts = module.q_proj(x), module.k_proj(x), module.v_proj(x)
    return _by_heads(module, parts, module.b_proj(x), module.a_proj(x), module.g_proj(x))


def _by_heads(module: Any, parts: Sequence[Tensor], b: Tensor, a: Tensor, gate: Tensor) -> _Projected:
    keys, values = (module.num_k_heads, module.head_k_dim), (module.num_v_heads, module.head_v_dim)
    q, k, v = (part.unflatten(-1, sizes) for part, sizes in zip(parts, (keys, keys, values), strict=True))
    return _Projected(q, k, v, torch.stack((b, a), dim=-1), gate.unflatten(-1, values))


def _forward(
    project: Callable[[Any, Tensor], _Projected],
    norm: str,
    out: str,
    module: Any,
    functions: Functions,
    hidden_states: Tensor,
    batch: SequenceParallelBatch,
) -> Tensor:
    """See ``MixerKind``; ``norm`` and ``out`` are names of what follows the recurrence."""
    projected = project(module, hidden_states)
    channels = projected.query, projected.key, projected.value
    values = _GatedDelta(module, functions, batch).mixed(channels, projected.rates)
    size = module.head_v_dim
    gated = getattr(module, norm)(values.reshape(-1, size), projected.gate.reshape(-1, size))
    made: Tensor = getattr(module, out)(gated.reshape(*hidden_states.shape[:2], -1))
    return made


class _GatedDelta(HeadMixer):
    """The gated delta rule of a module; see ``HeadMixer``."""

    def __init__(self, module: Any, functions: Functions, batch: SequenceParallelBatch) -> None:
        keys = Channels(module.num_k_heads, module.head_k_dim, True)
        values = Channels(module.num_v_heads, module.head_v_dim, False)
        repeats = _repeats(type(module).forward)
        super().__init__(module, (keys, keys, values), module.head_v_dim, functions[CONVOLUTION], repeats, batch)
        self.rule = functions[RULE]
        self.decay = -module.A_log[self.own].float().exp()
        self.offset = module.dt_bias[self.own]

    @property
    def sizes_of_state(self) -> tuple[int, int]:
        return self.module.head_k_dim, self.module.head_v_dim

    def recur(self, channels: Sequence[Tensor], rates: Tensor, keeps: bool) -> tuple[Tensor, Tensor | None]:
        update, decay = rates.unbind(-1)
        beta = update.sigmoid()
        if getattr(self.module, "allow_neg_eigval", False):
            beta = beta * 2.0
        made: tuple[Tensor, Tensor | None] = self.rule(
            *channels, g=self.decay * softplus(decay.float() + self.offset), beta=beta, initial_state=None,
            output_final_state=keeps, use_qk_l2norm_in_kernel=True,
        )  # fmt: skip
        return made


@functools.cache
def _repeats(forward: Any) -> bool:
    """Whether the forward of a class repeats key heads ahead of the rule; in later releases of transformers it does."""
    return "repeat_interleave" in inspect.unwrap(forward).__code__.co_names


def _kind(
    classes: tuple[str, ...], parts: tuple[str, ...], project: Callable[[Any, Tensor], _Projected], norm: str, out: str
) -> MixerKind:
    def sizes(module: Any) -> tuple[int, int, int, int]:
        return module.num_v_heads, module.num_k_heads, module.head_k_dim, module.head_v_dim

    forward = functools.partial(_forward, project, norm, out)
    return MixerKind(classes, (*PARTS, *parts, norm, out), (CONVOLUTION, RULE), sizes, forward)


GATED_DELTA = (
    _kind(
        ("Qwen3NextGatedDeltaNet",), ("in_proj_qkvz", "in_proj_ba", "fix_query_key_value_ordering"), _by_groups, "norm",
        "out_proj",
    ),
    _kind(
        ("Qwen3_5GatedDeltaNet", "Qwen3_5MoeGatedDeltaNet"), ("in_proj_qkv", "in_proj_b", "in_proj_a", "in_proj_z"),
        _together, "norm", "out_proj",
    ),
    _kind(
        ("OlmoHybridGatedDeltaNet",),
        ("q_proj", "k_proj", "v_proj", "b_proj", "a_proj", "g_proj", "allow_neg_eigval"), _separately, "o_norm",
        "o_proj",
    ),
)  # fmt: skip
