"""Copies of an attached model, or of a part of it, which would compute with the weights of the original."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NoReturn

from torch import nn

from ds_lvxattn.errors import ConfigError


def refuse_copies(modules: Iterable[nn.Module]) -> None:
    """Make ``copy`` and ``pickle`` of each of ``modules``, and of what holds one, a ``ConfigError``.

    Their wrapped methods close over the module itself, and plans know it by its identity.
    """
    for module in modules:
        vars(module)["__reduce_ex__"] = _refuse  # by which both take an object apart


def _refuse(protocol: object) -> NoReturn:
    raise ConfigError(
        "a model that is attached, or a part of it, was to be copied or pickled (copy.deepcopy, torch.save of a whole "
        "model, an average of weights, modules_to_save of PEFT), and the copy would compute with this model's process "
        "groups and weights; copy it, or call peft.get_peft_model, ahead of attach, or take its state_dict()"
    )
