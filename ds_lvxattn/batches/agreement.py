"""One outcome on all ranks: what fails on one rank is the same error on every rank, and no rank waits for it.

Messages between hosts, not for a training step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch.distributed as dist

from ds_lvxattn.data.sample import SampleError
from ds_lvxattn.errors import ConfigError, RunError

Made = TypeVar("Made")
Problem = tuple[int, str]  # which of ``KINDS``, and its message
# Errors that carry a message for the user; the order is that in which they win.
KINDS: tuple[type[Exception], ...] = (ConfigError, SampleError, RunError)


def gather(value: Any, group: dist.ProcessGroup) -> list[Any]:
    """``value`` of every rank of ``group``."""
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def on_all_ranks(make: Callable[[], Made], group: dist.ProcessGroup | None) -> Made:
    """``make()`` of this rank; every rank of ``group`` calls it, and ``make`` must not wait for other ranks.

    Args:
        group: None: this rank alone.

    Raises:
        ConfigError, SampleError, RunError: on every rank, what one of them raised.
    """
    if group is None:
        return make()
    made, problem = _tried(make)
    raise_first(problem, group)
    return made  # type: ignore[return-value]


def agree(make: Callable[[], Made], digest: Callable[[Made], str], group: dist.ProcessGroup | None) -> Made:
    """The same, of what must be equal on all ranks.

    Args:
        digest: what must be equal, in words.

    Raises:
        ConfigError, SampleError, RunError: on every rank, what one of them raised; ``SampleError`` too where their
            digests differ.
    """
    if group is None:
        return make()
    made, problem = _tried(make)
    theirs = gather((problem, "" if problem else digest(made)), group)  # type: ignore[arg-type]
    _raise([found for found, _ in theirs])
    digests = sorted({said for _, said in theirs})
    if len(digests) > 1:
        raise SampleError(f"the ranks of the group read different data: {digests}")
    return made  # type: ignore[return-value]


def raise_first(problem: Problem | None, group: dist.ProcessGroup) -> None:
    """Raise, on every rank of ``group``, the problem of the first rank that has one."""
    _raise(gather(problem, group))


def _tried(make: Callable[[], Made]) -> tuple[Made | None, Problem | None]:
    try:
        return make(), None
    except KINDS as error:
        return None, (next(i for i, kind in enumerate(KINDS) if isinstance(error, kind)), str(error))


def _raise(problems: Sequence[Problem | None]) -> None:
    found = [problem for problem in problems if problem is not None]
    if found:
        kind, text = min(found, key=lambda problem: problem[0])
        raise KINDS[kind](text)
