"""The DeepSpeed config as the loop hands it to DeepSpeed: ``auto`` values filled in."""

from __future__ import annotations

import copy
from typing import Any

# Schedule settings that a run fills in when the config says "auto": the key and its share of the steps.
AUTO_STEPS = {"total_num_steps": 1.0, "warmup_num_steps": 0.05}


def resolve_ds_config(ds_config: dict[str, Any], steps: int) -> dict[str, Any]:
    """A copy of ``ds_config`` whose scheduler lengths follow from ``steps`` where they are ``auto``."""
    resolved = copy.deepcopy(ds_config)
    params = resolved.get("scheduler", {}).get("params", {})
    for key, share in AUTO_STEPS.items():
        if params.get(key) == "auto":
            params[key] = max(1, round(share * steps))
    return resolved
