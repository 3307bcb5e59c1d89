"""Modules of language models that mix tokens outside attention, of all kinds that are known: exchanged by heads."""

from __future__ import annotations

from torch import nn

from ds_lvxattn.families.gated_delta import divide_gated_delta, gated_delta
from ds_lvxattn.families.mamba2 import divide_scans, scans
from ds_lvxattn.families.short_conv import divide_short_convolutions, short_convolutions
from ds_lvxattn.plan.layer_plan import AttentionLayer


def mixers(model: nn.Module) -> dict[nn.Module, AttentionLayer]:
    """Those of ``model``, with sizes; see ``Family.mixers``."""
    return {**gated_delta(model), **scans(model), **short_convolutions(model)}


def divide(model: nn.Module) -> None:
    """Let the modules ``mixers(model)`` take divided text."""
    divide_gated_delta(model)
    divide_scans(model)
    divide_short_convolutions(model)


def types_of_layers(model: nn.Module) -> list[str]:
    """What the config of ``model`` calls the layers around them, ascending."""
    return sorted({str(module.layer_type) for module in mixers(model)})
