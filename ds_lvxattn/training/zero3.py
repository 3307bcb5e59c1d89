"""ZeRO-3 with fewer and larger gathers: what it takes as a whole, and its sizes where the config leaves them out."""

from __future__ import annotations

from typing import Any

import torch
from deepspeed.utils import set_z3_leaf_module, set_z3_leaf_modules
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from ds_lvxattn.errors import ConfigError
from ds_lvxattn.families import VisualFamily, family_of, unwrapped

# Share of the device's memory that a frozen encoder may take while all portions of the frames go through it.
ENCODER_SHARE = 0.1
LIVE, PREFETCH = "stage3_max_live_parameters", "stage3_prefetch_bucket_size"


def take_as_wholes(model: nn.Module, zero: dict[str, Any]) -> dict[str, Any]:
    """Mark, ahead of ``deepspeed.initialize``, what ZeRO-3 gathers by one collective and calls without hooks inside.

    - A frozen vision encoder, which stays gathered for all portions of the frames, unless it is large.
    - Frozen decoder layers without cross-attention, whose only input with a gradient is the first one: DeepSpeed takes
      a backward pass for finished when the gradients of the positional inputs are there.
    - Experts that are computed one by one: they call their activation as often as tokens reach one of them, which
      differs between the ranks, and DeepSpeed compares what they called.

    Args:
        model: the model, or what holds it.
        zero: the block ``zero_optimization``.

    Returns:
        ``zero`` with sizes for what was marked, where it has none.
    """
    experts = {type(module) for module in model.modules() if type(module).__name__.endswith("Experts")}
    if experts:
        set_z3_leaf_modules(model, list(experts))
    base = unwrapped(model)
    try:
        family = family_of(base)
    except ConfigError:
        return zero  # adapters or parts of a model by themselves: nothing is known of them
    roles = {module: layer.role for module, layer in family.attention_layers(base).items()}
    live, largest = 0, 0
    encoder = family.encoder(base) if isinstance(family, VisualFamily) else None
    if encoder is not None and _frozen(encoder) and _bytes(encoder) <= ENCODER_SHARE * _memory():
        set_z3_leaf_module(encoder, True)
        live = _numel(encoder)
    inside = set() if encoder is None else {*encoder.modules()}
    for layer in base.modules():
        if not isinstance(layer, GradientCheckpointingLayer) or layer in inside:
            continue
        of_layer = {roles[module] for module in layer.modules() if module in roles}
        if of_layer:
            largest = max(largest, _numel(layer))
        if of_layer == {"self"} and _frozen(layer):
            set_z3_leaf_module(layer, True)
    sizes = {}
    if largest:
        # A layer ahead; DeepSpeed's own size is less than the largest matrix of a layer.
        sizes[PREFETCH] = max(50_000_000, largest)
        sizes[LIVE] = 1_000_000_000 + live + largest
    return {**sizes, **zero}


def _frozen(module: nn.Module) -> bool:
    return not any(parameter.requires_grad for parameter in module.parameters())


def _numel(module: nn.Module) -> int:
    return sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in module.parameters())


def _bytes(module: nn.Module) -> int:
    return sum(getattr(p, "ds_numel", p.numel()) * p.element_size() for p in module.parameters())


def _memory() -> float:
    """Bytes of the device, the same on every rank."""
    if not torch.cuda.is_available():
        return float("inf")
    return float(torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory)
