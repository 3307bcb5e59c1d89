"""What callbacks decide, on all ranks: a rank that stopped, saved or evaluated alone would leave the others waiting."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerControl
from transformers.trainer_callback import CallbackHandler

DECISIONS = ("should_training_stop", "should_epoch_stop", "should_save", "should_evaluate", "should_log")
# Those whose decisions the Trainer acts on next; all ranks call them alike.
EVENTS = ("on_substep_end", "on_step_end", "on_epoch_end")


def decide_together(handler: CallbackHandler, group: dist.ProcessGroup) -> None:
    """From now on, what a callback of ``handler`` decides on any rank is decided on all; in this object alone.

    Args:
        group: all ranks, for host messages.
    """
    call = handler.call_event

    def call_event(event: str, args: Any, state: Any, control: TrainerControl, **others: Any) -> TrainerControl:
        control = call(event, args, state, control, **others)
        if event in EVENTS:
            share_decisions(control, group)
        return control

    vars(handler)["call_event"] = call_event


def share_decisions(control: TrainerControl, group: dist.ProcessGroup) -> None:
    """Set in ``control`` what is set on any rank; all ranks call it."""
    decided = torch.tensor([getattr(control, name) for name in DECISIONS], dtype=torch.uint8)
    dist.all_reduce(decided, dist.ReduceOp.MAX, group)
    for name, each in zip(DECISIONS, decided.tolist(), strict=True):
        setattr(control, name, bool(each))
