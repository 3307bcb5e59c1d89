"""Other tiles and forms of the kernels than the chosen ones: where ``kernels/triton/tiles.py`` comes from.

python benchmarks/tiles.py --case frame,encoder --output FILE.json

Processes that touch no GPU compile all of it first. Then each form runs a few times, with a cold L2 and the host far
ahead, and is compared with the present one's results; the fastest take turns in ``harness.time_calls``. Forms that do
not compile or fit are left out, and named in the file.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import wait
from typing import Any

import harness
import torch
from attention_cases import Case
from compile_only import Compilers
from tile_candidates import (
    Inputs,
    compile_form,
    kernels_of,
    other_calls,
    present,
    smaller,
    tiles,
    triton_call,
    tuned,
    wanted,
    worth_trying,
)
from torch import Tensor

from ds_lvxattn.kernels.triton.delta import attention_delta
from ds_lvxattn.kernels.triton.forward import interval_forward

AHEAD_CYCLES = 1 << 21  # about a millisecond, in which the host queues a call
REPEATS = 5
WRONG = 0.02  # of two results' difference, over the size of the present one's
FINALISTS = 4

Calls = dict[str, Callable[[], tuple[Tensor, ...]]]


def inputs_of(case: Case) -> Inputs:
    q, k, v, dout = case.inputs()
    start, stop = case.interval()
    out, lse = interval_forward(q, k, v, start, stop, case.scale, config=tuned(case, False).config)
    return Inputs(q, k, v, dout, start, stop, case.scale, out, lse, attention_delta(dout, out, None))


def difference(results: tuple[Tensor, ...], reference: tuple[Tensor, ...]) -> float:
    """The largest over the results; what is not finite counts as infinite."""
    worst = 0.0
    for got, expected in zip(results, reference, strict=True):
        got, expected = got.float(), expected.float()
        share = float((got - expected).norm() / expected.norm())
        worst = max(worst, share if share == share else float("inf"))
    return worst


def quick_seconds(call: Callable[[], object], flush: Tensor | None) -> float:
    """Median seconds on the device, nothing of the host's time in them."""
    if flush is None:
        begin = time.perf_counter()
        call()
        return time.perf_counter() - begin
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(REPEATS)]
    for begin, end in events:
        flush.zero_()
        torch.cuda._sleep(AHEAD_CYCLES)
        begin.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(begin.elapsed_time(end) for begin, end in events) / 1e3


def breakdown(call: Callable[[], object]) -> dict[str, float]:
    """Microseconds of each kernel of a call, by the profiler; empty where there is none."""
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            call()
            torch.cuda.synchronize()
        events = [(each.key, each.self_device_time_total) for each in profile.key_averages()]
    except Exception:  # measured without it
        return {}
    return {name[:60]: round(us, 1) for name, us in sorted(events, key=lambda x: -x[1])[:8] if us}


def measure(case: Case, backward: bool, flush: Tensor | None, most: int | None) -> dict[str, Any]:
    """Seconds of all forms, and of the fastest again beside the present one."""
    x = inputs_of(case)
    calls: Calls = dict(other_calls(case, x, backward))
    for form in tiles(case, backward)[:most]:
        calls[form.name] = lambda form=form: triton_call(x, form, backward)
    first = next((name for name in calls if name.startswith(present(case, backward))), next(iter(calls)))
    reference = calls[first]()
    seconds: dict[str, float] = {}
    left_out: dict[str, str] = {}
    errors: dict[str, float] = {}
    for name, call in calls.items():
        try:
            errors[name] = difference(call(), reference)
            if errors[name] > WRONG:
                left_out[name] = f"differs by {errors[name]:.1e}"
                continue
            seconds[name] = quick_seconds(call, flush)
        except Exception as error:  # too much shared memory or registers
            left_out[name] = f"{type(error).__name__}: {str(error)[:200]}"
    best = sorted(seconds, key=seconds.__getitem__)
    kinds = (next((name for name in best if name.startswith(kind)), first) for kind in ("cudnn", "fa4", "triton"))
    chosen = dict.fromkeys((first, tuned(case, backward).name, *best[:FINALISTS], *kinds))
    final = {name: seconds[name] for name in chosen if name in seconds}
    parts = {}
    if flush is not None:
        final = dict(zip(final, harness.time_calls(*(calls[name] for name in final)), strict=True))
        parts = {name: breakdown(calls[name]) for name in (first, min(final, key=final.__getitem__))}
    return {
        "present": first, "wanted": wanted(case, backward), "tflop": case.tflop(backward), "final": final,
        "quick": {name: seconds[name] for name in best}, "errors": errors, "left_out": left_out, "kernels": parts,
    }  # fmt: skip


