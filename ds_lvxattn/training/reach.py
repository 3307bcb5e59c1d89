"""Which parameters a loss reaches: alike on all ranks, and at least one, as ZeRO has it.

Images in the micro-batches of some ranks alone are the case to look for: without sequence parallelism or packing, the
model is the unmodified one, which leaves its vision encoder out where there is text alone.
"""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor, nn

from ds_lvxattn.batches.agreement import gather
from ds_lvxattn.batches.prepare import IMAGES_EVERYWHERE
from ds_lvxattn.errors import ConfigError


def check_reached_alike(loss: Tensor, model: nn.Module, stage: int, everyone: dist.ProcessGroup) -> None:
    """Check, where only some ranks have images, that the losses of all reach the same parameters; all ranks call it.

    ZeRO 1 and 2 put gradients into buckets in the order in which they come, and sum these over the ranks: parameters
    that one rank's loss does not reach would be summed with others, or end the run in a collective.

    Args:
        stage: of ZeRO.
        everyone: all ranks, for host messages.

    Raises:
        ConfigError: on all ranks, naming a parameter that only some reach.
    """
    if stage not in (1, 2):
        return  # without ZeRO, DeepSpeed fills in what is missing; under ZeRO-3 such a micro-batch is not prepared
    found = reached(loss)
    missed = [name for name, p in model.named_parameters() if p.requires_grad and p not in found]
    of_all = gather(missed, everyone)
    apart = sorted(set().union(*of_all).difference(set.intersection(*map(set, of_all))))
    if apart:
        raise ConfigError(
            f"only some of the {len(of_all)} ranks have images in a micro-batch, and the loss of text alone does not "
            f"reach {len(apart)} of the parameters that train ('{apart[0]}'): ZeRO-{stage} would sum gradients of "
            f"different parameters. {IMAGES_EVERYWHERE}"
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


def with_gradient(loss: Tensor, model: nn.Module, stage: int) -> Tensor:
    """``loss``, with a gradient of 0 where it depends on nothing that trains: text alone, where its layers are frozen.

    Raises:
        ConfigError: under ZeRO-3, where a parameter that no module uses is not at hand.
    """
    if loss.requires_grad:
        return loss
    trained = next((p for p in model.parameters() if p.requires_grad), None)
    if trained is None:
        raise ConfigError("no parameter trains: 'finetuning.trainable' freezes all of the model")
    if stage == 3:
        raise ConfigError(
            "a micro-batch without images reaches no parameter that trains, which ZeRO-3 cannot step over; leave rows "
            "of text out, train layers of the text too ('finetuning.trainable'), or take ZeRO stage 2"
        )
    return loss + 0.0 * trained.sum()
