"""A DeepSpeed config checked as a whole, before any process group exists.

The judge is DeepSpeed itself: its reader is handed the config and watched. A key that it never asks for would be
ignored, so it is refused; the type that a key should have is that of DeepSpeed's default or model field; optimizer
and schedule are made once on a dummy parameter. So nothing here repeats DeepSpeed's list of keys.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any

from deepspeed.runtime import config as reader
from pydantic import ValidationError

from ds_lvxattn.config import BLOCK_KEY, CHECKPOINTING_KEY, SIZE_KEY
from ds_lvxattn.errors import ConfigError
from ds_lvxattn.training import settings
from ds_lvxattn.training.config_check.block import WatchedBlock, value_at
from ds_lvxattn.training.config_check.optimizer import forms, optimizer_problems, scheduler_problems
from ds_lvxattn.training.config_check.places import OWN_BLOCKS
from ds_lvxattn.training.config_check.values import (
    default_kind,
    field_names,
    impossible_values,
    meant,
    models,
    of_kind,
    unknown_key,
    wrong_types,
)
from ds_lvxattn.training.ds_config import ACCUMULATION, BATCH, MICRO_BATCH

# Blocks and keys that are checked where they are used.
OURS = (SIZE_KEY, BLOCK_KEY, settings.BLOCK_KEY, CHECKPOINTING_KEY, BATCH, MICRO_BATCH, ACCUMULATION)
# Blocks that the loop reads too, and for which DeepSpeed takes other values from older configs.
OBJECTS = ("zero_optimization", "bf16", "fp16")
# What DeepSpeed knows and this loop does not do: the values that ask for nothing, and what to do instead.
NOT_DONE: dict[str, tuple[tuple[Any, ...], str]] = {
    "autotuning.enabled": ((False,), "the loop does not restart itself; leave the block out"),
    "bfloat16": ((), "name the block 'bf16'"),
    "checkpoint.load_universal": ((False,), "checkpoints are resumed on as many ranks as saved them; leave it out"),
    "checkpoint.use_node_local_storage": ((False,), "the ranks share one --output_dir; leave it out"),
    "checkpoint.writer": ((None,), "checkpoints are written by torch; leave it out"),
    "data_efficiency.enabled": ((False,), "the loop has a data order of its own; leave the block out"),
    "datastates_ckpt": ((None, {}), "checkpoints are written by torch; leave it out"),
    "expert_parallel": (({},), "there are no expert-parallel groups; leave it out"),
    "gradient_allreduce_op": (("mean",), "gradients are averaged over the data-parallel groups; leave it out"),
    "hybrid_engine.enabled": ((False,), "it serves inference; leave the block out"),
    "managed_gradient_accumulation": ((True,), f"set '{ACCUMULATION}' and leave it out"),
    "pipeline": (({},), f"layers are not divided over ranks; set '{SIZE_KEY}' instead"),
    "tensor_parallel.autotp_size": ((0, 1), f"weights are not divided by tensor parallelism; set '{SIZE_KEY}' instead"),
    "weight_quantization": (({},), "it serves inference; leave it out"),
}


def check_ds_config(ds_config: Mapping[str, Any], trains: bool = True) -> None:
    """Check a config that ``resolve_ds_config`` gave. No rank needs another for it, and no device is touched.

    Args:
        trains: whether optimizer and schedule count.

    Raises:
        ConfigError: keys that nothing reads, values that cannot work or that DeepSpeed refuses; one message that
            names each with its value and the remedy.
    """
    block = WatchedBlock({key: value for key, value in ds_config.items() if key not in OURS})
    problems = [
        *_objects(ds_config), *forms(ds_config), *_not_done(block), *_without_a_folder(block),
        *impossible_values(block, ""),
    ]  # fmt: skip
    if not problems:
        problems = _deepspeed_says(block) or [*_unread(block), *wrong_types(block)]
    if not problems and trains:
        problems = [*optimizer_problems(ds_config), *scheduler_problems(ds_config)]
    if problems:
        raise ConfigError("; ".join(problems))


def check_names(ds_config: Mapping[str, Any]) -> None:
    """Check the names at the top of a config, before anything is made of the values, and those of this package's blocks
    that are like others, or known elsewhere; the blocks themselves refuse the rest of theirs.

    Raises:
        ConfigError: one is not known.
    """
    known = [*OURS, *_known_names()]
    problems = [unknown_key(key, value, known) for key, value in ds_config.items() if key not in known]
    for path, names in OWN_BLOCKS.items():
        block = value_at(ds_config, path)
        for key, value in block.items() if isinstance(block, Mapping) else ():
            if key not in names and meant(f"{path}.{key}", names):
                problems.append(unknown_key(f"{path}.{key}", value, names))
    if problems:
        raise ConfigError("; ".join(problems))


@functools.cache
def _known_names() -> tuple[str, ...]:
    """What DeepSpeed's reader asks a config for."""
    block = WatchedBlock({MICRO_BATCH: 1})
    reader.DeepSpeedConfig(block, mpu=_Groups())
    return tuple(block.asked)


