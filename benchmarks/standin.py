"""The stand-in output that carries ``delta`` against a copy of as many bytes.

python benchmarks/standin.py --output FILE.json
"""

from __future__ import annotations

import harness
import torch

from ds_lvxattn.kernels.triton.surrogate import output_with_delta


def measure() -> list[harness.Row]:
    dout = torch.randn(1, 32, 32768, 128, device="cuda", dtype=torch.bfloat16)
    delta = torch.randn(1, 32, 32768, device="cuda")
    moved = dout.nbytes * 2 + delta.nbytes
    return [harness.memory_row("stand-in output", lambda: output_with_delta(dout, delta), moved, 0.85)]


if __name__ == "__main__":
    harness.main(__doc__, measure)
