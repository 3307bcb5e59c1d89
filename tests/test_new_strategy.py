"""A strategy from outside the package: one registration, and it is forced, planned, costed, recomputed and drawn."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from ds_lvxattn import KVInterval, SequenceShards, ShardLayout, sp_attention
from ds_lvxattn.config import sequence_parallel_config
from ds_lvxattn.errors import ConfigError
from ds_lvxattn.exchange.comm import communicator
from ds_lvxattn.plan.cluster import plots
from ds_lvxattn.plan.cluster.job import ClusterJob
from ds_lvxattn.plan.cluster.model_sizes import SHIPPED
from ds_lvxattn.plan.cost import Pass, Passes
from ds_lvxattn.plan.layer_plan import AttentionLayer, LayerPlan, PlanSettings, plan_layers, write_plan
from ds_lvxattn.plan.modes import Mode, modes, register, strategies, unregister
from ds_lvxattn.plan.profile import load_profile
from ds_lvxattn.plan.traffic import CallShape, LayerShape
from tests.support.all_keys_mode import ALL_KEYS
from tests.support.distributed import run
from tests.support.reference import dense_attention, visible
from tests.support.tiny_model import attach, loss_of, tiny_model, tiny_sample

FREE = replace(ALL_KEYS, passes=lambda layer, profile: Passes(Pass(), Pass()), host_like=())


@contextlib.contextmanager
def registered(mode: Mode = ALL_KEYS) -> Iterator[None]:
    register(mode)
    try:
        yield
    finally:
        unregister(mode)


def test_a_name_is_taken_once() -> None:
    with registered(), pytest.raises(ValueError, match="'all_keys/auto' is registered already"):
        register(ALL_KEYS)
    assert ALL_KEYS not in modes()


def operands() -> tuple[list[Tensor], Tensor, Tensor]:
    torch.manual_seed(0)
    shapes = (2, 4, 5, 8), (2, 2, 11, 8), (2, 2, 11, 6)
    q, k, v = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
    start, stop = torch.randint(0, 12, (2, 2, 5), dtype=torch.int32).sort(dim=0).values
    return [q, k, v], start, stop


def attend(masked: bool) -> tuple[list[list[Tensor]], int, int]:
    """Parts of output, log-sum-exp and gradients, with positions, and bytes received and predicted."""
    (q, k, v), start, stop = operands()
    shards = ShardLayout(SequenceShards((2, 3)), SequenceShards.striped(11, 2, 2))
    comm = communicator(dist.group.WORLD)
    rows, keys = list(shards.q.positions(comm.rank)), list(shards.kv.positions(comm.rank))
    leaves = [x[:, :, own].clone().requires_grad_() for x, own in ((q, rows), (k, keys), (v, keys))]
    interval = KVInterval(start[:, rows], stop[:, rows]) if masked else None
    with registered():
        comm.reset()
        out, lse = sp_attention(*leaves, group=comm.group, strategy="all_keys", interval=interval, shards=shards)
        grads = torch.autograd.grad(out.sin().sum() + lse.clamp(min=-50).sum(), leaves)
    with pytest.raises(ValueError, match="strategy is 'all_keys'"):  # nor is it known for shapes that it has run with
        sp_attention(*leaves, group=comm.group, strategy="all_keys", interval=interval, shards=shards)
    received = comm.bytes_received - comm.received["intervals"]
    shape = LayerShape(2, 4, 2, 8, shards.q.lengths, shards.kv.lengths, 8, value_dim=6)
    tensors = [x.detach() for x in (out, lse, *grads)]
    return [[*tensors, torch.tensor(rows), torch.tensor(keys)]], received, ALL_KEYS.traffic(shape, comm.rank).total


@pytest.mark.parametrize("masked", [False, True])
def test_it_is_exact_and_its_bytes_are_predicted(masked: bool) -> None:
    (q, k, v), start, stop = operands()
    whole = [x.requires_grad_() for x in (q, k, v)]
    mask = visible(start, stop, k.shape[2]) if masked else None
    out, lse = dense_attention(*whole, mask, q.shape[3] ** -0.5)
    want = [out, lse, *torch.autograd.grad(out.sin().sum() + lse.clamp(min=-50).sum(), whole)]
    for [[*got, rows, keys]], received, predicted in run(2, attend, masked):
        assert received == predicted > 0
        for x, y, own in zip(got, want, (rows, rows, rows, keys, keys), strict=True):
            torch.testing.assert_close(x, y[:, :, own], rtol=1e-12, atol=1e-12)


def bytes_of_a_step(recompute: str) -> tuple[float, int, int]:
    """Loss over all ranks, bytes of a forward and a backward pass of a model, and what the plan says of them."""
    samples = [tiny_sample("IItaIItIItaaI", seed) for seed in range(2)]
    with registered():
        model = tiny_model()
        batches = attach(model, 2, ("all_keys", "auto", "contiguous"), samples, recompute=recompute)
        comm, plan = batches.parallel.comm, [layer for layer in batches.planner.plan if layer.role != "local"]
        assert {layer.strategy for layer in plan} == {"all_keys"}
        planned = sum(layer.predicted_bytes[layer.strategy] or 0 for layer in plan)
        comm.reset()
        loss = loss_of(model, samples, batches)
        loss.backward()
        received = comm.bytes_received
        dist.all_reduce(loss.detach_())
    return loss.item(), received, planned


def test_a_model_runs_with_it_and_recomputation_sends_nothing_again() -> None:
    want = loss_of(tiny_model(), [tiny_sample("IItaIItIItaaI", seed) for seed in range(2)]).item()
    for recompute in ("none", "kv", "layer"):
        for loss, received, planned in run(2, bytes_of_a_step, recompute):
            assert loss == pytest.approx(want, rel=1e-5)
            assert received == planned > 0


LAYER = AttentionLayer("layers.3.cross_attn", "cross", 32, 8, 128)


def plan_of(**settings: object) -> LayerPlan:
    shape = CallShape(1, (500, 500), (90_000, 90_000), 2)
    [plan] = plan_layers([LAYER], {"cross": shape}, load_profile("h200"), PlanSettings(**settings), ranks=2)
    return plan


def test_it_is_forced_planned_and_written(tmp_path: Path) -> None:
    with registered():
        for settings in ({"strategy": "all_keys"}, {"layers": {"*cross_attn": "all_keys"}}):
            forced = plan_of(**settings)
            assert forced.strategy == "all_keys" and forced.mode is ALL_KEYS
        considered = plan_of()
        assert considered.strategy != "all_keys" and considered.predicted_ms["all_keys"] > 0
    with registered(FREE):
        chosen = plan_of()
        write_plan([chosen], tmp_path / "plan.json")
    [written] = json.loads((tmp_path / "plan.json").read_text())
    assert written["strategy"] == "all_keys" and "all_keys/auto" in written["reason"]
    assert written["predicted_ms"]["all_keys"] == 0 < written["predicted_bytes"]["all_keys"]


def test_the_config_takes_it_while_it_is_registered() -> None:
    config = {"sequence_parallel_size": 2, "sequence_parallel": {"strategy": "all_keys", "layers": {"*": "all_keys"}}}
    with registered():
        assert sequence_parallel_config(config, 2).strategy == "all_keys" in strategies()
    with pytest.raises(ConfigError, match="'all_keys'; choose 'auto', 'lv_xattn'"):
        sequence_parallel_config(config, 2)


@pytest.mark.slow
def test_it_is_drawn(tmp_path: Path) -> None:
    figure = pytest.importorskip("matplotlib.figure").Figure
    job = ClusterJob(SHIPPED["OpenFlamingo-9B"], 512, 64, 4)
    legends = []

    def look(self: object, *unused: object, **unused_too: object) -> None:
        legends.append({line.get_label(): line.get_color() for axes in self.axes for line in axes.lines})  # type: ignore[attr-defined]

    with registered(), mock.patch.object(figure, "savefig", look), mock.patch.object(plots, "MOST_GPUS", 4):
        plots.scaling(job, load_profile("h200"), tmp_path / "scaling.png")
        plots.choice_map(job, plots.slower_links(job, load_profile("h200"))[:2], tmp_path / "map.png")
    assert [legend["all_keys"] for legend in legends] == [ALL_KEYS.colour] * 2
