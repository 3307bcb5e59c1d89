"""The closed formulas against the discrete-event simulation, for 6 to 4,096 ranks."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ds_lvxattn.plan import network
from ds_lvxattn.plan.cluster import simulate
from ds_lvxattn.plan.cluster.simulate import Cluster, Simulation, Task
from ds_lvxattn.plan.cost import Layer
from ds_lvxattn.plan.modes import hybrid, kv_gather, mode_named
from ds_lvxattn.plan.profile import Profile, load_profile
from ds_lvxattn.plan.traffic import LayerShape
from tests.support.marks import slow

PROFILES = ("a100-2x3", "h200", "h200-slow-link")


def machine(name: str) -> Profile:
    """A profile on which transfers and kernels do not slow each other, and elementwise passes are free."""
    return replace(load_profile(name), overlap=1.0, memory_bandwidth=1e30, launch=0.0, host={}, curves=())


def layer(ranks: int, rows: int, keys: int, groups: int = 1) -> Layer:
    shape = LayerShape(1, 32, 8, 128, (rows,) * ranks, (keys,) * ranks, 2)
    return Layer(shape, groups=(groups, groups))


def test_a_shared_link_is_divided_and_streams_keep_their_order() -> None:
    simulation = Simulation(lambda link: 10.0)
    first = simulation.add(Task("a", 0.0, 10.0, ("link",)))
    second = simulation.add(Task("b", 1.0, 10.0, ("link",)))
    last = simulation.add(Task("a", 2.0), [second])
    # Alone for 1 s (10 bytes left: none), so they do not meet.
    assert simulation.run() == pytest.approx(4.0)
    assert (first.done, second.done, last.done) == (pytest.approx(1.0), pytest.approx(2.0), pytest.approx(4.0))
    shared = Simulation(lambda link: 10.0)
    both = [shared.add(Task(name, 0.0, size, ("link",))) for name, size in (("a", 10.0), ("b", 20.0))]
    shared.run()
    assert [task.done for task in both] == [pytest.approx(2.0), pytest.approx(3.0)]


def test_tasks_in_a_circle_are_an_error() -> None:
    simulation = Simulation(lambda link: 1.0)
    late = Task("a", 1.0)
    simulation.add(Task("a", 1.0), [late])
    simulation.add(late)
    with pytest.raises(RuntimeError, match="wait for each other"):
        simulation.run()


@pytest.mark.parametrize("ranks", [6, 96, 1024, slow(4096)])
@pytest.mark.parametrize("name", PROFILES)
def test_collectives(name: str, ranks: int) -> None:
    profile = machine(name)
    cluster = Cluster(profile, ranks)
    for own in (1e4, 4e6):

        def collective(what, size=own):
            def build(simulation: Simulation) -> None:
                what(simulation, size, [simulation.add(Task(("begin", r))) for r in range(cluster.simulated)])

            return cluster.run(build)

        assert network.all_gather(profile, ranks, own) == pytest.approx(collective(cluster.all_gather), rel=0.07)
        exchanged = collective(cluster.all_to_all, own * ranks)
        assert network.all_to_all(profile, ranks, own * ranks) == pytest.approx(exchanged, rel=0.07)


@pytest.mark.parametrize("ranks", [6, 48, 384, slow(4096)])
@pytest.mark.parametrize("name", PROFILES)
def test_kv_ring(name: str, ranks: int) -> None:
    """Short and long queries: the links bind, or the kernels do."""
    profile = machine(name)
    for rows in (1, 2048):
        call = layer(ranks, rows, 2048)
        forward = mode_named("ring", "ring").cost(call, profile).forward
        sent = 2 * 2048 * 8 * 128 * 2
        assert forward.total == pytest.approx(
            simulate.ring(Cluster(profile, ranks), forward.kernel / ranks, sent), rel=0.05
        )


@pytest.mark.parametrize("ranks", [6, 48, 384])
def test_query_ring(ranks: int) -> None:
    for name in PROFILES:
        profile = machine(name)
        call = layer(ranks, 512, 4096)
        shape = call.shape
        forward = mode_named("lv_xattn", "ring").cost(call, profile).forward
        sent = shape.query_bytes(512)
        simulated = simulate.ring(
            Cluster(profile, ranks), forward.kernel / ranks, sent, sent + shape.statistic_bytes(512)
        )
        assert forward.total == pytest.approx(simulated, rel=0.12), name


@pytest.mark.parametrize(("ranks", "groups"), [(6, 1), (6, 2), (6, 8), (64, 1), (64, 8), slow(512, 2)])
def test_query_gather(ranks: int, groups: int) -> None:
    """The formula lets transfers follow each other; where kernels are short, some of different ranks overlap."""
    for name in PROFILES:
        profile = machine(name)
        for keys in (1024, 65536):
            call = layer(ranks, 64, keys, groups)
            shape = call.shape
            forward = mode_named("lv_xattn", "gather").cost(call, profile).forward
            rows = 64 * ranks
            simulated = simulate.pipeline(
                Cluster(profile, ranks), groups, forward.kernel / groups, shape.query_bytes(64),
                shape.query_bytes(rows) + shape.statistic_bytes(rows),
            )  # fmt: skip
            assert forward.total == pytest.approx(simulated, rel=0.1 if keys > 1024 else 0.22), (name, keys)


@pytest.mark.parametrize("ranks", [2, 8, 32])
def test_head_all_to_all(ranks: int) -> None:
    for name in ("h200", "h200-slow-link"):
        profile = machine(name)
        call = layer(ranks, 256, 16384)
        shape = call.shape
        forward = mode_named("ulysses", "auto").cost(call, profile).forward
        query, key = shape.query_bytes(256), 16384 * max(8, ranks) * 128 * 2
        simulated = simulate.head_all_to_all(
            Cluster(profile, ranks), forward.kernel, (query, key, key), (query, shape.statistic_bytes(256))
        )
        assert forward.total == pytest.approx(simulated, rel=0.05), name


def on_nodes(profile: Profile, ranks: int, rows: int, keys: int, groups: int = 1) -> Layer:
    call = layer(ranks, rows, keys, groups)
    return replace(call, shape=replace(call.shape, inner_size=profile.gpus_per_node))


@pytest.mark.parametrize("ranks", [16, 128, 1024, slow(4096)])
@pytest.mark.parametrize("name", ["h200", "h200-slow-link"])
def test_heads_inside_and_a_ring_between_nodes(name: str, ranks: int) -> None:
    """Heads inside the nodes, then a ring or a gather between them, each on its own links."""
    profile = machine(name)
    size = profile.gpus_per_node
    nodes, call = ranks // size, on_nodes(profile, ranks, 256, 4096)
    shape, outer = call.shape, Cluster(network.outer_level(profile, size), nodes)
    query, key, statistic = shape.query_bytes(256), shape.kv_bytes(4096) / 2, shape.statistic_bytes(256)
    inner = Cluster(network.inner_level(profile, size), size)
    heads = simulate.head_all_to_all(inner, 0.0, (query, key, key), (query, statistic))
    for schedule, sent, returned in (("kv_ring", 2 * key, 0.0), ("ring", query, query + statistic)):
        forward = mode_named("hybrid", schedule).cost(call, profile).forward
        # Of a node's rows or keys each rank sends its share of the heads: as much as one rank holds.
        between = simulate.ring(outer, forward.kernel / nodes, sent, returned)
        assert forward.total == pytest.approx(heads + between, rel=0.12), schedule


@pytest.mark.parametrize("ranks", [16, 128, 1024, slow(4096)])
@pytest.mark.parametrize("name", ["h200", "h200-slow-link"])
def test_heads_inside_and_collectives_between_nodes(name: str, ranks: int) -> None:
    """Queries, or keys and values, gathered between nodes: both passes of the latter, kept from the forward pass."""
    profile = machine(name)
    size = profile.gpus_per_node
    nodes, outer = ranks // size, Cluster(network.outer_level(profile, size), ranks // size)
    inner = Cluster(network.inner_level(profile, size), size)
    for rows, keys in ((64, 65_536), (4096, 256)):
        call = on_nodes(profile, ranks, rows, keys)
        shape = call.shape
        query, key, statistic = shape.query_bytes(rows), shape.kv_bytes(keys) / 2, shape.statistic_bytes(rows)
        heads = [
            simulate.head_all_to_all(inner, 0.0, (query, key, key), behind) for behind in ((query, statistic), (query,))
        ]
        forward, backward, _ = mode_named("hybrid", "gather").passes(call, profile)
        groups = call.groups[0] if call.groups else 1
        between = simulate.pipeline(outer, groups, forward.kernel / groups, query, nodes * (query + statistic))
        assert forward.total == pytest.approx(heads[0] + between, rel=0.12), (rows, keys)
        hybrid_gather = mode_named("hybrid", "kv_gather")
        assert hybrid_gather.pipeline is not None
        forward, backward, _ = hybrid_gather.passes(call, profile)
        forward_groups, groups = hybrid_gather.pipeline(call, profile)
        between = simulate.pipeline(outer, forward_groups, forward.kernel / forward_groups, 2 * key, 0.0)
        assert forward.total == pytest.approx(heads[0] + between, rel=0.15), (rows, keys)
        across = hybrid.between_nodes(shape, shape.heads // size, max(shape.kv_heads // size, 1))
        again = 0.0 if kv_gather.keeps(across) else 2 * key
        between = simulate.pipeline(outer, groups, backward.kernel / groups, again, nodes * 2 * key)
        assert backward.total == pytest.approx(heads[1] + between, rel=0.15), (rows, keys)


@pytest.mark.parametrize("ranks", [16, 128, 1024, slow(4096)])
@pytest.mark.parametrize("name", ["h200", "h200-slow-link"])
def test_query_exchange_that_knows_the_node(name: str, ranks: int) -> None:
    profile = machine(name)
    size = profile.gpus_per_node
    for groups, keys in ((1, 4096), (4, 4096), (4, 65_536)):
        call = on_nodes(profile, ranks, 64, keys, groups)
        shape, rows = call.shape, 64 * ranks
        forward = mode_named("lv_xattn", "two_level").cost(call, profile).forward
        simulated = simulate.two_level(
            profile, ranks, size, groups, forward.kernel / groups, shape.query_bytes(64),
            shape.query_bytes(rows) + shape.statistic_bytes(rows),
        )  # fmt: skip
        assert forward.total == pytest.approx(simulated, rel=0.1), (groups, keys)


def test_a_straggler_holds_up_all() -> None:
    """One rank of eight computes at half speed: every step of a ring waits for it, as the formulas say."""
    profile = machine("h200")
    slow = (1.0,) * 7 + (2.0,)
    even = simulate.ring(Cluster(profile, 8, (1.0,) * 8), 1e-3, 1e6)
    assert even == pytest.approx(simulate.ring(Cluster(profile, 8), 1e-3, 1e6))
    assert simulate.ring(Cluster(profile, 8, slow), 1e-3, 1e6) == pytest.approx(2 * even, rel=0.05)
    gather = simulate.pipeline(Cluster(profile, 8, slow), 1, 1e-3, 1e4, 8e4)
    assert gather == pytest.approx(simulate.pipeline(Cluster(profile, 8), 1, 2e-3, 1e4, 8e4), rel=0.01)
