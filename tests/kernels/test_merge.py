"""Merge of partial attentions: the Triton path and the torch path against attention over all the keys."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from ds_lvxattn.kernels.triton.merge import merge_partials, merge_partials_triton


def merge_triton(outs, lses):
    out, lse = torch.full_like(outs[0], float("nan")), torch.full_like(lses[0], float("nan"))
    merge_partials_triton(outs, lses, out, lse)
    return out, lse


def partials(p, cuts):
    """``outs, lses`` in float32 of the key ranges between ``cuts``."""
    parts = []
    for a, b in pairwise(cuts):
        bounds = (p.start.clamp(a, b) - a, p.stop.clamp(a, b) - a)
        exact = type(p)(p.q, p.k[:, :, a:b], p.v[:, :, a:b], p.dout, p.dlse, *bounds, p.scale).exact()
        parts.append((exact["out"].float(), exact["lse"].float()))
    return tuple(torch.stack(x) for x in zip(*parts, strict=True))


@pytest.mark.parametrize("merge", (merge_triton, merge_partials))
@pytest.mark.parametrize("head_dim", (64, 80))
def test_equals_attention_over_all_keys(make_problem, error, merge, head_dim):
    p = make_problem(batch=2, heads=3, rows=41, keys=90, head_dim=head_dim, gain=20.0)
    exact = p.exact()
    out, lse = merge(*partials(p, (0, 13, 50, 90)))
    assert error(out, exact["out"]) < 1e-5
    assert error(lse, exact["lse"]) < 1e-6


@pytest.mark.parametrize("merge", (merge_triton, merge_partials))
def test_unseen_partials_count_as_zero(merge):
    outs = torch.randn(2, 1, 2, 5, 16)
    lses = torch.full((2, 1, 2, 5), float("-inf"))
    lses[1, :, :, :3] = 120.0
    outs[0] = float("nan")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    out, lse = merge(outs.to(device), lses.to(device))
    assert torch.equal(out[:, :, :3].cpu(), outs[1, :, :, :3])
    assert not out[:, :, 3:].any()
    assert torch.equal(lse.cpu(), lses[1])


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(parts=st.integers(1, 9), rows=st.integers(1, 90), dtype=st.sampled_from((torch.float32, torch.float16)))
def test_triton_equals_torch(error, parts, rows, dtype):
    torch.manual_seed(rows)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    outs = torch.randn(parts, 2, rows, 3, 32, device=device, dtype=dtype).transpose(2, 3)  # sequence-first
    lses = torch.randn(parts, 2, rows, 3, device=device).transpose(2, 3) * 50
    exact_out, exact_lse = merge_partials(outs.double(), lses.double())
    out, lse = merge_triton(outs, lses)
    assert error(out, exact_out) < (1e-6 if dtype == torch.float32 else 1e-3)
    assert error(lse, exact_lse) < 1e-6


@pytest.mark.parametrize("merge", (merge_partials_triton, merge_partials))
def test_writes_some_heads_of_a_larger_tensor(merge):
    """As an exchange does that merges one group of heads at a time: sequence first, two heads of five."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    outs = torch.randn(3, 7, 2, 2, 80, device=device).movedim(1, 3)
    lses = torch.randn(3, 7, 2, 2, device=device).movedim(1, 3)
    out = torch.full((2, 7, 5, 80), 9.0, device=device).transpose(1, 2)
    lse = torch.full((2, 5, 7), 9.0, device=device)
    merge(outs, lses, out[:, 1:3], lse[:, 1:3])
    exact_out, exact_lse = merge_partials(outs.double(), lses.double())
    torch.testing.assert_close(out[:, 1:3].double(), exact_out, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(lse[:, 1:3].double(), exact_lse, rtol=1e-5, atol=1e-6)
    for rest in (out[:, :1], out[:, 3:], lse[:, :1], lse[:, 3:]):
        assert torch.all(rest == 9.0)
