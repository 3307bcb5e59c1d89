"""Forward kernel against dense float64 attention."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from ds_lvxattn.kernels.triton.forward import (
    interval_forward,
    interval_forward_supported,
    key_splits,
    rows_for_copy_engine,
)

MASKS = ("visible", "growing", "sliding", "frame", "random")
GPU = torch.cuda.is_available()
LONG = 20 if GPU else 1  # times the lengths that the interpreter takes
HALVES = (torch.float16, torch.bfloat16) if GPU else (torch.float16,)  # the interpreter has no bfloat16 product


def run(p):
    return interval_forward(p.q, p.k, p.v, p.start, p.stop, p.scale, softcap=p.softcap)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("kv_heads", (1, 3))
def test_exact_in_float32(make_problem, error, mask, kv_heads):
    p = make_problem(batch=2, heads=3, kv_heads=kv_heads, rows=37 * LONG, keys=101 * LONG, mask=mask)
    exact = p.exact()
    out, lse = run(p)
    assert error(out, exact["out"]) < 1e-5
    assert error(lse, exact["lse"]) < 1e-6


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("mask", MASKS)
def test_no_less_exact_than_pytorch(make_problem, error, mask, dtype):
    p = make_problem(heads=4, kv_heads=2, rows=40 * LONG, keys=150 * LONG, dtype=dtype, mask=mask)
    exact = p.exact()
    out, lse = run(p)
    assert out.dtype == dtype and lse.dtype == torch.float32
    assert error(out, exact["out"]) <= 1.5 * error(p.pytorch()["out"], exact["out"])
    assert error(lse, exact["lse"]) < 1e-5


@pytest.mark.parametrize("head_dim", (64, 80))
@pytest.mark.parametrize("gain", (1.0, 1e4))
def test_soft_cap(make_problem, error, head_dim, gain):
    """Also of scores so far above it that all are the cap."""
    p = make_problem(heads=3, rows=20 * LONG, keys=90 * LONG, head_dim=head_dim, softcap=20.0, gain=gain)
    exact = p.exact()
    out, lse = run(p)
    assert error(out, exact["out"]) < 1e-5
    assert error(lse, exact["lse"]) < 1e-6


@pytest.mark.parametrize("head_dim", (16, 32, 72, 80, 88, 96, 128, 160, 256, (192, 128), (64, 16), (24, 80)))
def test_head_sizes(make_problem, error, head_dim):
    """Of keys, and of values where they differ."""
    key, value = head_dim if isinstance(head_dim, tuple) else (head_dim, head_dim)
    dtype = HALVES[-1]
    p = make_problem(rows=30 * LONG, keys=70 * LONG, head_dim=key, value_dim=value, dtype=dtype, sequence_first=True)
    exact = p.exact()
    out, _ = run(p)
    assert out.shape == p.dout.shape and out.stride() == p.dout.stride()
    assert error(out, exact["out"]) <= 1.5 * error(p.pytorch()["out"], exact["out"])


def test_large_log_sum_exp(make_problem, error):
    p = make_problem(rows=20, keys=90, gain=60.0)
    exact = p.exact()
    assert exact["lse"].max() > 100
    out, lse = run(p)
    assert error(out, exact["out"]) < 1e-4
    assert error(lse, exact["lse"]) < 1e-6


def test_rows_that_see_nothing(make_problem):
    p = make_problem(rows=50, keys=70, mask="growing")
    p.start[:], p.stop[:] = 7, 7
    out, lse = run(p)
    assert not out.any() and torch.all(lse == float("-inf"))


@pytest.mark.parametrize("rows, keys", ((0, 5), (5, 0)))
def test_empty(make_problem, rows, keys):
    p = make_problem(rows=rows, keys=keys, mask="visible")
    out, lse = run(p)
    assert out.shape == p.q.shape and not out.any() and torch.all(lse == float("-inf"))


def test_strides_are_read_and_kept(make_problem, error):
    p = make_problem(batch=2, heads=4, kv_heads=2, rows=33, keys=70, sequence_first=True)
    out, _ = run(p)
    assert out.stride() == p.q.stride()
    assert error(out, p.exact()["out"]) < 1e-5
    p.k = torch.nn.functional.pad(p.k, (1, 2))[..., 1:-2]  # rows that start between 16-byte boundaries
    assert error(run(p)[0], p.exact()["out"]) < 1e-5
    flat = torch.cat((p.k.new_zeros(1), p.k.flatten()))
    p.k = flat[1:].view(p.k.shape)  # contiguous, but begins between them
    assert error(run(p)[0], p.exact()["out"]) < 1e-5


@pytest.mark.parametrize("head_dim", (64, 80, 96, 128, 256))
def test_layouts_of_projections_are_read_without_a_copy(head_dim):
    x = torch.randn(2, 33, 4 * head_dim, dtype=torch.float16).unflatten(2, (4, head_dim))
    for view in (x.transpose(1, 2), x.transpose(1, 2)[:, 1:3, 5:], x.permute(1, 2, 0, 3)):
        assert rows_for_copy_engine(view) is view


def test_tiles_that_share_keys_and_start_apart(make_problem, error):
    """Long sliding runs, which the tiles enter in the middle."""
    p = make_problem(rows=90, keys=1500, mask="sliding")
    out, lse = run(p)
    exact = p.exact()
    assert error(out, exact["out"]) < 1e-5
    assert error(lse, exact["lse"]) < 1e-6


@settings(max_examples=40 if GPU else 10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.integers(1, 70 * LONG),
    keys=st.integers(1, 200 * LONG),
    heads=st.sampled_from(((1, 1), (4, 2), (3, 1))),
    mask=st.sampled_from(MASKS),
    softcap=st.sampled_from((None, 0.7, 50.0)),
    seed=st.integers(0, 1000),
)
def test_any_length(make_problem, error, rows, keys, heads, mask, softcap, seed):
    p = make_problem(
        heads=heads[0], kv_heads=heads[1], rows=rows, keys=keys, mask=mask, seed=seed, softcap=softcap, gain=3.0,
    )  # fmt: skip
    exact = p.exact()
    out, lse = run(p)
    assert error(out, exact["out"]) < 1e-5
    assert error(lse, exact["lse"]) < 1e-5


def test_key_splits_fill_the_chip():
    assert key_splits(tiles=5000, key_blocks=1000, slots=264) == 1
    assert key_splits(tiles=96, key_blocks=4, slots=264) == 1
    splits = key_splits(tiles=96, key_blocks=2048, slots=264)
    rounds = -(-96 * splits // 264)
    assert 96 * splits / (rounds * 264) > 0.9


def test_supported_names_what_is_wrong():
    assert interval_forward_supported(torch.bfloat16, 128, "cuda") is None
    assert "cpu" in interval_forward_supported(torch.bfloat16, 128, "cpu")
    assert "float64" in interval_forward_supported(torch.float64, 128, "cuda")
    assert "100" in interval_forward_supported(torch.bfloat16, 100, "cuda")


def test_scale_must_be_positive(make_problem):
    p = make_problem()
    p.scale = -1.0
    with pytest.raises(ValueError, match="scale"):
        run(p)
