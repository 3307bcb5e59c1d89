"""Loss and gradients of several ranks against those of one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from ds_lvxattn.data.sample import Sample
from tests.support.tiny_model import tiny_sample

Gradients = dict[str, Tensor]


def samples_of(patterns: Sequence[str]) -> list[Sample]:
    return [tiny_sample(pattern, seed) for seed, pattern in enumerate(patterns)]


def gradients_of(model: torch.nn.Module) -> Gradients:
    """float64 gradients; zeros for parameters that the loss does not reach."""
    named = model.named_parameters()
    return {name: (torch.zeros_like(p) if p.grad is None else p.grad).double() for name, p in named}


def sum_over_ranks(loss: Tensor, gradients: Gradients) -> tuple[float, Gradients]:
    """Loss and gradients of all ranks, summed (the gradients on rank 0 only)."""
    whole = torch.cat([loss.detach().double().reshape(1), *(g.flatten() for g in gradients.values())])
    dist.all_reduce(whole)
    parts = whole[1:].split([g.numel() for g in gradients.values()])
    # Cloned: a view is pickled with the whole tensor.
    shaped = {name: part.view_as(g).clone() for (name, g), part in zip(gradients.items(), parts, strict=True)}
    return whole[0].item(), shaped if dist.get_rank() == 0 else {}


def largest_differences(got: tuple[float, Gradients], want: tuple[float, Gradients]) -> tuple[float, float]:
    """Of the loss and of a gradient, relative: to the largest of its parameter, or to a thousandth of the largest."""
    scale = max(g.abs().max().item() for g in want[1].values())
    differences = [
        (got[1][name] - g).abs().max().item() / max(g.abs().max().item(), 1e-3 * scale) for name, g in want[1].items()
    ]
    return abs(got[0] - want[0]) / abs(want[0]), max(differences)
