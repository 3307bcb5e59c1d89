"""Merge of partial attentions against a copy of as many bytes.

python benchmarks/merge.py --output FILE.json
"""

from __future__ import annotations

import harness
import torch

from ds_lvxattn.kernels.triton.merge import merge_partials

HEADS, ROWS, HEAD_DIM = 32, 16384, 128


def row(parts: int, heads_of_more: bool) -> harness.Row:
    """``parts`` partials as an exchange receives them, sequence first; into half the heads of a tensor where asked."""
    outs = torch.randn(parts, ROWS, 1, HEADS, HEAD_DIM, device="cuda", dtype=torch.bfloat16).movedim(1, 3)
    lses = torch.randn(parts, ROWS, 1, HEADS, device="cuda").movedim(1, 3)
    out = lse = None
    if heads_of_more:
        out = torch.empty(1, ROWS, 2 * HEADS, HEAD_DIM, device="cuda", dtype=torch.bfloat16).transpose(1, 2)[:, :HEADS]
        lse = torch.empty(1, ROWS, 2 * HEADS, device="cuda").transpose(1, 2)[:, :HEADS]
    moved = (outs.nbytes + lses.nbytes) * (parts + 1) // parts
    name = f"merge of {parts}{', half the heads' if heads_of_more else ''}"
    return harness.memory_row(name, lambda: merge_partials(outs, lses, out, lse), moved, 0.85)


def measure() -> list[harness.Row]:
    return [row(2, False), row(8, False), row(2, True), row(8, True)]


if __name__ == "__main__":
    harness.main(__doc__, measure)
