"""Local attention by every kernel that is installed, and by ``auto``, against the baseline of each case.

python -m ds_lvxattn.calibrate --layouts 32/8/128,8/8/64,16/16/80 --output profile.json
python benchmarks/local_attention.py --profile profile.json --output FILE.json

A case's kernels and its baseline take turns in one run. Only ``auto`` has targets: what the profile of the machine has
as fastest, as in a run; without a profile, the kernels' own order.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

import harness
import torch
from attention_cases import CASES, Case, baseline_calls

from ds_lvxattn.calibration.kernels import seen_and_drift
from ds_lvxattn.kernels.base import Call
from ds_lvxattn.kernels.dispatch import KERNELS, select_kernel, usable_kernels
from ds_lvxattn.kernels.local import LocalAttention
from ds_lvxattn.kernels.triton.delta import attention_delta
from ds_lvxattn.plan.kernel_time import AttentionCall, kernel_seconds
from ds_lvxattn.plan.profile import Profile, load_profile

PLAIN = ("math", "flash")  # never the fastest on these chips


def passes(case: Case, backward: bool) -> dict[str, Callable[[], object]]:
    """A pass of ``case`` by each kernel that can do it."""
    q, k, v, dout = case.inputs()
    start, stop = case.interval()
    pattern = case.pattern
    call = (Call.backward if backward else Call.forward)(q, k, v, start is not None, pattern=pattern)
    kernels = [kernel for kernel in KERNELS if kernel.name not in PLAIN and kernel.unsupported(call) is None]
    calls: dict[str, Callable[[], object]] = {}
    how = case.scale, None, pattern
    out, lse = LocalAttention(start, stop, case.scale, None, "triton", pattern).forward(q, k, v)
    for kernel in kernels:
        delta = None if kernel.needs_out else attention_delta(dout, out, None)
        if backward:
            calls[kernel.name] = partial(kernel.backward, dout, q, k, v, out, lse, delta, start, stop, *how)
        else:
            calls[kernel.name] = partial(kernel.forward, q, k, v, start, stop, *how)
    return calls


def choice(case: Case, backward: bool, profile: Profile | None) -> str:
    """The kernel that ``auto`` takes."""
    q, k, v, _ = case.inputs()
    start, stop = case.interval()
    call = (Call.backward if backward else Call.forward)(q, k, v, start is not None, pattern=case.pattern)
    usable = usable_kernels(call)
    seen, drift = seen_and_drift(start, stop, case.keys)
    sizes = (case.batch, case.heads, case.kv_heads, case.head_dim, case.rows, case.keys, seen, drift)
    times = {
        kernel.name: kernel_seconds(profile, kernel, AttentionCall(*sizes), backward)
        for kernel in (profile.kernels_for(case.head_dim, call.masked) if profile else ())
        if kernel.name in usable
    }
    return min(times, key=times.__getitem__) if len(times) > 1 else select_kernel("auto", call).name


def rows(case: Case, backward: bool, profile: Profile | None) -> list[harness.Row]:
    auto = choice(case, backward, profile)
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


def measure(profile: Profile | None = None) -> list[harness.Row]:
    table = []
    for case in CASES:
        for backward in (False, True):
            table += rows(case, backward, profile)
            torch.cuda.empty_cache()
    return table


def add_profile(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--profile", type=load_profile, help="what ds_lvxattn.calibrate wrote on this machine")


if __name__ == "__main__":
    parser = harness.arguments(__doc__)
    add_profile(parser)
    args = parser.parse_args()
    table = measure(args.profile)
    harness.write_json(args.output, table)
    harness.print_table(table)
