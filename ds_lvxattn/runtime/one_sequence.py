"""The rows of all samples of a batch as one sequence, for attention whose keys are one: those of cross-attention."""

from __future__ import annotations

from torch import Tensor


def as_one_sequence(x: Tensor) -> Tensor:
    """``[B, H, s, ...]`` as ``[1, H, B * s, ...]``, sample by sample."""
    return x if x.shape[0] == 1 else x.transpose(0, 1).flatten(1, 2).unsqueeze(0)


def by_sample(x: Tensor, samples: int) -> Tensor:
    """The inverse: ``[1, H, B * s, ...]`` as ``[B, H, s, ...]``."""
    return x if samples == 1 else x[0].unflatten(1, (samples, -1)).transpose(0, 1)
