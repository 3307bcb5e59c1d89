"""The row term ``delta`` against a copy of as many bytes.

python benchmarks/delta.py --output FILE.json
"""

from __future__ import annotations

import harness
import torch

from ds_lvxattn.kernels.triton.delta import attention_delta


def measure() -> list[harness.Row]:
    out, dout = (torch.randn(1, 32, 65536, 128, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    dlse = torch.randn(1, 32, 65536, device="cuda")
    moved = out.nbytes * 2 + dlse.nbytes * 2
    return [harness.memory_row("delta", lambda: attention_delta(dout, out, dlse), moved, 0.85)]


if __name__ == "__main__":
    harness.main(__doc__, measure)
