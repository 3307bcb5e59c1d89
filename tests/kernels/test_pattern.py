"""What the host tells kernels of the ranges: found where they are made, and the tiles that are chosen by it."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from ds_lvxattn import KVInterval
from ds_lvxattn.kernels.pattern import ALIKE, FRAME, GROWING, PATTERNS, SLIDING, UNKNOWN, drift_of, pattern_of
from ds_lvxattn.kernels.triton.backward import interval_backward
from ds_lvxattn.kernels.triton.delta import attention_delta
from ds_lvxattn.kernels.triton.forward import interval_forward
from ds_lvxattn.kernels.triton.tiles import backward_config, forward_config

ROWS, KEYS = 4096, 65536
HALVES = (torch.float16, torch.bfloat16) if torch.cuda.is_available() else (torch.float16,)


def ranges(start, stop):
    return [x.expand(1, ROWS).int().contiguous() for x in (torch.as_tensor(start), torch.as_tensor(stop))]


row = torch.arange(ROWS)
CASES = {
    "all": (ranges(0, KEYS), ALIKE),
    "nothing": (ranges(0, 0), ALIKE),
    "a quarter sees all, the others a quarter": (ranges(0, torch.where(row < ROWS // 4, KEYS, KEYS // 4)), ALIKE),
    "growing": (ranges(0, (row + 1) * KEYS // ROWS), GROWING),
    "growing, behind rows that see nothing": (ranges(0, (row - 999).clamp(min=0) * 8), GROWING),
    "causal": (ranges(0, row + 1), GROWING),
    "two samples": (ranges(row // 2048 * 999, row // 2048 * 999 + 999), ALIKE),
    "thirty samples": (ranges(row // 137 * 999, row // 137 * 999 + 999), SLIDING),
    "sliding": (ranges(row * 16, row * 16 + KEYS // 16), SLIDING),
    "window": (ranges((row - 511).clamp(min=0), row + 1), SLIDING),
    "a frame a row": (ranges(row * 16, row * 16 + 16), FRAME),
    "a frame for 20 rows": (ranges(row // 20 * 64, row // 20 * 64 + 64), FRAME),
    "frames, and rows between them that see nothing": (ranges(row * 16, row * 16 + 16 * (row % 7 > 1)), FRAME),
}


@pytest.mark.parametrize(("name", "drift"), [("all", 0), ("causal", 1), ("sliding", 32), ("a frame a row", 32)])
def test_keys_by_which_ranges_move(name, drift):
    assert drift_of(*CASES[name][0]) == drift


@pytest.mark.parametrize("name", CASES)
def test_pattern_of_ranges(name):
    (start, stop), pattern = CASES[name]
    assert pattern_of(start, stop) == pattern
    interval = KVInterval.from_host(start, stop, "cpu")
    assert interval.pattern == interval.within(KEYS).pattern == pattern
    # Of all ranks, the rows divided between them, in their order.
    shares = (x.unflatten(1, (4, -1)).transpose(0, 1).contiguous() for x in (start, stop))
    assert KVInterval.from_host(*shares, "cpu").pattern == pattern


def test_intervals_of_one_exchange_have_a_pattern_in_common():
    start, stop = CASES["sliding"][0]
    first, second = KVInterval.from_host(start, stop, "cpu"), KVInterval.from_host(stop, stop + KEYS // 16, "cpu")
    assert KVInterval.several([first, second]).pattern == SLIDING
    assert KVInterval.several([first, KVInterval(stop, stop)]).pattern == UNKNOWN
    with pytest.raises(ValueError, match="pattern is 'wide'; choose one of"):
        KVInterval(start, stop, pattern="wide")


@pytest.mark.parametrize("head_dim", (64, 80, 128))
@pytest.mark.parametrize("dtype", HALVES)
def test_tiles_of_every_pattern_give_the_same(make_problem, error, dtype, head_dim):
    p = make_problem(heads=4, kv_heads=2, rows=41, keys=150, head_dim=head_dim, dtype=dtype, mask="frame")
    p.dlse.zero_()  # PyTorch's attention does not return the log-sum-exp
    p.dout[p.hidden.expand(-1, 4, -1)] = 0  # nor does it take rows that see nothing
    exact, theirs = p.exact(), p.pytorch()
    delta, lse = attention_delta(p.dout.double(), exact["out"], None).float(), exact["lse"].float()
    heads = (head_dim, head_dim)
    for config in {forward_config(heads, 2, pattern, True) for pattern in PATTERNS}:
        out, _ = interval_forward(p.q, p.k, p.v, p.start, p.stop, p.scale, config)
        assert error(out, exact["out"]) <= 1.5 * error(theirs["out"], exact["out"]), config
    configs = {backward_config(heads, 2, pattern, True) for pattern in PATTERNS}
    for config in configs:
        grads = interval_backward(
            p.dout, p.q, p.k, p.v, lse, delta, p.start, p.stop, p.scale, workspace_bytes=2**22, config=config
        )  # fmt: skip
        for name, got in zip(("dq", "dk", "dv"), grads, strict=True):
            assert error(got, exact[name]) <= 1.5 * error(theirs[name], exact[name]), (config, name)


def test_few_tiles_depend_on_the_pattern():
    """A pattern has kernels of its own to compile: only where they were measured to be faster."""
    of = {pattern: (forward_config((128, 128), 2, pattern, True), backward_config((64, 64), 2, pattern, True))
          for pattern in PATTERNS}  # fmt: skip
    assert of[UNKNOWN] == of[ALIKE] == of[GROWING] != of[SLIDING] != of[FRAME]
    assert of[FRAME][0].block_m < of[GROWING][0].block_m and of[FRAME][1].tile < of[SLIDING][1].tile
