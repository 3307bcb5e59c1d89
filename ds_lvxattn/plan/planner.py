"""The plans of one model: a strategy for each of its attention layers, for every size of batch that comes.

The planner is handed values (settings, layers, sizes, the machine) and knows neither the model nor the process group.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from ds_lvxattn.plan.choice import ShapeClass
from ds_lvxattn.plan.cost import Layer
from ds_lvxattn.plan.dense import TEXT_LAYER, host_time
from ds_lvxattn.plan.layer_plan import AttentionLayer, LayerPlan, PlanSettings, plan_layers, recomputed
from ds_lvxattn.plan.layer_sizes import LayerSizes
from ds_lvxattn.plan.memory import POLICIES, kept_bytes
from ds_lvxattn.plan.modes import LOCAL, ModeKey, mode_named
from ds_lvxattn.plan.profile import Profile
from ds_lvxattn.plan.replicated_compute import (
    TEXT_SHARE,
    copying_text_is_faster,
    replicating_is_faster,
    text_seconds,
)
from ds_lvxattn.plan.tiling import Tiles
from ds_lvxattn.plan.traffic import CallShape, LayerShape
from ds_lvxattn.plan.visibility import of_shape
from ds_lvxattn.plan.zero import Work

Plan = tuple[LayerPlan, ...]  # a layer each, in the model's order


@dataclass(frozen=True)
class DenseSizes:
    """What the planner must know of a model beside its attention layers.

    Attributes:
        width: size of a text row (``d_model``).
        intermediate: inner size of the feed-forward part.
        frame_tokens: visual tokens of a frame.
        row_operations: operations of a text row, forward and backward, attention left out.
        token_operations: the same of a token of the vision encoder.
        tiled_mlp: tiles of the feed-forward part, as in the config.
        pair_operations: operations, forward and backward, of attention inside the encoder for two tokens of a picture.
        token_pixels: pixels that are made for a token of the encoder.
    """

    width: int
    intermediate: int
    frame_tokens: int
    row_operations: float
    token_operations: float
    tiled_mlp: Tiles = None
    pair_operations: float = 0.0
    token_pixels: float = 0.0


@dataclass(frozen=True)
class BatchSizes:
    """What the planner must know of a micro-batch; equal on every rank of the group.

    Attributes:
        shape_class: ``choice.shape_class`` of it. Batches of one class have one plan.
        ranks: over which it is divided; 1 where every rank computes all of it.
        text_copied: only the frames are divided, and every rank has all of the text.
        rows: text rows, over all samples.
        encoded: tokens of the vision encoder, over all samples.
        shapes: makes the sizes of each exchanged kind of layers; called for a new class only.
        encoded_pairs: pairs of tokens of one picture in the encoder, over all samples.
    """

    shape_class: ShapeClass
    ranks: int
    text_copied: bool
    rows: int
    encoded: float
    shapes: Callable[[], Mapping[str, CallShape]]
    encoded_pairs: float = 0.0


class Share(Protocol):
    """One plan for many ranks: the first of them makes it, and all get it, or the error that it raised."""

    def __call__(self, make: Callable[[], list[LayerPlan]], everyone: bool) -> list[LayerPlan]:
        """``make()`` of the first rank of the group, or of the run where it is for ``everyone``."""


class Planner:
    """Plans for the batches of one model.

    Args:
        layers: the model's attention layers, in its order.
        settings: what the user prescribes.
        ranks: of the sequence-parallel group.
        model: its other sizes.
        profile: the machine, as far as it is known ahead of the run. What decides on undivided batches: they are laid
            out ahead of their steps, perhaps before anything is measured, and alike on all ranks.
        policy: the recompute policy in effect, which a switch of the model may change.
        room: bytes that one layer's exchange may need while it runs; None: no limit.
        share: makes the ranks of a group follow the plan of the first.
        kernels: local kernels that can be used; None: all that a profile knows.
        mixers: layers with something else in the place of attention that is exchanged by heads. Nothing of them is
            planned; for memory each counts as self-attention by ``ulysses``.

    Attributes:
        profile: the machine that is planned for: ``profile``, or one that was measured.
        plan: that of the last batch; empty before the first.
    """

    def __init__(
        self,
        layers: Sequence[AttentionLayer],
        settings: PlanSettings,
        ranks: int,
        model: DenseSizes,
        profile: Profile,
        policy: Callable[[], str],
        room: Callable[[], float | None],
        share: Share,
        kernels: Collection[str] | None = None,
        mixers: Sequence[AttentionLayer] = (),
    ) -> None:
        if kernels is not None:
            profile = profile.limited_to(kernels)
        self._kernels, self._mixers = kernels, mixers
        self._layers, self._settings, self._ranks, self._model = layers, settings, ranks, model
        self._shipped, self._policy, self._room, self._share = profile, policy, room, share
        self.profile = profile
        self.plan: Plan = ()
        self._plan_of: dict[tuple[ShapeClass, int, bool], Plan] = {}
        self._undivided: dict[ShapeClass, bool] = {}
        self._text_copied: dict[ShapeClass, bool] = {}

    def undivided(self, sizes: BatchSizes) -> bool:
        """Whether every rank is to compute a batch whole, of these sizes when divided, instead of its part of it.

        Decided at the first batch of a class.
        """
        settings = self._settings
        if settings.strategy != "auto" or settings.schedule != "auto" or settings.layers:
            return False
        if sizes.shape_class not in self._undivided:
            model = self._model
            dense = sizes.rows * model.row_operations + sizes.encoded * model.token_operations
            dense += sizes.encoded_pairs * model.pair_operations
            layers = [shape for _, shape in self._exchanged(sizes)]
            self._undivided[sizes.shape_class] = replicating_is_faster(
                layers, dense, self._shipped, sizes.encoded * model.token_pixels
            )
        return self._undivided[sizes.shape_class]

    def copies_text(self, sizes: BatchSizes) -> bool:
        """Whether every rank is to compute all of the text of a batch, of these sizes when divided, and its part of the
        frames. Decided as ``undivided`` is.
        """
        settings = self._settings
        if settings.text != "auto" or not any(layer.role == "cross" for layer in self._layers):
            return settings.text == "replicated"
        if settings.strategy != "auto" or settings.schedule != "auto" or settings.layers:
            return False
        if sizes.shape_class not in self._text_copied:
            self._text_copied[sizes.shape_class] = copying_text_is_faster(
                self._exchanged(sizes), self._model.row_operations, sizes.rows, self._shipped
            )
        return self._text_copied[sizes.shape_class]

    def _exchanged(self, sizes: BatchSizes) -> list[tuple[str, LayerShape]]:
        """Role and sizes of each attention layer that exchanges."""
        shapes, policy = sizes.shapes(), self._policy()
        return [
            (
                layer.role,
                shapes[layer.kind].of_layer(
                    layer.heads, layer.kv_heads, layer.head_dim, recomputed(layer.role, policy), layer.value_dim
                ),
            )
            for layer in self._layers
            if layer.kind in shapes
        ]

    def start(self, sizes: BatchSizes) -> Plan:
        """Plan afresh, for batches of these sizes: one plan for all ranks of the run, which all call it.

        Raises:
            ConfigError: on every rank, when a setting cannot work for a layer.
        """
        self.plan, self._plan_of = (), {}
        return self._remember(sizes, everyone=True)

    def follow(self, sizes: BatchSizes) -> Plan:
        """The plan for a batch of these sizes, which a class that is new gets now; it is the ``plan`` from then on.

        Every rank of the group calls it with the same sizes, so that all or none of them plan; the group's first rank
        decides. A layer changes its strategy only for a gain that is worth it (``choice.HYSTERESIS``).

        Raises:
            ConfigError: on every rank of the group, when no strategy can run a layer.
        """
        if not self.plan:
            return self.start(sizes)
        known = self._plan_of.get((sizes.shape_class, sizes.ranks, sizes.text_copied))
        if known is None:
            return self._remember(sizes, everyone=False)
        self.plan = known
        return known

    def _remember(self, sizes: BatchSizes, everyone: bool) -> Plan:
        shapes = sizes.shapes()
        before = {plan.layer: (plan.strategy, plan.schedule) for plan in self.plan}

        def decide() -> list[LayerPlan]:
            settings = replace(self._settings, recompute=self._policy())
            profile = self.profile if self._kernels is None else self.profile.limited_to(self._kernels)
            return plan_layers(
                self._layers,
                shapes,
                profile,
                settings,
                self._ranks,
                before,
                self._room(),
                self._kernels,
                sizes.text_copied,
            )

        self.plan = tuple(
            replace(plan, kept_bytes={policy: kept_bytes(kept, policy) for policy in POLICIES}) if kept else plan
            for plan, kept in self._with_sizes(self._share(decide, everyone), shapes)
        )
        self._plan_of[sizes.shape_class, sizes.ranks, sizes.text_copied] = self.plan
        return self.plan

    def work(self, sizes: BatchSizes) -> Work:
        """Seconds of a batch's forward and backward pass by the plan at hand, on the device and on the host."""
        own, model, shapes = self.profile, self._model, sizes.shapes()
        modes = [plan.mode for plan, layer in zip(self.plan, self._layers, strict=True) if layer.kind in shapes]
        device = host = 0.0
        rest = host_time(own, TEXT_LAYER)
        element = 2
        for (mode, shape), count in Counter(zip(modes, (s for _, s in self._exchanged(sizes)), strict=True)).items():
            cost = mode.cost(Layer(shape, of_shape(shape)), own)
            device += count * (cost.device + cost.projection + cost.projection_repeated)
            host += count * (cost.host + rest.forward + rest.backward)
            element = shape.element
        rows, encoded = (total / sizes.ranks for total in (sizes.rows, sizes.encoded))
        if sizes.text_copied:
            rows = sizes.rows
        device += text_seconds(model.row_operations, rows, element, own)
        return Work(device + encoded * model.token_operations / (TEXT_SHARE * own.matmul), host)

    def layer_sizes(self, shapes: Mapping[str, CallShape]) -> list[LayerSizes]:
        """What the memory plan must know of each decoder layer, on the rank that holds most, by the plan at hand."""
        found = [sizes for _, sizes in self._with_sizes(self.plan, shapes) if sizes is not None]
        for layer in self._mixers:
            mode = mode_named("ulysses") if shapes[layer.kind].ranks > 1 else LOCAL
            found.append(_layer_sizes(mode.key, layer, shapes[layer.kind], self._model))
        return found

    def _with_sizes(
        self, plans: Sequence[LayerPlan], shapes: Mapping[str, CallShape]
    ) -> list[tuple[LayerPlan, LayerSizes | None]]:
        return [
            (
                plan,
                _layer_sizes(plan.mode.key, layer, shapes[layer.kind], self._model) if layer.kind in shapes else None,
            )
            for plan, layer in zip(plans, self._layers, strict=True)
        ]

    def note_times(self, plan: Plan, measured: Mapping[str, Mapping[str, float]]) -> Plan:
        """``plan``, one of this planner's, with measured milliseconds (``forward``, ``backward``) by layer name."""
        noted = tuple(
            replace(layer, measured_ms={k: round(v, 4) for k, v in measured[layer.layer].items()})
            if layer.layer in measured
            else layer
            for layer in plan
        )
        if self.plan is plan:
            self.plan = noted
        self._plan_of = {key: noted if known is plan else known for key, known in self._plan_of.items()}
        return noted


def _layer_sizes(mode: ModeKey, layer: AttentionLayer, shape: CallShape, model: DenseSizes) -> LayerSizes:
    rows, keys = max(shape.q_lengths), max(shape.kv_lengths)
    if layer.role == "cross":
        keys = max(keys, model.frame_tokens)  # a rank without frames has a blank one
    return LayerSizes(
        layer.role, *mode, shape.batch, shape.ranks,
        rows, rows, sum(shape.q_lengths), keys, max(sum(shape.kv_lengths), keys),
        layer.heads, layer.kv_heads, layer.head_dim, model.width, model.intermediate, shape.element, layer.shares_layer,
        shape.inner_size, model.tiled_mlp, layer.value_dim,
    )  # fmt: skip
