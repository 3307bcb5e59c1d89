"""The registered operators: ``opcheck``, ``torch.compile``, and selective activation checkpointing."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from ds_lvxattn import KVInterval, SequenceShards, ShardLayout, merge_attention, sp_attention
from ds_lvxattn.exchange.comm import communicator
from ds_lvxattn.exchange.routes import Routes
from ds_lvxattn.kernels.pattern import FRAME
from tests.support.distributed import device, run
from tests.support.marks import slow

ops = torch.ops.ds_lvxattn

Q_LENGTHS, KV_LENGTHS = (3, 2), (4, 6)


def qkv(
    rank: int = 0, dtype: torch.dtype = torch.float32, requires_grad: bool = True, value_dim: int = 8
) -> tuple[Tensor, ...]:
    torch.manual_seed(rank)
    shapes = [(2, 4, Q_LENGTHS[rank], 8), *[(2, 2, KV_LENGTHS[rank], size) for size in (8, value_dim)]]
    return tuple(torch.randn(s, dtype=dtype, device=device(), requires_grad=requires_grad) for s in shapes)


def ranges(*shape: int, seed: int = 5) -> tuple[Tensor, Tensor]:
    """Equal on every rank, with rows that see nothing."""
    generator = torch.Generator().manual_seed(seed)
    bounds = torch.randint(0, sum(KV_LENGTHS), (2, *shape), generator=generator, dtype=torch.int32)
    return bounds[0].to(device()), bounds[1].to(device())


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kernel", ["auto", "math"])
def test_opcheck_of_local_attention(masked: bool, kernel: str) -> None:
    start, stop = ranges(2, Q_LENGTHS[0]) if masked else (None, None)
    softcap = 2.0 if kernel == "math" and masked else None
    value_dim = 8 if kernel == "auto" else 4
    torch.library.opcheck(ops.local_attention, (*qkv(value_dim=value_dim), start, stop, 0.3, softcap, kernel, FRAME))


def test_opcheck_of_local_attention_backward() -> None:
    q, k, v = qkv(requires_grad=False)
    start, stop = ranges(2, Q_LENGTHS[0])
    out, lse = ops.local_attention(q, k, v, start, stop, 0.3, 2.0, "auto", FRAME)
    args = (torch.ones_like(out), torch.ones_like(lse), q, k, v, out, lse, start, stop, 0.3, 2.0, "auto", FRAME)
    torch.library.opcheck(ops.local_attention_backward, args)


def test_opcheck_of_merge_attention() -> None:
    assert merge_attention  # its module registers the operator
    outs = torch.randn(3, 2, 4, 5, 8, device=device(), requires_grad=True)
    lses = torch.randn(3, 2, 4, 5, device=device(), requires_grad=True)
    torch.library.opcheck(ops.merge_attention, (outs, lses))


def second_derivative() -> Tensor:
    q, k, v = qkv()
    (dq,) = torch.autograd.grad(sp_attention(q, k, v)[0].square().sum(), q, create_graph=True)
    return torch.autograd.grad(dq.sum(), k)[0]


def tangent() -> Tensor:
    q, k, v = qkv(requires_grad=False)
    with forward_ad.dual_level():
        return sp_attention(forward_ad.make_dual(q, q), k, v)[0]


def batch_of_gradients() -> Tensor:
    q, k, v = qkv()
    out, _ = sp_attention(q, k, v)
    return torch.autograd.grad(out, q, out.new_ones((3, *out.shape)), is_grads_batched=True)[0]


@pytest.mark.parametrize(
    ("differentiate", "message"),
    [
        (second_derivative, "local_attention was differentiated with create_graph=True"),
        (tangent, "sp_attention was called inside a transform of torch.func .* or forward-mode"),
        (batch_of_gradients, "local_attention was differentiated with a batch of gradients at once"),
        (lambda: torch.func.grad(lambda q: sp_attention(q, q, q)[0].sum())(qkv()[1]), "inside a transform"),
        (lambda: torch.vmap(lambda q: sp_attention(q, q, q)[0])(qkv()[1][None]), "inside a transform"),
    ],
)
def test_derivatives_that_there_are_none_of_are_refused(differentiate: Callable[[], Tensor], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        differentiate()


def test_autocast_takes_queries_keys_and_values_in_its_dtype() -> None:
    q, k, v = qkv()
    with torch.autocast(device().type, torch.bfloat16):
        out, _ = sp_attention(q, k, v.bfloat16())
        double = sp_attention(q.double(), k.double(), v.double())[0]
    want, _ = sp_attention(q.bfloat16(), k.bfloat16(), v.bfloat16())
    assert out.dtype == torch.bfloat16 and torch.equal(out, want) and double.dtype == torch.float64
    out.float().sum().backward()
    assert q.grad is not None and q.grad.dtype == torch.float32


def spread(x: Tensor) -> Tensor:
    """``x`` whose elements have gaps between them."""
    return torch.stack((x, torch.full_like(x, 7)), dim=-1).detach()[..., 0].requires_grad_()


def with_gaps(strategy: str, schedule: str) -> float:
    """The largest difference of results and gradients to those without gaps, of a few rows and of a single number."""
    worst = 0.0
    for shape in ((2, 2, 3, 8), (1, 1, 1, 1)):
        torch.manual_seed(dist.get_rank())
        plain = [torch.randn(shape, dtype=torch.float64, device=device(), requires_grad=True) for _ in range(3)]
        results = []
        for q, k, v in (plain, [spread(x) for x in plain]):
            out, lse = sp_attention(q, k, v, group=dist.group.WORLD, strategy=strategy, schedule=schedule)
            results.append([out, lse, *torch.autograd.grad(out.sum() + lse.square().sum(), (q, k, v))])
        worst = max(worst, *((a - b).abs().max().item() for a, b in zip(*results, strict=True)))
    return worst


@pytest.mark.parametrize("mode", [("lv_xattn", "gather"), ("lv_xattn", "ring"), ("ring", "auto")])
def test_tensors_with_gaps_between_their_elements(mode: tuple[str, str]) -> None:
    assert max(run(2, with_gaps, *mode)) < 1e-12


def test_an_interval_serves_evaluation_in_inference_mode_and_then_training() -> None:
    q, k, v = qkv()
    interval = KVInterval(*ranges(2, Q_LENGTHS[0]))
    with torch.inference_mode():
        want, _ = sp_attention(q, k, v, interval=interval)
    out, _ = sp_attention(q, k, v, interval=interval)
    out.sum().backward()
    assert torch.equal(out, want) and q.grad is not None


def traced_evaluated_and_trained(strategy: str, heads: int) -> float:
    """The largest difference between what one call gives in evaluation and then in training; of no samples, too.

    Of sizes that no other test has: what is kept of them is made in the trace and in the evaluation.
    """
    rank, ranks = dist.get_rank(), dist.get_world_size()
    rows, keys = SequenceShards.striped(11, ranks, 3), SequenceShards.dealt([(2, 1), (5, 0), (7, 1), (3, 0)], ranks)
    torch.manual_seed(rank)
    shapes = ((2, heads, rows.lengths[rank], 4), *[(2, heads, keys.lengths[rank], 4)] * 2)
    plain = [torch.randn(shape, dtype=torch.float64, device=device(), requires_grad=True) for shape in shapes]
    bounds = torch.zeros_like(plain[0][:, 0, :, 0], dtype=torch.int32)
    call = functools.partial(sp_attention, group=dist.group.WORLD, strategy=strategy, shards=ShardLayout(rows, keys))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        call(*map(mode.from_tensor, plain), interval=KVInterval(*[mode.from_tensor(bounds)] * 2))
    interval = KVInterval(bounds, bounds + 13)
    with torch.inference_mode():
        want, _ = call(*plain, interval=interval)
    out, _ = call(*plain, interval=interval)
    out.sum().backward()
    none, _ = call(*(x[:0] for x in plain), interval=KVInterval(bounds[:0], bounds[:0]))
    none.sum().backward()
    assert none.shape == (0, *out.shape[1:])
    return (out - want).abs().max().item()


@pytest.mark.parametrize(("strategy", "heads"), [("ulysses", 2), ("ulysses", 3), ("lv_xattn", 3)])
def test_evaluation_in_inference_mode_and_tracing_ahead_of_training(strategy: str, heads: int) -> None:
    assert max(run(2, traced_evaluated_and_trained, strategy, heads)) == 0.0


def opcheck_distributed(name: str, masked: bool, keep_queries: bool) -> dict[str, str]:
    """``opcheck`` of an operator and of its backward, on all ranks together."""
    comm = communicator(dist.group.WORLD)
    forward, backward = getattr(ops, name), getattr(ops, f"{name}_backward")
    q, k, v = qkv(comm.rank, value_dim=4 if masked else 8)
    rows = [comm.ranks, 2, max(Q_LENGTHS)]
    if name == "kv_gather":
        rows = [2, q.shape[2]]
    elif name == "kv_ring":
        rows = [comm.ranks, 2, q.shape[2]]
    elif name == "query_replicated":
        q, rows = qkv(0)[0], [1, 2, Q_LENGTHS[0]]
    start, stop = ranges(*rows) if masked else (None, None)
    shards = ShardLayout(SequenceShards(Q_LENGTHS), SequenceShards(KV_LENGTHS))
    q_lengths, keys = list(Q_LENGTHS), (list(KV_LENGTHS), [])
    first, last = None, None
    if start is not None and stop is not None and name not in ("kv_ring", "kv_gather"):
        first, last = KVInterval(start, stop).local_to(shards.kv, comm.rank)
    places = torch.tensor(shards.kv.order_from_padded(), device=device())
    softcap = 2.0 if masked else None
    call: tuple[Any, ...] = {
        "query_gather": (first, last, 0.3, softcap, "math", FRAME, comm.name, "", q_lengths, [2, 1], keep_queries),
        "query_replicated": (first, last, 0.3, softcap, "math", FRAME, comm.name, masked),
        "query_ring": (first, last, 0.3, softcap, "math", FRAME, comm.name, q_lengths),
        "kv_ring": (start, stop, 0.3, softcap, "math", FRAME, comm.name, keys[0]),
        "kv_gather": (start, stop, places, 0.3, softcap, "math", FRAME, comm.name, keys[0], [2, 1], keep_queries),
    }.get(name, ())
    if name == "query_routed":
        assert start is not None and stop is not None
        routes = Routes.build(start.cpu(), stop.cpu(), shards, comm.rank, device())
        tensors = (routes.start, routes.stop, routes.send_rows, routes.slots, routes.returns)
        counts = list(routes.sent), list(routes.received)
        call = (*tensors, 0.3, softcap, "math", FRAME, comm.name, *counts, keep_queries)
    results = torch.library.opcheck(forward, (q, k, v, *call))
    with torch.no_grad():
        out, lse, *rest = forward(q, k, v, *call)
    q, k, v = (x.detach() for x in (q, k, v))
    kept = [q, *rest]
    torch.library.opcheck(backward, (torch.ones_like(out), torch.ones_like(lse), *kept, k, v, out, lse, *call))
    return results


@pytest.mark.parametrize(
    ("name", "masked", "keep_queries"),
    [
        slow("query_gather", False, True),
        ("query_gather", True, False),
        slow("kv_gather", False, True),
        slow("kv_gather", True, False),
        slow("query_routed", True, True),
        slow("query_routed", True, False),
        *[slow(name, False, True) for name in ("query_ring", "query_replicated", "kv_ring")],
        *[slow(name, True, True) for name in ("query_ring", "query_replicated")],
        ("kv_ring", True, True),
    ],
)
def test_opcheck_of_distributed_operators(name: str, masked: bool, keep_queries: bool) -> None:
    for results in run(2, opcheck_distributed, name, masked, keep_queries):
        assert set(results.values()) == {"SUCCESS"}


def test_compiled_whole() -> None:
    """One graph, no break; the operator stays one node of it."""
    q, k, v = qkv()
    start, stop = ranges(2, Q_LENGTHS[0])

    def layer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, lse = sp_attention(q.sin(), k, v, interval=KVInterval(start, stop))
        return (out.cos().sum() + lse.exp().sum()).sin()

    want = torch.autograd.grad(layer(q, k, v), (q, k, v))
    got = torch.autograd.grad(torch.compile(layer, fullgraph=True, backend="aot_eager")(q, k, v), (q, k, v))
    torch.testing.assert_close(got, want)


def compiled_beside_eager(strategy: str) -> list[tuple[list[Tensor], int]]:
    """Gradients of a layer and the bytes that two passes received, eager and compiled."""
    comm = communicator(dist.group.WORLD)
    tensors = qkv(comm.rank)
    shards = ShardLayout(SequenceShards(Q_LENGTHS), SequenceShards(KV_LENGTHS))

    def layer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, _ = sp_attention(q.sin(), k.cos(), v, group=comm.group, strategy=strategy, shards=shards)
        return out.cos().sum()

    results = []
    for function in (layer, torch.compile(layer, backend="aot_eager", fullgraph=strategy != "ulysses", dynamic=True)):
        comm.reset()
        for _ in range(2):
            gradients = torch.autograd.grad(function(*tensors), tensors)
        results.append(([gradient.cpu() for gradient in gradients], comm.bytes_received))
    return results


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["lv_xattn", "ulysses", "ring"])
def test_compiled_with_symbolic_sizes(strategy: str) -> None:
    """The same gradients, and every byte of every pass counted."""
    for eager, compiled in run(2, compiled_beside_eager, strategy):
        torch.testing.assert_close(compiled, eager)


def keep_attention(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    if getattr(operator, "namespace", "") == "ds_lvxattn":
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


def gradients_with_recomputation(schedule: str, queries: str, mode: str) -> tuple[list[Tensor], int]:
    """Gradients of a layer with projections around the attention, and the bytes of its backward pass."""
    comm = communicator(dist.group.WORLD)
    x, y, _ = qkv(comm.rank)
    q_lengths: tuple[int, ...] = Q_LENGTHS
    if queries == "replicated":
        x, q_lengths = qkv(0)[0], (Q_LENGTHS[0],) * comm.ranks
    weight = torch.eye(8, device=device(), requires_grad=True)
    interval = KVInterval(*ranges(1 if queries == "replicated" else comm.ranks, 2, max(q_lengths)))
    shards = ShardLayout(SequenceShards(q_lengths), SequenceShards(KV_LENGTHS))

    def layer(x: Tensor, y: Tensor) -> Tensor:
        out, _ = sp_attention(
            x @ weight, y @ weight, (y @ weight).sin(), group=comm.group, schedule=schedule, queries=queries,
            interval=interval, shards=shards,
        )  # fmt: skip
        return (out @ weight).cos()

    contexts = functools.partial(create_selective_checkpoint_contexts, keep_attention)
    if mode == "none":
        out = layer(x, y)
    elif mode == "all":
        out = checkpoint(layer, x, y, use_reentrant=False)
    else:
        out = checkpoint(layer, x, y, use_reentrant=False, context_fn=contexts)
    comm.reset()
    gradients = torch.autograd.grad(out.sum(), (x, y, weight))
    return [gradient.cpu() for gradient in gradients], comm.bytes_received


@pytest.mark.parametrize(
    ("schedule", "queries"),
    [("gather", "sharded"), ("ring", "sharded"), ("routed", "sharded"), ("auto", "replicated")],
)
def test_recomputation_that_keeps_the_attention_receives_nothing(schedule: str, queries: str) -> None:
    plain, everything, selective = (
        run(2, gradients_with_recomputation, schedule, queries, mode) for mode in ("none", "all", "selective")
    )
    for (want, without), (_, with_exchange), (got, received) in zip(plain, everything, selective, strict=True):
        assert received == without < with_exchange
        torch.testing.assert_close(got, want, rtol=0, atol=0)
