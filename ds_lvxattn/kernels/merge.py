"""Merge of partial attentions over disjoint keys: ``L = logsumexp(l)``, ``O = sum exp(l - L) o``.

LV-XAttn (arXiv 2502.02406), section 3.2. The maximum is subtracted before any exponential, because a real
log-sum-exp exceeds 88, where ``exp`` overflows float32.
"""

from __future__ import annotations

import torch
from torch import Tensor


def merge_partials(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """Merge ``n`` partial results of the same rows into one.

    Args:
        outs: ``[n, B, H, S, D]`` partial outputs, any strides; float64, float32, bfloat16 or float16.
        lses: ``[n, B, H, S]`` natural log-sum-exp, float32 (float64 for float64 outputs); ``-inf`` where a
            partial saw no key, and its output there counts as 0 whatever it holds.

    Returns:
        ``out [B, H, S, D]`` in the dtype of ``outs`` and ``lse [B, H, S]`` in the dtype of ``lses``. Rows that
        no partial saw give 0 and ``-inf``. The sum runs in the dtype of ``lses``.
    """
    lse = torch.logsumexp(lses, dim=0)
    # A row that sees nothing has lse = -inf; shifting by 0 there keeps exp(-inf - 0) = 0 instead of NaN.
    shift = lse.masked_fill(lse == float("-inf"), 0.0)
    weights = torch.exp(lses - shift)
    out = torch.zeros_like(outs[0], dtype=lses.dtype)
    for part, weight in zip(outs.unbind(0), weights.unbind(0), strict=True):
        out.addcmul_(weight.unsqueeze(-1), part.to(lses.dtype))
    return out.to(outs.dtype), lse
