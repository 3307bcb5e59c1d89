"""A transformers model made sequence-parallel: roles, hooks and the plan, without touching its code."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from ds_lvxattn.comm import Communicator, communicator
from ds_lvxattn.config import ConfigError, SequenceParallelConfig
from ds_lvxattn.groups import SequenceParallelGroups
from ds_lvxattn.kernels.base import Call
from ds_lvxattn.kernels.dispatch import select_kernel
from ds_lvxattn.models import family_of
from ds_lvxattn.plan.memory import POLICIES, LayerSizes, kept_bytes
from ds_lvxattn.plan.plan import AttentionLayer, LayerPlan, plan_layers
from ds_lvxattn.plan.traffic import LayerShape
from ds_lvxattn.recompute import Recomputation
from ds_lvxattn.registration import IMPLEMENTATION, register_with_transformers

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
        ConfigError: an attention implementation that would be overruled, attention dropout above 0, or a model
            class that no family knows.
    """

    def __init__(self, model: PreTrainedModel, config: SequenceParallelConfig, groups: SequenceParallelGroups) -> None:
        self.config = config
        self.comm: Communicator = communicator(groups.get_sequence_parallel_group())
        self.family = family_of(model)
        self.model_config = model.config
        text = getattr(model.config, self.family.attention_config)
        if text._attn_implementation not in REPLACEABLE:
            raise ConfigError(
                f"the model's attention implementation is '{text._attn_implementation}', and sequence parallelism "
                f"needs '{IMPLEMENTATION}': load the model without attn_implementation, or set "
                "'sequence_parallel_size' to 1"
            )
        dropout = max(getattr(text, key, 0.0) or 0.0 for key in ("dropout", "attention_dropout"))
        if dropout:
            raise ConfigError(
                f"the model's attention dropout is {dropout}; sequence-parallel attention has none, set it to 0 "
                "in the model's config"
            )
        register_with_transformers()
        model.set_attn_implementation({self.family.attention_config: IMPLEMENTATION})
        self._layers = self.family.attention_layers(model)
        self.recomputation = Recomputation(
            model,
            [module for module, layer in self._layers.items() if layer.role == "cross"],
            self._decoder_layers(model),
            config.recompute,
            "recompute" in config.model_fields_set,
            config.offload,
        )
        self.family.install_hooks(model, self.recomputation)
        self.plans: dict[nn.Module, LayerPlan] = {}

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

    def make_plan(self, shapes: Mapping[str, LayerShape], device: torch.device, dtype: torch.dtype) -> None:
        """Choose every layer's strategy for batches like ``shapes`` (role to sizes), computed in ``dtype``.

        Rank 0 chooses and tells the others, so that no rank can come to another plan.

        Raises:
            ConfigError: on every rank, when a setting cannot work for a layer.
        """
        for layer in self._layers.values():
            if layer.role in shapes:
                call = Call(device.type, dtype, layer.heads, layer.kv_heads, layer.head_dim, masked=True)
                try:
                    select_kernel(self.config.kernel, call)
                except ValueError as error:
                    raise ConfigError(f"layer {layer.name}: {error}") from error
        answer: list[list[LayerPlan] | ConfigError | None] = [None]
        if dist.get_rank() == 0:
            try:
                config = self.config.model_copy(update={"recompute": self.recomputation.policy})
                answer[0] = plan_layers(list(self._layers.values()), shapes, config, device.type)
            except ConfigError as error:
                answer[0] = error
        dist.broadcast_object_list(answer, src=0)
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
            module: self._layer_sizes(self.plans[module], layer, shapes[layer.role])
            for module, layer in self._layers.items()
            if layer.role in shapes
        }

    def _layer_sizes(self, plan: LayerPlan, layer: AttentionLayer, shape: LayerShape) -> LayerSizes:
        text = getattr(self.model_config, self.family.attention_config)
        rows, keys = max(shape.q_lengths), max(shape.kv_lengths)
        if layer.role == "cross":
            keys = max(keys, self.family.frame_tokens(self.model_config))  # a rank without frames has a blank one
        return LayerSizes(
            layer.role, plan.strategy, plan.schedule, shape.batch, shape.ranks,
            rows, rows, sum(shape.q_lengths), keys, max(sum(shape.kv_lengths), keys),
            layer.heads, layer.kv_heads, layer.head_dim, text.hidden_size, text.intermediate_size, shape.element,
        )  # fmt: skip
