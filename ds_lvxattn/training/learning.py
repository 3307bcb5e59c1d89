"""A run that learns nothing says so: bad samples alone, or no gradient."""

from __future__ import annotations

from ds_lvxattn.data.sample import SampleError
from ds_lvxattn.errors import ConfigError
from ds_lvxattn.training.tokens import StepCounts

# Steps at the start of a run after which a run that has learnt nothing ends.
FIRST_STEPS = 3
# Samples over which the share of bad ones is judged.
JUDGED = 50


class Learning:
    """Ends a run from whose samples or gradients nothing can be learnt. Equal on all ranks, which see the same counts.

    Args:
        max_bad_share: share of bad samples above which a run ends.
        steps: of the run, which may have fewer than are looked at.
    """

    def __init__(self, max_bad_share: float, steps: int = FIRST_STEPS) -> None:
        self.max_bad_share = max_bad_share
        self.first_steps = min(FIRST_STEPS, steps)
        self._steps = self._tokens = self._samples = self._skipped = 0
        self._moved = False

    def note_samples(self, counts: StepCounts) -> None:
        """Count the samples of one more step, ahead of it.

        Raises:
            SampleError: none of the first steps has a token to learn from, or too large a share of the samples is bad.
        """
        self._steps += 1
        self._tokens += counts.tokens
        self._samples += counts.samples
        self._skipped += counts.skipped
        if self._steps >= self.first_steps and not self._tokens:
            raise SampleError(
                f"nothing to learn from in {self._steps} steps: {self._skipped} of their {self._samples} samples were "
                "bad (the warnings above say why), the others have no answer; `ds-lvxattn data FILE` lists all bad rows"
            )
        if self._samples >= JUDGED and self._skipped > self.max_bad_share * self._samples:
            raise SampleError(
                f"{self._skipped} of {self._samples} samples were bad, more than 'finetuning.max_bad_share' "
                f"({self.max_bad_share}) allows; `ds-lvxattn data FILE` lists all bad rows"
            )

    def note_gradient(self, step: int, norm: float | None) -> None:
        """Look at the norm of a step's gradients.

        Raises:
            ConfigError: none of the first steps had a gradient.
        """
        self._moved = self._moved or norm is None or norm != 0.0
        if not self._moved and self._steps >= self.first_steps:
            raise ConfigError(
                f"no parameter got a gradient in the steps up to {step}: what trains ('finetuning.trainable') is not "
                "reached by the data, as with rows of text alone where only cross-attention trains"
            )
