"""FlashAttention-4: block lists against dense masks anywhere; on a GPU that has it, both passes against float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from ds_lvxattn.kernels.base import Call
from ds_lvxattn.kernels.derived import derived_of
from ds_lvxattn.kernels.dispatch import select_kernel
from ds_lvxattn.kernels.fa4.block_lists import as_lists, block_lists, padded_ranges
from ds_lvxattn.kernels.fa4.kernel import FlashAttention4Kernel, installed
from ds_lvxattn.kernels.fa4.packed import last_rows_first, packed_backward, packed_ranges
from ds_lvxattn.kernels.fa4.shares import forward_in_shares
from ds_lvxattn.kernels.math import MathKernel
from ds_lvxattn.kernels.triton.delta import attention_delta
from ds_lvxattn.kernels.triton.kernel import TritonKernel

MASKS = ("visible", "growing", "sliding", "frame", "random")
HEAD_SIZES = (64, 72, 80, 88, 96, 128)
GRADS = ("dq", "dk", "dv")
HALVES = (torch.bfloat16, torch.float16)
KERNEL = FlashAttention4Kernel()
CALL = Call("cuda", torch.bfloat16, 4, 2, 128, True)
REASON = KERNEL.unsupported(CALL) if torch.cuda.is_available() else "there is no GPU"
on_gpu = pytest.mark.skipif(REASON is not None, reason=f"fa4: {REASON}")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.integers(1, 70),
    keys=st.integers(1, 90),
    mask=st.sampled_from(MASKS[1:]),
    tile=st.sampled_from((4, 16)),
    block=st.sampled_from((8, 16)),
    transposed=st.booleans(),
    seed=st.integers(0, 1000),
)
@example(rows=2, keys=21, mask="sliding", tile=4, block=8, transposed=False, seed=0)  # no row sees the block between
def test_block_lists(make_problem, rows, keys, mask, tile, block, transposed, seed):
    """Whole blocks are those without a hidden pair; all listed touch a tile's first to last visible keys."""
    p = make_problem(batch=2, rows=rows, keys=keys, mask=mask, seed=seed)
    part, whole = block_lists(*padded_ranges(p.start, p.stop, tile), keys, tile, block)
    key = torch.arange(keys, device=p.start.device)
    seen = (key >= p.start[..., None]) & (key < p.stop[..., None])
    missing = (0, -keys % block, 0, -rows % tile)
    pairs = torch.nn.functional.pad(seen, missing).unflatten(2, (-1, block)).unflatten(1, (-1, tile))
    hidden = torch.nn.functional.pad(~seen, (0, -keys % block), value=True)
    hidden = torch.nn.functional.pad(hidden, (0, 0, 0, -rows % tile)).unflatten(2, (-1, block)).unflatten(1, (-1, tile))
    assert torch.equal(whole, ~hidden.any(2).any(3)) and not (part & whole).any()
    # The rows of a tile may see ranges apart from each other; blocks between them are visited too.
    of_tile = pairs.any(2).flatten(2).int()
    hull = of_tile.cummax(2).values & of_tile.flip(2).cummax(2).values.flip(2)
    assert torch.equal(part | whole, hull.unflatten(2, (-1, block)).any(3))
    if transposed:
        part, whole = part.transpose(1, 2), whole.transpose(1, 2)
    lists = as_lists(part, whole)
    for count, blocks, marked in ((*lists[:2], part), (*lists[2:], whole)):
        assert count.dtype == blocks.dtype == torch.int32 and count.is_contiguous() and blocks.is_contiguous()
        for sequence in range(2):
            for line in range(marked.shape[1]):
                visited = blocks[sequence, 0, line, : count[sequence, 0, line]]
                assert torch.equal(visited.long(), marked[sequence, line].nonzero()[:, 0])


def test_derived_once_for_the_layers_of_a_batch():
    start, stop = torch.zeros(2, 3, 4, dtype=torch.int32, device="cuda" if REASON is None else "cpu")
    made = []

    def make() -> int:
        made.append(0)
        return len(made)

    assert [derived_of(start, stop, "a", make) for _ in range(3)] == [1, 1, 1]
    assert derived_of(start, stop, "b", make) == 2
    assert derived_of(start, stop.clone(), "a", make) == 3  # other ends
    start += 1
    assert derived_of(start, stop, "a", make) == 4  # other contents
    with torch.inference_mode():
        inference = torch.zeros(3, 4, dtype=torch.int32)
    assert [derived_of(inference, inference, "a", make) for _ in range(2)] == [5, 6]


