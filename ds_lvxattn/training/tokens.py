"""The loss of an optimizer step: the sum over its supervised tokens, divided by their number.

DeepSpeed averages over micro-batches and data-parallel groups, whatever each of them holds. So the loss of each is
divided by the mean number of tokens of a micro-batch of the step, which is known from token ids before the step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist

from ds_lvxattn.batches.prepare import Loaded
from ds_lvxattn.groups import SequenceParallelGroups


@dataclass(frozen=True)
class StepCounts:
    """What the micro-batches of a step hold, over all groups.

    Attributes:
        tokens: supervised tokens.
        samples: samples, the skipped ones among them.
        skipped: samples that were skipped.
    """

    tokens: int
    samples: int
    skipped: int


def counted_step(
    micro_batches: Sequence[Loaded], groups: SequenceParallelGroups, everyone: dist.ProcessGroup
) -> tuple[list[Loaded], StepCounts]:
    """The micro-batches of one optimizer step with what their losses are divided by; all ranks call it.

    Args:
        everyone: all ranks, for host messages.
    """
    mine = (
        sum(loaded.layout.supervised_tokens for loaded in micro_batches),
        sum(len(loaded.layout.frames) for loaded in micro_batches),
        sum(loaded.skipped for loaded in micro_batches),
    )
    data_ranks = groups.get_data_parallel_world_size()
    if data_ranks > 1:
        of_all = torch.tensor(mine)
        dist.all_reduce(of_all, group=everyone)
        mine = tuple(of_all.div(groups.size, rounding_mode="floor").tolist())  # the ranks of a group count alike
    counts = StepCounts(*mine)
    tokens = max(counts.tokens, 1) / (len(micro_batches) * data_ranks)
    return [replace(loaded, tokens=tokens) for loaded in micro_batches], counts
