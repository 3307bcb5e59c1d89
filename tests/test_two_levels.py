"""Two levels in whole models: on nodes of several ranks, against one rank; topology and what the planner says of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from benchmarks import nodes_on_paper
from ds_lvxattn.calibration.clock import Clock
from ds_lvxattn.calibration.collectives import collective_curves, level_curves, with_links
from ds_lvxattn.calibration.extent import Extent
from ds_lvxattn.config import sequence_parallel_config
from ds_lvxattn.errors import ConfigError
from ds_lvxattn.exchange.comm import Communicator, communicator
from ds_lvxattn.exchange.grid import grid_of, largest_block, make_grids, node_size
from ds_lvxattn.exchange.shards import SequenceShards
from ds_lvxattn.plan.__main__ import main
from ds_lvxattn.plan.choice import candidates, choose
from ds_lvxattn.plan.cost import Layer
from ds_lvxattn.plan.layer_plan import AttentionLayer, PlanSettings, plan_layers
from ds_lvxattn.plan.modes import mode_named
from ds_lvxattn.plan.network import all_gather, inner_level, outer_level
from ds_lvxattn.plan.profile import Profile, load_profile
from ds_lvxattn.plan.traffic import CallShape, LayerShape
from tests.support.distributed import run
from tests.support.parity import Gradients, gradients_of, largest_differences, samples_of, sum_over_ranks
from tests.support.tiny_model import attach, loss_of, tiny_model
from tests.support.training import Case, metrics_in, one_rank, train

MODES = (
    ("hybrid", "gather", "contiguous"),
    ("hybrid", "kv_ring", "striped"),
    ("hybrid", "kv_gather", "striped"),
    ("hybrid", "ring", "striped"),
    ("hybrid", "routed", "contiguous"),
    ("lv_xattn", "two_level", "striped"),
)
PATTERNS = ("tItIItttaaItaIIIta", "IIttaIItaI")


def in_all_modes(recompute: str) -> list[tuple[tuple[float, Gradients], tuple[int, int], tuple[int, int]]]:
    """Per mode: loss and gradients over the ranks; bytes, and those between nodes, as counted and as planned."""
    results = []
    for mode in MODES:
        samples, model = samples_of(PATTERNS), tiny_model(dtype=torch.float64).train()
        batches = attach(model, dist.get_world_size(), mode, samples, inner_size=2, recompute=recompute)
        comm, plan = batches.parallel.comm, [layer for layer in batches.planner.plan if layer.role != "local"]
        assert {(layer.strategy, layer.schedule, layer.inner_size) for layer in plan} == {(*mode[:2], 2)}
        planned = [sum(of[layer.strategy] or 0 for layer, of in zip(plan, column, strict=True)) for column in (
            [layer.predicted_bytes for layer in plan], [layer.bytes_between_nodes for layer in plan])]  # fmt: skip
        comm.reset()
        loss = loss_of(model, samples, batches)
        loss.backward()
        counted = comm.bytes_received, comm.bytes_between_nodes
        results.append((sum_over_ranks(loss, gradients_of(model)), counted, (planned[0], planned[1])))
    return results


@pytest.mark.slow
@pytest.mark.parametrize("recompute", ["none", "layer"])
def test_a_model_on_two_nodes_of_two(recompute: str) -> None:
    """Loss and gradients are those of one rank; no rank receives more than the plan says, and one as much."""
    model = tiny_model(dtype=torch.float64).train()
    loss = loss_of(model, samples_of(PATTERNS))
    loss.backward()
    want = loss.item(), gradients_of(model)
    for mode, *ranks in zip(MODES, *run(4, in_all_modes, recompute), strict=True):
        differences = largest_differences(ranks[0][0], want)
        assert max(differences) < 1e-11, (mode, differences)
        for _, counted, planned in ranks:
            assert 0 < counted[0] <= planned[0] and counted[1] > 0, (mode, counted, planned)
            assert counted[1] < counted[0]


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_training_under_zero(stage: int, tmp_path: Path) -> None:
    mode = MODES[stage - 1]
    # Of stage 3 two groups, as data parallelism has them, each on a grid of its own.
    ranks, steps = (8, 4) if stage == 3 else (4, 6)
    case = Case(ranks, 4, stage, mode, steps=steps, micro_batch=1, recompute="kv", inner_size=2)
    run(ranks, train, case, tmp_path)
    losses, norms = zip(*one_rank(case.steps, case.batch, case.micro_batch), strict=True)
    assert metrics_in(tmp_path) == pytest.approx(losses, rel=1e-5)
    assert metrics_in(tmp_path, "grad_norm") == pytest.approx(norms, rel=1e-3)
    between, received = (metrics_in(tmp_path, what) for what in ("comm_bytes_between_nodes", "comm_bytes"))
    assert all(0 < far < all_bytes for far, all_bytes in zip(between, received, strict=True))


def test_config() -> None:
    block = {"strategy": "hybrid", "inner_size": 2}
    config = sequence_parallel_config({"sequence_parallel_size": 4, "sequence_parallel": block}, 8)
    assert (config.strategy, config.inner_size) == ("hybrid", 2)
    for size in (3, 0, True):
        with pytest.raises(ConfigError, match="inner_size"):
            sequence_parallel_config(
                {"sequence_parallel_size": 4, "sequence_parallel": {**block, "inner_size": size}}, 4
            )


# Topology


@pytest.mark.parametrize(
    ("hosts", "size"),
    [("aabb", 2), ("aaaa", 4), ("abcd", 1), ("aaab", 1), ("aabbcc", 2), ("aaaaaabb", 2), ("aaabbb", 3), ("abab", 1)],
)
def test_nodes_by_host(hosts: str, size: int) -> None:
    assert largest_block([*hosts], len(hosts)) == size
    # Two groups on the same hosts each, and the second on others.
    assert largest_block([*hosts, *hosts], len(hosts)) == size
    assert largest_block([*hosts, *"abcdefgh"[: len(hosts)]], len(hosts)) == 1


def grids() -> tuple[int, list[tuple[int, int, int, int]]]:
    comm = communicator(dist.group.WORLD)
    places = []
    for size in (1, 2, 4):
        inner, outer = grid_of(comm, size)
        places.append((inner.rank, inner.ranks, outer.rank, outer.ranks))
        assert grid_of(comm, size) == (inner, outer), "made once"
    return node_size(comm), places


def test_places_on_a_grid() -> None:
    for rank, (size, places) in enumerate(run(4, grids)):
        assert size == 4  # one host
        assert places == [(0, 1, rank, 4), (rank % 2, 2, rank // 2, 2), (rank, 4, 0, 1)]


def grids_of_two_groups() -> list[list[int]]:
    """Two sequence-parallel groups of four, as data parallelism has them, each on two nodes of two.

    Made by all ranks ahead, and by the members of the first group alone at its first use.
    """
    seen = []
    for ahead in (True, False):
        halves = [dist.new_group(list(range(first, first + 4))) for first in (0, 4)]
        comm = communicator(halves[dist.get_rank() // 4])
        if ahead:
            make_grids(comm, 2)
            assert 2 in comm.levels
        elif dist.get_rank() >= 4:
            continue
        mine = torch.tensor([dist.get_rank()])
        seen.append([rank for level in grid_of(comm, 2) for rank in level.all_gather(mine, "ranks").flatten().tolist()])
    return seen


@pytest.mark.slow
def test_grids_where_the_group_is_not_the_world() -> None:
    for rank, seen in enumerate(run(8, grids_of_two_groups)):
        node, place = rank // 2 * 2, rank // 4 * 4 + rank % 2
        assert seen == [[node, node + 1, place, place + 2]] * (2 if rank < 4 else 1)


@pytest.mark.parametrize("stripe", [0, 1, 3])
def test_shards_of_nodes(stripe: int) -> None:
    for total in range(40):
        for size in (1, 2, 4):
            flat = SequenceShards.striped(total, 4, stripe) if stripe else SequenceShards.contiguous(total, 4)
            nodes = flat.of_nodes(size)
            for node in range(4 // size):
                members = range(node * size, (node + 1) * size)
                held = sorted(position for rank in members for position in flat.positions(rank))
                assert held == list(nodes.positions(node)), (total, size, node)


def links_of_both_levels() -> tuple[Profile, int]:
    """Measured on a grid that the config gives: the ranks are of one host."""
    comm, profile, cpu = communicator(dist.group.WORLD), load_profile("cpu"), torch.device("cpu")
    comm.reset()
    extent = Extent((), (), 0.0, (1 << 8, 1 << 12), 1)
    clock = Clock(cpu, extent.repeats)
    curves = collective_curves(Communicator(comm.group), clock, extent, cpu)
    curves += level_curves(comm, clock, extent, cpu, inner_size=2)
    return with_links(profile, profile, curves, comm.ranks), comm.bytes_received


def test_each_level_is_measured() -> None:
    for profile, received in run(4, links_of_both_levels):
        assert received == 0, "the counts of the group stay as they were"
        assert profile.gpus_per_node == 2 and profile.inter.shared == 2 * profile.inter.bandwidth
        assert profile.intra != load_profile("cpu").intra


# The planner


def layer(queries: int, keys: int, ranks: int, inner_size: int | None, kv_heads: int = 8) -> Layer:
    lengths = (queries // ranks,) * ranks, (keys // ranks,) * ranks
    return Layer(LayerShape(1, 32, kv_heads, 128, *lengths, 2, inner_size=inner_size))


def test_links_of_the_levels() -> None:
    profile = load_profile("h200")
    inner, outer = inner_level(profile, 8), outer_level(profile, 8)
    # Eight GPUs of each node share what comes in; alone, one gets no more than its own adapter.
    assert all_gather(outer, 2, 1e8) >= all_gather(profile, 16, 1e8) / 15
    assert all_gather(inner, 8, 1e8) == all_gather(profile, 8, 1e8)


def test_two_levels_are_considered_where_there_are_two() -> None:
    profile = load_profile("h200")
    one, two = (candidates(layer(8192, 262_144, 64, inner), profile) for inner in (None, 8))
    assert not any(found.mode.two_levels for found in one)
    assert {found.mode.key for found in two} >= {("hybrid", "gather"), ("hybrid", "kv_ring"), ("lv_xattn", "two_level")}


def test_between_nodes_fall_by_the_gpus_of_a_node() -> None:
    profile = load_profile("h200")
    found = {c.mode.key: c for c in candidates(layer(1024, 2_097_152, 64, 8), profile)}
    flat = found["lv_xattn", "gather"]
    for key in (("lv_xattn", "two_level"), ("hybrid", "gather")):
        # 7 rows from other nodes instead of 56; statistics are part of the bytes.
        assert found[key].between == pytest.approx(flat.between / 8, rel=0.02)
    assert found["lv_xattn", "two_level"].received == flat.received


def test_more_ranks_than_key_heads_leave_a_choice() -> None:
    """64 ranks, 8 key heads: flat Ulysses has no query head for half of the ranks, on nodes of 8 heads are divided."""
    profile = load_profile("h200")
    found = {c.mode.key: c for c in candidates(layer(65_536, 65_536, 64, 8), profile)}
    assert found["ulysses", "auto"].cost is None and found["hybrid", "kv_ring"].cost is not None
    chosen = choose(list(found.values()))
    assert chosen is not None and chosen.mode.two_levels
    obstacle = mode_named("hybrid").obstacle
    assert obstacle(7, 7, 64, 8) is not None and obstacle(28, 4, 64, 8) is None


@pytest.mark.parametrize(("inner_size", "levels"), [(None, 1), (1, 1), (2, 2)])
def test_a_strategy_of_two_levels_says_where_there_is_one(inner_size: int | None, levels: int) -> None:
    """Nodes of unequal size leave one level: what the config forces then runs, exact, as a flat strategy."""
    shapes = {"cross": CallShape(1, (16,) * 4, (640,) * 4, 2, inner_size=inner_size)}
    settings = PlanSettings(strategy="hybrid")
    plan = plan_layers([AttentionLayer("x", "cross", 8, 8, 64)], shapes, load_profile("h200"), settings, 4)[0]
    assert plan.strategy == "hybrid" and ("runs as a flat strategy" in plan.reason) == (levels == 1)


def test_the_command_says_when_two_levels_win(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--model", "Llama-3.2-11B-Vision", "--text", "2048", "--cluster", "h100"]
    for gpus, frames, said in (("512", "1250", "win for"), ("64", "64", "win for"), ("8", "64", "on one node")):
        assert main([*words, "--gpus", gpus, "--frames", frames]) == 0
        assert said in " ".join(capsys.readouterr().out.split())


def test_the_table_on_paper_is_that_of_the_page(capsys: pytest.CaptureFixture[str]) -> None:
    nodes_on_paper.main([])
    page = (Path(__file__).parents[1] / "docs" / "planner.md").read_text()
    assert capsys.readouterr().out in page