@pytest.mark.parametrize("sequence_first", (False, True))
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("heads", ((4, 2), (7, 1)))
def test_packed_heads_have_the_same_gradients(make_problem, error, heads, mask, sequence_first):
    p = make_problem(
        batch=2, heads=heads[0], kv_heads=heads[1], mask=mask, sequence_first=sequence_first, softcap=20.0
    )  # fmt: skip
    exact, math = p.exact(), MathKernel()
    delta = attention_delta(p.dout.double(), exact["out"], p.dlse.masked_fill(p.hidden, 0.0)).float()

    def backward(dout, q, k, v, *rest):
        return math.backward(dout, q, k, v, None, *rest)

    given = (p.dout, p.q, p.k, p.v, exact["lse"].float(), delta, p.start, p.stop, p.scale, p.softcap)
    grads = packed_backward(backward, *given)
    assert grads[0].stride() == p.q.stride()
    for name, got, direct in zip(GRADS, grads, backward(*given), strict=True):
        assert error(got, exact[name]) < 1e-5 and error(got, direct.double()) < 2e-6, name


@pytest.mark.parametrize("sequence_first", (False, True))
@pytest.mark.parametrize("heads", ((4, 2), (7, 1), (3, 3)))
def test_last_rows_first_are_the_same_rows(make_problem, error, heads, sequence_first):
    p = make_problem(batch=2, heads=heads[0], kv_heads=heads[1], mask="random", sequence_first=sequence_first)
    exact, given = p.exact(), []

    def forward(q, k, v, start, *rest):
        given.append(start)
        return MathKernel().forward(q, k, v, start, *rest)

    for _ in range(2):
        out, lse = last_rows_first(forward, p.q, p.k, p.v, p.start, p.stop, p.scale, p.softcap)
        assert out.stride() == p.q.stride() and lse.dtype == torch.float32
        assert error(out, exact["out"]) < 1e-5 and error(lse, exact["lse"]) < 1e-6
    group = heads[0] // heads[1]
    assert given[0] is given[1] and torch.equal(given[0][:, ::group].flip(1), p.start)


def test_ranges_of_packed_heads_are_made_once():
    start = torch.tensor([[0, 3, 5], [1, 1, 2]], dtype=torch.int32)
    stop = start + 4
    first, last = packed_ranges(start, stop, 2)
    assert first.tolist() == [[0, 0, 3, 3, 5, 5], [1, 1, 1, 1, 2, 2]] and torch.equal(last, first + 4)
    assert packed_ranges(start, stop, 2)[0] is first and packed_ranges(None, None, 2) == (None, None)


