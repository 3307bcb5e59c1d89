"""Mamba 2 (the mixers of Nemotron-H, Bamba and Granite 4) on divided text.

The module projects each token by itself; a causal convolution and a scan run along the text (``HeadMixer``), in which
groups of heads share what is written to their states and how they are read; what that gives is normed with a gate over
all heads, and projected. Convolution and scan are computed by the functions that the module's own forward calls while
text is read in; in training its forward may call one that does all at once, where the package with it is installed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ds_lvxattn.families.head_mixing import Channels, HeadMixer
from ds_lvxattn.families.mixer_kind import Functions, MixerKind
from ds_lvxattn.runtime.batch import SequenceParallelBatch

CONVOLUTION, SCAN = "causal_conv1d_fn", "mamba2_chunk_scan"


def _sizes(module: Any) -> tuple[int, int, int, int]:
    return module.num_heads, module.n_groups, module.ssm_state_size, module.head_dim


def _forward(module: Any, functions: Functions, hidden_states: Tensor, batch: SequenceParallelBatch) -> Tensor:
    """See ``MixerKind``."""
    of_groups = module.n_groups * module.ssm_state_size
    sizes = [module.intermediate_size, module.intermediate_size, of_groups, of_groups, module.num_heads]
    gate, x, written, read, steps = module.in_proj(hidden_states).split(sizes, dim=-1)
    heads, groups = (module.num_heads, module.head_dim), (module.n_groups, module.ssm_state_size)
    channels = x.unflatten(-1, heads), written.unflatten(-1, groups), read.unflatten(-1, groups)
    scanned = _Scan(module, functions, batch).mixed(channels, steps.unsqueeze(-1))
    normed = module.norm(scanned.flatten(2), gate)
    made: Tensor = module.out_proj(normed.to(hidden_states.dtype))
    return made


class _Scan(HeadMixer):
    """The scan of a module; see ``HeadMixer``."""

    def __init__(self, module: Any, functions: Functions, batch: SequenceParallelBatch) -> None:
        heads = Channels(module.num_heads, module.head_dim, False)
        groups = Channels(module.n_groups, module.ssm_state_size, True)
        super().__init__(module, (heads, groups, groups), module.head_dim, functions[CONVOLUTION], False, batch)
        self.scan = functions[SCAN]
        self.decay = -torch.exp(module.A_log[self.own].float())
        self.skip, self.offset = module.D[self.own], module.dt_bias[self.own]

    @property
    def sizes_of_state(self) -> tuple[int, int]:
        return self.module.head_dim, self.module.ssm_state_size

    def recur(self, channels: Sequence[Tensor], rates: Tensor, keeps: bool) -> tuple[Tensor, Tensor | None]:
        x, written, read = channels
        made: Any = self.scan(
            x, rates.squeeze(-1), self.decay, written, read, chunk_size=self.module.chunk_size, D=self.skip, z=None,
            return_final_states=keeps, dt_bias=self.offset, dt_softplus=True, initial_states=None,
            dt_limit=self.module.time_step_limit,
        )  # fmt: skip
        out, state = made if keeps else (made, None)
        return out, state


MAMBA2 = MixerKind(
    ("NemotronHMamba2Mixer", "BambaMixer", "GraniteMoeHybridMambaLayer"),
    (
        "num_heads", "n_groups", "head_dim", "ssm_state_size", "intermediate_size", "conv1d", "conv_kernel_size",
        "activation", "A_log", "D", "dt_bias", "time_step_limit", "chunk_size", "in_proj", "norm", "out_proj",
    ),
    (CONVOLUTION, SCAN), _sizes, _forward,
)  # fmt: skip
