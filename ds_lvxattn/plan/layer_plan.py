"""The choice of a strategy for each attention layer, and ``plan.json``, which says why."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from ds_lvxattn.errors import ConfigError
from ds_lvxattn.plan.choice import Candidate, best_of_each, candidates, choose, reason
from ds_lvxattn.plan.cost import Layer
from ds_lvxattn.plan.kernel_choice import AUTO, kernel_choice
from ds_lvxattn.plan.modes import LOCAL, REPLICATED, Mode, ModeKey, mode_of, schedules, strategies
from ds_lvxattn.plan.profile import Profile
from ds_lvxattn.plan.traffic import CallShape
from ds_lvxattn.plan.visibility import of_shape


@dataclass(frozen=True)
class AttentionLayer:
    """One attention module of the model.

    Attributes:
        name: its full module name.
        role: ``cross`` (visual keys, sharded by frames), ``self`` (text, causal, sharded by tokens) or ``local``
            (each rank its own frames, nothing exchanged).
        heads, kv_heads, head_dim: its sizes.
        shares_layer: whether it shares a decoder layer with another attention, with which the rest of the layer is
            counted.
        window: of ``self``, the last keys that a row sees, its own included; None: all before it.
        chunk: of ``self``, the rows of a chunk, where a row sees its own chunk alone; None: there are none.
        capped: whether its scores have a soft cap.
        value_dim: head size of its values and outputs; None: as that of the keys.
    """

    name: str
    role: str
    heads: int
    kv_heads: int
    head_dim: int
    shares_layer: bool = False
    window: int | None = None
    chunk: int | None = None
    capped: bool = False
    value_dim: int | None = None

    @property
    def kind(self) -> str:
        """What layers with the same shards and mask have in common."""
        return kind_of(self.role, self.window, self.chunk)


@dataclass(frozen=True)
class LayerPlan:
    """What a layer runs with, and what was expected of every candidate: one object of ``plan.json``.

    Attributes:
        layer, role, strategy, schedule: the layer's name and role, and the choice.
        predicted_ms, predicted_bytes: for every strategy, by its best schedule, forward and backward together; None
            where it cannot run. Times are of attention and exchange, bytes those that a rank receives.
        reason: why this choice.
        kept_bytes: for each recompute policy, what the decoder layer keeps from forward to backward pass.
        head_groups: groups of key heads that ``gather`` and ``kv_gather`` pipeline, forward and backward; None: it
            chooses, or does not run.
        balance: largest over mean visible work of a rank when queries travel; 1 is even.
        measured_ms: ``forward`` and ``backward`` of the choice as it ran, when a run has measured it.
        window, chunk: see ``AttentionLayer``.
        bytes_between_nodes: of ``predicted_bytes``, what comes from other nodes; empty where all ranks are on one.
        inner_size: ranks of a node where the choice tells nodes apart; None elsewhere.
        kernel: local kernels that ``auto`` prefers, ``FORWARD/BACKWARD``; ``auto`` where there is nothing to compare.
    """

    layer: str
    role: str
    strategy: str
    schedule: str
    predicted_ms: dict[str, float | None]
    predicted_bytes: dict[str, int | None]
    reason: str
    kept_bytes: dict[str, int] = field(default_factory=dict)
    head_groups: tuple[int, int] | None = None
    balance: float | None = None
    measured_ms: dict[str, float] = field(default_factory=dict)
    window: int | None = None
    chunk: int | None = None
    bytes_between_nodes: dict[str, int | None] = field(default_factory=dict)
    inner_size: int | None = None
    kernel: str = AUTO

    @property
    def mode(self) -> Mode:
        """What it runs with; ``LOCAL`` where nothing is exchanged."""
        return mode_of((self.strategy, self.schedule))

    @property
    def kind(self) -> str:
        """See ``AttentionLayer``."""
        return kind_of(self.role, self.window, self.chunk)

    @property
    def expected_ms(self) -> float | None:
        """Predicted time of the choice."""
        return self.predicted_ms.get(self.strategy)

    @property
    def took_ms(self) -> float | None:
        """Measured time of the choice, forward and backward."""
        return sum(self.measured_ms.values()) if self.measured_ms else None


def kind_of(role: str, window: int | None = None, chunk: int | None = None) -> str:
    """Name of the layers of ``role`` that have the same mask."""
    limits = (("window", window), ("chunk", chunk))
    return ", ".join([role, *(f"{name} {size}" for name, size in limits if size is not None)])


@dataclass(frozen=True)
class PlanSettings:
    """What the user's settings prescribe of a plan; the config's keys of the same names.

    Attributes:
        strategy: for all layers, or ``auto``.
        layers: module-name patterns to strategies, over ``strategy``; the first match counts.
        schedule: for the strategies that have it, or ``auto``.
        recompute: the policy in effect: ``none``, ``kv`` or ``layer``.
        text: ``auto``, ``divided``, or ``replicated`` for all of it on every rank.
    """

    strategy: str = "auto"
    layers: Mapping[str, str] = field(default_factory=dict)
    schedule: str = "auto"
    recompute: str = "none"
    text: str = "auto"

    def forced(self, layer: str) -> str | None:
        """The strategy that they prescribe for a layer, if any."""
        matching = (name for pattern, name in self.layers.items() if fnmatchcase(layer, pattern))
        return next(matching, None if self.strategy == "auto" else self.strategy)


def plan_layers(
    layers: Sequence[AttentionLayer],
    shapes: Mapping[str, CallShape],
    profile: Profile,
    settings: PlanSettings,
    ranks: int,
    before: Mapping[str, ModeKey] | None = None,
    room: float | None = None,
    kernels: Collection[str] | None = None,
    text_copied: bool = False,
) -> list[LayerPlan]:
    """A plan for every layer.

    Args:
        layers: the model's attention layers.
        shapes: for each exchanged kind of layers, the sizes of a typical batch.
        profile: the machine that it runs on.
        settings: the user's.
        ranks: of the sequence-parallel group.
        before: strategy and schedule that layers ran with so far, by layer name.
        room: bytes that a layer's exchange may need while it runs; None: no limit.
        kernels: local kernels that can be used; None: all that the profile knows.
        text_copied: every rank has all of the text, and only the frames are divided.

    Raises:
        ConfigError: a pattern of ``settings.layers`` matches no exchanged layer, or the strategy that a setting
            forces cannot run a layer.
    """
    exchanged = [layer.name for layer in layers if layer.kind in shapes]
    for pattern in settings.layers:
        if not any(fnmatchcase(name, pattern) for name in exchanged):
            raise ConfigError(
                f"'sequence_parallel.layers' has the pattern {pattern!r}, which matches none of the layers {exchanged}"
            )
    known: dict[object, LayerPlan] = {}
    plans = []
    for layer in layers:
        forced = settings.forced(layer.name)
        past = (before or {}).get(layer.name)
        # Most layers of a model are alike, and so are their plans.
        key = (layer.kind, layer.heads, layer.kv_heads, layer.head_dim, layer.value_dim, forced, past)
        if key not in known:
            sizes = shapes.get(layer.kind)
            why = _nothing_to_exchange(layer, sizes, ranks, text_copied)
            if sizes is None or why is not None:
                known[key] = LayerPlan(
                    layer.name, layer.role, *LOCAL.key, {}, {}, why or "", window=layer.window, chunk=layer.chunk
                )
            elif text_copied:
                known[key] = _replicated_layer(layer, sizes, profile, settings)
            else:
                known[key] = _plan_layer(layer, sizes, profile, settings, forced, past, room, kernels)
        plans.append(replace(known[key], layer=layer.name))
    return plans


def _nothing_to_exchange(layer: AttentionLayer, sizes: CallShape | None, ranks: int, text_copied: bool) -> str | None:
    """Why every rank attends by itself, or None where it does not."""
    if sizes is None or ranks == 1:
        return "each rank attends within its own frames" if layer.role == "local" else "one rank, nothing to exchange"
    if sizes.ranks == 1 and text_copied:
        return "every rank has all of the text"
    if sizes.ranks == 1:
        return "a small batch, which every rank computes whole: predicted faster than dividing it"
    return None if sum(sizes.kv_lengths) else "no rank has a key, nothing to exchange"


def _replicated_layer(layer: AttentionLayer, sizes: CallShape, profile: Profile, settings: PlanSettings) -> LayerPlan:
    """Of text that is on every rank only partial results travel, whatever the strategy of divided text would be."""
    policy = recomputed(layer.role, settings.recompute)
    shape = sizes.of_layer(layer.heads, layer.kv_heads, layer.head_dim, policy, layer.value_dim)
    cost = REPLICATED.cost(Layer(shape, of_shape(shape)), profile)
    received = max(REPLICATED.traffic(shape, rank).total for rank in range(shape.ranks))
    return LayerPlan(
        layer.name, layer.role, *REPLICATED.key, {REPLICATED.strategy: round(cost.attention * 1e3, 4)},
        {REPLICATED.strategy: received}, "every rank has all of the text; partial results are merged",
        window=layer.window,
        chunk=layer.chunk,
    )  # fmt: skip


def _plan_layer(
    layer: AttentionLayer,
    sizes: CallShape,
    profile: Profile,
    settings: PlanSettings,
    forced: str | None,
    before: ModeKey | None,
    room: float | None,
    kernels: Collection[str] | None,
) -> LayerPlan:
    policy = recomputed(layer.role, settings.recompute)
    shape = sizes.of_layer(layer.heads, layer.kv_heads, layer.head_dim, policy, layer.value_dim)
    costed = Layer(shape, of_shape(shape))
    allowed = {name: (settings.schedule,) for name in strategies() if settings.schedule in schedules(name)}
    found = candidates(costed, profile, allowed, room, forced)
    best = best_of_each(found)
    if forced is not None:
        if best[forced].cost is None:
            # The only one there is: it may run out of memory, but the user asked for it.
            if (unlimited := best_of_each(candidates(costed, profile, allowed, None, forced))[forced]).cost is None:
                raise ConfigError(f"strategy '{forced}' cannot run layer {layer.name}: {unlimited.obstacle}")
            best[forced] = unlimited
        chosen: Candidate | None = best[forced]
        if before is not None and before[0] == forced:
            own = [candidate for candidate in found if candidate.mode.strategy == forced]
            chosen = choose(own, before) or chosen
        assert chosen is not None
        why = f"set in the config: '{forced}'"
        if chosen.mode.two_levels and 1 in (shape.inner, shape.nodes):
            why += (
                f"; {shape.inner} of the {shape.ranks} ranks make a node, which is one level: it runs as a flat "
                "strategy ('inner_size' makes nodes of other sizes)"
            )
    else:
        chosen = choose(found, before)
        if chosen is None:
            raise ConfigError(
                f"no strategy can run layer {layer.name}: "
                + "; ".join(f"{candidate.mode.name} {candidate.obstacle}" for candidate in found)
            )
        why = reason(chosen, found, costed, profile, kept=chosen.mode.key == before)
    kernel, why_kernel = kernel_choice(costed, profile, chosen.mode, kernels)
    why = f"{why}; {why_kernel}" if why_kernel else why
    # What is written for a strategy is what would run: for the chosen one, the chosen schedule.
    best[chosen.mode.strategy] = chosen
    return LayerPlan(
        layer.name, layer.role, *chosen.mode.key,
        {name: None if c.cost is None else round(c.cost.attention * 1e3, 4) for name, c in best.items()},
        {name: c.received for name, c in best.items()},
        why,
        head_groups=chosen.mode.pipeline(costed, profile) if chosen.mode.pipeline else None,
        balance=round(shape.balance, 4),
        window=layer.window,
        chunk=layer.chunk,
        bytes_between_nodes={name: c.between for name, c in best.items()} if shape.nodes > 1 else {},
        inner_size=shape.inner if chosen.mode.two_levels else None,
        kernel=kernel,
    )  # fmt: skip


def recomputed(role: str, policy: str) -> str:
    """What ``policy`` means for a layer of ``role``: K and V are recomputed in cross-attention alone."""
    return "none" if policy == "kv" and role != "cross" else policy


def write_plan(plan: Sequence[LayerPlan], path: Path, zero: Mapping[str, Any] | None = None) -> None:
    """Write ``plan.json``: a list with one object a layer. ``zero``, of the whole run, stands in that of the first."""
    layers: list[dict[str, Any]] = [asdict(layer) for layer in plan]
    if zero is not None and layers:
        layers[0]["zero"] = zero
    path.write_text(json.dumps(layers, indent=2) + "\n")
