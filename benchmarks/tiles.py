"""Other tiles of the Triton kernels than the tuned ones, case by case: where ``kernels/triton/tiles.py`` comes from.

python benchmarks/tiles.py --case "encoder 16/16/80" --output FILE.json

A case's candidates take turns in one run; those that do not compile or fit are left out.
"""

from __future__ import annotations

import itertools
import json

import harness
import torch
from attention_cases import CASES, Case

from ds_lvxattn.kernels.triton.backward import interval_backward
from ds_lvxattn.kernels.triton.delta import attention_delta
from ds_lvxattn.kernels.triton.forward import interval_forward
from ds_lvxattn.kernels.triton.tiles import BackwardConfig, ForwardConfig, backward_config, forward_config


def forward_candidates() -> list[ForwardConfig]:
    sizes = itertools.product((64, 128), (32, 64, 128), (4, 8), (2, 3), (1, 2, 3))
    return [ForwardConfig(*x) for x in sizes if not (x[0] == 64 and x[2] == 8)]


def backward_candidates(tuned: BackwardConfig) -> list[BackwardConfig]:
    """Tiles and stages around the tuned ones, with and without a workspace."""
    found = []
    for tile, block_m, block_n, stages, (resident, registers), keep in itertools.product(
        (64, 128), (32, 64), (64, 128), (2, 3), ((2, None), (3, 168)), (True, False)
    ):
        warps = 8 if block_n == 128 else 4
        query = (8, 4) if keep else (4, 3)
        found.append(BackwardConfig(tile, block_m, block_n, warps, stages, resident, *query, registers, keep))
    return [tuned, *(x for x in found if x != tuned)]


def measure(case: Case, backward: bool) -> list[tuple[float, tuple[object, ...]]]:
    """TFLOP/s on visible scores and tiles, fastest first."""
    q, k, v, dout = case.inputs()
    start, stop = case.interval()
    out, lse = interval_forward(q, k, v, start, stop, case.scale)
    delta = attention_delta(dout, out, None)
    masked = start is not None
    if backward:
        tuned = backward_config(case.head_dims, 2, masked, True)
        configs = [x for x in backward_candidates(tuned) if x.keep_ds or (masked and max(case.head_dims) <= 64)]
        call = lambda c: interval_backward(dout, q, k, v, lse, delta, start, stop, case.scale, config=c)  # noqa: E731
    else:
        configs = [forward_config(case.head_dims, 2, masked, True), *forward_candidates()]
        call = lambda c: interval_forward(q, k, v, start, stop, case.scale, config=c)  # noqa: E731
    fit = []
    for config in configs:
        try:
            call(config)
            torch.cuda.synchronize()
        except Exception:  # too much shared memory or registers
            continue
        fit.append(config)
    seconds = harness.time_calls(*(lambda c=c: call(c) for c in fit))
    return sorted(((case.tflop(backward) / s, tuple(c)) for s, c in zip(seconds, fit, strict=True)), reverse=True)


if __name__ == "__main__":
    parser = harness.arguments(__doc__)
    parser.add_argument("--case", default="", help="part of the name of the cases")
    parser.add_argument("--passes", default="fwd,bwd")
    args = parser.parse_args()
    results = {}
    for case in CASES:
        if args.case not in case.name:
            continue
        for way in args.passes.split(","):
            results[f"{case.name} {way}"] = rows = measure(case, way == "bwd")
            print(f"{case.name} {way}", *(f"  {rate:6.1f} {config}" for rate, config in rows[:6]), sep="\n", flush=True)
            if args.output is not None:
                args.output.write_text(json.dumps(results, indent=1))
