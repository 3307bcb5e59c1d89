"""Backward kernels against dense float64 attention, from the log-sum-exp and delta of the exact forward
pass."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from ds_lvxattn.kernels.triton.backward import interval_backward
from ds_lvxattn.kernels.triton.delta import attention_delta
from ds_lvxattn.kernels.triton.forward import interval_forward

MASKS = ("visible", "growing", "sliding", "frame", "random")
GRADS = ("dq", "dk", "dv")
GPU = torch.cuda.is_available()
LONG = 20 if GPU else 1  # times the lengths that the interpreter takes
HALVES = (torch.float16, torch.bfloat16) if GPU else (torch.float16,)  # the interpreter has no bfloat16 product
ONE_BLOCK = 1  # bytes of workspace: every key block its own chunk


def run(p, exact, with_dlse=True, workspace=2**30):
    dlse = p.dlse.masked_fill(p.hidden, 0.0) if with_dlse else None
    delta = attention_delta(p.dout.double(), exact["out"], dlse).float()
    lse = exact["lse"].float()
    grads = interval_backward(p.dout, p.q, p.k, p.v, lse, delta, p.start, p.stop, p.scale, workspace, softcap=p.softcap)
    return dict(zip(GRADS, grads, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("workspace", (ONE_BLOCK, 2**30))
@pytest.mark.parametrize("head_dim", (64, 80, 128))
@pytest.mark.parametrize("mask", MASKS)
def test_exact_in_float32(make_problem, error, mask, head_dim, workspace):
    p = make_problem(batch=2, heads=3, kv_heads=1, rows=29, keys=90, head_dim=head_dim, mask=mask)
    exact = p.exact()
    grads = run(p, exact, workspace=workspace)
    for name in GRADS:
        assert error(grads[name], exact[name]) < 1e-5, name


@pytest.mark.slow
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("head_dim", (64, 128))
@pytest.mark.parametrize("mask", MASKS)
def test_no_less_exact_than_pytorch(make_problem, error, mask, head_dim, dtype):
    p = make_problem(heads=4, kv_heads=2, rows=40 * LONG, keys=120 * LONG, head_dim=head_dim, dtype=dtype, mask=mask)
    p.dlse.zero_()  # PyTorch's attention does not return the log-sum-exp
    p.dout[p.hidden.expand(-1, 4, -1)] = 0  # nor does it take rows that see nothing
    exact = p.exact()
    grads, theirs = run(p, exact, with_dlse=False, workspace=2**20 if GPU else ONE_BLOCK), p.pytorch()
    for name in GRADS:
        assert error(grads[name], exact[name]) <= 1.5 * error(theirs[name], exact[name]), name


@pytest.mark.parametrize("mask", ("visible", "random"))
@pytest.mark.parametrize("head_dim", (64, 80))
def test_soft_cap(make_problem, error, head_dim, mask):
    p = make_problem(heads=3, rows=20 * LONG, keys=90 * LONG, head_dim=head_dim, softcap=2.0, gain=5.0, mask=mask)
    exact = p.exact()
    grads = run(p, exact)
    for name in GRADS:
        assert error(grads[name], exact[name]) < 1e-5, name


@pytest.mark.parametrize("head_dim", (16, 32, 72, 80, 88, 96, 160, 256, (192, 128), (64, 16), (24, 80)))
def test_head_sizes(make_problem, error, head_dim):
    """Of keys, and of values where they differ."""
    key, value = head_dim if isinstance(head_dim, tuple) else (head_dim, head_dim)
    p = make_problem(rows=30 * LONG, keys=70 * LONG, head_dim=key, value_dim=value, dtype=HALVES[-1])
    exact = p.exact()
    grads = run(p, exact)
    for name in GRADS:
        assert error(grads[name], exact[name]) < (2e-3 if HALVES[-1] == torch.float16 else 1e-2), name


def test_large_log_sum_exp(make_problem, error):
    p = make_problem(rows=20, keys=90, gain=60.0)
    exact = p.exact()
    assert exact["lse"].max() > 100
    grads = run(p, exact)
    for name in GRADS:
        assert error(grads[name], exact[name]) < 1e-3, name


def test_log_sum_exp_over_keys_elsewhere(make_problem, error):
    """Two shards, each with the global row terms: ``dK``, ``dV`` concatenate and ``dQ`` adds up."""
    p = make_problem(heads=4, kv_heads=2, rows=45, keys=160, mask="random")
    exact = p.exact()
    delta = attention_delta(p.dout.double(), exact["out"], p.dlse.masked_fill(p.hidden, 0.0)).float()
    lse = exact["lse"].float()
    shards = []
    for a, b in ((0, 50), (50, 160)):
        bounds = (p.start.clamp(a, b) - a, p.stop.clamp(a, b) - a)
        shards.append(interval_backward(p.dout, p.q, p.k[:, :, a:b], p.v[:, :, a:b], lse, delta, *bounds, p.scale))
    assert error(shards[0][0] + shards[1][0], exact["dq"]) < 1e-5
    assert error(torch.cat((shards[0][1], shards[1][1]), 2), exact["dk"]) < 1e-5
    assert error(torch.cat((shards[0][2], shards[1][2]), 2), exact["dv"]) < 1e-5


def test_rows_that_see_nothing(make_problem):
    p = make_problem(rows=50, keys=70, mask="growing")
    p.start[:], p.stop[:] = 7, 7
    lse = torch.full_like(p.dlse, float("-inf"))
    for grad in interval_backward(p.dout, p.q, p.k, p.v, lse, torch.zeros_like(lse), p.start, p.stop, p.scale):
        assert not grad.any()
    for grad in interval_backward(p.dout, p.q, p.k, p.v, lse, torch.zeros_like(lse), None, None, p.scale):
        assert not grad.any()


@pytest.mark.parametrize("rows, keys", ((0, 5), (5, 0)))
def test_empty(make_problem, rows, keys):
    p = make_problem(rows=rows, keys=keys, mask="visible")
    terms = torch.zeros_like(p.dlse)
    grads = interval_backward(p.dout, p.q, p.k, p.v, terms, terms, None, None, p.scale)
    for grad, x in zip(grads, (p.q, p.k, p.v), strict=True):
        assert grad.shape == x.shape and not grad.any()


@pytest.mark.parametrize("summed", (False, True))
@pytest.mark.parametrize("head_dim", (64, 80, 128))
def test_strides_are_read_and_kept(make_problem, error, head_dim, summed):
    """Also where ``delta`` is summed up from the output."""
    p = make_problem(batch=2, heads=4, kv_heads=2, rows=33, keys=70, head_dim=head_dim, sequence_first=True)
    if summed:
        p.dlse.zero_()
    exact = p.exact()
    if summed:
        out, lse = interval_forward(p.q, p.k, p.v, p.start, p.stop, p.scale)
        rows = (p.dout, p.q, p.k, p.v, lse, None, p.start, p.stop, p.scale)
        grads = dict(zip(GRADS, interval_backward(*rows, out=out), strict=True))
    else:
        grads = run(p, exact)
    for name, x in zip(GRADS, (p.q, p.k, p.v), strict=True):
        assert grads[name].stride() == x.stride(), name
        assert error(grads[name], exact[name]) < 1e-5, name


@pytest.mark.parametrize("head_dim", (64, 128))
def test_same_bits_every_time(make_problem, head_dim):
    p = make_problem(heads=4, kv_heads=2, rows=60 * LONG, keys=150 * LONG, head_dim=head_dim, dtype=HALVES[-1])
    exact = p.exact()
    first, second = run(p, exact, workspace=2**20), run(p, exact, workspace=2**20)
    assert all(torch.equal(first[name], second[name]) for name in GRADS)


@settings(max_examples=30 if GPU else 8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.integers(1, 60 * LONG),
    keys=st.integers(1, 150 * LONG),
    heads=st.sampled_from(((1, 1), (4, 2), (3, 1))),
    head_dim=st.sampled_from(((64, 64), (128, 128), (32, 16), (80, 128), (192, 128))),
    mask=st.sampled_from(MASKS),
    workspace=st.sampled_from((2**16 * LONG, 2**30)),
    softcap=st.sampled_from((None, 0.7, 50.0)),
    seed=st.integers(0, 1000),
    summed=st.booleans(),
)
def test_any_length(make_problem, error, rows, keys, heads, head_dim, mask, workspace, softcap, seed, summed):
    p = make_problem(
        heads=heads[0], kv_heads=heads[1], rows=rows, keys=keys, head_dim=head_dim[0], value_dim=head_dim[1],
        mask=mask, seed=seed, softcap=softcap,
    )  # fmt: skip
    if summed:  # what is summed up has no gradient of the log-sum-exp
        p.dlse.zero_()
    exact = p.exact()
    out, lse = interval_forward(p.q, p.k, p.v, p.start, p.stop, p.scale, softcap=softcap)
    delta = None if summed else attention_delta(p.dout, out, p.dlse.masked_fill(p.hidden, 0.0))
    grads = interval_backward(
        p.dout, p.q, p.k, p.v, lse, delta, p.start, p.stop, p.scale, workspace, softcap=softcap, out=out
    )  # fmt: skip
    for name, grad in zip(GRADS, grads, strict=True):
        assert grad.isfinite().all()
        # A row that sees one key has an exact gradient of 0 in q, so the error is taken against the inputs'
        # size too.
        assert (grad.double() - exact[name]).norm() < 2e-5 * (exact[name].norm() + p.dout.norm()), name
