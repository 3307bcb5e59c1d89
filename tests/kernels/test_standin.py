"""The stand-in output: its row sums with the gradient are ``delta``, to what rounding a true output allows."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from ds_lvxattn.kernels.triton.surrogate import output_with_delta, output_with_delta_triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
VERSIONS = (output_with_delta_triton, output_with_delta)


def row_sums(dout, out):
    return (dout.double() * out.double()).sum(-1)


@settings(max_examples=15, deadline=None)
@given(
    rows=st.integers(0, 90),
    head_dim=st.sampled_from((32, 64, 80)),
    dtype=st.sampled_from((torch.float32, torch.float16, torch.bfloat16)),
    size=st.sampled_from((1e-6, 1.0, 100.0)),
    sequence_first=st.booleans(),
)
def test_error_is_no_more_than_that_of_a_rounded_output(rows, head_dim, dtype, size, sequence_first):
    torch.manual_seed(rows)
    dout = (torch.randn(2, 3, rows, head_dim, device=DEVICE) * size).to(dtype)
    if sequence_first:
        dout = dout.transpose(1, 2).contiguous().transpose(1, 2)
    delta = row_sums(dout, torch.randn(2, 3, rows, head_dim, device=DEVICE)).float()
    # Rounding O to the dtype moves the sum by up to u * sum |dO| |O|, which is at least u * |delta|.
    info = torch.finfo(dtype)
    bound = info.eps / 2 * delta.abs() + dout.abs().sum(-1) * info.tiny * info.eps + 2**-21 * delta.abs()
    # The interpreter cuts bfloat16 off instead of rounding it.
    for version in VERSIONS[dtype == torch.bfloat16 and DEVICE == "cpu" :]:
        out = version(dout, delta)
        assert out.dtype == dtype and out.stride() == dout.stride()
        assert torch.all((row_sums(dout, out) - delta).abs() <= bound)


@pytest.mark.parametrize("version", VERSIONS)
def test_small_gradients_and_none(version):
    dout = torch.randn(1, 2, 8, 64, device=DEVICE, dtype=torch.bfloat16) * 1e-30  # squares underflow float32
    dout[:, :, 3] = 0
    delta = row_sums(dout, torch.randn(1, 2, 8, 64, device=DEVICE)).float()
    out = version(dout, delta)
    assert out.isfinite().all() and not out[:, :, 3].any()
    torch.testing.assert_close(row_sums(dout, out), delta.double(), rtol=1e-2, atol=0)
