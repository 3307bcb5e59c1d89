"""Interval attention, backward, against cuDNN and FlexAttention.

python benchmarks/interval_backward.py --output FILE.json
"""

from __future__ import annotations

import harness
from attention_cases import CASES, Case, baseline_row

from ds_lvxattn.kernels.triton.backward import interval_backward
from ds_lvxattn.kernels.triton.delta import attention_delta
from ds_lvxattn.kernels.triton.forward import interval_forward


def row(case: Case) -> harness.Row:
    q, k, v, dout = case.inputs()
    start, stop = case.interval()
    out, lse = interval_forward(q, k, v, start, stop, case.scale)
    delta = attention_delta(dout, out, None)
    call = lambda: interval_backward(dout, q, k, v, lse, delta, start, stop, case.scale)  # noqa: E731
    return baseline_row(case, call, backward=True)


def measure() -> list[harness.Row]:
    return [row(case) for case in CASES]


if __name__ == "__main__":
    harness.main(__doc__, measure)
