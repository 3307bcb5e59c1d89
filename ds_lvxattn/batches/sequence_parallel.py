"""A transformers model made sequence-parallel: roles, hooks and recomputation, without touching its code."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Mapping
from types import MappingProxyType

from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from ds_lvxattn.config import SequenceParallelConfig
from ds_lvxattn.errors import ConfigError
from ds_lvxattn.exchange.comm import Communicator, close_levels, communicator
from ds_lvxattn.exchange.grid import make_grids, node_size
from ds_lvxattn.families import family_of
from ds_lvxattn.families.rotary import check_positions
from ds_lvxattn.groups import SequenceParallelGroups
from ds_lvxattn.kernels.settled import forget_tables
from ds_lvxattn.plan.layer_plan import AttentionLayer
from ds_lvxattn.plan.modes import eligible_modes
from ds_lvxattn.runtime.compiled import compile_layers
from ds_lvxattn.runtime.copies import refuse_copies
from ds_lvxattn.runtime.dropout import drop_rate
from ds_lvxattn.runtime.norms import fuse_norms
from ds_lvxattn.runtime.projections import fuse_patches
from ds_lvxattn.runtime.recompute import Recomputation
from ds_lvxattn.runtime.registration import (
    IMPLEMENTATION,
    refuse_other_arguments,
    refuse_other_masks,
    refuse_replaced,
    register_with_transformers,
)
from ds_lvxattn.runtime.temperature import set_temperature_apart
from ds_lvxattn.runtime.tiled import TiledLogits, tile_feed_forward

# transformers chooses these by itself; any other implementation is somebody's wish, which is not overruled.
REPLACEABLE = ("sdpa", "eager", IMPLEMENTATION)


class SequenceParallel:
    """A model that is attached.

    Attaching sets the attention implementation of the text part to ``ds_lvxattn``, gives each attention module a
    role and installs the family's hooks. The model's forward then takes ``sequence_parallel``.

    Args:
        model: a transformers model of a known family.
        config: the sequence-parallel settings.
        groups: the process groups.

    Attributes:
        layers: the model's attention modules, in its order, with roles and sizes.
        mixers: modules that mix tokens outside attention, with sizes.
        recomputation: what its layers compute again in the backward pass.
        comm: communicator of the sequence-parallel group.
        tiled_logits: its output layer and loss by tiles; None: all rows at once.

    Raises:
        ConfigError: an attention implementation that would be overruled, attention dropout above 0, rotary frequencies
            that depend on the length, or a model class that no family knows.
    """

    def __init__(self, model: PreTrainedModel, config: SequenceParallelConfig, groups: SequenceParallelGroups) -> None:
        self.model, self.config = model, config
        self.comm: Communicator = communicator(groups.get_sequence_parallel_group())
        self.comm.node_size = config.inner_size or node_size(self.comm, of_world=True)
        named = {config.strategy, *config.layers.values()}
        if "auto" in named or any(mode.two_levels and mode.strategy in named for mode in eligible_modes()):
            make_grids(self.comm, self.comm.node_size)
        self.family = family_of(model)
        text = self.family.text_config
        if text._attn_implementation not in REPLACEABLE:
            raise ConfigError(
                f"the model's attention implementation is '{text._attn_implementation}', and sequence parallelism "
                f"needs '{IMPLEMENTATION}': load the model without attn_implementation, or set "
                "'sequence_parallel_size' to 1"
            )
        self.layers: Mapping[nn.Module, AttentionLayer] = MappingProxyType(self.family.attention_layers(model))
        dropout = max([getattr(text, "attention_dropout", 0.0) or 0.0, *map(attention_dropout, self._exchanged)])
        if dropout:
            raise ConfigError(
                f"the model's attention dropout is {dropout}; sequence-parallel attention has none, set it to 0 "
                "in the model's config"
            )
        check_positions(text)
        self.mixers: Mapping[nn.Module, AttentionLayer] = MappingProxyType(self.family.mixers(model))
        self._check_heads()
        register_with_transformers()
        if self.family.attention_config is not None:
            model.set_attn_implementation({self.family.attention_config: IMPLEMENTATION})
            self._reach_copies()
        registered = self.family.attention_config is not None
        refuse = functools.partial(refuse_other_arguments, text, registered)
        for part in self._around_exchanged:
            part.register_forward_pre_hook(refuse_other_masks, with_kwargs=True)
            part.register_forward_pre_hook(refuse, with_kwargs=True)
        fuse_norms(model)
        fuse_patches(model)
        self.family.reach_attention(model)
        divided = {layer.name: (module, module.forward) for module, layer in self.mixers.items()}
        for part in self._around_exchanged if divided else ():
            # Ahead of the others, which mark the batch as looked at.
            hook = functools.partial(refuse_replaced, divided)
            part.register_forward_pre_hook(hook, with_kwargs=True, prepend=True)
        self.recomputation = Recomputation(
            model,
            self.family.recomputed(self.layers),
            self.decoder_layers,
            config.recompute,
            "recompute" in config.model_fields_set,
            config.offload,
        )
        self.family.install_hooks(model, self.recomputation)
        set_temperature_apart(self._exchanged)
        self.tiled_logits = tile_rows(model, self.layers, config)
        refuse_copies([model, *self._exchanged, *self.mixers])
        if config.compile:
            compile_layers(self.compilable)
        self._forget_tables = weakref.finalize(model, forget_tables)

    def close(self) -> None:
        """End the groups of its grids, not those that it was given; after their last use, on every rank."""
        close_levels(self.comm)
        self._forget_tables()

    def _check_heads(self) -> None:
        """Raise ``ConfigError`` where a module outside attention has fewer heads than ranks are to share."""
        for module, layer in self.mixers.items():
            if layer.heads < self.comm.ranks:
                raise ConfigError(
                    f"{layer.name} ({type(module).__name__}) has {layer.heads} heads, of which each rank takes at "
                    f"least one, and 'sequence_parallel_size' is {self.comm.ranks}; set it to {layer.heads} or less"
                )

    def _reach_copies(self) -> None:
        """Set the implementation where parts were copied ahead of attaching, as PEFT's ``modules_to_save`` does.

        Such a part has a copy of the config too, by which it would attend to the rank's own rows alone.
        """
        key, text = self.family.attention_config, self.family.text_config
        for part in (*self._exchanged, *self._around_exchanged):
            config = getattr(part, "config", None)
            config = getattr(config, key, config) if key else config
            if isinstance(config, type(text)) and config._attn_implementation != IMPLEMENTATION:
                config._attn_implementation = IMPLEMENTATION  # of the configs inside too, the encoder's among them

    @property
    def _exchanged(self) -> list[nn.Module]:
        return [module for module, layer in self.layers.items() if layer.role != "local"]

    @property
    def _around_exchanged(self) -> list[PreTrainedModel]:
        """The model, and the models in it that hold exchanged attention."""
        exchanged = {*self._exchanged}
        inside = (module for module in self.model.modules() if isinstance(module, PreTrainedModel))
        holders = (module for module in inside if not exchanged.isdisjoint(module.modules()))
        return [self.model, *(module for module in holders if module is not self.model)]

    @property
    def decoder_layers(self) -> list[GradientCheckpointingLayer]:
        """The layers around exchanged attention and beside those, which transformers can checkpoint."""
        return decoder_layers(self.model, self.layers)

    @functools.cached_property
    def draws(self) -> str | None:
        """What draws numbers at random in the layers of the text, adapters put in by then included; None: nothing.

        Ranks whose frames differ in number are at different places of their generators.
        """
        for layer in self.decoder_layers:
            for name, module in layer.named_modules():
                rate = drop_rate(module) or getattr(module, "dropout", 0.0)
                if isinstance(rate, (int, float)) and rate > 0:
                    return f"dropout of {rate} in {name or type(layer).__name__}"
        return None

    @property
    def compilable(self) -> list[nn.Module]:
        """The layers that can be compiled, of the language model and of the vision encoder."""
        encoders = [module for module, layer in self.layers.items() if layer.role == "local"]
        parents = [m for m in self.model.modules() if not set(m.children()).isdisjoint(encoders)]
        return [*self.decoder_layers, *parents]

    @property
    def head_layouts(self) -> list[tuple[int, int, int]]:
        """Query heads, key heads and head size of the layers that exchange."""
        return sorted({(x.heads, x.kv_heads, x.head_dim) for x in self.layers.values() if x.role != "local"})

    @property
    def limits(self) -> list[tuple[int | None, int | None]]:
        """Sliding windows and chunks of self-attention layers, each pair once; none of layers without either."""
        found = {(layer.window, layer.chunk) for layer in self.layers.values()} - {(None, None)}
        return sorted(found, key=str)


def decoder_layers(model: nn.Module, layers: Mapping[nn.Module, AttentionLayer]) -> list[GradientCheckpointingLayer]:
    """The layers of ``model`` around its attention modules ``layers`` but those of encoders, and those beside them,
    which may have something else in the place of attention."""
    attention = {module for module, layer in layers.items() if layer.role != "local"}
    around = {layer for layer in model.modules() if attention.intersection(layer.modules())}
    lists = [x for x in model.modules() if isinstance(x, nn.ModuleList) and not around.isdisjoint(x)]
    beside = {layer for some in lists for layer in some}
    return [x for x in model.modules() if isinstance(x, GradientCheckpointingLayer) and (x in around or x in beside)]


def tile_rows(
    model: PreTrainedModel, layers: Mapping[nn.Module, AttentionLayer], config: SequenceParallelConfig
) -> TiledLogits | None:
    """Let ``model`` take its rows by tiles where the settings say so, sequence-parallel or not.

    Raises:
        ConfigError: it has no part that can.
    """
    if config.tiled_mlp is not None:
        tile_feed_forward(decoder_layers(model, layers), config.tiled_mlp)
    return None if config.tiled_logits is None else TiledLogits(model, config.tiled_logits)


def attention_dropout(attention: nn.Module) -> float:
    """Probability with which a module drops attention weights; in a config ``dropout`` may be that of other layers."""
    values = (getattr(attention, key, 0.0) for key in ("dropout", "attention_dropout"))
    return max((value for value in values if isinstance(value, (int, float))), default=0.0)
