"""The planner of an attached model: its sizes, the device at hand, and one plan for all ranks of a group."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ds_lvxattn.batches.sequence_parallel import SequenceParallel
from ds_lvxattn.errors import ConfigError
from ds_lvxattn.families import VisualFamily
from ds_lvxattn.kernels.base import Call
from ds_lvxattn.kernels.dispatch import select_kernel, usable_kernels
from ds_lvxattn.plan.layer_plan import AttentionLayer, LayerPlan, PlanSettings
from ds_lvxattn.plan.planner import DenseSizes, Planner
from ds_lvxattn.plan.profile import Profile, profile_for_device
from ds_lvxattn.runtime.kept_parameters import UNUSED


def planner_for(parallel: SequenceParallel, device: torch.device, dtype: torch.dtype) -> Planner:
    """The planner of a model that runs on ``device`` and computes in ``dtype``.

    Raises:
        ConfigError: on every rank, when the kernel that is set cannot run a layer.
    """
    layers = list(parallel.layers.values())
    exchanged = [layer for layer in layers if layer.role != "local"]

    def call_of(layer: AttentionLayer, masked: bool) -> Call:
        sizes = layer.heads, layer.kv_heads, layer.head_dim
        return Call(
            device.type, dtype, *sizes, masked=masked, capped=layer.capped, value_dim=layer.value_dim,
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )  # fmt: skip

    for layer in exchanged:
        try:
            select_kernel(parallel.config.kernel, call_of(layer, masked=True))
        except ValueError as error:
            raise ConfigError(f"layer {layer.name}: {error}") from error
    if parallel.config.text == "replicated" and parallel.family.keys_in_text:
        raise ConfigError(
            "'sequence_parallel.text' is 'replicated', and the visual tokens of this model stand in its text, or it "
            "has none, so nothing would be divided: set it to 'auto' or 'divided'"
        )
    group = parallel.comm.group

    def share(make: Callable[[], list[LayerPlan]], everyone: bool) -> list[LayerPlan]:
        return made_by_first(make, None if everyone else group)

    config = parallel.config
    settings = PlanSettings(config.strategy, config.layers, config.schedule, text=config.text)
    calls = {call_of(layer, masked=False) for layer in exchanged}
    usable = {name for call in calls for name in usable_kernels(call)}
    return Planner(
        layers, settings, parallel.comm.ranks,
        dense_sizes(parallel), shipped_profile(device), lambda: parallel.recomputation.policy, room, share,
        usable, list(parallel.mixers.values()),
    )  # fmt: skip


def made_by_first(make: Callable[[], list[LayerPlan]], group: dist.ProcessGroup | None) -> list[LayerPlan]:
    """``make()`` of the first rank of ``group`` (None: of all ranks) on every rank in it, or the error that it raised.

    Raises:
        ConfigError: on every rank of the group.
    """
    answer: list[list[LayerPlan] | ConfigError | None] = [None]
    if dist.get_rank(group) == 0:
        try:
            answer[0] = make()
        except ConfigError as error:
            answer[0] = error
    dist.broadcast_object_list(answer, src=0 if group is None else dist.get_global_rank(group, 0), group=group)
    if isinstance(answer[0], ConfigError):
        raise answer[0]
    assert answer[0] is not None
    return answer[0]


def dense_sizes(parallel: SequenceParallel) -> DenseSizes:
    """Sizes of an attached model, whose parameters may be partitioned already."""
    family = parallel.family
    text = family.text_config
    # What decoders call it that have no gate: the plan takes their feed-forward part for one with a gate.
    inner = getattr(text, "intermediate_size", None) or getattr(text, "ffn_dim", 4 * text.hidden_size)
    inner = inner if isinstance(inner, int) else max(inner)  # of each layer, in Gemma 3n
    frame_tokens = family.frame_tokens() if isinstance(family, VisualFamily) else 1
    return DenseSizes(
        text.hidden_size, inner, frame_tokens, *_dense_operations(parallel), parallel.config.tiled_mlp,
        _pair_operations(parallel), _token_pixels(family.config),
    )  # fmt: skip


def _dense_operations(parallel: SequenceParallel) -> tuple[float, float]:
    """Operations, forward and backward, of a text row and of a token of the vision encoder, attention left out."""

    def parameters(module: nn.Module) -> dict[nn.Parameter, int]:
        return {p: getattr(p, "ds_numel", p.numel()) for p in module.parameters() if not hasattr(p, UNUSED)}

    model = parallel.model
    decoder = {p: n for layer in parallel.decoder_layers for p, n in parameters(layer).items()}
    head = model.get_output_embeddings()
    tables = [table for table in (model.get_input_embeddings(), head) if table is not None]
    others = parameters(model)
    for known in (decoder, *map(parameters, tables)):
        for parameter in known:
            others.pop(parameter, None)
    if not decoder:  # a language model of layers that transformers does not checkpoint: anything may be part of it
        decoder = others
    passes = 6.0 if any(p.requires_grad for p in others) else 2.0
    if head is not None:  # each row goes through it too
        decoder |= parameters(head)
    # Gradients of rows go through all weights, those of weights are computed where they train.
    return sum((6.0 if p.requires_grad else 4.0) * n for p, n in decoder.items()), passes * sum(others.values())


def _pair_operations(parallel: SequenceParallel) -> float:
    """Operations of attention in the vision encoder's layers for two tokens of a picture, forward and backward."""
    return sum(
        (12.0 if any(p.requires_grad for p in module.parameters()) else 4.0) * layer.heads * layer.head_dim
        for module, layer in parallel.layers.items()
        if layer.role == "local"
    )


def _token_pixels(config: Any) -> float:
    """Pixels of a patch, of all frames that a token has some of."""
    vision = getattr(config, "vision_config", None)
    patch = getattr(vision, "patch_size", None)
    if not isinstance(patch, int):
        return 0.0
    return float(patch**2 * getattr(vision, "temporal_patch_size", 1))


def shipped_profile(device: torch.device) -> Profile:
    """The shipped profile that is nearest to ``device``."""
    return profile_for_device(torch.cuda.get_device_name(device) if device.type == "cuda" else device.type)


def room() -> float | None:
    """Bytes that one layer's exchange may need while it runs: half of what the device has left, which activations
    share. None on a CPU."""
    if not torch.cuda.is_available():
        return None
    free, _ = torch.cuda.mem_get_info()
    return 0.5 * (free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated())
