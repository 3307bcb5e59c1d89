"""Dense float64 attention to compare with. Without a GPU the Triton kernels run on Triton's interpreter."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass
class Problem:
    """Random inputs of one attention call and its exact results."""

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    dlse: Tensor
    start: Tensor | None
    stop: Tensor | None
    scale: float
    softcap: float | None = None

    @property
    def hidden(self) -> Tensor:
        """bool ``[B, 1, S_q]``: rows that see no key."""
        if self.start is None:
            return torch.zeros(self.q.shape[0], 1, self.q.shape[2], dtype=torch.bool, device=self.q.device)
        return (self.start >= self.stop)[:, None]

    @property
    def visible(self) -> Tensor:
        """bool ``[B, 1, S_q, S_kv]``; rows that see nothing count as seeing all, for use as a dense mask."""
        key = torch.arange(self.k.shape[2], device=self.q.device)
        if self.start is None:
            return torch.ones(self.q.shape[0], 1, self.q.shape[2], len(key), dtype=torch.bool, device=self.q.device)
        seen = (key >= self.start[..., None]) & (key < self.stop[..., None])
        return seen[:, None] | self.hidden[..., None]

    def exact(self, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
        """``out, lse, dq, dk, dv`` by dense attention in ``dtype``, the log-sum-exp's gradient included."""
        q, k, v = (x.detach().to(dtype).requires_grad_() for x in (self.q, self.k, self.v))
        group = q.shape[1] // k.shape[1]
        scores = self.scale * q @ k.repeat_interleave(group, 1).transpose(2, 3)
        if self.softcap is not None:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        scores = scores.masked_fill(~self.visible, float("-inf"))
        lse = scores.logsumexp(-1)
        out = (scores - lse[..., None]).exp() @ v.repeat_interleave(group, 1)
        out = out.masked_fill(self.hidden[..., None], 0.0)
        loss = (out * self.dout.to(dtype)).sum() + (lse.masked_fill(self.hidden, 0.0) * self.dlse.to(dtype)).sum()
        dq, dk, dv = torch.autograd.grad(loss, (q, k, v))
        lse = lse.detach().masked_fill(self.hidden, float("-inf"))
        return {"out": out.detach(), "lse": lse, "dq": dq, "dk": dk, "dv": dv}

    def pytorch(self) -> dict[str, Tensor]:
        """``out, dq, dk, dv`` of PyTorch's attention in the inputs' own dtype (no gradient of the
        log-sum-exp)."""
        q, k, v = (x.detach().requires_grad_() for x in (self.q, self.k, self.v))
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=self.visible.expand(-1, q.shape[1], -1, -1), scale=self.scale,
            enable_gqa=q.shape[1] != k.shape[1],
        )  # fmt: skip
        out = out.masked_fill(self.hidden[..., None], 0.0)
        dq, dk, dv = torch.autograd.grad(out, (q, k, v), self.dout)
        return {"out": out.detach(), "dq": dq, "dk": dk, "dv": dv}


def interval(kind: str, batch: int, rows: int, keys: int) -> tuple[Tensor | None, Tensor | None]:
    """int32 ``start, stop [B, S_q]`` of one kind of mask; ``random`` holds empty and full rows too."""
    if kind == "visible":
        return None, None
    row = torch.arange(rows).repeat(batch, 1)
    if kind == "growing":
        start, stop = torch.zeros_like(row), (row + 1) * keys // rows
    elif kind == "sliding":
        width = max(1, keys // 4)
        start = (keys - width) * row // max(1, rows - 1)
        stop = start + width
    elif kind == "frame":
        frame = max(1, min(16, keys))
        start = row * (keys // frame) // rows * frame
        stop = start + frame
        start[:, : rows // 8], stop[:, : rows // 8] = 0, 0  # text before the first image
    else:
        ends = torch.randint(0, keys + 1, (2, batch, rows))
        start, stop = ends.amin(0), ends.amax(0)
        choice = torch.rand(batch, rows)
        start = torch.where(choice < 0.15, 0, start)
        stop = torch.where(choice < 0.15, keys, torch.where(choice > 0.85, start, stop))
    return start.int().to(DEVICE), stop.int().to(DEVICE)


@pytest.fixture
def make_problem():
    """Builds a ``Problem``; ``gain`` scales the queries, ``sequence_first`` stores ``[B, S, H, D]``."""

    def make(
        batch=1, heads=2, kv_heads=1, rows=33, keys=70, head_dim=64, dtype=torch.float32, mask="random",
        gain=1.0, sequence_first=False, seed=0, softcap=None, value_dim=None,
    ) -> Problem:  # fmt: skip
        torch.manual_seed(seed)

        def tensor(heads: int, length: int, size: int) -> Tensor:
            if sequence_first:
                return torch.randn(batch, length, heads, size).to(DEVICE, dtype).transpose(1, 2)
            return torch.randn(batch, heads, length, size).to(DEVICE, dtype)

        values = value_dim or head_dim
        q = tensor(heads, rows, head_dim) * gain
        k, v = tensor(kv_heads, keys, head_dim), tensor(kv_heads, keys, values)
        start, stop = interval(mask, batch, rows, keys)
        dlse = torch.randn(batch, heads, rows).to(DEVICE)
        return Problem(q, k, v, tensor(heads, rows, values), dlse, start, stop, head_dim**-0.5, softcap)

    return make


@pytest.fixture
def error():
    """Relative error in the Euclidean norm; infinities must agree."""

    def relative(actual: Tensor, exact: Tensor) -> float:
        finite = exact.isfinite()
        assert torch.equal(actual.double()[~finite], exact[~finite]), "infinities differ"
        difference = (actual.double()[finite] - exact[finite]).norm()
        return (difference / exact[finite].norm().clamp(min=1e-30)).item()

    return relative
