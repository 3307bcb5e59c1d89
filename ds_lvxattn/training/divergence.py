"""A run whose loss is no number any more says so and ends."""

from __future__ import annotations

import math
from collections.abc import Callable

from ds_lvxattn.errors import RunError

# Steps in a row; fewer happen where fp16 looks for its loss scale.
STEPS = 20


class FiniteLoss:
    """Counts the steps in a row whose loss or gradient norm is not finite. Equal on all ranks, as these are.

    Args:
        newest: the newest whole checkpoint, in words.
        steps: how many end the run.
    """

    def __init__(self, newest: Callable[[], str], steps: int = STEPS) -> None:
        self.newest, self.steps, self.count = newest, steps, 0

    def note(self, step: int, loss: float, norm: float | None, last: bool = False) -> None:
        """Take note of a step.

        Args:
            norm: of the gradients; None where a step with one that is not finite is skipped (bf16, fp16).
            last: whether it is the last step, which must be finite.

        Raises:
            RunError: the run has diverged.
        """
        self.count = 0 if math.isfinite(loss) and math.isfinite(norm or 0.0) else self.count + 1
        if self.count >= self.steps or (last and self.count):
            raise RunError(
                f"the loss is {loss} and the gradient norm {norm} at step {step}, and one of them has not been finite "
                f"since step {step - self.count + 1}: the run has diverged; {self.newest()}. Go on from there with a "
                "lower learning rate or with 'gradient_clipping'"
            )

    @property
    def finite(self) -> bool:
        """Whether the last step was finite: what another one leaves is not worth a checkpoint."""
        return self.count == 0
