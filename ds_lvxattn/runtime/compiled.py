"""Regional ``torch.compile``: each layer by itself, in graphs around the attention operators.

What happens once a batch (plans, intervals, shards) is Python objects that change with the batch, so the attention
functions and recomputation are no part of a graph: a layer is what leads to its attention, and what follows it. Layers
of one class share the code that was compiled.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ds_lvxattn.runtime.zero3 import has_hooks_inside

BACKEND = "inductor"


def compile_layers(layers: Iterable[nn.Module]) -> None:
    """Let layers compile their forward at their first call.

    Layers in which ZeRO-3 gathers parameters piece by piece stay as they are: there would be nothing but the pieces to
    compile.
    """
    for layer in layers:
        setattr(layer, "forward", _compiled(layer))  # noqa: B010


def _compiled(layer: nn.Module) -> Any:
    plain = layer.forward
    compiled = torch.compile(plain, backend=BACKEND)

    @functools.wraps(plain)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return (plain if has_hooks_inside(layer) else compiled)(*args, **kwargs)

    return forward
