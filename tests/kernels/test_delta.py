"""``delta = rowsum(dO * O) - dL``: the Triton path against float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from ds_lvxattn.kernels.triton.delta import attention_delta, attention_delta_triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@settings(max_examples=15, deadline=None)
@given(
    rows=st.integers(0, 90),
    head_dim=st.sampled_from((32, 64, 80)),
    dtype=st.sampled_from((torch.float32, torch.float16, torch.bfloat16)),
    with_dlse=st.booleans(),
    sequence_first=st.booleans(),
)
def test_equals_float64(rows, head_dim, dtype, with_dlse, sequence_first):
    torch.manual_seed(rows)
    out, dout = torch.randn(2, 2, 3, rows, head_dim, device=DEVICE, dtype=dtype)
    if sequence_first:
        out = out.transpose(1, 2).contiguous().transpose(1, 2)
    dlse = torch.randn(2, rows, 3, device=DEVICE).transpose(1, 2) if with_dlse else None
    exact = attention_delta(dout.double(), out.double(), None if dlse is None else dlse.double())
    delta = attention_delta_triton(dout, out, dlse)
    assert delta.dtype == torch.float32 and delta.shape == (2, 3, rows)
    torch.testing.assert_close(delta.double(), exact, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(attention_delta(dout, out, dlse).double(), exact, rtol=1e-5, atol=1e-4)
