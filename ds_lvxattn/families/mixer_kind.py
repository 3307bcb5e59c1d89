"""Kinds of modules that mix tokens outside attention, and whose code is known: what it takes to divide them."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ds_lvxattn.families.handed_on import names, takes_others
from ds_lvxattn.kernels.torch_internals import never_compiled
from ds_lvxattn.plan.layer_plan import AttentionLayer
from ds_lvxattn.runtime.batch import SequenceParallelBatch

Functions = Mapping[str, Any]


@dataclass(frozen=True)
class MixerKind:
    """Modules of some classes.

    Attributes:
        classes: names of the classes.
        parts: attributes that such a module has.
        calls: functions that its forward finds by name, those of other packages where these are installed.
        sizes: of a module the heads, the heads that they read, and the sizes of the latter and of the former.
        forward: what the module makes of ``hidden_states [B, s, d]`` of divided text: called with the module, what its
            forward finds by name, those and the batch.
    """

    classes: tuple[str, ...]
    parts: tuple[str, ...]
    calls: tuple[str, ...]
    sizes: Callable[[Any], tuple[int, int, int, int]]
    forward: Callable[[Any, Functions, Tensor, SequenceParallelBatch], Tensor]

    def functions_of(self, module: nn.Module) -> Functions | None:
        """What the forward of ``module`` finds by name; None: it is none of these, or written in another way."""
        parts = (*self.parts, "layer_idx", "layer_type")
        if type(module).__name__ not in self.classes or not all(hasattr(module, name) for name in parts):
            return None
        functions: Functions = inspect.unwrap(type(module).forward).__globals__
        calls = all(name in functions and names(module, name) for name in self.calls)
        return functions if calls and takes_others(module) else None

    def layer(self, name: str, module: nn.Module) -> AttentionLayer:
        """Sizes of such a module, as if it were self-attention."""
        heads, read, size, value_dim = self.sizes(module)
        return AttentionLayer(name, "self", heads, read, size, value_dim=value_dim)

    def divide(self, module: nn.Module, functions: Functions) -> None:
        """Let such a module take divided text; where this rank has the whole text it runs as it is."""
        own = module.forward

        @functools.wraps(own)
        @never_compiled
        def forward(hidden_states: Tensor, sequence_parallel: Any = None, **kwargs: Any) -> Tensor:
            batch: SequenceParallelBatch | None = sequence_parallel
            # While text is generated, each new token is on every rank, and so are the states that it goes on from.
            if batch is None or not batch.brings_frames or batch.mixes_at_once:
                made: Tensor = own(hidden_states, **kwargs)
                return made
            return self.forward(module, functions, hidden_states, batch)

        setattr(module, "forward", forward)  # noqa: B010
