"""Plain matrix products: any device, any dtype, exact intervals. The kernel that the others are tested against."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ds_lvxattn.kernels.base import Call, empty_results, lse_dtype
from ds_lvxattn.kernels.pattern import UNKNOWN

# Scores of one chunk of query rows. Chunks bound the memory: never S_q x S_kv at once.
MAX_SCORES = 1 << 26


class MathKernel:
    """Local attention as matrix products over chunks of query rows, in float32 (float64 for float64)."""

    name = "math"
    needs_out = False
    sums_delta = False
    takes_intervals = True

    def splits_keys(self, call: Call) -> bool:
        return False

    def unsupported(self, call: Call) -> str | None:
        return None

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        start: Tensor | None,
        stop: Tensor | None,
        scale: float,
        softcap: float | None = None,
        pattern: str = UNKNOWN,
    ) -> tuple[Tensor, Tensor]:
        wide = lse_dtype(q.dtype)
        out, lse = empty_results(q, v)
        keys, values = k.to(wide), v.to(wide)
        for rows in _chunks(q, k):
            scores = _scores(q[:, :, rows], keys, scale)
            if softcap is not None:
                _cap(scores, softcap)
            _hide(scores, start, stop, rows)
            row_lse = torch.logsumexp(scores, dim=-1)
            # Shifting hidden rows (-inf) by 0 makes exp(-inf - 0) = 0 instead of NaN.
            shift = row_lse.masked_fill(row_lse == float("-inf"), 0.0)
            probs = scores.sub_(shift.unsqueeze(-1)).exp_()
            # The rounding of the log-sum-exp (1e-5 at 250 in float32) scales whole rows; their sums take it out.
            total = probs.sum(dim=-1, keepdim=True)
            probs.div_(total.masked_fill_(total == 0.0, 1.0))
            out[:, :, rows] = _ungroup(torch.matmul(_fold(probs), values), probs).to(q.dtype)
            lse[:, :, rows] = row_lse.flatten(1, 2)
        return out, lse

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor | None,
        lse: Tensor,
        delta: Tensor | None,
        start: Tensor | None,
        stop: Tensor | None,
        scale: float,
        softcap: float | None = None,
        pattern: str = UNKNOWN,
    ) -> tuple[Tensor, Tensor, Tensor]:
        wide = lse_dtype(q.dtype)
        assert delta is not None
        keys, values = k.to(wide), v.to(wide)
        dq = torch.empty(q.shape, dtype=wide, device=q.device)
        dk = torch.zeros(k.shape, dtype=wide, device=k.device)
        dv = torch.zeros(v.shape, dtype=wide, device=v.device)
        # A row that sees nothing anywhere has lse = -inf; +inf there gives exp(s - inf) = 0.
        lse = lse.masked_fill(lse == float("-inf"), float("inf"))
        groups = k.shape[1]
        for rows in _chunks(q, k):
            grad = _group(dout[:, :, rows].to(wide), groups)
            scores = _scores(q[:, :, rows], keys, scale)
            slope = None
            if softcap is not None:
                _cap(scores, softcap)
                slope = 1 - (scores / softcap).square()
            _hide(scores, start, stop, rows)
            probs = scores.sub_(_group(lse[:, :, rows].unsqueeze(-1), groups)).exp_()
            dv += torch.matmul(_fold(probs).transpose(-1, -2), _fold(grad))
            dprobs = torch.matmul(_fold(grad), values.transpose(-1, -2)).view_as(probs)
            dscores = dprobs.sub_(_group(delta[:, :, rows].unsqueeze(-1), groups)).mul_(probs).mul_(scale)
            if slope is not None:
                dscores.mul_(slope)
            dq[:, :, rows] = _ungroup(torch.matmul(_fold(dscores), keys), dscores)
            dk += torch.matmul(_fold(dscores).transpose(-1, -2), _fold(_group(q[:, :, rows].to(wide), groups)))
        return dq, dk, dv


def _chunks(q: Tensor, k: Tensor) -> Iterator[slice]:
    per_row = max(q.shape[0] * q.shape[1] * k.shape[2], 1)
    step = max(MAX_SCORES // per_row, 1)
    for first in range(0, q.shape[2], step):
        yield slice(first, min(first + step, q.shape[2]))


def _group(x: Tensor, kv_heads: int) -> Tensor:
    """``[B, H_q, s, ...]`` to ``[B, H_kv, g, s, ...]``: the query heads that share a key head, side by side."""
    return x.unflatten(1, (kv_heads, -1))


def _fold(x: Tensor) -> Tensor:
    """``[B, H_kv, g, s, x]`` to ``[B, H_kv, g * s, x]``: one product a key head, K and V never repeated."""
    return x.flatten(2, 3)


def _ungroup(folded: Tensor, like: Tensor) -> Tensor:
    """``[B, H_kv, g * s, D]`` back to ``[B, H_q, s, D]``; ``like`` is ``[B, H_kv, g, s, ...]``."""
    return folded.unflatten(2, like.shape[2:4]).flatten(1, 2)


def _scores(q: Tensor, keys: Tensor, scale: float) -> Tensor:
    grouped = _group(q.to(keys.dtype) * scale, keys.shape[1])
    return torch.matmul(_fold(grouped), keys.transpose(-1, -2)).unflatten(2, grouped.shape[2:4])


def _cap(scores: Tensor, softcap: float) -> None:
    """``softcap * tanh(scores / softcap)``, in place."""
    scores.div_(softcap).tanh_().mul_(softcap)


def _hide(scores: Tensor, start: Tensor | None, stop: Tensor | None, rows: slice) -> None:
    """Set the scores of keys outside each row's range to ``-inf``, in place."""
    if start is None or stop is None:
        return
    position = torch.arange(scores.shape[-1], device=scores.device, dtype=start.dtype)
    hidden = (position < start[:, rows, None]) | (position >= stop[:, rows, None])
    scores.masked_fill_(hidden[:, None, None], float("-inf"))
