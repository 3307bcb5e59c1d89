"""``delta = rowsum(dO * O) - dL``: the row term of the attention backward pass.

FlashAttention-2 (arXiv 2307.08691), algorithm 2, line 4; ``- dL`` makes the log-sum-exp output differentiable.
"""

from __future__ import annotations

from torch import Tensor


def attention_delta(dout: Tensor, out: Tensor, dlse: Tensor | None) -> Tensor:
    """Row term of the backward pass, computed once by the owner of the rows.

    Args:
        dout: ``[B, H, S, D]`` gradient of the output.
        out: ``[B, H, S, D]`` output of the whole (merged) attention.
        dlse: ``[B, H, S]`` gradient of the log-sum-exp, or None when it is not used.

    Returns:
        ``[B, H, S]`` in float32 (float64 for float64 inputs).
    """
    wide = dout.dtype if dout.element_size() == 8 else None
    if wide is None:
        dout, out = dout.float(), out.float()
    delta = (dout * out).sum(dim=-1)
    return delta if dlse is None else delta - dlse