class _Groups:
    """Stands for the ``mpu``: DeepSpeed asks it for the ranks that divide the batch."""

    def get_data_parallel_world_size(self) -> int:
        return 1


def _deepspeed_says(block: WatchedBlock) -> list[str]:
    """What DeepSpeed's reader refuses."""
    block[MICRO_BATCH] = 1  # batch sizes have been checked, and depend on the ranks
    try:
        reader.DeepSpeedConfig(block, mpu=_Groups())
    except ValidationError as error:
        return [_explain(problem, block) for problem in error.errors()]
    except Exception as error:  # assertions and whatever a value of another type leads to
        path = block.trail[-1] if block.trail else "the config"
        value = value_at(block, path)
        if isinstance(error, (AttributeError, TypeError)) and not isinstance(value, dict):
            # Where it fails is not always where the value is that leads to it.
            wrong = list(of_kind(path, value, default_kind(block, path), False)) or list(wrong_types(block))
            return wrong or [f"'{path}' is {value!r}; give an object"]
        return [f"'{path}' is {value!r}: DeepSpeed says: {error}"]
    finally:
        block.pop(MICRO_BATCH)
    return []


def _explain(problem: Any, block: WatchedBlock) -> str:
    """A message for one problem that a model of DeepSpeed's found."""
    location = ".".join(str(part) for part in problem["loc"])
    last = block.trail[-1] if block.trail else ""
    parent = last.rpartition(".")[0]
    # A model of one block names its own keys; the models of the monitors are made together.
    path = location if problem["loc"] and dict.__contains__(block, problem["loc"][0]) else f"{parent}.{location}"
    path = path.strip(".") or last
    if problem["type"] == "extra_forbidden":
        known = _model_keys(path.rpartition(".")[0], block)
        return unknown_key(path, problem["input"], known)
    return f"'{path}' is {problem['input']!r}: {problem['msg']}"


def _model_keys(path: str, block: WatchedBlock) -> list[str]:
    """Keys of the models that share most keys with the block at ``path``."""
    given = set(dict.keys(value_at(block, path) or {}))
    best = max(models(), key=lambda model: (len(given & field_names(model)), -len(field_names(model))))
    return sorted(field_names(best))


def _objects(ds_config: Mapping[str, Any]) -> Iterator[str]:
    for key in OBJECTS:
        if not isinstance(ds_config.get(key, {}), dict):
            yield f"'{key}' is {ds_config[key]!r}; give an object, or leave it out"


def _not_done(block: WatchedBlock) -> Iterator[str]:
    for path, (idle, remedy) in NOT_DONE.items():
        value: Any = block
        for key in path.split("."):
            value = dict.get(value, key, idle) if isinstance(value, dict) else idle
        if value is not idle and value not in idle:
            yield f"'{path}' is {value!r}, which this loop does not do: {remedy}"


def _without_a_folder(block: WatchedBlock) -> Iterator[str]:
    """Offloading to disk that does not say where, which DeepSpeed meets when the model is there."""
    zero = dict.get(block, "zero_optimization")
    for key in ("offload_optimizer", "offload_param"):
        offload = dict.get(zero, key) if isinstance(zero, dict) else None
        if isinstance(offload, dict) and dict.get(offload, "device") == "nvme" and not dict.get(offload, "nvme_path"):
            path = f"zero_optimization.{key}"
            yield f"'{path}.device' is 'nvme' and '{path}.nvme_path' is not set; name a folder, or offload to 'cpu'"


def _unread(block: WatchedBlock) -> Iterator[str]:
    """Keys that the reader never asked for."""
    known = [*OURS, *(key for key in block.asked if key not in NOT_DONE)]
    for key in block:
        value = dict.__getitem__(block, key)
        if key not in block.asked:
            yield unknown_key(key, value, known)
        elif isinstance(value, WatchedBlock) and value.asked:
            for inner in value:
                if inner not in value.asked:
                    yield unknown_key(f"{key}.{inner}", dict.__getitem__(value, inner), value.asked)
