"""Shapes and masks of the attention benchmarks, and the baselines.

cuDNN where all is visible, FlexAttention where there is a mask, for a vision encoder the dense mask of transformers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ds_lvxattn.kernels.pattern import UNKNOWN, pattern_of

aten = torch.ops.aten
TOKENS_PER_FRAME = 64
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Of a forward and of a backward pass.
Calls = tuple[Callable[[], object], Callable[[], object]]


@dataclass(frozen=True)
class Case:
    """One shape and mask, and the ratios to the baseline that ``auto`` has to reach."""

    mask: str
    heads: int
    kv_heads: int
    head_dim: int
    rows: int
    keys: int
    forward_target: float
    backward_target: float
    batch: int = 1
    value_dim: int | None = None

    @property
    def head_dims(self) -> tuple[int, int]:
        """Head sizes of keys and of values."""
        return self.head_dim, self.value_dim or self.head_dim

    @property
    def name(self) -> str:
        sizes = "+".join(str(size) for size in dict.fromkeys(self.head_dims))
        return f"{self.mask} {self.heads}/{self.kv_heads}/{sizes} {self.rows}x{self.keys}"

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5

    def interval(self) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """int32 ``start, stop [B, rows]``, or None for both when every key is visible."""
        row = torch.arange(self.rows, device=DEVICE)
        if self.mask == "visible":
            return None, None
        if self.mask == "growing":
            stop = (row + 1) * self.keys // self.rows
            start = torch.zeros_like(stop)
        elif self.mask == "sliding":
            width = self.keys // 16
            start = (self.keys - width) * row // (self.rows - 1)
            stop = start + width
        elif self.mask == "encoder":  # patches of one tile in four are real, and see all; the others see the real ones
            start = torch.zeros_like(row)
            stop = torch.where(row < self.rows // 4, self.keys, self.keys // 4)
        else:
            start = row * (self.keys // TOKENS_PER_FRAME) // self.rows * TOKENS_PER_FRAME
            stop = start + TOKENS_PER_FRAME
        start, stop = (x.int().expand(self.batch, -1).contiguous() for x in (start, stop))
        return start, stop

    @property
    def pattern(self) -> str:
        """Of its ranges, as a run is told of those of a batch."""
        start, stop = self.interval()
        return UNKNOWN if start is None or stop is None else pattern_of(start.cpu(), stop.cpu())

    def tflop(self, backward: bool) -> float:
        """Operations on visible scores, in 1e12: ``2 * H_q * (D + D_v) * visible`` forward, one more product with
        keys backward and both twice."""
        start, stop = self.interval()
        seen = self.batch * self.rows * self.keys if start is None else int((stop - start).sum())
        key, value = self.head_dims
        return 2 * self.heads * (3 * key + 2 * value if backward else key + value) * seen / 1e12

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Of ``q, k, v, dout``."""
        q_shape = (self.batch, self.heads, self.rows, self.head_dim)
        key, value = ((self.batch, self.kv_heads, self.keys, size) for size in self.head_dims)
        return q_shape, key, value, (*q_shape[:3], value[3])

    def inputs(self, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """``q, k, v, dout``."""
        torch.manual_seed(0)
        return tuple(torch.randn(shape, device=DEVICE, dtype=dtype) for shape in self.shapes)


CASES = (
    Case("visible", 32, 8, 128, 384, 131072, 1.08, 1.0),
    Case("visible", 32, 8, 128, 4096, 131072, 1.1, 1.03),
    Case("visible", 28, 4, 128, 4096, 131072, 1.1, 1.03),
    Case("visible", 8, 8, 64, 4096, 262144, 1.0, 1.0),
    Case("growing", 32, 8, 128, 4096, 131072, 1.65, 1.3),
    Case("sliding", 32, 8, 128, 4096, 131072, 1.5, 1.55),
    Case("frame", 8, 8, 64, 4096, 262144, 5.0, 2.2),
    Case("encoder", 16, 16, 80, 6432, 6432, 5.0, 1.0, batch=5),
    Case("growing", 16, 16, 192, 8192, 65536, 1.0, 1.0, value_dim=128),
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


def dense_calls(case: Case) -> Calls:
    """Passes of ``case`` with the dense additive mask that transformers hands to torch."""
    q, k, v, dout = (x.requires_grad_(i < 3) for i, x in enumerate(case.inputs()))
    start, stop = case.interval()
    key = torch.arange(case.keys, device="cuda")
    hidden = (key < start[..., None]) | (key >= stop[..., None])
    mask = hidden[:, None].to(q.dtype) * torch.finfo(q.dtype).min

    def forward() -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=case.scale)

    out = forward()
    return torch.no_grad()(forward), lambda: torch.autograd.grad(out, (q, k, v), dout, retain_graph=True)


def baseline_calls(case: Case) -> tuple[str, Calls]:
    """Name and passes of what ``case`` is compared with."""
    if case.mask == "visible":
        return "cuDNN", cudnn_calls(case)
    return ("dense", dense_calls(case)) if case.mask == "encoder" else ("Flex", flex_calls(case))
