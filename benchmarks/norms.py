"""RMS norms against a copy of as many bytes and against PyTorch's kernels.

python benchmarks/norms.py --output FILE.json
"""

from __future__ import annotations

from dataclasses import replace

import harness
import torch

from ds_lvxattn.kernels.triton.rms_norm import rms_norm, rms_norm_backward

# Keys of 96 frames of four tiles over four ranks, their rows a head's size; and rows of a text layer.
SIZES = (("keys", (1, 153_696, 8, 128)), ("text", (1, 1536, 4096)))
EPSILON = 1e-5
OF_BOTH, OF_INPUT = (True, True), (True, False)


def rows(name: str, shape: tuple[int, ...]) -> list[harness.Row]:
    """Both passes, the backward one with the gradient of a weight that trains and without."""
    x, grad = torch.randn(2, *shape, device="cuda", dtype=torch.bfloat16)
    weight = torch.ones(shape[-1], device="cuda", dtype=torch.bfloat16)
    # As attention has keys.
    seen, seen_grad = (each.transpose(1, 2) if each.dim() == 4 else each for each in (x, grad))
    inverse = rms_norm(seen, weight, EPSILON)[1]
    theirs, theirs_backward = torch.ops.aten._fused_rms_norm, torch.ops.aten._fused_rms_norm_backward
    their_inverse = theirs(x, weight.shape, weight, EPSILON)[1]
    passes = [
        ("forward", 2, lambda: rms_norm(seen, weight, EPSILON), lambda: theirs(x, weight.shape, weight, EPSILON)),
        *(
            (
                f"backward{behind}", 3,
                lambda wanted=wanted: rms_norm_backward(seen_grad, seen, weight, inverse, wanted),
                lambda wanted=wanted: theirs_backward(grad, x, weight.shape, their_inverse, weight, [*wanted]),
            )
            for behind, wanted in (("", OF_BOTH), (", weight frozen", OF_INPUT))
        ),
    ]  # fmt: skip
    found = []
    for of_pass, tensors, ours, pytorch in passes:
        row = harness.memory_row(f"norm of {name}, {of_pass}", ours, tensors * x.nbytes + inverse.nbytes, 0.85)
        seconds, baseline = harness.time_calls(ours, pytorch)
        beside = replace(
            row, baseline="PyTorch", milliseconds=seconds * 1e3, baseline_milliseconds=baseline * 1e3,
            ratio=baseline / seconds, target=1.0,
        )  # fmt: skip
        found += [row, beside]
    return found


def measure() -> list[harness.Row]:
    return [row for size in SIZES for row in rows(*size)]


if __name__ == "__main__":
    harness.main(__doc__, measure)
