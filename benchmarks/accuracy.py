"""Errors of every installed kernel against float64 over those of PyTorch's attention, at the sizes of the benchmarks.

python benchmarks/accuracy.py --output FILE.json
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import harness
import torch
import torch.nn.functional as F
from attention_cases import CASES, Case
from torch import Tensor

from ds_lvxattn.kernels.base import Call, Kernel
from ds_lvxattn.kernels.dispatch import KERNELS
from ds_lvxattn.kernels.triton.delta import attention_delta

TARGET = 1.5


def reference(case: Case, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """``out, dq, dk, dv`` of one key/value head in float64, a thousand rows at a time."""
    q, k, v, dout = (x.double() for x in tensors)
    start, stop = case.interval()
    key = torch.arange(case.keys, device="cuda")
    out, dq, dk, dv = (torch.zeros_like(x) for x in (dout, q, k, v))
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


def kernels_of(case: Case) -> list[Kernel]:
    """Those of this project, and FlashAttention-4, that can do ``case``."""
    q, k, v, _ = case.inputs()
    call = Call.backward(q, k, v, case.mask != "visible", pattern=case.pattern)
    return [x for x in KERNELS if not x.needs_out and x.name != "math" and x.unsupported(call) is None]


def error_ratios(case: Case) -> dict[str, dict[str, float]]:
    """By kernel: errors of ``out, dq, dk, dv`` over those of ``scaled_dot_product_attention`` with a dense mask.

    The whole case runs; one key/value head of one sequence is compared.
    """
    q, k, v, dout = case.inputs()
    start, stop = case.interval()
    group = case.heads // case.kv_heads
    results = {}
    how = case.scale, None, case.pattern
    for kernel in kernels_of(case):
        out, lse = kernel.forward(q, k, v, start, stop, *how)
        delta = attention_delta(dout, out, None)
        grads = kernel.backward(dout, q, k, v, None, lse, delta, start, stop, *how)
        heads = (group, group, 1, 1)
        results[kernel.name] = [x[:1, :n] for x, n in zip((out, *grads), heads, strict=True)]
    heads = (q[:1, :group], k[:1, :1], v[:1, :1], dout[:1, :group])
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
        f"{kernel}: {case.name}": {
            name: error(a, y) / error(b, y)
            for name, a, b, y in zip(("out", "dq", "dk", "dv"), mine, theirs, exact, strict=True)
        }
        for kernel, mine in results.items()
    }


def measure() -> dict[str, dict[str, float]]:
    return {name: ratios for case in CASES for name, ratios in error_ratios(case).items()}


def print_ratios(errors: dict[str, dict[str, float]]) -> None:
    for name, ratios in errors.items():
        text = ", ".join(f"{what} {ratio:.2f}" for what, ratio in ratios.items())
        print(f"{name:42} error over PyTorch's: {text}{'' if max(ratios.values()) <= TARGET else ' TOO LARGE'}")


if __name__ == "__main__":
    args = harness.arguments(__doc__).parse_args()
    measured = measure()
    harness.write_json(args.output, [], error_over_pytorch=measured)
    print_ratios(measured)
