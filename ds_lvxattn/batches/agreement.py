"""One outcome on all ranks of a group: what fails on one rank is an error on every rank, and no rank waits for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from ds_lvxattn.data.sample import SampleError

Made = TypeVar("Made")


def agree(make: Callable[[], Made], digest: Callable[[Made], str], group: dist.ProcessGroup | None) -> Made:
    """``make()`` of this rank; every rank of ``group`` calls it. A collective on the host, not for a training step.

    Args:
        digest: what must be equal on all ranks, in words.
        group: None: this rank alone.

    Raises:
        SampleError: on every rank, when ``make`` raises it on one of them or their digests differ.
    """
    if group is None:
        return make()
    made: Made | None = None
    verdict: tuple[str, str]
    try:
        made = make()
        verdict = ("", digest(made))
    except SampleError as error:
        verdict = (str(error), "")
    verdicts: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(verdicts, verdict, group=group)
    for problem, _ in verdicts:
        if problem:
            raise SampleError(problem)
    digests = sorted({theirs for _, theirs in verdicts})
    if len(digests) > 1:
        raise SampleError(f"the ranks of the group read different data: {digests}")
    assert made is not None
    return made
