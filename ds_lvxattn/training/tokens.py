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

from ds_lvxattn.batches.agreement import gather
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
    mixed = [0 < ranks < data_ranks for ranks in with_images]
    if alike and any(mixed):
        raise ConfigError(
            f"of the {data_ranks} ranks only {next(n for n in with_images if 0 < n < data_ranks)} have images in a "
            "micro-batch: the unmodified model does not call its vision encoder for text alone, and ZeRO-3, which "
            "gathers a module on all ranks together, would wait for ever. Set 'finetuning.packing' or "
            "'sequence_parallel_size' (above 1), with which such a rank encodes a blank image, or leave rows of text "
            "out"
        )
    tokens = max(counts.tokens, 1) / (len(micro_batches) * data_ranks)
    made = [replace(loaded, tokens=tokens, mixed=some) for loaded, some in zip(micro_batches, mixed, strict=True)]
    return made, counts


def check_reached_alike(loss: Tensor, engine: Any, everyone: dist.ProcessGroup) -> None:
    """Check, where only some ranks have images, that the losses of all reach the same parameters; all ranks call it.

    ZeRO 1 and 2 put gradients into buckets in the order in which they come, and sum these over the ranks: parameters
    that one rank's loss does not reach would be summed with others, or end the run in a collective.

    Args:
        everyone: all ranks, for host messages.

    Raises:
        ConfigError: on all ranks, naming a parameter that only some reach.
    """
    stage = engine.zero_optimization_stage()
    if stage not in (1, 2):
        return  # without ZeRO, DeepSpeed fills in what is missing; ZeRO-3 has refused them
    found = reached(loss)
    missed = [name for name, p in engine.module.named_parameters() if p.requires_grad and p not in found]
    of_all = gather(missed, everyone)
    apart = sorted(set().union(*of_all).difference(set.intersection(*map(set, of_all))))
    if apart:
        raise ConfigError(
            f"only some of the {len(of_all)} ranks have images in a micro-batch, and the loss of text alone does not "
            f"reach {len(apart)} of the parameters that train ('{apart[0]}'): ZeRO-{stage} would sum gradients of "
            "different parameters. Set 'finetuning.packing' or 'sequence_parallel_size' (above 1), with which a rank "
            "without images encodes a blank one, or leave rows of text out"
        )


def reached(loss: Tensor) -> set[Tensor]:
    """The leaves that a loss depends on."""
    found: set[Tensor] = set()
    seen, waiting = set(), [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if (leaf := getattr(node, "variable", None)) is not None:
            found.add(leaf)
        waiting += [following for following, _ in node.next_functions]
    return found


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
