"""Loss and gradients of several ranks against those of one."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor

from ds_lvxattn.batches.prepare import Batches
from ds_lvxattn.data.sample import Sample
from ds_lvxattn.training.loading import parameter_groups, partition_over_all_ranks
from tests.support.tiny_families import SINGLE, tiny
from tests.support.tiny_model import (
    ADAMW,
    CLIPPING,
    MODES,
    attach,
    ds_config,
    groups_of,
    loss_of,
    tiny_batches,
    tiny_sample,
)

Gradients = dict[str, Tensor]

BATCHES = (
    ("tItIItttaaItaIIIta",),
    ("IIIIIIIttataa",),
    ("tItta",),
    ("ttatta",),
    ("IItaItIIItta", "ttIa", "tta"),
)
# OpenFlamingo gives text ahead of all images the mean of all values, those of blank frames that pad a batch too.
NONE_HIDDEN = (*BATCHES[:3], ("IIta",), ("IItaItIIItta", "Ita", "ItIIa"))
TEXT = (("ttatttattaataatta",), ("tttttttaa",), ("tta",), ("ta",), ("tttatta", "ta", "ttttta"))


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


def norms_in_float64(model: torch.nn.Module) -> torch.nn.Module:
    """``model`` whose RMS norms compute in the dtype of their input, not in float32 as transformers has them: gradients
    that are summed behind a norm on one side and ahead of it on the other are then equal in float64 too."""

    def forward(norm: Any, x: Tensor) -> Tensor:
        epsilon = getattr(norm, "variance_epsilon", None) or norm.eps
        return norm.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + epsilon))

    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            setattr(module, "forward", functools.partial(forward, module))  # noqa: B010
    return model


def limits_of(family: str) -> tuple[float, float]:
    """How far a float64 loss and gradient may be from those of one rank; see ``largest_differences``."""
    return (1e-7, 1e-5) if family in SINGLE else (1e-12, 1e-11)


def batches_of(family: str) -> tuple[tuple[str, ...], ...]:
    if family == "text only":
        return TEXT
    return NONE_HIDDEN if family == "open_flamingo, all previous" else BATCHES


@functools.cache
def on_one_rank(family: str, patterns: tuple[str, ...], dtype: torch.dtype) -> tuple[float, Gradients]:
    """Loss and gradients of the unmodified model."""
    return loss_and_gradients(tiny(family, dtype), patterns)


def loss_and_gradients(model: torch.nn.Module, patterns: Sequence[str]) -> tuple[float, Gradients]:
    """Those of a model that is not attached."""
    value = loss_of(model, samples_of(patterns))
    value.backward()
    return value.item(), gradients_of(model)


def losses_of_batches(model: torch.nn.Module, batches: Sequence[Sequence[str]]) -> list[float]:
    """Losses of a step on each of ``batches`` with torch's AdamW, on one rank, of the unmodified model."""
    optimizer = torch.optim.AdamW(parameter_groups(model), **ADAMW)
    return [_step(model, optimizer, tiny_batches(model).prepare(samples_of(patterns)).inputs) for patterns in batches]


def _step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, inputs: dict[str, Any]) -> float:
    """The loss of a step on one rank."""
    loss = model(**inputs).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), CLIPPING)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def losses_of_steps(
    model: torch.nn.Module,
    samples: Sequence[Sample],
    ranks: int,
    steps: int,
    batches: Batches | None = None,
    stage: int = 3,
) -> list[float]:
    """Losses of a few steps on one batch: under ZeRO on several ranks, with torch's AdamW on one."""
    model = model.train()
    batches = batches or (attach(model, ranks, MODES[0], samples) if ranks > 1 else tiny_batches(model))
    inputs = batches.prepare(samples).inputs
    if batches.parallel is None:
        optimizer = torch.optim.AdamW(parameter_groups(model), **ADAMW)
        return [_step(model, optimizer, inputs) for _ in range(steps)]
    config = ds_config(stage, len(samples), len(samples), ranks)
    partition_over_all_ranks(model, config, groups_of(ranks))
    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=parameter_groups(model), config=config, mpu=groups_of(ranks)
    )
    return losses_of_engine(engine, lambda: engine(**inputs).loss, steps)


def losses_of_engine(engine: Any, part_of_loss: Callable[[], Tensor], steps: int) -> list[float]:
    """Losses of steps of a DeepSpeed engine, which is destroyed, summed over the ranks."""
    losses = []
    for _ in range(steps):
        loss = part_of_loss()
        engine.backward(loss)
        engine.step()
        whole = loss.detach().clone()
        dist.all_reduce(whole)
        losses.append(whole.item())
    engine.destroy()
    return losses
