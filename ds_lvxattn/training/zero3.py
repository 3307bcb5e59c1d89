"""ZeRO-3 with fewer and larger gathers: what it takes as a whole, and its sizes where the config leaves them out."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.utils import set_z3_leaf_module, set_z3_leaf_modules
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from ds_lvxattn.errors import ConfigError
from ds_lvxattn.families import VisualFamily, family_of, unwrapped
from ds_lvxattn.plan.zero import gradient_bucket
from ds_lvxattn.runtime.kept_parameters import KeptParameters
from ds_lvxattn.training.ds_config import zero_stage
from ds_lvxattn.training.memory_plan import Frozen, KeptFrozen

# Share of the device's memory that a frozen encoder may take while all portions of the frames go through it.
ENCODER_SHARE = 0.1
# Keys with which DeepSpeed holds partitions, or gathers them, in another way.
REPARTITIONED = (
    "mics_shard_size", "zero_hpz_partition_size", "zero_quantized_weights", "zero_quantized_nontrainable_weights",
)  # fmt: skip
DEFAULT_LIMIT = 1_000_000_000  # of parameters, DeepSpeed's for both of ``LIMITS``
LIVE, PREFETCH, REDUCE = "stage3_max_live_parameters", "stage3_prefetch_bucket_size", "reduce_bucket_size"
LIMITS = (LIVE, "stage3_max_reuse_distance")


def take_as_wholes(model: nn.Module, zero: dict[str, Any]) -> dict[str, Any]:
    """Mark, ahead of ``deepspeed.initialize``, what ZeRO-3 gathers by one collective and calls without hooks inside.

    - A frozen vision encoder, which stays gathered for all portions of the frames, unless it is large.
    - Frozen decoder layers without cross-attention, whose only input with a gradient is the first one: DeepSpeed takes
      a backward pass for finished when the gradients of the positional inputs are there.
    - Experts that are computed one by one: they call their activation as often as tokens reach one of them, which
      differs between the ranks, and DeepSpeed compares what they called.

    Args:
        model: the model, or what holds it.
        zero: the block ``zero_optimization``.

    Returns:
        ``zero`` with sizes for what was marked, and of the buckets of gradients, where it has none.
    """
    experts = {type(module) for module in model.modules() if type(module).__name__.endswith("Experts")}
    if experts:
        set_z3_leaf_modules(model, list(experts))
    base = unwrapped(model)
    try:
        family = family_of(base)
    except ConfigError:
        return zero  # adapters or parts of a model by themselves: nothing is known of them
    roles = {module: layer.role for module, layer in family.attention_layers(base).items()}
    live, largest, trained = 0, 0, 0
    encoder = family.encoder(base) if isinstance(family, VisualFamily) else None
    if encoder is not None and _frozen(encoder) and _bytes(encoder) <= ENCODER_SHARE * _memory():
        set_z3_leaf_module(encoder, True)
        live = _numel(encoder)
    inside = set() if encoder is None else {*encoder.modules()}
    for layer in base.modules():
        if not isinstance(layer, GradientCheckpointingLayer) or layer in inside:
            continue
        of_layer = {roles[module] for module in layer.modules() if module in roles}
        if of_layer:
            largest, trained = max(largest, _numel(layer)), max(trained, _numel(layer, trains=True))
        if of_layer == {"self"} and _frozen(layer):
            set_z3_leaf_module(layer, True)
    sizes = {}
    if largest:
        # A layer ahead; DeepSpeed's own size is less than the largest matrix of a layer.
        sizes[PREFETCH] = max(50_000_000, largest)
        sizes[LIVE] = DEFAULT_LIMIT + live + largest
    if total := _numel(model, trains=True):
        sizes[REDUCE] = gradient_bucket(trained, total)
    return {**sizes, **zero}


def frozen_of(kept: KeptParameters, ds_config: dict[str, Any], wish: bool | str) -> Frozen | None:
    """What the memory plan must know of parameters that could stay gathered; None without ZeRO-3.

    Raises:
        ConfigError: the config wants them kept, and something else in it does not let them be.
    """
    if zero_stage(ds_config) != 3:
        return None
    zero = ds_config["zero_optimization"]
    obstacle = None
    if (zero.get("offload_param") or {}).get("device", "none") != "none":
        obstacle = "'zero_optimization.offload_param' leaves parameters off the device"
    elif named := [key for key in REPARTITIONED if zero.get(key) is True or _number(zero.get(key), 0) > 1]:
        obstacle = f"'zero_optimization.{named[0]}' holds parameters in another way"
    if obstacle is not None and wish is True:
        raise ConfigError(f"'sequence_parallel.keep_frozen' is true, and {obstacle}; leave one of the two out")
    return Frozen(kept.numel, wish, obstacle, bool(kept.trained))


def may_keep_trained(ds_config: dict[str, Any]) -> bool:
    """Whether the config sets no lower limit than DeepSpeed does to what is whole at a time."""
    zero = ds_config.get("zero_optimization", {})
    return all(_number(zero.get(key), DEFAULT_LIMIT) >= DEFAULT_LIMIT for key in LIMITS)


def _number(value: Any, default: int) -> float:
    return value if isinstance(value, (int, float)) else default  # not "auto"


def keep(kept: KeptParameters, fate: KeptFrozen, device: torch.device) -> KeptFrozen:
    """Keep what is frozen, if all ranks of the run are to; all call it. Returns what has become of it."""
    most = sys.maxsize if fate.portions is None else fate.portions
    least = torch.tensor(most if fate.kept else -1, device=device)
    dist.all_reduce(least, dist.ReduceOp.MIN)
    if (portions := int(least)) < 0:
        elsewhere = replace(fate, kept=False, why="it does not fit on another rank", bytes=0, trained=False)
        return elsewhere if fate.kept else fate
    portions_that_fit = None if portions == sys.maxsize else portions
    kept.keep(portions_that_fit)
    return replace(fate, portions=portions_that_fit)


def _frozen(module: nn.Module) -> bool:
    return not any(parameter.requires_grad for parameter in module.parameters())


def _numel(module: nn.Module, trains: bool = False) -> int:
    """Elements of its parameters, of those that train alone where ``trains``."""
    some = (p for p in module.parameters() if p.requires_grad or not trains)
    return sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in some)


def _bytes(module: nn.Module) -> int:
    return sum(getattr(p, "ds_numel", p.numel()) * p.element_size() for p in module.parameters())


def _memory() -> float:
    """Bytes of the device, the same on every rank."""
    if not torch.cuda.is_available():
        return float("inf")
    return float(torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory)
