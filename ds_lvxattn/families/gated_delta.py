"""Linear attention by the gated delta rule (``GatedDeltaNet`` of Qwen3-Next, Qwen3.5 and OLMo Hybrid) on divided text.

The module projects each token by itself; a causal convolution and a recurrence run along the text (``HeadMixer``); what
that gives is gated and projected, again token by token. Both are computed by the functions that the module's own
forward calls, for which transformers takes the kernels of other packages where those are installed.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from ds_lvxattn.families.handed_on import names, takes_others
from ds_lvxattn.families.head_mixing import Channels, HeadMixer
from ds_lvxattn.kernels.torch_internals import never_compiled
from ds_lvxattn.plan.layer_plan import AttentionLayer
from ds_lvxattn.runtime.batch import SequenceParallelBatch

KNOWN = ("Qwen3NextGatedDeltaNet", "Qwen3_5GatedDeltaNet", "Qwen3_5MoeGatedDeltaNet", "OlmoHybridGatedDeltaNet")
# Functions that their forward calls: the convolution, and the recurrence over a whole text.
CONVOLUTION, RULE = "causal_conv1d_fn", "torch_chunk_gated_delta_rule"
# What they have beside the names of one of ``PROJECTIONS``.
PARTS = (
    "num_k_heads", "num_v_heads", "head_k_dim", "head_v_dim", "activation", "layer_idx", "layer_type", "conv1d",
    "conv_kernel_size", "A_log", "dt_bias",
)  # fmt: skip
FUSED = ("in_proj_qkvz", "in_proj_ba", "fix_query_key_value_ordering", "norm", "out_proj")
MIXED = ("in_proj_qkv", "in_proj_b", "in_proj_a", "in_proj_z", "norm", "out_proj")
SEPARATE = ("q_proj", "k_proj", "v_proj", "b_proj", "a_proj", "g_proj", "o_norm", "o_proj", "allow_neg_eigval")
PROJECTIONS = (FUSED, MIXED, SEPARATE)


@dataclass(frozen=True)
class _Code:
    """What a module's own forward does.

    Attributes:
        projections: those of ``PROJECTIONS`` that the module has.
        functions: by name, those that the forward finds.
        repeats: whether it repeats key heads for the value heads that read them, ahead of the recurrence.
    """

    projections: tuple[str, ...]
    functions: Mapping[str, Any]
    repeats: bool


def gated_delta(model: nn.Module) -> dict[nn.Module, AttentionLayer]:
    """The modules of ``model`` that ``divide_gated_delta`` takes, with sizes, value heads as query heads."""
    found: dict[nn.Module, AttentionLayer] = {}
    module: Any
    for name, module in model.named_modules():
        if _code_of(module) is not None:
            heads = module.num_v_heads, module.num_k_heads
            found[module] = AttentionLayer(name, "self", *heads, module.head_k_dim, value_dim=module.head_v_dim)
    return found


def divide_gated_delta(model: nn.Module) -> None:
    """Let the modules ``gated_delta(model)`` take divided text."""
    for module in model.modules():
        code = _code_of(module)
        if code is not None:
            own = module.forward
            divided = functools.wraps(own)(functools.partial(_forward, module, code, own))
            setattr(module, "forward", divided)  # noqa: B010


def _code_of(module: nn.Module) -> _Code | None:
    """None: it is of no class that is known, or of a release that writes it in another way."""
    if type(module).__name__ not in KNOWN:
        return None
    functions = inspect.unwrap(type(module).forward).__globals__
    has = (some for some in PROJECTIONS if all(hasattr(module, name) for name in (*PARTS, *some)))
    projections = next(has, None)
    calls = all(name in functions and names(module, name) for name in (CONVOLUTION, RULE))
    if projections is None or not calls or not takes_others(module):
        return None
    return _Code(projections, functions, names(module, "repeat_interleave"))


@never_compiled
def _forward(
    module: Any,
    code: _Code,
    own: Callable[..., Tensor],
    hidden_states: Tensor,
    cache_params: Any = None,
    attention_mask: Tensor | None = None,
    sequence_parallel: Any = None,
    **kwargs: Any,
) -> Tensor:
    """The forward of ``module``, ``own`` where this rank has the whole text: ``hidden_states [B, s, d]``."""
    batch: SequenceParallelBatch | None = sequence_parallel
    # While text is generated, each new token is on every rank, and so are the states that it goes on from.
    if batch is None or not batch.brings_frames or batch.mixes_at_once:
        return own(hidden_states, cache_params=cache_params, attention_mask=attention_mask, **kwargs)
    projected = _projected(module, code, hidden_states)
    channels = projected.query, projected.key, projected.value
    values = _GatedDelta(module, code, batch).mixed(channels, projected.rates)
    separate = code.projections is SEPARATE
    norm, project = (module.o_norm, module.o_proj) if separate else (module.norm, module.out_proj)
    size = module.head_v_dim
    gated = norm(values.reshape(-1, size), projected.gate.reshape(-1, size))
    made: Tensor = project(gated.reshape(*hidden_states.shape[:2], -1))
    return made


@dataclass(frozen=True)
class _Projected:
    """What a module projects tokens to, ``[B, s, H, D]``: keys and values ahead of the convolution; ``rates [B, s, H_v,
    2]``, from which update and decay follow; and the gate."""

    query: Tensor
    key: Tensor
    value: Tensor
    rates: Tensor
    gate: Tensor


def _projected(module: Any, code: _Code, x: Tensor) -> _Projected:
    if code.projections is FUSED:
        q, k, v, gate, b, a = module.fix_query_key_value_ordering(module.in_proj_qkvz(x), module.in_proj_ba(x))
        return _Projected(q, k, v, torch.stack((b, a), dim=-1), gate)
    keys, values = (module.num_k_heads, module.head_k_dim), (module.num_v_heads, module.head_v_dim)
    if code.projections is MIXED:
        parts = module.in_proj_qkv(x).split([heads * size for heads, size in (keys, keys, values)], dim=-1)
        b, a, gate = module.in_proj_b(x), module.in_proj_a(x), module.in_proj_z(x)
    else:
        parts = module.q_proj(x), module.k_proj(x), module.v_proj(x)
        b, a, gate = module.b_proj(x), module.a_proj(x), module.g_proj(x)
    q, k, v = (part.unflatten(-1, sizes) for part, sizes in zip(parts, (keys, keys, values), strict=True))
    return _Projected(q, k, v, torch.stack((b, a), dim=-1), gate.unflatten(-1, values))


class _GatedDelta(HeadMixer):
    """The gated delta rule of a module of a class in ``KNOWN``; see ``HeadMixer``."""

    def __init__(self, module: Any, code: _Code, batch: SequenceParallelBatch) -> None:
        keys = Channels(module.num_k_heads, module.head_k_dim, True)
        values = Channels(module.num_v_heads, module.head_v_dim, False)
        convolve = code.functions[CONVOLUTION]
        super().__init__(module, (keys, keys, values), module.head_v_dim, convolve, code.repeats, batch)
        self.rule = code.functions[RULE]
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
