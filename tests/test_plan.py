"""The plan: predicted bytes against counted ones, the choice, and ``plan.json``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from ds_lvxattn.config import ConfigError, SequenceParallelConfig
from ds_lvxattn.plan.plan import AttentionLayer, LayerPlan, plan_layers, write_plan
from ds_lvxattn.plan.traffic import TRAFFIC, LayerShape
from tests.distributed import run
from tests.test_traffic import Layer, traffic_of
from tests.tiny_model import MODES, attach, loss_of, tiny_model, tiny_sample

CALLS = {
    "even": Layer((6, 6), (40, 40), lse_in_loss=False),
    "outputs travel": Layer((6, 6), (40, 40), kernel="flash", lse_in_loss=False),
    "uneven": Layer((5, 2), (31, 8), dtype=torch.float32, lse_in_loss=False),
    "empty": Layer((0, 3), (7, 0), dtype=torch.float64, lse_in_loss=False),
    "3 ranks": Layer((4, 3, 3), (10, 5, 0), heads=6, kv_heads=3, lse_in_loss=False),
    "3 ranks, one key head": Layer((4, 3, 0), (10, 5, 7), heads=6, kv_heads=1, dtype=torch.float32, lse_in_loss=False),
}


@pytest.mark.parametrize("layer", CALLS.values(), ids=CALLS.keys())
def test_predicted_bytes_are_the_counted_ones(layer: Layer) -> None:
    shape = LayerShape(
        layer.batch, layer.heads, layer.kv_heads, layer.head_dim, layer.q_lengths, layer.kv_lengths,
        layer.dtype.itemsize, layer.out_travels,
    )  # fmt: skip
    modes = tuple((strategy, schedule, "sharded") for strategy, schedule in TRAFFIC)
    for rank, results in enumerate(run(layer.ranks, traffic_of, layer, modes)):
        for (strategy, schedule, _), counted in zip(modes, results, strict=True):
            predicted = TRAFFIC[strategy, schedule](shape, rank)
            want = (counted.forward.total(), counted.backward.total())
            assert (predicted.forward, predicted.backward) == want, (strategy, schedule, rank)


def bytes_of_a_step(recompute: str) -> list[tuple[int, int]]:
    """Counted and planned bytes of a forward and a backward pass of the model, in each mode."""
    samples = [tiny_sample("IItaIItItaaI", seed) for seed in range(2)]  # twelve tokens, six frames
    results = []
    for mode in MODES:
        model = tiny_model()
        parallel = attach(model, dist.get_world_size(), mode, samples, recompute=recompute)
        parallel.comm.reset()
        loss_of(model, samples, parallel).backward()
        planned = sum(layer.predicted_bytes[layer.strategy] or 0 for layer in parallel.plan if layer.role != "local")
        results.append((parallel.comm.bytes_received, planned))
    return results


@pytest.mark.parametrize("recompute", ["none", "kv", "layer"])
def test_a_training_step_receives_what_the_plan_says(recompute: str) -> None:
    for results in run(2, bytes_of_a_step, recompute):
        for mode, (counted, planned) in zip(MODES, results, strict=True):
            assert counted == planned > 0, mode


# The choice

LAYERS = [
    AttentionLayer("text.layers.0.self_attn", "self", 8, 4, 16),
    AttentionLayer("text.layers.1.cross_attn", "cross", 8, 4, 16),
    AttentionLayer("text.layers.3.cross_attn", "cross", 8, 4, 16),
    AttentionLayer("vision.layers.0.self_attn", "local", 8, 8, 16),
]


def plans(queries: int, keys: int, ranks: int = 2, model: Any = LAYERS, **settings: Any) -> list[LayerPlan]:
    """A plan for ``model`` with so many queries and visual keys a rank."""
    cross = LayerShape(1, 1, 1, 1, (queries,) * ranks, (keys,) * ranks, 2)
    text = LayerShape(1, 1, 1, 1, (queries,) * ranks, (queries,) * ranks, 2)
    config = SequenceParallelConfig(size=ranks, **settings)
    return plan_layers(model, {"cross": cross, "self": text}, config, "cpu")


def test_auto_takes_what_receives_fewest_bytes() -> None:
    assert [plan.strategy for plan in plans(10, 4000)] == ["ulysses", "lv_xattn", "lv_xattn", "local"]
    assert plans(100, 10, ranks=4)[1].strategy == "ring"
    assert plans(100, 200, ranks=4)[1].strategy == "ulysses"
    for plan in plans(100, 200)[:3]:
        possible = {name: size for name, size in plan.predicted_bytes.items() if size is not None}
        assert set(possible) == {"lv_xattn", "ulysses", "ring"} == set(plan.predicted_ms)
        assert possible[plan.strategy] == min(possible.values())
        assert f"{plan.strategy} {possible[plan.strategy]:,}" in plan.reason


def test_patterns_go_before_the_strategy_and_the_first_match_counts() -> None:
    layers = {"*.1.cross_attn": "ulysses", "*cross_attn": "ring"}
    for strategy, text in (("auto", "ulysses"), ("lv_xattn", "lv_xattn")):
        chosen = plans(10, 4000, strategy=strategy, layers=layers)
        assert [plan.strategy for plan in chosen] == [text, "ulysses", "ring", "local"]
        assert "set in the config: 'ulysses'" in chosen[1].reason


@pytest.mark.parametrize("pattern", ["*.layers.2.*", "vision.*"])
def test_a_pattern_without_a_layer_is_an_error(pattern: str) -> None:
    with pytest.raises(ConfigError) as error:
        plans(10, 4000, layers={pattern: "ring"})
    assert repr(pattern) in str(error.value) and LAYERS[1].name in str(error.value)


@pytest.mark.parametrize(("heads", "kv_heads"), [(3, 3), (2, 1), (6, 3)])
def test_ulysses_without_enough_heads(heads: int, kv_heads: int) -> None:
    layer = AttentionLayer("text.layers.1.cross_attn", "cross", heads, kv_heads, 16)
    with pytest.raises(ConfigError) as error:
        plans(10, 100, ranks=4, model=[layer], strategy="ulysses")
    assert "'ulysses' cannot run layer text.layers.1.cross_attn" in str(error.value)
    assert "use lv_xattn" in str(error.value)
    [plan] = plans(10, 100, ranks=4, model=[layer])
    assert plan.strategy != "ulysses" and plan.predicted_bytes["ulysses"] is None
    assert "ulysses not possible" in plan.reason


def test_the_schedule_holds_where_a_strategy_has_it() -> None:
    assert [plan.schedule for plan in plans(10, 4000)] == ["auto", "gather", "gather", "auto"]
    gather, ring = (plans(10, 4000, strategy="lv_xattn", schedule=schedule)[1] for schedule in ("gather", "ring"))
    assert (gather.schedule, ring.schedule) == ("gather", "ring")
    # The queries travel twice in the ring.
    assert ring.predicted_bytes["lv_xattn"] > gather.predicted_bytes["lv_xattn"]


def test_plan_json(tmp_path: Path) -> None:
    write_plan(plans(10, 4000), tmp_path / "plan.json")
    written = json.loads((tmp_path / "plan.json").read_text())
    keys = ["layer", "role", "strategy", "schedule", "predicted_ms", "predicted_bytes", "reason", "kept_bytes"]
    assert [list(layer) for layer in written] == [keys] * len(LAYERS)
    assert [layer["role"] for layer in written] == ["self", "cross", "cross", "local"]
    assert written[1]["strategy"] in written[1]["predicted_bytes"] and written[3]["predicted_bytes"] == {}


def test_one_rank_exchanges_nothing() -> None:
    assert {plan.strategy for plan in plans(10, 4000, ranks=1)} == {"local"}
