"""The Triton kernels against cuDNN, FlexAttention and the copy bandwidth, side by side in one run.

    python benchmarks/kernels.py --check --output kernels.json

Every row is a ratio to its baseline at the same shape (above 1 is faster), next to the ratio it has to reach.
Operations are those on visible scores: ``4 * H_q * D * visible`` forward, 2.5 times that backward.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ds_lvxattn.kernels.delta import attention_delta
from ds_lvxattn.kernels.interval_backward import interval_backward
from ds_lvxattn.kernels.interval_forward import interval_forward
from ds_lvxattn.kernels.merge import merge_partials

aten = torch.ops.aten
TOKENS_PER_FRAME = 64


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

    def tflop(self, seconds: float, backward: bool) -> float:
        start, stop = self.interval()
        seen = self.rows * self.keys if start is None else int((stop - start).sum())
        return 4 * self.heads * self.head_dim * seen * (2.5 if backward else 1.0) / seconds / 1e12

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


@dataclass(frozen=True)
class Row:
    """One line of the table; times in milliseconds, rate in TFLOP/s (attention) or TB/s (merge, delta,
    copy)."""

    name: str
    baseline: str
    milliseconds: float
    baseline_milliseconds: float
    rate: float
    ratio: float
    target: float


def time_call(call: Callable[[], object]) -> float:
    """Median seconds of one call, device events around each, enough calls for about 0.15 s."""
    call()
    torch.cuda.synchronize()

    def events(count: int) -> list[float]:
        pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(count)]
        for begin, end in pairs:
            begin.record()
            call()
            end.record()
        torch.cuda.synchronize()
        return [begin.elapsed_time(end) / 1e3 for begin, end in pairs]

    return statistics.median(events(max(5, min(50, math.ceil(0.15 / events(2)[1])))))


def time_graph(call: Callable[[], object], calls: int = 5) -> float:
    """Seconds of one call inside a captured graph: what the device takes, launch gaps aside."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            call()
    return time_call(graph.replay) / calls


def cudnn_calls(case: Case) -> tuple[Callable[[], object], Callable[[], object]]:
    """cuDNN's forward and backward pass of ``case`` through PyTorch's operators."""
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


def flex_calls(case: Case) -> tuple[Callable[[], object], Callable[[], object]]:
    """FlexAttention's forward and backward pass of ``case``, compiled, with its block mask made
    beforehand."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    torch._dynamo.config.cache_size_limit = 64
    flex = torch.compile(flex_attention, dynamic=False)
    q, k, v, dout = (x.requires_grad_(i < 3) for i, x in enumerate(case.inputs()))
    start, stop = (bound[0] for bound in case.interval())
    mask = create_block_mask(
        lambda b, h, row, key: (key >= start[row]) & (key < stop[row]), None, None, case.rows, case.keys
    )

    def forward() -> Tensor:
        with torch.no_grad():
            return flex(q, k, v, block_mask=mask, enable_gqa=case.heads != case.kv_heads, scale=case.scale)

    out = flex(q, k, v, block_mask=mask, enable_gqa=case.heads != case.kv_heads, scale=case.scale)
    return forward, lambda: torch.autograd.grad(out, (q, k, v), dout, retain_graph=True)


def triton_calls(case: Case) -> tuple[Callable[[], object], Callable[[], object]]:
    """This repository's forward and backward pass of ``case``."""
    q, k, v, dout = case.inputs()
    start, stop = case.interval()
    out, lse = interval_forward(q, k, v, start, stop, case.scale)
    delta = attention_delta(dout, out, None)
    return (
        lambda: interval_forward(q, k, v, start, stop, case.scale),
        lambda: interval_backward(dout, q, k, v, lse, delta, start, stop, case.scale),
    )


def attention_rows(case: Case) -> list[Row]:
    """Forward and backward pass of ``case`` against cuDNN (all visible) or FlexAttention (masked)."""
    baseline, calls = ("cuDNN", cudnn_calls) if case.mask == "visible" else ("Flex", flex_calls)
    theirs = [time_call(call) for call in calls(case)]
    ours = [time_call(call) for call in triton_calls(case)]
    targets = (case.forward_target, case.backward_target)
    return [
        Row(f"{case.name} {'bwd' if i else 'fwd'}", baseline, ours[i] * 1e3, theirs[i] * 1e3,
            case.tflop(ours[i], bool(i)), theirs[i] / ours[i], targets[i])
        for i in range(2)
    ]  # fmt: skip