@pytest.mark.parametrize("sequence_first", (False, True))
@pytest.mark.parametrize("shares, keys", ((2, 70), (4, 70), (3, 71), (5, 5)))
def test_shares_of_the_keys_are_merged(make_problem, error, shares, keys, sequence_first):
    p = make_problem(
        batch=2, heads=4, kv_heads=2, rows=9, keys=keys, mask="visible", sequence_first=sequence_first, gain=9.0
    )
    exact, sizes = p.exact(), []

    def forward(q, k, v, out, lse):
        sizes.append((q.shape[0], k.shape[2]))
        for written, made in zip((out, lse), MathKernel().forward(q, k, v, None, None, p.scale), strict=True):
            written.copy_(made)

    out, lse = forward_in_shares(forward, shares, p.q, p.k, p.v)
    left = [(1, keys % shares)] if keys % shares else []
    assert sizes == 2 * [(shares, keys // shares), *left] and out.stride() == p.q.stride()
    assert error(out, exact["out"]) < 1e-5 and error(lse, exact["lse"]) < 1e-6


def run(p, exact=None, with_dlse=True, kernel=KERNEL):
    """``out, lse`` and, given the exact results, gradients."""
    result = dict(zip(("out", "lse"), kernel.forward(p.q, p.k, p.v, p.start, p.stop, p.scale, p.softcap), strict=True))
    if exact is not None:
        dlse = p.dlse.masked_fill(p.hidden, 0.0) if with_dlse else None
        delta = attention_delta(p.dout.double(), exact["out"], dlse).float()
        lse = exact["lse"].float()
        grads = kernel.backward(p.dout, p.q, p.k, p.v, None, lse, delta, p.start, p.stop, p.scale, p.softcap)
        result.update(zip(GRADS, grads, strict=True))
    return result


@on_gpu
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("head_dim", HEAD_SIZES)
@pytest.mark.parametrize("mask", MASKS)
def test_no_less_exact_than_pytorch(make_problem, error, mask, head_dim, dtype):
    p = make_problem(batch=2, heads=4, kv_heads=2, rows=800, keys=2400, head_dim=head_dim, dtype=dtype, mask=mask)
    p.dlse.zero_()  # PyTorch's attention does not return the log-sum-exp
    p.dout[p.hidden.expand(-1, 4, -1)] = 0  # nor does it take rows that see nothing
    exact = p.exact()
    mine, theirs = run(p, exact, with_dlse=False), p.pytorch()
    assert error(mine["lse"], exact["lse"]) < 1e-5
    for name in ("out", *GRADS):
        assert error(mine[name], exact[name]) <= 1.5 * error(theirs[name], exact[name]), name


@on_gpu
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.integers(1, 1400),
    keys=st.integers(1, 4000),
    heads=st.sampled_from(((1, 1), (4, 2), (3, 1), (7, 1))),
    head_dim=st.sampled_from((64, 80, 128)),
    mask=st.sampled_from(MASKS),
    sequence_first=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_length(make_problem, error, rows, keys, heads, head_dim, mask, sequence_first, seed):
    p = make_problem(
        heads=heads[0], kv_heads=heads[1], rows=rows, keys=keys, head_dim=head_dim, mask=mask, seed=seed,
        dtype=torch.bfloat16, sequence_first=sequence_first,
    )  # fmt: skip
    exact = p.exact()
    results = run(p, exact)
    assert error(results["out"], exact["out"]) < 1e-2
    assert error(results["lse"], exact["lse"]) < 1e-4
    assert results["out"].stride() == p.q.stride()
    for name in GRADS:
        assert results[name].isfinite().all()
        # A row that sees one key has a gradient of 0 in q, so the error is taken against the inputs' size too.
        assert (results[name].double() - exact[name]).norm() < 1e-2 * (exact[name].norm() + p.dout.norm()), name


@on_gpu
@pytest.mark.parametrize("rows", (1, 96, 384, 700))
@pytest.mark.parametrize("heads", ((4, 4), (8, 2), (14, 2)))
@pytest.mark.parametrize("mask", MASKS)
def test_groups_of_heads_and_few_rows(make_problem, error, mask, heads, rows):
    """Keys that no number of shares divides, with the gradient of the log-sum-exp."""
    p = make_problem(
        batch=2, heads=heads[0], kv_heads=heads[1], rows=rows, keys=10007, head_dim=128, dtype=torch.bfloat16, mask=mask
    )
    exact = p.exact()
    results = run(p, exact)
    assert error(results["out"], exact["out"]) < 1e-2
    assert error(results["lse"], exact["lse"]) < 1e-4
    for name in GRADS:
        assert (results[name].double() - exact[name]).norm() < 1e-2 * (exact[name].norm() + p.dout.norm()), name


@on_gpu
@pytest.mark.parametrize("keys", (16384, 16385, 20011))
def test_few_rows_are_no_less_exact_than_pytorch(make_problem, error, keys):
    from ds_lvxattn.kernels.fa4.attention import _shares

    p = make_problem(
        batch=2, heads=8, kv_heads=2, rows=96, keys=keys, head_dim=128, dtype=torch.bfloat16, mask="visible"
    )  # fmt: skip
    assert _shares(p.q, p.k, 128) > 1
    exact, theirs = p.exact(), p.pytorch()
    mine = run(p)
    assert error(mine["out"], exact["out"]) <= 1.5 * error(theirs["out"], exact["out"])


@on_gpu
@pytest.mark.parametrize("gain", (1.0, 40.0))
@pytest.mark.parametrize("head_dim", (64, 80, 128))
@pytest.mark.parametrize("mask", ("visible", "growing", "random"))
def test_a_soft_cap_is_exact(make_problem, error, mask, head_dim, gain):
    """From scores far below the cap to scores far above it; next to Triton's kernels, which compute the same."""
    p = make_problem(
        batch=2, heads=4, kv_heads=2, rows=800, keys=2400, head_dim=head_dim, dtype=torch.bfloat16, mask=mask,
        softcap=50.0, gain=gain,
    )  # fmt: skip
    exact = p.exact()
    mine, triton = run(p, exact), run(p, exact, kernel=TritonKernel())
    assert error(mine["lse"], exact["lse"]) < 1e-5
    for name in ("out", *GRADS):
        assert error(mine[name], exact[name]) <= 1.5 * error(triton[name], exact[name]) + 1e-3, name


@on_gpu
def test_log_sum_exp_over_keys_elsewhere(make_problem, error):
    """Two shards, each with the global row terms: ``dK``, ``dV`` concatenate and ``dQ`` adds up."""
    p = make_problem(heads=4, kv_heads=2, rows=450, keys=1600, head_dim=128, mask="random", dtype=torch.bfloat16)
    exact = p.exact()
    delta = attention_delta(p.dout.double(), exact["out"], p.dlse.masked_fill(p.hidden, 0.0)).float()
    shards = []
    for a, b in ((0, 500), (500, 1600)):
        bounds = (p.start.clamp(a, b) - a, p.stop.clamp(a, b) - a)
        own = (p.q, p.k[:, :, a:b], p.v[:, :, a:b], None, exact["lse"].float(), delta)
        shards.append(KERNEL.backward(p.dout, *own, *bounds, p.scale))
    assert error(shards[0][0].float() + shards[1][0].float(), exact["dq"]) < 1e-2
    assert error(torch.cat((shards[0][1], shards[1][1]), 2), exact["dk"]) < 1e-2
    assert error(torch.cat((shards[0][2], shards[1][2]), 2), exact["dv"]) < 1e-2


@on_gpu
def test_rows_that_see_nothing(make_problem):
    p = make_problem(rows=300, keys=700, head_dim=128, mask="growing", dtype=torch.bfloat16)
    p.start[:], p.stop[:] = 7, 7
    results = run(p, {"out": p.q.double() * 0, "lse": torch.full_like(p.dlse, float("-inf"))})
    assert torch.all(results["lse"] == float("-inf"))
    assert not any(results[name].any() for name in ("out", *GRADS))


@on_gpu
@pytest.mark.parametrize("head_dim", (80, 128))
@pytest.mark.parametrize("mask", ("visible", "random"))
def test_same_bits_every_time_where_asked_for(make_problem, error, mask, head_dim):
    """By this kernel where it can, else by the one that is chosen instead."""
    p = make_problem(
        heads=8, kv_heads=2, rows=1000, keys=3000, head_dim=head_dim, dtype=torch.bfloat16, mask=mask
    )  # fmt: skip
    exact = p.exact()
    call = Call("cuda", torch.bfloat16, 8, 2, head_dim, masked=mask != "visible", deterministic=True)
    kernel = KERNEL if KERNEL.unsupported(call) is None else select_kernel("auto", call)
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (run(p, exact, kernel=kernel) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    for name in GRADS:
        assert torch.equal(first[name], second[name])
        assert error(first[name], exact[name]) < 1e-2


@on_gpu
def test_captured_in_a_cuda_graph(make_problem):
    """The lists of a captured call follow the ranges that are written before a replay."""
    p = make_problem(rows=500, keys=900, head_dim=128, mask="growing", dtype=torch.bfloat16)
    run(p)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(p)
    p.start += 100
    p.stop.copy_((p.stop + 200).clamp(max=900))
    p.start.copy_(torch.minimum(p.start, p.stop))
    graph.replay()
    torch.testing.assert_close(captured, run(p))


@pytest.mark.parametrize(
    "call, reason",
    (
        (Call("cpu", torch.bfloat16, 4, 2, 128, True), "does not run on cpu"),
        (Call("cuda", torch.float32, 4, 2, 128, True), "torch.float32"),
        (Call("cuda", torch.bfloat16, 4, 2, 256, True), "16 to 128, not 256"),
        (Call("cuda", torch.bfloat16, 4, 2, 100, True), "not 100"),
        (Call("cuda", torch.bfloat16, 4, 2, 256, True, capped=True), "16 to 128, not 256"),
        (Call("cuda", torch.bfloat16, 4, 2, 128, True, value_dim=64), "not 64 beside 128"),
    ),
)
def test_unsupported_names_what_is_wrong(monkeypatch, call, reason):
    monkeypatch.setattr("ds_lvxattn.kernels.fa4.kernel.installed", lambda: True)
    assert reason in KERNEL.unsupported(call)


def test_torch_compile_goes_over_whether_it_is_installed():
    compiled = torch.compile(lambda x: x + installed(), fullgraph=True, backend="aot_eager")
    assert compiled(torch.zeros(())) == float(installed())


def test_unsupported_where_it_is_not_installed_and_on_older_chips(monkeypatch):
    monkeypatch.setattr("ds_lvxattn.kernels.fa4.kernel.installed", lambda: False)
    assert "ds-lvxattn[fa4]" in KERNEL.unsupported(CALL)
    monkeypatch.setattr("ds_lvxattn.kernels.fa4.kernel.installed", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    assert "compute capability 8.0" in KERNEL.unsupported(CALL)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    deterministic = replace(CALL, deterministic=True)
    assert KERNEL.unsupported(CALL) is None and "not deterministic" in KERNEL.unsupported(deterministic)
    assert KERNEL.unsupported(replace(deterministic, masked=False)) is None
    assert KERNEL.unsupported(replace(deterministic, tiles=99)) is None  # a forward pass
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (10, 0))
    assert KERNEL.unsupported(deterministic) is None
