"""The choice of a kernel: the fastest that is right for a call, and clear errors where a forced one is not."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from ds_lvxattn.kernels.base import Call
from ds_lvxattn.kernels.dispatch import KERNEL_NAMES, select_kernel
from ds_lvxattn.kernels.pattern import ALIKE, FRAME, GROWING, SLIDING, UNKNOWN


@pytest.fixture(autouse=True)
def hopper(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))


def call(
    device="cuda", dtype=torch.bfloat16, head_dim=128, masked=False, tiles=None, capped=False, value_dim=None,
    kv_heads=8, rows=4096, pattern=UNKNOWN,
):  # fmt: skip
    return Call(device, dtype, 32, kv_heads, head_dim, masked, tiles, rows, capped, value_dim, pattern)


@pytest.mark.parametrize(
    "chosen, asked",
    (
        ("cudnn", call()),
        ("cudnn", call(dtype=torch.float16, head_dim=80)),
        ("cudnn", call(tiles=96)),
        ("triton", call(tiles=48)),
        ("flash", call("cpu", torch.float32, tiles=1)),
        ("math", call(dtype=torch.float32, tiles=1)),
        ("triton", call(head_dim=256)),
        ("triton", call(capped=True)),
        ("math", call("cpu", torch.float32, capped=True)),
        ("triton", call(masked=True)),
        ("triton", call(masked=True, head_dim=64, dtype=torch.float16)),
        ("math", call(dtype=torch.float32)),
        ("math", call(masked=True, dtype=torch.float32)),
        ("math", call(masked=True, head_dim=100)),
        ("triton", call(head_dim=192, value_dim=128)),
        ("triton", call(masked=True, head_dim=192, value_dim=128)),
        ("math", call(head_dim=192, value_dim=100)),
        ("math", call("cpu", torch.float32, value_dim=64)),
        ("flash", call("cpu", torch.float32, value_dim=128)),
        ("flash", call("cpu", torch.float32)),
        ("math", call("cpu", torch.float64, masked=True)),
    ),
)
def test_auto_takes_the_fastest_that_is_right(chosen, asked):
    assert select_kernel("auto", asked).name == chosen


@pytest.mark.parametrize(
    "chosen, asked",
    (
        ("fa4", call(tiles=48)),  # which cuts the keys
        ("triton", call(tiles=48, masked=True)),  # it does not where ranges hide some
        ("fa4", call(tiles=96, masked=True)),
        ("triton", call(tiles=96, masked=True, head_dim=64)),
        ("fa4", call(tiles=96, masked=True, head_dim=64, pattern=GROWING)),
        ("triton", call(tiles=96, masked=True, pattern=SLIDING)),
        ("fa4", call(rows=384)),  # backward, here and below
        ("fa4", call(masked=True)),
        ("cudnn", call(rows=384, kv_heads=32)),
        ("triton", call(masked=True, kv_heads=32)),
        ("fa4", call(masked=True, kv_heads=32, pattern=ALIKE)),
        ("triton", call(masked=True, kv_heads=32, pattern=FRAME)),
        ("fa4", call(masked=True, pattern=SLIDING)),
        ("fa4", call(kv_heads=32)),
    ),
)
def test_auto_where_flash_attention_4_is_installed(monkeypatch, chosen, asked):
    monkeypatch.setattr("ds_lvxattn.kernels.fa4.kernel.installed", lambda: True)
    assert select_kernel("auto", asked).name == chosen


@pytest.mark.parametrize(
    "chosen, asked",
    (
        ("triton", call(tiles=96)),
        ("cudnn", call()),  # backward
        ("triton", call(tiles=96, masked=True)),
        ("triton", call(masked=True)),  # the one preferred cannot
        ("flash", call("cpu", torch.float32, tiles=1)),  # neither can
    ),
)
def test_auto_prefers_a_kernel_for_each_pass(chosen, asked):
    assert select_kernel("triton/cudnn", asked).name == chosen


def test_auto_needs_no_cudnn_below_ampere(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    assert select_kernel("auto", call()).name == "triton"


@pytest.mark.parametrize(
    "name, asked, reason",
    (
        ("cudnn", call(masked=True), "no interval mask"),
        ("cudnn", call(head_dim=256), "up to 128, not 256"),
        ("cudnn", call("cpu"), "does not run on cpu"),
        ("flash", call(masked=True), "no interval mask"),
        ("cudnn", call(capped=True), "no soft cap"),
        ("flash", call("cpu", torch.float32, capped=True), "no soft cap"),
        ("flash", call(dtype=torch.float32), "not torch.float32"),
        ("triton", call("cpu"), "does not run on cpu"),
        ("triton", call(dtype=torch.float32), "not torch.float32"),
        ("triton", call(head_dim=100), "multiples of 8, 16 to 256, not 100"),
        ("triton", call(value_dim=100), "multiples of 8, 16 to 256, not 100"),
        *[(name, call(value_dim=64), "not 64 beside 128") for name in ("cudnn", "flash")],
    ),
)
def test_forcing_an_impossible_kernel_names_the_reason(name, asked, reason):
    with pytest.raises(ValueError, match=f"kernel '{name}' cannot do this call: .*{reason}"):
        select_kernel(name, asked)


def test_unknown_name():
    with pytest.raises(ValueError, match=f"kernel is 'fast'; choose one of .*{KERNEL_NAMES[-1]}"):
        select_kernel("fast", call())
