"""Mamba 2 (the mixers of Nemotron-H, Bamba and Granite 4) on divided text.

The module projects each token by itself; a causal convolution and a scan run along the text (``HeadMixer``), in which
groups of heads share what is written to their states and how they are read; what that gives is normed with a gate over
all heads, and projected. Convolution and scan are computed by the functions that the module's own forward calls while
text is read in; in training its forward may call one that does all at once, where the package with it is installed.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ds_lvxattn.families.handed_on import names, takes_others
from ds_lvxattn.families.head_mixing import Channels, HeadMixer
from ds_lvxattn.kernels.torch_internals import never_compiled
from ds_lvxattn.plan.layer_plan import AttentionLayer
from ds_lvxattn.runtime.batch import SequenceParallelBatch

KNOWN = ("NemotronHMamba2Mixer", "BambaMixer", "GraniteMoeHybridMambaLayer")
CONVOLUTION, SCAN = "causal_conv1d_fn", "mamba2_chunk_scan"  # functions that their forward calls, by name
PARTS = (
    "num_heads", "n_groups", "head_dim", "ssm_state_size", "intermediate_size", "conv1d", "conv_kernel_size",
    "activation", "A_log", "D", "dt_bias", "time_step_limit", "chunk_size", "in_proj", "norm", "out_proj", "layer_idx",
    "layer_type",
)  # fmt: skip


def scans(model: nn.Module) -> dict[nn.Module, AttentionLayer]:
    """The modules of ``model`` that ``divide_scans`` takes, with sizes, groups as key heads."""
    found: dict[nn.Module, AttentionLayer] = {}
    module: Any
    for name, module in model.named_modules():
        if _functions_of(module) is not None:
            sizes = module.num_heads, module.n_groups, module.ssm_state_size
            found[module] = AttentionLayer(name, "self", *sizes, value_dim=module.head_dim)
    return found


def divide_scans(model: nn.Module) -> None:
    """Let the modules ``scans(model)`` take divided text."""
    for module in model.modules():
        functions = _functions_of(module)
        if functions is not None:
            own = module.forward
            divided = functools.wraps(own)(functools.partial(_forward, module, functions, own))
            setattr(module, "forward", divided)  # noqa: B010


def _functions_of(module: nn.Module) -> Mapping[str, Any] | None:
    """What the forward of ``module`` finds by name; None: its class is not known, or written in another way."""
    if type(module).__name__ not in KNOWN or not all(hasattr(module, name) for name in PARTS):
        return None
    functions: Mapping[str, Any] = inspect.unwrap(type(module).forward).__globals__
    calls = all(name in functions and names(module, name) for name in (CONVOLUTION, SCAN))
    return functions if calls and takes_others(module) else None


@never_compiled
def _forward(
    module: Any,
    functions: Mapping[str, Any],
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
    """The scan of a module of a class in ``KNOWN``; see ``HeadMixer``."""

    def __init__(self, module: Any, functions: Mapping[str, Any], batch: SequenceParallelBatch) -> None:
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
