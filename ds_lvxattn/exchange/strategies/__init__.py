"""The torch side of the modes, one file each, found by the reference that a ``plan.modes.Mode`` holds."""

from __future__ import annotations

import importlib

from ds_lvxattn.exchange.arguments import Attention
from ds_lvxattn.plan.modes import Mode, modes

_resolved: dict[str, Attention] = {}


def implementation_of(mode: Mode) -> Attention:
    """The attention function of ``mode``."""
    if mode.implementation not in _resolved:
        module, name = mode.implementation.split(":")
        _resolved[mode.implementation] = getattr(importlib.import_module(module), name)
    return _resolved[mode.implementation]


# Imported now, not at the first call, which torch.compile may trace; importing them registers their operators.
for _mode in modes():
    implementation_of(_mode)
