"""Local attention by every kernel that is installed, and by ``auto``, against the baseline of each case.

python benchmarks/local_attention.py --output FILE.json

A case's kernels and its baseline take turns in one run. Only ``auto`` has targets.
"""

from __future__ import annotations

from collections.abc import Callable

import harness
import torch
from attention_cases import CASES, Case, baseline_calls

from ds_lvxattn.kernels.base import Call
from ds_lvxattn.kernels.dispatch import KERNELS, select_kernel
from ds_lvxattn.kernels.operator import backward_local, forward_local
from ds_lvxattn.kernels.triton.delta import attention_delta

PLAIN = ("math", "flash")  # never the fastest on these chips


def passes(case: Case, backward: bool) -> dict[str, Callable[[], object]]:
    """A pass of ``case`` by each kernel that can do it."""
    q, k, v, dout = case.inputs()
    start, stop = case.interval()
    call = (Call.backward if backward else Call.forward)(q, k, start is not None)
    kernels = [kernel for kernel in KERNELS if kernel.name not in PLAIN and kernel.unsupported(call) is None]
    calls: dict[str, Callable[[], object]] = {}
    out, lse = forward_local(q, k, v, start, stop, case.scale, "triton")
    for kernel in kernels:
        delta = None if kernel.needs_out else attention_delta(dout, out, None)
        if backward:
            args = (kernel, dout, q, k, v, out, lse, delta, start, stop, case.scale)
            calls[kernel.name] = lambda args=args: backward_local(*args)
        else:
            calls[kernel.name] = lambda name=kernel.name: forward_local(q, k, v, start, stop, case.scale, name)
    return calls


def rows(case: Case, backward: bool) -> list[harness.Row]:
    q, k, *_ = case.inputs()
    call = (Call.backward if backward else Call.forward)(q, k, case.mask != "visible")
    auto = select_kernel("auto", call).name
    calls = passes(case, backward)
    baseline, theirs = baseline_calls(case)
    *seconds, base = harness.time_calls(*calls.values(), theirs[backward])
    target = case.backward_target if backward else case.forward_target
    way = "bwd" if backward else "fwd"
    table = []
    for name, time in zip(calls, seconds, strict=True):
        label = f"{name}{' (auto)' if name == auto else ''}: {case.name} {way}"
        rate = case.tflop(backward) / time
        wanted = target if name == auto else 0.0
        table.append(harness.Row(label, baseline, time * 1e3, base * 1e3, rate, base / time, wanted))
    return table


def measure() -> list[harness.Row]:
    table = []
    for case in CASES:
        for backward in (False, True):
            table += rows(case, backward)
            torch.cuda.empty_cache()
    return table


if __name__ == "__main__":
    harness.main(__doc__, measure)
