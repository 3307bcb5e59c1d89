"""Modules of language models that mix tokens outside attention, of all kinds that are known: exchanged by heads."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from ds_lvxattn.families.gated_delta import GATED_DELTA
from ds_lvxattn.families.kimi_delta import KIMI_DELTA
from ds_lvxattn.families.mamba2 import MAMBA2
from ds_lvxattn.families.mixer_kind import Functions, MixerKind
from ds_lvxattn.families.short_conv import SHORT_CONVOLUTION
from ds_lvxattn.plan.layer_plan import AttentionLayer

MIXERS: tuple[MixerKind, ...] = (*GATED_DELTA, KIMI_DELTA, MAMBA2, SHORT_CONVOLUTION)


def mixers(model: nn.Module) -> dict[nn.Module, AttentionLayer]:
    """Those of ``model``, with sizes; see ``Family.mixers``."""
    return {module: kind.layer(name, module) for name, module, kind, _ in _known(model)}


def divide(model: nn.Module) -> None:
    """Let the modules ``mixers(model)`` take divided text."""
    for _, module, kind, functions in _known(model):
        kind.divide(module, functions)


def types_of_layers(model: nn.Module) -> list[str]:
    """What the config of ``model`` calls the layers around them, ascending."""
    return sorted({str(module.layer_type) for module in mixers(model)})


def _known(model: nn.Module) -> Iterator[tuple[str, nn.Module, MixerKind, Functions]]:
    for name, module in model.named_modules():
        for kind in MIXERS:
            functions = kind.functions_of(module)
            if functions is not None:
                yield name, module, kind, functions
