"""On a GPU: what is compiled, and when. A training step must not stall because a length changed."""

from __future__ import annotations

import os

import pytest
import torch

pytest.importorskip("triton")

import triton

from ds_lvxattn.kernels.triton.backward import interval_backward
from ds_lvxattn.kernels.triton.delta import attention_delta
from ds_lvxattn.kernels.triton.forward import interval_forward
from ds_lvxattn.kernels.triton.launch import Launch
from ds_lvxattn.kernels.triton.merge import merge_partials
from ds_lvxattn.kernels.triton.rms_norm import rms_norm_backward_triton, rms_norm_triton
from ds_lvxattn.kernels.triton.surrogate import output_with_delta

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="compiles for the GPU")


def every_operator(make_problem, rows, keys, mask, head_dim=128):
    p = make_problem(heads=8, kv_heads=2, rows=rows, keys=keys, head_dim=head_dim, dtype=torch.bfloat16, mask=mask)
    out, lse = interval_forward(p.q, p.k, p.v, p.start, p.stop, p.scale)
    merged, _ = merge_partials(torch.stack((out, out)), torch.stack((lse, lse)))
    delta = attention_delta(p.dout, merged, p.dlse)
    for row_terms in ({"delta": delta}, {"delta": None, "out": merged}):
        interval_backward(
            p.dout, p.q, p.k, p.v, lse, start=p.start, stop=p.stop, scale=p.scale, workspace_bytes=2**22, **row_terms
        )  # fmt: skip
    output_with_delta(p.dout, delta)
    weight = torch.ones(head_dim, device=p.k.device, dtype=p.k.dtype)
    _, inverse = rms_norm_triton(p.k, weight, 1e-5)
    rms_norm_backward_triton(p.k, p.k, weight, inverse, (True, True))
    torch.cuda.synchronize()


@pytest.fixture
def compiled(monkeypatch):
    """Names of the kernels that are compiled, or fetched from the disk cache, during a test."""
    names = []
    monkeypatch.setattr(
        triton.knobs.runtime, "jit_post_compile_hook", lambda *, repr, **_: names.append(repr), raising=True
    )
    return names


@pytest.mark.parametrize("mask", ("visible", "random"))
def test_other_lengths_compile_nothing(make_problem, compiled, mask):
    # Few tiles split the keys and merge the parts, many tiles do not.
    for rows, keys in ((48, 8192), (4096, 512)):
        every_operator(make_problem, rows, keys, mask)
    compiled.clear()
    for rows, keys in ((1, 640), (33, 4001), (48, 1), (61, 16384), (100, 20000), (2048, 1777), (4097, 513)):
        every_operator(make_problem, rows, keys, mask)
    assert not compiled


@pytest.mark.parametrize("mask", ("visible", "random"))
def test_settled_launches_are_what_triton_would_launch(make_problem, monkeypatch, mask):
    """Of every launch that is kept, the arguments bound anew give the kernel that was kept."""
    kept, settled = {}, Launch.__call__

    def checked(self, *args):
        compiled = self._kernel[self._grid](*self.described(args), **self._constants)
        assert kept.setdefault(self, compiled) is compiled
        settled(self, *args)

    monkeypatch.setattr(Launch, "__call__", checked)
    for rows, keys in ((48, 8192), (33, 4001), (4096, 512), (48, 8192), (33, 4001)):
        every_operator(make_problem, rows, keys, mask)
    assert kept


def test_first_step_takes_seconds(make_problem, monkeypatch, tmp_path):
    """From an empty cache, a head size that nothing else in these tests has."""
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    begin = sum(os.times()[:4])  # processor time, of the compilers that ran as processes too
    for mask in ("visible", "random"):
        every_operator(make_problem, 512, 1000, mask, head_dim=112)
    seconds = sum(os.times()[:4]) - begin
    print(f"all operators, with a mask and without, compiled and ran in {seconds:.1f} s")
    assert seconds < 60
