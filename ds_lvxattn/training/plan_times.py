"""Which steps of a run measure the attention layers of its plan: a few, once a plan has run for a while."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ds_lvxattn.batches.collate import MicroBatch
from ds_lvxattn.batches.prepare import Batches, Loaded
from ds_lvxattn.plan.planner import Plan
from ds_lvxattn.runtime.layer_times import LayerTimes

# Steps after a plan in which its layers are measured; the first ones compile kernels and open connections.
MEASURED_STEPS = range(2, 5)


class PlanTimes:
    """Prepares a run's micro-batches, and measures the layers of each plan that they are run with.

    Args:
        batches: of the model.
        device: where attention runs.
        tell: called with a plan when it has been measured, and with one that comes after the run's first.
    """

    def __init__(self, batches: Batches, device: torch.device, tell: Callable[[Plan], None]) -> None:
        self._batches, self._device, self._tell = batches, device, tell
        self._at = self._first = self._planned_at = 0  # steps: the one at hand, the first, the plan's first
        self._plan: Plan = ()  # that of the last micro-batch
        self._times: LayerTimes | None = None

    def start(self, plan: Plan, step: int) -> None:
        """Training begins with ``step``, and ``plan``, of which whoever made it tells."""
        self._plan, self._at, self._first, self._planned_at, self._times = plan, step - 1, step, step, None

    def start_step(self, step: int) -> None:
        """Switch the measurement on and off; tell of it when a plan's steps are measured."""
        self._at = step
        if self._batches.planner is None:
            return
        since = step - self._planned_at
        if since == 0 and step > self._first:
            self._tell(self._plan)  # another plan than the one told of
            self._times = None
        if since == MEASURED_STEPS.start:
            self._times = LayerTimes(self._device)
        elif since == MEASURED_STEPS.stop and self._times is not None:
            self._plan = self._batches.note_times(self._plan, self._times)
            self._times = None
            self._tell(self._plan)
        if self._times is not None:
            self._times.start_step()

    def prepare(self, loaded: Loaded) -> MicroBatch:
        """This rank's micro-batch, planned for; every rank of the group calls it for the same ones."""
        batch = self._batches.prepare(loaded, self._times)
        plan = self._batches.planner.plan if self._batches.planner else ()
        if plan is not self._plan and _modes(plan) != _modes(self._plan):
            self._planned_at = self._at + 1  # from the next step on, so that whole steps are measured
        self._plan = plan
        return batch


def _modes(plan: Plan) -> list[tuple[str, str]]:
    return [(layer.strategy, layer.schedule) for layer in plan]
