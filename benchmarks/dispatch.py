"""What ``kernel: auto`` takes, passes of the whole local operator, against cuDNN and FlexAttention.

python benchmarks/dispatch.py --output FILE.json
"""

from __future__ import annotations

import dataclasses

import harness
from attention_cases import CASES, Case, baseline_row

from ds_lvxattn.kernels.base import Call
from ds_lvxattn.kernels.dispatch import select_kernel
from ds_lvxattn.kernels.operator import backward_local, forward_local
from ds_lvxattn.kernels.triton.delta import attention_delta


def rows(case: Case) -> list[harness.Row]:
    q, k, v, dout = case.inputs()
    start, stop = case.interval()
    forwards = select_kernel("auto", Call.forward(q, k, start is not None))
    chosen = select_kernel("auto", Call.backward(q, k, start is not None))
    out, lse = forward_local(q, k, v, start, stop, case.scale, "auto")
    delta = None if chosen.needs_out else attention_delta(dout, out, None)

    def backward() -> object:
        return backward_local(chosen, dout, q, k, v, out, lse, delta, start, stop, case.scale)

    def forward() -> object:
        return forward_local(q, k, v, start, stop, case.scale, "auto")

    return [
        baseline_row(case, forward, False, f"auto ({forwards.name}): "),
        baseline_row(case, backward, True, f"auto ({chosen.name}): "),
    ]


def measure() -> list[harness.Row]:
    """The cases in which every key is visible; where something is masked ``auto`` is Triton, measured by itself."""
    cases = [dataclasses.replace(case, forward_target=1.0, backward_target=1.0) for case in CASES]
    return [row for case in cases if case.mask == "visible" for row in rows(case)]


if __name__ == "__main__":
    harness.main(__doc__, measure)
