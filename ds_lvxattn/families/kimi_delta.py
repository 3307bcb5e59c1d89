"""Kimi's delta attention (Kimi Linear) on divided text: the gated delta rule with a decay for each channel of a key.

The module projects each token by itself, to its decay too; a causal convolution and a recurrence run along the text
(``HeadMixer``); what that gives is gated and projected, again token by token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ds_lvxattn.families.head_mixing import Channels, HeadMixer
from ds_lvxattn.families.mixer_kind import Functions, MixerKind
from ds_lvxattn.runtime.batch import SequenceParallelBatch

CONVOLUTION, RULE = "causal_conv1d_fn", "chunk_kimi_delta_attention"


def _sizes(module: Any) -> tuple[int, int, int, int]:
    return module.num_heads, module.num_heads, module.head_dim, module.head_dim


def _forward(module: Any, functions: Functions, hidden_states: Tensor, batch: SequenceParallelBatch) -> Tensor:
    """See ``MixerKind``."""
    heads = module.num_heads, module.head_dim
    projections = module.q_proj, module.k_proj, module.v_proj
    channels = [project(hidden_states).unflatten(-1, heads) for project in projections]
    decay, update = module.forget_gate(hidden_states), torch.sigmoid(module.b_proj(hidden_states))
    mixed = _KimiDelta(module, functions, batch).mixed(channels, torch.cat((decay, update.unsqueeze(-1)), dim=-1))
    gate = module.g_b_proj(module.g_a_proj(hidden_states)).unflatten(-1, heads)
    made: Tensor = module.o_proj(module.o_norm(mixed, gate).flatten(2))
    return made


class _KimiDelta(HeadMixer):
    """The rule of a module; see ``HeadMixer``."""

    def __init__(self, module: Any, functions: Functions, batch: SequenceParallelBatch) -> None:
        keys, values = (Channels(module.num_heads, module.head_dim, read) for read in (True, False))
        super().__init__(module, (keys, keys, values), module.head_dim, functions[CONVOLUTION], False, batch)
        self.rule = functions[RULE]

    @property
    def sizes_of_state(self) -> tuple[int, int]:
        return self.module.head_dim, self.module.head_dim

    def recur(self, channels: Sequence[Tensor], rates: Tensor, keeps: bool) -> tuple[Tensor, Tensor | None]:
        decay, update = rates.split([self.module.head_dim, 1], dim=-1)
        made: tuple[Tensor, Tensor | None] = self.rule(
            *channels, g=decay, beta=update.squeeze(-1), initial_state=None, output_final_state=keeps,
            use_qk_l2norm_in_kernel=True,
        )  # fmt: skip
        return made


KIMI_DELTA = MixerKind(
    ("KimiLinearDeltaAttention",),
    (
        "num_heads", "head_dim", "q_proj", "k_proj", "v_proj", "conv1d", "conv_kernel_size", "activation",
        "forget_gate", "b_proj", "g_a_proj", "g_b_proj", "o_norm", "o_proj",
    ),
    (CONVOLUTION, RULE), _sizes, _forward,
)  # fmt: skip
