"""Interval attention, forward, against cuDNN and FlexAttention.

python benchmarks/interval_forward.py --output FILE.json
"""

from __future__ import annotations

import harness
from attention_cases import CASES, Case, baseline_row

from ds_lvxattn.kernels.triton.forward import interval_forward


def row(case: Case) -> harness.Row:
    q, k, v, _ = case.inputs()
    start, stop = case.interval()
    return baseline_row(case, lambda: interval_forward(q, k, v, start, stop, case.scale), backward=False)


def measure() -> list[harness.Row]:
    return [row(case) for case in CASES]


if __name__ == "__main__":
    harness.main(__doc__, measure)
