"""The DeepSpeed config as the loop hands it to DeepSpeed: batch size and ``auto`` values filled in."""

from __future__ import annotations

import copy
from typing import Any

from ds_lvxattn.errors import ConfigError

# Schedule settings that a run fills in when the config says "auto": the key and its share of the steps.
AUTO_STEPS = {"total_num_steps": 1.0, "warmup_num_steps": 0.05}


def resolve_ds_config(ds_config: dict[str, Any], steps: int, data_ranks: int) -> dict[str, Any]:
    """A copy of ``ds_config`` with a global batch size, and scheduler lengths from ``steps`` where they are ``auto``.

    Args:
        steps: length of the schedule, in optimizer steps.
        data_ranks: data-parallel ranks.

    Raises:
        ConfigError: neither the global batch size nor the micro-batch size is given.
    """
    resolved = copy.deepcopy(ds_config)
    if "train_batch_size" not in resolved:
        micro_batch = resolved.get("train_micro_batch_size_per_gpu")
        if not isinstance(micro_batch, int):
            raise ConfigError(
                "'train_batch_size' is missing and 'train_micro_batch_size_per_gpu' is "
                f"{micro_batch!r}; give one of them"
            )
        accumulation = resolved.get("gradient_accumulation_steps", 1)
        resolved["train_batch_size"] = micro_batch * accumulation * data_ranks
    params = resolved.get("scheduler", {}).get("params", {})
    for key, share in AUTO_STEPS.items():
        if params.get(key) == "auto":
            params[key] = max(1, round(share * steps))
    return resolved
