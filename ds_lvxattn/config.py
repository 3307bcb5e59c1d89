"""The ``sequence_parallel`` block of a DeepSpeed config, read and checked before ``deepspeed.initialize``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from deepspeed.runtime.config_utils import DeepSpeedConfigModel
from pydantic import Field, ValidationError

StrategyName = Literal["lv_xattn", "ulysses", "ring"]
StrategyChoice = Literal["auto", "lv_xattn", "ulysses", "ring"]

SIZE_KEY = "sequence_parallel_size"
BLOCK_KEY = "sequence_parallel"


class ConfigError(ValueError):
    """A setting that cannot work; the message names the key, the value and what to change."""


class SequenceParallelConfig(DeepSpeedConfigModel):
    """Keys of the ``sequence_parallel`` block.

    Attributes:
        strategy: how attention crosses ranks; ``auto`` chooses per layer by traffic.
        layers: module-name patterns (``fnmatch``) to a strategy, over ``strategy``; the first match counts.
        schedule: schedule of query exchange.
        kernel: local attention kernel.
        recompute: what the backward pass computes again instead of storing: ``none``; ``kv``, the projections and
            norms of K and V in cross-attention layers; ``layer``, every text layer but its attention operator.
        placement: how frames lie on the ranks.
        size: ranks of a sequence-parallel group, from ``sequence_parallel_size`` beside the block.
    """

    strategy: StrategyChoice = "auto"
    layers: dict[str, StrategyName] = Field(default_factory=dict)
    schedule: Literal["auto", "gather", "ring", "routed"] = "auto"
    kernel: Literal["auto", "triton", "cudnn", "flash", "math"] = "auto"
    recompute: Literal["none", "kv", "layer"] = "none"
    placement: Literal["contiguous", "striped"] = "contiguous"
    size: int = Field(1, ge=1)

    def __init__(self, **data: Any) -> None:
        # DeepSpeed's models drop the value "auto" unless told not to; here it is a value like others.
        super().__init__(strict=True, **data)


def load_ds_config(path: str | Path) -> dict[str, Any]:
    """A DeepSpeed config file as a dict.

    Raises:
        ConfigError: the file is missing or is not a JSON object.
    """
    try:
        config = json.loads(Path(path).read_text())
    except OSError as error:
        raise ConfigError(f"--ds_config {path}: cannot be read ({error.strerror})") from error
    except json.JSONDecodeError as error:
        raise ConfigError(f"--ds_config {path}: not valid JSON ({error})") from error
    if not isinstance(config, dict):
        raise ConfigError(f"--ds_config {path}: holds a {type(config).__name__}, not an object")
    return config


def sequence_parallel_config(ds_config: dict[str, Any], world_size: int) -> SequenceParallelConfig:
    """The checked sequence-parallel settings of a DeepSpeed config.

    A config without the block, or with size 1, trains as plain DeepSpeed.

    Args:
        ds_config: the whole DeepSpeed config.
        world_size: ranks of the run.

    Raises:
        ConfigError: an unknown key or value, or a size that does not divide the world size.
    """
    block = ds_config.get(BLOCK_KEY, {})
    size = ds_config.get(SIZE_KEY, 1)
    if not isinstance(block, dict):
        raise ConfigError(f"'{BLOCK_KEY}' is {block!r}; give an object with the keys {_accepted_keys()}")
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise ConfigError(f"'{SIZE_KEY}' is {size!r}; give a whole number of at least 1")
    if "size" in block:
        raise ConfigError(f"'{BLOCK_KEY}.size' is not a key; set '{SIZE_KEY}' beside the block")
    if world_size % size:
        raise ConfigError(
            f"'{SIZE_KEY}' is {size}, which does not divide the {world_size} ranks of this run; "
            f"choose one of {[n for n in range(1, world_size + 1) if world_size % n == 0]}"
        )
    try:
        return SequenceParallelConfig(size=size, **block)
    except ValidationError as error:
        raise ConfigError("; ".join(_explain(problem) for problem in error.errors())) from None


def _accepted_keys() -> list[str]:
    return [name for name in SequenceParallelConfig.model_fields if name != "size"]


def _explain(problem: Any) -> str:
    key = ".".join([BLOCK_KEY, *map(str, problem["loc"])])
    if problem["type"] == "extra_forbidden":
        return f"'{key}' (value {problem['input']!r}) is not a key; the keys are {_accepted_keys()}"
    if problem["type"] == "literal_error":
        return f"'{key}' is {problem['input']!r}; choose {problem['ctx']['expected']}"
    return f"'{key}' is {problem['input']!r}: {problem['msg']}"
