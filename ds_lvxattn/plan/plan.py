"""The choice of a strategy for each attention layer, and ``plan.json``, which says why."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

from ds_lvxattn.config import ConfigError, SequenceParallelConfig
from ds_lvxattn.plan.traffic import TRAFFIC, LayerShape
from ds_lvxattn.strategies import STRATEGIES

# Bytes a second at which ``predicted_ms`` turns bytes into time: a 200 Gbit/s link between nodes, or gloo over
# loopback on a CPU. It scales all candidates alike, so the choice does not depend on it.
NOMINAL_LINK = {"cuda": 25e9, "cpu": 1e9}

# The schedule that ``auto`` takes. Both schedules of query exchange receive the same bytes forward; gather sends
# fewer, larger messages, and keeps the queries for the backward pass instead of sending them again.
AUTO_SCHEDULE = {"lv_xattn": "gather", "ulysses": "auto", "ring": "ring"}


@dataclass(frozen=True)
class AttentionLayer:
    """One attention module of the model.

    Attributes:
        name: its full module name.
        role: ``cross`` (visual keys, sharded by frames), ``self`` (text, causal, sharded by tokens) or ``local``
            (each rank its own frames, nothing exchanged).
        heads, kv_heads, head_dim: its sizes.
    """

    name: str
    role: str
    heads: int
    kv_heads: int
    head_dim: int


@dataclass(frozen=True)
class LayerPlan:
    """What a layer runs with, and what was expected of every candidate: one object of ``plan.json``.

    ``kept_bytes`` has, for each recompute policy, what the decoder layer keeps from forward to backward pass.
    """

    layer: str
    role: str
    strategy: str
    schedule: str
    predicted_ms: dict[str, float | None]
    predicted_bytes: dict[str, int | None]
    reason: str
    kept_bytes: dict[str, int] = field(default_factory=dict)


def plan_layers(
    layers: Sequence[AttentionLayer],
    shapes: Mapping[str, LayerShape],
    config: SequenceParallelConfig,
    device: str,
) -> list[LayerPlan]:
    """A plan for every layer.

    Args:
        layers: the model's attention layers.
        shapes: for each exchanged role, the sizes of a typical batch (heads are taken from the layer).
        config: the sequence-parallel settings.
        device: device type, for the nominal link speed.

    Raises:
        ConfigError: a pattern of ``config.layers`` matches no exchanged layer, or the strategy that a setting
            forces cannot run a layer.
    """
    exchanged = [layer.name for layer in layers if layer.role in shapes]
    for pattern in config.layers:
        if not any(fnmatchcase(name, pattern) for name in exchanged):
            raise ConfigError(
                f"'sequence_parallel.layers' has the pattern {pattern!r}, which matches none of the layers {exchanged}"
            )
    return [_plan_layer(layer, shapes.get(layer.role), config, device) for layer in layers]


def _plan_layer(
    layer: AttentionLayer, sizes: LayerShape | None, config: SequenceParallelConfig, device: str
) -> LayerPlan:
    if sizes is None or config.size == 1:
        why = "each rank attends within its own frames" if layer.role == "local" else "one rank, nothing to exchange"
        return LayerPlan(layer.name, layer.role, "local", "auto", {}, {}, why)
    shape = LayerShape(
        sizes.batch, layer.heads, layer.kv_heads, layer.head_dim,
        sizes.q_lengths, sizes.kv_lengths, sizes.element, sizes.needs_out,
        _recomputed(layer.role, config),
    )  # fmt: skip
    ranks = shape.ranks
    predicted: dict[str, int | None] = {}
    obstacles: dict[str, str] = {}
    for name, strategy in STRATEGIES.items():
        obstacle = strategy.unsupported(layer.heads, layer.kv_heads, ranks, replicated=False)
        if obstacle is not None:
            obstacles[name], predicted[name] = obstacle, None
        else:
            traffic = TRAFFIC[name, _schedule(name, config)]
            predicted[name] = max(traffic(shape, rank).total for rank in range(ranks))
    forced: str | None = next(
        (name for pattern, name in config.layers.items() if fnmatchcase(layer.name, pattern)), None
    )
    if forced is None and config.strategy != "auto":
        forced = config.strategy
    if forced is not None:
        if forced in obstacles:
            raise ConfigError(f"strategy '{forced}' cannot run layer {layer.name}: {obstacles[forced]}")
        chosen, reason = forced, f"set in the config: '{forced}'"
    else:
        chosen, reason = _fewest_bytes(predicted, obstacles, shape)
    link = NOMINAL_LINK.get(device, NOMINAL_LINK["cuda"])
    predicted_ms = {name: None if b is None else b / link * 1e3 for name, b in predicted.items()}
    return LayerPlan(layer.name, layer.role, chosen, _schedule(chosen, config), predicted_ms, predicted, reason)


def _recomputed(role: str, config: SequenceParallelConfig) -> str:
    return "none" if config.recompute == "kv" and role != "cross" else config.recompute


def _schedule(strategy: str, config: SequenceParallelConfig) -> str:
    return config.schedule if config.schedule in STRATEGIES[strategy].schedules else AUTO_SCHEDULE[strategy]


def _fewest_bytes(
    predicted: Mapping[str, int | None], obstacles: Mapping[str, str], shape: LayerShape
) -> tuple[str, str]:
    possible = {name: b for name, b in predicted.items() if b is not None}
    chosen = min(possible, key=lambda name: possible[name])
    compared = ", ".join(f"{name} {b:,}" for name, b in sorted(possible.items(), key=lambda item: item[1]))
    reason = (
        f"fewest bytes received a step, forward and backward, at {sum(shape.q_lengths)} queries and "
        f"{sum(shape.kv_lengths)} keys on {shape.ranks} ranks: {compared}"
    )
    return chosen, "; ".join([reason, *(f"{name} not possible: {why}" for name, why in obstacles.items())])


def write_plan(plan: Sequence[LayerPlan], path: Path) -> None:
    """Write ``plan.json``: a list with one object a layer."""
    path.write_text(json.dumps([asdict(layer) for layer in plan], indent=2) + "\n")
