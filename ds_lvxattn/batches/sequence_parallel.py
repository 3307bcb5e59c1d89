"""A transformers model made sequence-parallel: roles, hooks and the plan, without touching its code."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from ds_lvxattn.config import SequenceParallelConfig
from ds_lvxattn.errors import ConfigError
from ds_lvxattn.exchange.comm import Communicator, communicator
from ds_lvxattn.families import family_of
from ds_lvxattn.families.rotary import check_positions
from ds_lvxattn.groups import SequenceParallelGroups
from ds_lvxattn.kernels.base import Call
from ds_lvxattn.kernels.dispatch import select_kernel
from ds_lvxattn.plan.choice import ShapeClass, class_of
from ds_lvxattn.plan.layer_plan import AttentionLayer, LayerPlan, plan_layers, recomputed
from ds_lvxattn.plan.memory import POLICIES, LayerSizes, kept_bytes
from ds_lvxattn.plan.profile import Profile, profile_for_device
from ds_lvxattn.plan.traffic import LayerShape
from ds_lvxattn.plan.undivided import whole_is_faster
from ds_lvxattn.runtime.layer_times import LayerTimes
from ds_lvxattn.runtime.recompute import Recomputation
from ds_lvxattn.runtime.registration import IMPLEMENTATION, register_with_transformers

# transformers chooses these by itself; any other implementation is somebody's wish, which is not overruled.
REPLACEABLE = ("sdpa", "eager", IMPLEMENTATION)


class SequenceParallel:
    """What training keeps for a sequence-parallel model.

    Attaching sets the attention implementation of the text part to ``ds_lvxattn``, gives each attention module a
    role and installs the family's hooks. The model's forward then takes ``sequence_parallel``.

    Args:
        model: a transformers model of a known family.
        config: the sequence-parallel settings.
        groups: the process groups.

    Raises:
        ConfigError: an attention implementation that would be overruled, attention dropout above 0, rotary frequencies
            that depend on the length, or a model class that no family knows.
    """

    def __init__(self, model: PreTrainedModel, config: SequenceParallelConfig, groups: SequenceParallelGroups) -> None:
        self.config = config
        self.comm: Communicator = communicator(groups.get_sequence_parallel_group())
        self.family = family_of(model)
        self.model_config = model.config
        text = self.family.text_config(model.config)
        if text._attn_implementation not in REPLACEABLE:
            raise ConfigError(
                f"the model's attention implementation is '{text._attn_implementation}', and sequence parallelism "
                f"needs '{IMPLEMENTATION}': load the model without attn_implementation, or set "
                "'sequence_parallel_size' to 1"
            )
        self._layers = self.family.attention_layers(model)
        exchanged = [module for module, layer in self._layers.items() if layer.role != "local"]
        dropout = max([getattr(text, "attention_dropout", 0.0) or 0.0, *map(attention_dropout, exchanged)])
        if dropout:
            raise ConfigError(
                f"the model's attention dropout is {dropout}; sequence-parallel attention has none, set it to 0 "
                "in the model's config"
            )
        check_positions(text)
        register_with_transformers()
        if self.family.attention_config is not None:
            model.set_attn_implementation({self.family.attention_config: IMPLEMENTATION})
        self.family.reach_attention(model)
        self.recomputation = Recomputation(
            model,
            self.family.recomputed(self._layers),
            self._decoder_layers(model),
            config.recompute,
            "recompute" in config.model_fields_set,
            config.offload,
        )
        self.family.install_hooks(model, self.recomputation)
        self.plans: dict[nn.Module, LayerPlan] = {}
        self.profile: Profile | None = None
        self.times: LayerTimes | None = None
        self._plan_of_class: dict[ShapeClass, dict[nn.Module, LayerPlan]] = {}
        self._whole: dict[ShapeClass, bool] = {}
        self._operations = self._dense_operations(model)

    def _decoder_layers(self, model: nn.Module) -> list[GradientCheckpointingLayer]:
        """The layers around exchanged attention, which transformers can checkpoint."""
        attention = {module for module, layer in self._layers.items() if layer.role != "local"}
        return [
            layer
            for layer in model.modules()
            if isinstance(layer, GradientCheckpointingLayer) and attention.intersection(layer.modules())
        ]

    @property
    def plan(self) -> list[LayerPlan]:
        """The plan, a layer each, in the model's order; empty before ``make_plan``."""
        return list(self.plans.values())

    @property
    def head_layouts(self) -> list[tuple[int, int, int]]:
        """Query heads, key heads and head size of the layers that exchange."""
        return sorted({(x.heads, x.kv_heads, x.head_dim) for x in self._layers.values() if x.role != "local"})

    @property
    def windows(self) -> list[int]:
        """Sliding windows of self-attention layers, each once."""
        return sorted({layer.window for layer in self._layers.values() if layer.window is not None})

    def _dense_operations(self, model: PreTrainedModel) -> tuple[float, float]:
        """Operations, forward and backward, of a text row and of a token of the vision encoder, attention left out."""

        def parameters(module: nn.Module) -> dict[nn.Parameter, int]:
            return {p: getattr(p, "ds_numel", p.numel()) for p in module.parameters()}

        decoder = {p: n for layer in self._decoder_layers(model) for p, n in parameters(layer).items()}
        tables = [table for table in (model.get_input_embeddings(), model.get_output_embeddings()) if table is not None]
        others = parameters(model)
        for known in (decoder, *map(parameters, tables)):
            for parameter in known:
                others.pop(parameter, None)
        if not decoder:  # a language model of layers that transformers does not checkpoint: anything may be part of it
            decoder = others
        passes = 6.0 if any(p.requires_grad for p in others) else 2.0
        return 6.0 * sum(decoder.values()), passes * sum(others.values())

    def computes_whole(
        self,
        shape_class: ShapeClass,
        shapes: Callable[[], Mapping[str, LayerShape]],
        rows: int,
        encoded: float,
        device: torch.device,
    ) -> bool:
        """Whether every rank is to compute a batch of this class whole, instead of its part of it.

        Decided at the first batch of a class, from the shipped profile: batches are laid out ahead of their steps,
        perhaps before anything is measured, and alike on all ranks.

        Args:
            shape_class: see ``follow``.
            shapes: makes the sizes of the divided batch; called for a new class only.
            rows: text rows, over all samples.
            encoded: tokens of the vision encoder, over all samples.
        """
        if self.config.strategy != "auto" or self.config.schedule != "auto" or self.config.layers:
            return False
        if shape_class not in self._whole:
            sizes, policy = shapes(), self.recomputation.policy
            layers = [
                replace(
                    sizes[layer.kind], heads=layer.heads, kv_heads=layer.kv_heads, head_dim=layer.head_dim,
                    recompute=recomputed(layer.role, policy),
                )
                for layer in self._layers.values()
                if layer.kind in sizes
            ]  # fmt: skip
            dense = rows * self._operations[0] + encoded * self._operations[1]
            self._whole[shape_class] = whole_is_faster(layers, dense, shipped_profile(device))
        return self._whole[shape_class]

    def make_plan(
        self,
        shapes: Mapping[str, LayerShape],
        device: torch.device,
        dtype: torch.dtype,
        profile: Profile | None = None,
    ) -> None:
        """Choose every layer's strategy for batches like ``shapes`` (kind of layers to sizes), computed in ``dtype``.

        Rank 0 chooses and tells the others, so that no rank can come to another plan.

        Args:
            profile: the machine; None takes the shipped profile of the device.

        Raises:
            ConfigError: on every rank, when a setting cannot work for a layer.
        """
        for layer in self._layers.values():
            if layer.kind in shapes:
                call = Call(device.type, dtype, layer.heads, layer.kv_heads, layer.head_dim, masked=True)
                try:
                    select_kernel(self.config.kernel, call)
                except ValueError as error:
                    raise ConfigError(f"layer {layer.name}: {error}") from error
        self.profile = profile or shipped_profile(device)
        self._decide(shapes, None)
        self._plan_of_class = {class_of(shapes): self.plans}

    def follow(self, shape_class: ShapeClass, shapes: Callable[[], Mapping[str, LayerShape]]) -> bool:
        """Plan anew when a batch is of a class of sizes that has no plan yet; return whether the plan changed.

        Every rank of the group calls it with the same sizes, so that all or none of them plan; the group's first rank
        decides. A layer changes its strategy only for a gain that is worth it (``choice.HYSTERESIS``).

        Args:
            shape_class: ``choice.shape_class`` of the batch's attention roles.
            shapes: makes the sizes; called for a new class only.
        """
        known = self._plan_of_class.get(shape_class)
        before = self.plans
        if known is None:
            self._decide(shapes(), self.comm.group)
            self._plan_of_class[shape_class] = self.plans
        else:
            self.plans = known
        modes = ([(plan.strategy, plan.schedule) for plan in plans.values()] for plans in (before, self.plans))
        return next(modes) != next(modes)

    def _decide(self, shapes: Mapping[str, LayerShape], group: dist.ProcessGroup | None) -> None:
        """The plan of the first rank of ``group`` (None: of all ranks) for every rank in it."""
        assert self.profile is not None
        answer: list[list[LayerPlan] | ConfigError | None] = [None]
        if dist.get_rank(group) == 0:
            before = {plan.layer: (plan.strategy, plan.schedule) for plan in self.plan}
            try:
                config = self.config.model_copy(update={"recompute": self.recomputation.policy})
                layers = list(self._layers.values())
                answer[0] = plan_layers(layers, shapes, config, self.profile, before, _room())
            except ConfigError as error:
                answer[0] = error
        dist.broadcast_object_list(answer, src=0 if group is None else dist.get_global_rank(group, 0), group=group)
        if isinstance(answer[0], ConfigError):
            raise answer[0]
        assert answer[0] is not None
        self.plans = dict(zip(self._layers, answer[0], strict=True))
        for module, sizes in self._sizes(shapes).items():
            kept = {policy: kept_bytes(sizes, policy) for policy in POLICIES}
            self.plans[module] = replace(self.plans[module], kept_bytes=kept)

    def decoder_layer_sizes(self, shapes: Mapping[str, LayerShape]) -> list[LayerSizes]:
        """What the memory plan must know of each decoder layer, on the rank that holds most; after ``make_plan``."""
        return list(self._sizes(shapes).values())

    def _sizes(self, shapes: Mapping[str, LayerShape]) -> dict[nn.Module, LayerSizes]:
        return {
            module: self._layer_sizes(self.plans[module], layer, shapes[layer.kind])
            for module, layer in self._layers.items()
            if layer.kind in shapes
        }

    def note_times(self, measured: Mapping[nn.Module, Mapping[str, float]]) -> None:
        """Put measured milliseconds (``forward``, ``backward``) of attention modules into the plan."""
        for module, times in measured.items():
            self.plans[module] = replace(self.plans[module], measured_ms={k: round(v, 4) for k, v in times.items()})

    def _layer_sizes(self, plan: LayerPlan, layer: AttentionLayer, shape: LayerShape) -> LayerSizes:
        text = self.family.text_config(self.model_config)
        rows, keys = max(shape.q_lengths), max(shape.kv_lengths)
        if layer.role == "cross":
            keys = max(keys, self.family.frame_tokens(self.model_config))  # a rank without frames has a blank one
        # What decoders call it that have no gate: the plan takes their feed-forward part for one with a gate.
        inner = getattr(text, "intermediate_size", None) or getattr(text, "ffn_dim", 4 * text.hidden_size)
        return LayerSizes(
            layer.role, plan.strategy, plan.schedule, shape.batch, shape.ranks,
            rows, rows, sum(shape.q_lengths), keys, max(sum(shape.kv_lengths), keys),
            layer.heads, layer.kv_heads, layer.head_dim, text.hidden_size, inner, shape.element, layer.beside,
        )  # fmt: skip


def shipped_profile(device: torch.device) -> Profile:
    """The shipped profile that is nearest to ``device``."""
    return profile_for_device(torch.cuda.get_device_name(device) if device.type == "cuda" else device.type)


def attention_dropout(attention: nn.Module) -> float:
    """Probability with which a module drops attention weights; in a config ``dropout`` may be that of other layers."""
    values = (getattr(attention, key, 0.0) for key in ("dropout", "attention_dropout"))
    return max((value for value in values if isinstance(value, (int, float))), default=0.0)


def _room() -> float | None:
    """Bytes that one layer's exchange may need while it runs: half of what the device has left, which activations
    share. None on a CPU."""
    if not torch.cuda.is_available():
        return None
    free, _ = torch.cuda.mem_get_info()
    return 0.5 * (free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated())
