"""Linear attention by the gated delta rule (``GatedDeltaNet`` of Qwen3-Next, Qwen3.5 and OLMo Hybrid) on divided text.

The module projects each token by itself; a causal convolution runs along the text, channel by channel, and then a
recurrence, head by head; what that gives is gated and projected, again token by token. So what is between the
projections is exchanged by heads (``exchange/sequence_mixing.py``). It is computed by the functions that the module's
own forward calls, for which transformers takes the kernels of other packages where those are installed.

Equally many value heads read a key head. Ranks share the value heads, and each gets the key heads that its own read, as
in Ulysses. A rank takes its heads' part of the parameters of convolution and decay too, so that their gradients are
parts that add up over the ranks, as those of all parameters do.
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

from ds_lvxattn.exchange.sequence_mixing import heads_of_all_ranks, last_tokens, mixed_by_heads, of_documents
from ds_lvxattn.families.handed_on import names, takes_others
from ds_lvxattn.kernels.torch_internals import never_compiled
from ds_lvxattn.plan.head_shards import head_shards
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
    values = _Mixer(module, code, batch).mixed(projected).transpose(1, 2)
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


class _Mixer:
    """Convolution and recurrence of a module over the text of a batch, for this rank's heads.

    Args:
        module: of a class in ``KNOWN``.
        code: what its own forward does.
        batch: the batch.
    """

    def __init__(self, module: Any, code: _Code, batch: SequenceParallelBatch) -> None:
        self.module, self.batch = module, batch
        shards = head_shards(module.num_v_heads, module.num_k_heads, batch.comm.ranks)
        self.keys, self.values = tuple(x.keys for x in shards), tuple(x.queries for x in shards)
        self.share = shards[batch.comm.rank]
        self.convolve, self.rule = code.functions[CONVOLUTION], code.functions[RULE]
        # The function does it where the module does not, and as many value heads read each key head.
        several = len(self.share.queries) > len(self.share.keys)
        self.repeats = len(self.share.parts) > 1 or (several and code.repeats)
        channels = [module.num_k_heads * module.head_k_dim] * 2 + [module.num_v_heads * module.head_v_dim]
        sizes = (module.head_k_dim, module.head_k_dim, module.head_v_dim)
        own = [slice(x.start, x.stop) for x in (self.share.keys, self.share.keys, self.share.queries)]

        def of_own(x: Tensor) -> list[Tensor]:
            """The parameters of the channels of this rank's queries, keys and values."""
            parts = zip(x.split(channels), sizes, own, strict=True)
            return [part.unflatten(0, (-1, size))[heads].flatten(0, 1) for part, size, heads in parts]

        self.weights = of_own(module.conv1d.weight.squeeze(1))
        bias = module.conv1d.bias
        self.biases: Sequence[Tensor | None] = [None] * 3 if bias is None else of_own(bias)
        self.decay = -module.A_log[own[2]].float().exp()
        self.offset = module.dt_bias[own[2]]
        self.states: list[tuple[list[Tensor], Tensor]] = []

    def mixed(self, projected: _Projected) -> Tensor:
        """What the recurrence makes of the rank's tokens, with all heads: ``[B, H_v, s, D_v]``."""
        tensors = [x.transpose(1, 2) for x in (projected.query, projected.key, projected.value, projected.rates)]
        heads = (self.keys, self.keys, self.values, self.values)
        result = self.values, self.module.head_v_dim
        out = mixed_by_heads(tensors, heads, result, self.batch.mixed_rows, self._mix)
        if self.batch.states is not None:
            self.batch.states[self.module] = self._all_states(tensors)
        return out

    def _mix(self, *tensors: Tensor) -> Tensor:
        """``query, key [B, heads, S, D]``, ``value [B, heads, S, D_v]`` and rates of this rank's heads to values."""
        keeps = self.batch.states is not None
        *channels, rates = tensors
        query, key, value = map(self._convolved, channels, self.weights, self.biases)
        if self.repeats:
            query, key = self._repeated(query), self._repeated(key)
        update, decay = rates.transpose(1, 2).unbind(-1)
        beta = update.sigmoid()
        if getattr(self.module, "allow_neg_eigval", False):
            beta = beta * 2.0
        out, state = self.rule(
            query, key, value, g=self.decay * softplus(decay.float() + self.offset), beta=beta, initial_state=None,
            output_final_state=keeps, use_qk_l2norm_in_kernel=True,
        )  # fmt: skip
        if keeps:
            self.states.append(([last_tokens(x, self.module.conv_kernel_size) for x in channels], state))
        made: Tensor = out.transpose(1, 2)
        return made

    def _convolved(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """``x [B, heads, S, D]``, convolved along ``S``, as ``[B, S, heads, D]``."""
        heads, size = x.shape[1], x.shape[3]
        made = self.convolve(x.transpose(2, 3).flatten(1, 2), weight, bias, activation=self.module.activation)
        convolved: Tensor = made.unflatten(1, (heads, size)).permute(0, 3, 1, 2)
        return convolved

    def _repeated(self, x: Tensor) -> Tensor:
        """Key heads of ``x [B, S, heads, D]``, each for the value heads that read it."""
        runs = x.split([keys for _, keys in self.share.parts], dim=2)
        return torch.cat(
            [run.repeat_interleave(values // keys, dim=2)
             for run, (values, keys) in zip(runs, self.share.parts, strict=True)], dim=2,
        )  # fmt: skip

    def _all_states(self, tensors: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Behind each document, on every rank: the last channels ``[B, C, kernel]`` that the convolution took, queries,
        keys and values, and the state of the recurrence ``[B, H_v, D, D_v]``.

        Args:
            tensors: of the rank's tokens with all heads.
        """
        module, comm, documents = self.module, self.batch.comm, self.batch.documents
        assert documents is not None
        tails, heads = [], (self.keys, self.keys, self.values)
        for place, (of_ranks, x) in enumerate(zip(heads, tensors, strict=False)):
            nothing = x.new_zeros(1, len(of_ranks[comm.rank]), module.conv_kernel_size, x.shape[3])
            own = of_documents([made[place] for made, _ in self.states], documents, nothing)
            tails.append(heads_of_all_ranks(own, of_ranks, comm).transpose(2, 3).flatten(1, 2))
        sizes = len(self.share.queries), module.head_k_dim, module.head_v_dim
        nothing = tensors[0].new_zeros(1, *sizes, dtype=torch.float32)
        state = of_documents([state for _, state in self.states], documents, nothing)
        return torch.cat(tails, dim=1), heads_of_all_ranks(state, self.values, comm)
