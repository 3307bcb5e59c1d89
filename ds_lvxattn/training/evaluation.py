"""Evaluation: the share of answers whose every token is the model's first choice, given the tokens before."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ds_lvxattn.batches.collate import MicroBatch
from ds_lvxattn.batches.loader import Loader
from ds_lvxattn.groups import SequenceParallelGroups
from ds_lvxattn.runtime.tiled import first_choices


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: Loader,
    groups: SequenceParallelGroups,
    micro_batch: int,
    progress: Callable[[], None] = lambda: None,
) -> dict[str, float | int]:
    """Evaluate on the loader's samples, divided over the data-parallel ranks; all ranks call it.

    Args:
        progress: called for every micro-batch.

    Returns:
        ``accuracy`` in [0, 1], ``loss`` a supervised token, and ``examples``, the answers that were judged.
    """
    size, data_ranks = len(loader.source), groups.get_data_parallel_world_size()
    # Every rank runs as many micro-batches, since ZeRO-3 gathers parameters in each; missing rows are filled.
    rounds = -(-size // (micro_batch * data_ranks))

    def rows(number: int) -> list[int | None]:
        first = (number * data_ranks + groups.get_data_parallel_rank()) * micro_batch
        return [row if row < size else None for row in range(first, first + micro_batch)]

    # The ranks of a group judge the same answers together, so one of them counts.
    counts = groups.get_sequence_parallel_rank() == 0
    was_training = model.training
    model.eval()
    sums = torch.zeros(4, dtype=torch.float64, device=loader.batches.collator.device)
    for loaded in loader.stream(rows, 0, rounds):
        progress()
        batch = loader.batches.prepare(loaded)
        output = model(**batch.inputs)
        right = (wrong_tokens(first_choices(output), batch, groups) == 0).sum()
        sums[0] += output.loss * batch.inputs["num_items_in_batch"]
        sums[1] += (batch.answers >= 0).sum()
        sums[2] += right * counts
        sums[3] += batch.num_answers * counts
    model.train(was_training)
    dist.all_reduce(sums)
    loss, tokens, right_answers, answers = sums.tolist()
    return {
        "accuracy": right_answers / answers if answers else float("nan"),
        "loss": loss / tokens if tokens else float("nan"),
        "examples": int(answers),
    }


def wrong_tokens(choices: Tensor, batch: MicroBatch, groups: SequenceParallelGroups) -> Tensor:
    """int64 ``[answers]``: wrong tokens of each answer of the group's micro-batch, over the ranks that hold rows.

    Args:
        choices: int64 ``[B, s]``, the token that the model finds likeliest for each of the rank's rows.
    """
    supervised = batch.answers >= 0
    misses = (choices != batch.labels)[supervised]
    wrong = torch.zeros(batch.num_answers, dtype=torch.long, device=choices.device)
    wrong.index_add_(0, batch.answers[supervised], misses.long())
    if batch.num_answers:
        dist.all_reduce(wrong, group=groups.get_sequence_parallel_group())
    return wrong
