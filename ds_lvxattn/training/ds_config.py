"""The DeepSpeed config as the loop hands it to DeepSpeed: batch sizes and ``auto`` values filled in.

``auto`` is resolved as the Trainer of transformers does it, whose configs are found everywhere. What the Trainer takes
from its command line and this loop does not have (``bf16.enabled``) is refused by its key.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from transformers import PretrainedConfig

from ds_lvxattn.errors import ConfigError

AUTO = "auto"
BATCH, MICRO_BATCH, ACCUMULATION = "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"
# Schedule settings that a run fills in when the config says "auto": the key and its share of the steps.
AUTO_STEPS = {"total_num_steps": 1.0, "warmup_num_steps": 0.05}
# Keys whose "auto" means a size of the model: as transformers fills them in from the hidden size.
MODEL_SIZES: dict[str, Callable[[int], int]] = {
    "reduce_bucket_size": lambda hidden: hidden * hidden,
    "stage3_prefetch_bucket_size": lambda hidden: int(0.9 * hidden * hidden),
    "stage3_param_persistence_threshold": lambda hidden: 10 * hidden,
}


def resolve_ds_config(ds_config: dict[str, Any], steps: int, data_ranks: int) -> dict[str, Any]:
    """A copy of ``ds_config`` with all three batch sizes, and with a value for each ``auto`` that has one.

    ``auto`` values that depend on the model stay; ``fill_model_sizes`` sees to them.

    Args:
        steps: length of the schedule, in optimizer steps.
        data_ranks: data-parallel ranks.

    Raises:
        ConfigError: the batch sizes are missing, no positive whole numbers, or do not fit each other.
    """
    resolved = copy.deepcopy(ds_config)
    resolved.update(zip((BATCH, MICRO_BATCH, ACCUMULATION), batch_sizes(ds_config, data_ranks), strict=True))
    if resolved.get("gradient_clipping") == AUTO:
        resolved["gradient_clipping"] = _trainer_default("max_grad_norm")
    optimizer, scheduler = _params(resolved, "optimizer"), _params(resolved, "scheduler")
    for key, argument in (("lr", "learning_rate"), ("eps", "adam_epsilon"), ("weight_decay", "weight_decay")):
        if optimizer.get(key) == AUTO:
            optimizer[key] = _trainer_default(argument)
    if optimizer.get("betas") == AUTO:
        optimizer["betas"] = [_trainer_default("adam_beta1"), _trainer_default("adam_beta2")]
    if scheduler.get("warmup_min_lr") == AUTO:
        scheduler["warmup_min_lr"] = 0.0
    if scheduler.get("warmup_max_lr") == AUTO and "lr" in optimizer:
        scheduler["warmup_max_lr"] = optimizer["lr"]
    fill_steps(resolved, auto_steps(resolved), steps)
    return resolved


def zero_stage(ds_config: Mapping[str, Any]) -> int:
    """The stage of ZeRO; 0 without it."""
    return (ds_config.get("zero_optimization") or {}).get("stage", 0)


def with_fused_adam(ds_config: Mapping[str, Any]) -> dict[str, Any]:
    """``ds_config`` whose Adam is torch's fused one, unless it chooses another or its optimizer is on the CPU.

    DeepSpeed's own is as fast and computes the same, but is compiled at its first use, for which a machine with a GPU
    needs CUDA's compiler; torch's without ``fused`` goes over all states several times.
    """
    config, optimizer = dict(ds_config), ds_config.get("optimizer")
    zero = ds_config.get("zero_optimization") or {}
    offloaded = (zero.get("offload_optimizer") or {}).get("device", "none") != "none"
    if not isinstance(optimizer, dict) or str(optimizer.get("type")).lower() not in ("adam", "adamw"):
        return config
    params = dict(optimizer.get("params") or {})
    known = {*inspect.signature(torch.optim.AdamW).parameters, "torch_adam", "adam_w_mode"}
    # Without ZeRO, DeepSpeed scales the loss of fp16 otherwise for optimizers that it does not take for fused.
    if offloaded or not zero.get("stage") or not known.issuperset(params):
        return config
    if params.get("torch_adam", True) and not {"fused", "foreach"}.intersection(params):
        config["optimizer"] = {**optimizer, "params": {**params, "torch_adam": True, "fused": True}}
    return config


def auto_steps(ds_config: dict[str, Any]) -> tuple[str, ...]:
    """Settings of the schedule that are ``auto`` and follow from the number of steps."""
    scheduler = _params(ds_config, "scheduler")
    return tuple(key for key in AUTO_STEPS if scheduler.get(key) == AUTO)


def fill_steps(ds_config: dict[str, Any], keys: Iterable[str], steps: int) -> None:
    """Fill in, in place, such settings for a schedule of ``steps`` optimizer steps."""
    for key in keys:
        _params(ds_config, "scheduler")[key] = max(1, round(AUTO_STEPS[key] * steps))


def fill_model_sizes(ds_config: dict[str, Any], config: PretrainedConfig) -> None:
    """Fill in, in place, what ``auto`` leaves to the model: bucket sizes of ZeRO from the hidden size of the text."""
    zero = ds_config.get("zero_optimization", {})
    for key, size in MODEL_SIZES.items():
        if zero.get(key) == AUTO:
            zero[key] = size(config.get_text_config().hidden_size)


def batch_sizes(ds_config: dict[str, Any], data_ranks: int) -> tuple[int, int, int]:
    """Global batch, micro-batch and accumulation; DeepSpeed's own rules for what is missing or ``auto``.

    Raises:
        ConfigError: neither the global batch nor the micro-batch is given, one is no positive whole number, or the
            first is not the product of the others and the data-parallel ranks.
    """
    given = {key: ds_config.get(key) for key in (BATCH, MICRO_BATCH, ACCUMULATION)}
    for key, value in given.items():
        if value is not None and value != AUTO and (type(value) is not int or value < 1):
            raise ConfigError(f"'{key}' is {value!r}; give a whole number of at least 1")
    numbers: list[int | None] = [None if value == AUTO else value for value in given.values()]
    batch, micro_batch, accumulation = numbers
    if batch is None and micro_batch is None:
        raise ConfigError(
            f"'{BATCH}' is {_absent(given[BATCH])} and '{MICRO_BATCH}' is {_absent(given[MICRO_BATCH])}; "
            "give a number for one of them"
        )
    if micro_batch is None:
        assert batch is not None
        micro_batch = max(1, batch // (data_ranks * (accumulation or 1)))
    if batch is None:
        batch = micro_batch * (accumulation or 1) * data_ranks
    if accumulation is None:
        accumulation = max(1, batch // (micro_batch * data_ranks))
    if batch != micro_batch * accumulation * data_ranks:
        raise ConfigError(
            f"'{BATCH}' is {batch}, which is not '{MICRO_BATCH}' {micro_batch} x '{ACCUMULATION}' {accumulation} x "
            f"{data_ranks} data-parallel ranks; change one of the three, or leave '{ACCUMULATION}' out"
        )
    return batch, micro_batch, accumulation


def _params(ds_config: dict[str, Any], block: str) -> dict[str, Any]:
    """``params`` of the optimizer or scheduler, where they are what they should be: that is checked elsewhere."""
    found = ds_config.get(block)
    params = found.get("params") if isinstance(found, dict) else None
    return params if isinstance(params, dict) else {}


def _absent(value: Any) -> str:
    return "missing" if value is None else repr(value)


def _trainer_default(argument: str) -> Any:
    """Default of an argument of transformers' Trainer, in this version of it."""
    from transformers import TrainingArguments  # slow to import, and rarely needed

    return next(field.default for field in dataclasses.fields(TrainingArguments) if field.name == argument)
