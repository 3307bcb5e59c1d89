"""One outcome on all ranks: what fails on one rank ends all of them with the same message."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from ds_lvxattn.data.sample import SampleError
from ds_lvxattn.errors import ConfigError, RunError

Made = TypeVar("Made")
# Errors that carry a message for the user; the order is that in which they win.
KINDS: tuple[type[Exception], ...] = (ConfigError, SampleError, RunError)


def gather(value: Any, group: dist.ProcessGroup) -> list[Any]:
    """``value`` of every rank of ``group``, a group for host messages."""
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def on_all_ranks(make: Callable[[], Made], group: dist.ProcessGroup | None) -> Made:
    """``make()`` of this rank; every rank of ``group`` calls it, and ``make`` must not wait for other ranks.

    Args:
        group: for host messages; None: this rank alone.

    Raises:
        ConfigError, SampleError, RunError: on every rank, what one of them raised.
    """
    if group is None:
        return make()
    made: Made | None = None
    problem: tuple[int, str] | None = None
    try:
        made = make()
    except KINDS as error:
        problem = next(i for i, kind in enumerate(KINDS) if isinstance(error, kind)), str(error)
    raise_first(problem, group)
    return made  # type: ignore[return-value]


def raise_first(problem: tuple[int, str] | None, group: dist.ProcessGroup) -> None:
    """Raise, on every rank of ``group``, the problem of the first rank that has one: its place in KINDS and text."""
    problems = [found for found in gather(problem, group) if found is not None]
    if problems:
        kind, text = min(problems, key=lambda found: found[0])
        raise KINDS[kind](text)