def copy_bandwidth() -> float:
    """Bytes a second of a device-to-device copy, read and written bytes both counted."""
    source = torch.randn(1 << 28, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / time_graph(lambda: target.copy_(source))


def memory_rows() -> list[Row]:
    """Merge and delta against a device-to-device copy of as many bytes."""
    bandwidth = copy_bandwidth()
    rows = []

    def add(name: str, call: Callable[[], object], moved: int) -> None:
        seconds = time_graph(call)
        rows.append(
            Row(name, "copy", seconds * 1e3, moved / bandwidth * 1e3, moved / seconds / 1e12,
                moved / bandwidth / seconds, 0.85)
        )  # fmt: skip

    for parts in (2, 8):
        outs = torch.randn(parts, 1, 32, 16384, 128, device="cuda", dtype=torch.bfloat16)
        lses = torch.randn(parts, 1, 32, 16384, device="cuda")
        moved = (outs.nbytes + lses.nbytes) * (parts + 1) // parts
        add(f"merge of {parts}", lambda outs=outs, lses=lses: merge_partials(outs, lses), moved)
    out, dout = (torch.randn(1, 32, 65536, 128, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    dlse = torch.randn(1, 32, 65536, device="cuda")
    add("delta", lambda: attention_delta(dout, out, dlse), out.nbytes * 2 + dlse.nbytes * 2)
    return rows


def reference(case: Case, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """``out, dq, dk, dv`` of one key/value head in float64, a thousand rows at a time."""
    q, k, v, dout = (x.double() for x in tensors)
    start, stop = case.interval()
    key = torch.arange(case.keys, device="cuda")
    out, dq, dk, dv = (torch.zeros_like(x) for x in (q, q, k, v))
    for head in range(q.shape[1]):
        for rows in torch.arange(case.rows, device="cuda").split(1024):
            scores = case.scale * q[0, head, rows] @ k[0, 0].T
            if start is not None:
                hidden = (key < start[0, rows, None]) | (key >= stop[0, rows, None])
                scores.masked_fill_(hidden, -math.inf)
            p = scores.softmax(-1)
            out[0, head, rows] = p @ v[0, 0]
            grad = dout[0, head, rows]
            dv[0, 0] += p.T @ grad
            ds = p * (grad @ v[0, 0].T - (grad * out[0, head, rows]).sum(-1, keepdim=True)) * case.scale
            dq[0, head, rows] = ds @ k[0, 0]
            dk[0, 0] += ds.T @ q[0, head, rows]
    return out, dq, dk, dv


def check(case: Case) -> dict[str, float]:
    """Largest ratio of this repository's error to PyTorch's, both against float64, on one key/value head.

    PyTorch's is ``scaled_dot_product_attention`` with a dense mask. The whole case runs; one head is
    compared."""
    q, k, v, dout = case.inputs()
    start, stop = case.interval()
    group = case.heads // case.kv_heads
    out, lse = interval_forward(q, k, v, start, stop, case.scale)
    grads = interval_backward(dout, q, k, v, lse, attention_delta(dout, out, None), start, stop, case.scale)
    heads = (q[:, :group], k[:, :1], v[:, :1], dout[:, :group])
    mine = (out[:, :group], grads[0][:, :group], grads[1][:, :1], grads[2][:, :1])
    exact = reference(case, heads)
    mask = None
    if start is not None:
        key = torch.arange(case.keys, device="cuda")
        mask = ((key >= start[0, :, None]) & (key < stop[0, :, None]))[None, None].expand(1, group, -1, -1)
    leaves = [x.detach().clone().requires_grad_() for x in heads[:3]]
    expanded = [x.expand(-1, group, -1, -1) for x in leaves[1:]]
    theirs_out = F.scaled_dot_product_attention(leaves[0], *expanded, attn_mask=mask, scale=case.scale)
    theirs = (theirs_out, *torch.autograd.grad(theirs_out, leaves, heads[3]))

    def error(x: Tensor, y: Tensor) -> float:
        return ((x.double() - y).norm() / y.norm()).item()

    return {
        name: error(a, y) / error(b, y)
        for name, a, b, y in zip(("out", "dq", "dk", "dv"), mine, theirs, exact, strict=True)
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="where to write the rows as JSON")
    parser.add_argument("--check", action="store_true", help="also compare errors with float64 at full size")
    parser.add_argument("--only", default="", help="run the cases whose name holds this text")
    args = parser.parse_args()
    cases = [case for case in CASES if args.only in case.name]
    rows = [row for case in cases for row in attention_rows(case)]
    if not args.only:
        rows += memory_rows()
    errors = {case.name: check(case) for case in cases} if args.check else {}
    device = torch.cuda.get_device_name()
    if args.output:
        report = {"device": device, "torch": torch.__version__, "rows": [asdict(row) for row in rows]}
        args.output.write_text(json.dumps({**report, "error_over_pytorch": errors}, indent=1))
    for name, ratios in errors.items():
        worst = max(ratios.values())
        print(f"{name:34} error / PyTorch's {ratios} {'ok' if worst <= 1.5 else 'TOO LARGE'}")
    print(f"{device}, torch {torch.__version__}\n{'':38} {'ms':>9} {'T/s':>7} {'baseline':>9} {'ratio':>6} target")
    for row in rows:
        verdict = "" if row.ratio >= row.target else " missed"
        print(f"{row.name:38} {row.milliseconds:9.3f} {row.rate:7.1f} {row.baseline:>9} {row.ratio:6.2f} "
              f"{row.target:4.2f}{verdict}")  # fmt: skip


if __name__ == "__main__":
    main()
