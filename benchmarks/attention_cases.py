"""Shapes and masks of the attention benchmarks, and the baselines: cuDNN, and FlexAttention where there is a mask."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from harness import Row, time_calls
from torch import Tensor

aten = torch.ops.aten
TOKENS_PER_FRAME = 64
# Of a forward and of a backward pass.
Calls = tuple[Callable[[], object], Callable[[], object]]


@dataclass(frozen=True)
class Case:
    """One shape and mask, and the ratios to the baseline that it has to reach."""

    mask: str
    heads: int
    kv_heads: int
    head_dim: int
    rows: int
    keys: int
    forward_target: float
    backward_target: float

    @property
    def name(self) -> str:
        return f"{self.mask} {self.heads}/{self.kv_heads}/{self.head_dim} {self.rows}x{self.keys}"

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5

    def interval(self) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """int32 ``start, stop [1, rows]`` on the GPU, or None for both when every key is visible."""
        row = torch.arange(self.rows, device="cuda")
        if self.mask == "visible":
            return None, None
        if self.mask == "growing":
            stop = (row + 1) * self.keys // self.rows
            start = torch.zeros_like(stop)
        elif self.mask == "sliding":
            width = self.keys // 16
            start = (self.keys - width) * row // (self.rows - 1)
            stop = start + width
        else:
            start = row * (self.keys // TOKENS_PER_FRAME) // self.rows * TOKENS_PER_FRAME
            stop = start + TOKENS_PER_FRAME
        return start.int()[None].contiguous(), stop.int()[None].contiguous()

    def tflop(self, backward: bool) -> float:
        """Operations on visible scores, in 1e12: ``4 * H_q * D * visible`` forward, 2.5 times that backward."""
        start, stop = self.interval()
        seen = self.rows * self.keys if start is None else int((stop - start).sum())
        return 4 * self.heads * self.head_dim * seen * (2.5 if backward else 1.0) / 1e12

    def inputs(self, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """``q, k, v, dout``."""
        torch.manual_seed(0)
        q_shape = (1, self.heads, self.rows, self.head_dim)
        kv_shape = (1, self.kv_heads, self.keys, self.head_dim)
        return tuple(torch.randn(shape, device="cuda", dtype=dtype) for shape in (q_shape, kv_shape, kv_shape, q_shape))


CASES = (
    Case("visible", 32, 8, 128, 384, 131072, 0.95, 0.75),
    Case("visible", 32, 8, 128, 4096, 131072, 0.85, 0.75),
    Case("visible", 28, 4, 128, 4096, 131072, 0.85, 0.75),
    Case("visible", 8, 8, 64, 4096, 262144, 0.85, 0.75),
    Case("growing", 32, 8, 128, 4096, 131072, 1.3, 1.2),
    Case("sliding", 32, 8, 128, 4096, 131072, 1.5, 1.5),
    Case("frame", 8, 8, 64, 4096, 262144, 2.0, 2.0),
)


def cudnn_calls(case: Case) -> Calls:
    """cuDNN's passes of ``case`` through PyTorch's operators."""
    q, k, v, dout = case.inputs()

    def forward() -> tuple[Tensor, ...]:
        return aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, False, False, scale=case.scale)

    out, lse, *_ = forward()
    no_dropout = torch.zeros((), dtype=torch.int64, device="cuda")

    def backward() -> tuple[Tensor, ...]:
        return aten._scaled_dot_product_cudnn_attention_backward(
            dout, q, k, v, out, lse, no_dropout, no_dropout, None, None, None, case.rows, case.keys, 0.0,
            False, scale=case.scale,
        )  # fmt: skip

    return forward, backward


@functools.cache
def compiled_flex() -> Callable[..., Tensor]:
    """FlexAttention, compiled for each shape that it meets."""
    from torch.nn.attention.flex_attention import flex_attention

    torch._dynamo.config.cache_size_limit = 64
    return torch.compile(flex_attention, dynamic=False)


def flex_calls(case: Case) -> Calls:
    """FlexAttention's passes of ``case``, compiled, with its block mask made beforehand."""
    from torch.nn.attention.flex_attention import create_block_mask

    flex = compiled_flex()
    q, k, v, dout = (x.requires_grad_(i < 3) for i, x in enumerate(case.inputs()))
    start, stop = (bound[0] for bound in case.interval())
    mask = create_block_mask(
        lambda b, h, row, key: (key >= start[row]) & (key < stop[row]), None, None, case.rows, case.keys
    )
    options = {"block_mask": mask, "enable_gqa": case.heads != case.kv_heads, "scale": case.scale}

    def forward() -> Tensor:
        with torch.no_grad():
            return flex(q, k, v, **options)

    out = flex(q, k, v, **options)
    return forward, lambda: torch.autograd.grad(out, (q, k, v), dout, retain_graph=True)


def baseline_row(case: Case, call: Callable[[], object], backward: bool, label: str = "") -> Row:
    """``call``, a pass of ``case``, against cuDNN (all visible) or FlexAttention (masked)."""
    name, calls = ("cuDNN", cudnn_calls) if case.mask == "visible" else ("Flex", flex_calls)
    ours, theirs = time_calls(call, calls(case)[backward])
    target = case.backward_target if backward else case.forward_target
    label = f"{label}{case.name} {'bwd' if backward else 'fwd'}"
    return Row(label, name, ours * 1e3, theirs * 1e3, case.tflop(backward) / ours, theirs / ours, target)
