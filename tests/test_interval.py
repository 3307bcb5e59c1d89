"""What the layers of a batch derive from their common interval is derived once."""

from __future__ import annotations

import pytest
import torch

from ds_lvxattn import KVInterval, SequenceShards, ShardLayout, sp_attention
from ds_lvxattn.kernels.math import MathKernel
from ds_lvxattn.kernels.pattern import FRAME
from tests.support.distributed import run
from tests.support.tiny_model import tiny_batches, tiny_model, tiny_sample

MODES = [
    ("ulysses", "auto"), ("lv_xattn", "gather"), ("hybrid", "kv_gather"), ("hybrid", "gather"), ("local", "auto"),
    ("lv_xattn", "ring"), ("ring", "ring"), ("hybrid", "kv_ring"),
]  # fmt: skip


def ranges_that_kernels_see(striped: bool) -> dict[tuple[str, str], int]:
    """For each strategy how many different tensors of ranges reach the kernel in both passes of three layers."""
    world = torch.distributed.group.WORLD
    keys = SequenceShards.striped(8, 2, 2) if striped else SequenceShards.contiguous(8, 2)
    layouts = {world: ShardLayout(SequenceShards((2, 2)), keys), None: ShardLayout(*map(SequenceShards, ((2,), (4,))))}
    stop = torch.full((2, 1, 2), 5, dtype=torch.int32)
    intervals = {
        group: KVInterval(torch.zeros_like(x), x, pattern=FRAME) for group, x in ((world, stop), (None, stop[0]))
    }
    q, (k, v) = torch.randn(1, 4, 2, 8, requires_grad=True), torch.randn(2, 1, 2, 4, 8, requires_grad=True)
    seen: list[torch.Tensor] = []
    forward, backward = MathKernel.forward, MathKernel.backward

    def record(self, q, k, v, start, *more):
        seen.append(start)
        assert more[-1] == FRAME
        return forward(self, q, k, v, start, *more)

    def record_backward(self, dout, q, k, v, out, lse, delta, start, *more):
        seen.append(start)
        assert more[-1] == FRAME
        return backward(self, dout, q, k, v, out, lse, delta, start, *more)

    counts = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MathKernel, "forward", record)
        patch.setattr(MathKernel, "backward", record_backward)
        for strategy, schedule in MODES:
            group = None if strategy == "local" else world
            seen.clear()
            for _ in range(3):
                out, _ = sp_attention(
                    q, k, v, group=group, strategy=strategy, schedule=schedule, interval=intervals[group],
                    shards=layouts[group], inner_size=1,
                )  # fmt: skip
                out.sum().backward()
            assert len(seen) >= 6
            counts[strategy, schedule] = len({id(tensor) for tensor in seen})
    return counts


@pytest.mark.parametrize("striped", [False, True])
def test_layers_share_what_is_derived(striped: bool) -> None:
    for counts in run(2, ranges_that_kernels_see, striped):
        # A ring computes the rows, or the keys, of one rank after another.
        assert counts == {mode: 2 if "ring" in mode[1] else 1 for mode in counts}


def test_positions_outside_the_sequence() -> None:
    """They are clamped alike whether or not anything is exchanged."""
    q, (k, v) = torch.randn(1, 2, 3, 8), torch.randn(2, 1, 2, 4, 8)
    wide = KVInterval(torch.tensor([[-3, 2, 9]], dtype=torch.int32), torch.tensor([[7, 99, 12]], dtype=torch.int32))
    inside = KVInterval(torch.tensor([[0, 2, 0]], dtype=torch.int32), torch.tensor([[4, 4, 0]], dtype=torch.int32))
    for one, other in zip(sp_attention(q, k, v, interval=wide), sp_attention(q, k, v, interval=inside), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("patterns", "unmasked"),
    [
        (("Itta",), True),
        (("tIta",), True),  # text ahead of the first image sees all in this model
        (("IIta",), False),
        (("Ita", "Ita"), False),
        (("tIttIa",), False),
        (("tta", "Ita"), False),
    ],
)
def test_a_batch_knows_whether_every_row_sees_every_key(patterns: tuple[str, ...], unmasked: bool) -> None:
    """Then kernels without a mask run on a GPU; self-attention is causal whatever the batch."""
    layout = tiny_batches(tiny_model()).layout([tiny_sample(pattern) for pattern in patterns])
    start, stop = layout.ranges_of("cross")
    assert layout.sees_all("cross") == unmasked == bool(((start == 0) & (stop == layout.keys.total)).all())
    assert not layout.sees_all("self")
