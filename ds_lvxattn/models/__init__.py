"""The model families, one file each."""

from __future__ import annotations

from torch import nn

from ds_lvxattn.config import ConfigError
from ds_lvxattn.models.family import Family
from ds_lvxattn.models.mllama import Mllama

FAMILIES: tuple[Family, ...] = (Mllama(),)

__all__ = ["FAMILIES", "Family", "family_of"]


def family_of(model: nn.Module) -> Family:
    """The family of ``model``.

    Raises:
        ConfigError: no family knows its class.
    """
    for family in FAMILIES:
        if family.matches(model):
            return family
    known = ", ".join(family.name for family in FAMILIES)
    raise ConfigError(
        f"model class {type(model).__name__} belongs to no known family ({known}); "
        "docs/adding-a-family.md says how to add one"
    )