def print_result(name: str, result: dict[str, Any]) -> None:
    final, quick, base = result["final"], result["quick"], result["final"][result["present"]]
    target = f"{result['wanted']:.2f}" if result["wanted"] else "-"
    print(f"\n{name}; wanted {target} of the present; {len(quick)} forms, {len(result['left_out'])} left out")
    print(f"  {'':64} {'ms':>8} {'TFLOP/s':>8} {'ratio':>6} {'host ahead, ms':>15}")
    for form, seconds in sorted(final.items(), key=lambda x: x[1]):
        mark = " (present)" if form == result["present"] else ""
        print(f"  {form + mark:64} {seconds * 1e3:8.3f} {result['tflop'] / seconds:8.1f} {base / seconds:6.3f} "
              f"{quick[form] * 1e3:15.3f}")  # fmt: skip
    for form, parts in result["kernels"].items():
        print(f"  kernels of {form}, us: " + ", ".join(f"{kernel} {us}" for kernel, us in parts.items()))


def main() -> None:
    parser = harness.arguments(__doc__)
    parser.add_argument("--case", default="", help="parts of the names of the cases, between commas")
    parser.add_argument("--passes", default="fwd,bwd")
    parser.add_argument("--seconds", type=float, default=190.0, help="no case starts later than this")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="that compile")
    parser.add_argument("--smaller", type=int, default=1, help="divide rows and keys, to see that it runs")
    parser.add_argument("--forms", type=int, help="at most so many forms of the Triton kernels a case")
    args = parser.parse_args()
    begin = time.monotonic()
    parts, passes = args.case.split(","), args.passes.split(",")
    work = [
        (smaller(case, args.smaller), backward) for case, backward in worth_trying()
        if any(part in case.name for part in parts) and ("bwd" if backward else "fwd") in passes
    ]  # fmt: skip
    on_gpu = torch.cuda.is_available()
    flush = torch.empty(harness.FLUSH_BYTES, dtype=torch.uint8, device="cuda") if on_gpu else None
    futures: dict[int, list[Any]] = {}
    if on_gpu:
        compilers = Compilers(compile_form, args.processes)
        for i, (case, backward) in enumerate(work):
            kernels = kernels_of(tiles(case, backward)[: args.forms])
            futures[i] = compilers.start([(kernel, (case, backward, form)) for kernel, form in kernels])
    results: dict[str, Any] = {}
    if on_gpu:
        for case, backward in work:  # the other kernels compile in this process meanwhile
            try:
                for call in other_calls(case, inputs_of(case), backward).values():
                    _try(call)
            except Exception as error:
                print(f"{case.name}: {error}")
            torch.cuda.empty_cache()
        print(f"other kernels compiled after {time.monotonic() - begin:.0f} s", flush=True)
    for i, (case, backward) in enumerate(work):
        wait(futures.get(i, ()))
        if time.monotonic() - begin > args.seconds:
            print(f"no time left for {case.name}")
            continue
        name = f"{case.name} {'bwd' if backward else 'fwd'}"
        results[name] = result = measure(case, backward, flush, args.forms)
        print_result(name, result)
        print(f"  after {time.monotonic() - begin:.0f} s", flush=True)
        if args.output is not None:
            args.output.write_text(json.dumps(results, indent=1))
        if on_gpu:
            torch.cuda.empty_cache()
    if on_gpu:
        compilers.stop()


def _try(call: Callable[[], object]) -> None:
    try:
        call()
    except Exception:  # said when it is measured
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
