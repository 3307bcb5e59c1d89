"""The loss of an optimizer step: the sum over its supervised tokens, divided by their number.

DeepSpeed averages over micro-batches and data-parallel groups, whatever each of them holds. So the loss of each is
divided by the mean number of tokens of a micro-batch of the step, which is known from token ids before the step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ds_lvxattn.batches.prepare import Loaded
from ds_lvxattn.errors import ConfigError
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


def step_of(
    micro_batches: Sequence[Loaded], groups: SequenceParallelGroups, everyone: dist.ProcessGroup, alike: bool = False
) -> tuple[list[Loaded], StepCounts]:
    """The micro-batches of one optimizer step with what their losses are divided by; all ranks call it.

    Args:
        everyone: all ranks, for host messages.
        alike: see ``Attached.calls_alike``.

    Raises:
        ConfigError: on all ranks, where they are to be alike and only some have images in a micro-batch.
    """
    mine = (
        sum(loaded.layout.supervised_tokens for loaded in micro_batches),
        sum(len(loaded.layout.frames) for loaded in micro_batches),
        sum(loaded.skipped for loaded in micro_batches),
        *(any(loaded.layout.frames) for loaded in micro_batches),
    )
    data_ranks = groups.get_data_parallel_world_size()
    if data_ranks > 1:
        of_all = torch.tensor(mine)
        dist.all_reduce(of_all, group=everyone)
        mine = tuple(of_all.div(groups.size, rounding_mode="floor").tolist())  # the ranks of a group count alike
    counts, with_images = StepCounts(*mine[:3]), mine[3:]
    if alike and any(0 < ranks < data_ranks for ranks in with_images):
        raise ConfigError(
            f"of the {data_ranks} ranks only {next(n for n in with_images if 0 < n < data_ranks)} have images in a "
            "micro-batch: the unmodified model does not call its vision encoder for text alone, and ZeRO-3, which "
            "gathers a module on all ranks together, would wait for ever. Set 'finetuning.packing' or "
            "'sequence_parallel_size' (above 1), with which such a rank encodes a blank image, take ZeRO stage 2, or "
            "leave rows of text out"
        )
    tokens = max(counts.tokens, 1) / (len(micro_batches) * data_ranks)
    return [replace(loaded, tokens=tokens) for loaded in micro_batches], counts


def with_gradient(loss: Tensor, engine: Any) -> Tensor:
    """``loss``, with a gradient of 0 where it depends on nothing that trains: text alone, where its layers are frozen.

    Raises:
        ConfigError: under ZeRO-3, where a parameter that no module uses is not at hand.
    """
    if loss.requires_grad:
        return loss
    trained = next((p for p in engine.module.parameters() if p.requires_grad), None)
    if trained is None:
        raise ConfigError("no parameter trains: 'finetuning.trainable' freezes all of the model")
    if engine.zero_optimization_stage() == 3:
        raise ConfigError(
            "a micro-batch without images reaches no parameter that trains, which ZeRO-3 cannot step over; leave rows "
            "of text out, train layers of the text too ('finetuning.trainable'), or take ZeRO stage 2"
        )
    return loss + 0.0 * trained.sum()
