"""What follows from sizes and settings alone, settled once for the layers and batches that share them.

Checks, choices and divisions of work are the same for every layer of a model; the host would make them anew each time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeVar

import torch

from ds_lvxattn.kernels.torch_internals import dispatch_modes

KEPT = 512  # of the arguments of a function, those that were used last
KEPT_TABLES = 32  # likewise, for tables, which may have a number for every token: those of a few batches

Function = TypeVar("Function", bound=Callable[..., object])


def settled(function: Function) -> Function:
    """``function``, which must be pure, of hashable arguments given by position, with its last results kept.

    What it raises is not kept. While torch.compile traces it, it is called: sizes may be symbols then, and what is kept
    would be guarded.
    """
    kept = functools.lru_cache(maxsize=KEPT)(function)

    @functools.wraps(function)
    def call(*args: object) -> object:
        return function(*args) if torch.compiler.is_compiling() else kept(*args)

    return call  # type: ignore[return-value]


def settled_tables(function: Function) -> Function:
    """The same of a function that makes tables, tensors on a device: once a batch and not once a layer, as a copy to
    the device would wait for it.

    They are no inference tensors, which the backward pass of a later step could not save, and those made under a mode
    (``FakeTensorMode``, tracing) are not kept, as they are the mode's. ``forget_tables`` frees them.
    """

    @functools.lru_cache(maxsize=KEPT_TABLES)
    def kept(*args: object) -> object:
        with torch.inference_mode(False):
            return function(*args)

    @functools.wraps(function)
    def call(*args: object) -> object:
        looks_on = torch.compiler.is_compiling() or dispatch_modes()
        return function(*args) if looks_on else kept(*args)

    _tables.append(kept.cache_clear)
    return call  # type: ignore[return-value]


_tables: list[Callable[[], None]] = []  # forgets what is kept, one a function


def forget_tables() -> None:
    """Free all tables that are kept; those that are needed again are made again."""
    for forget in _tables:
        forget()
