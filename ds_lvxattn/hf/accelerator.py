"""Accelerate for groups of ranks that share their samples, in one accelerator object and nowhere else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import accelerate.data_loader
import deepspeed
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader

from ds_lvxattn.errors import ConfigError
from ds_lvxattn.groups import SequenceParallelGroups
from ds_lvxattn.training.loading import partition_over_all_ranks


def use_groups(accelerator: Accelerator, groups: SequenceParallelGroups, made: Callable[[nn.Module], Any]) -> None:
    """Let ``accelerator`` deal batches to groups instead of ranks, and make engines with the process groups.

    Two methods of the object are replaced: ``prepare_data_loader``, and ``_prepare_deepspeed``, during which
    ``deepspeed.initialize`` gets an ``mpu``. Nothing outside the object stays changed.

    Args:
        made: called with the model that an engine is made of.
    """
    prepare_engine = accelerator._prepare_deepspeed

    def prepare_deepspeed(*args: Any) -> Any:
        initialize, engines = deepspeed.initialize, []

        def with_groups(*, model: nn.Module, config_params: dict[str, Any], **others: Any) -> Any:
            config = dict(config_params)
            # Accelerate counts every rank as a data-parallel one.
            config["train_batch_size"] = (
                config["train_micro_batch_size_per_gpu"]
                * config["gradient_accumulation_steps"]
                * groups.get_data_parallel_world_size()
            )
            partition_over_all_ranks(model, config, groups)
            made(model)
            engines.append(initialize(model=model, config_params=config, mpu=groups, **others))
            return engines[-1]

        deepspeed.initialize = with_groups
        try:
            prepared = prepare_engine(*args)
        finally:
            deepspeed.initialize = initialize
        if not engines and any(isinstance(each, nn.Module) for each in args):
            raise RuntimeError(
                f"Accelerate {accelerate.__version__} made an engine without deepspeed.initialize, so that it has no "
                "sequence-parallel groups; use a version that the requirements name"
            )
        return prepared

    def prepare_data_loader(loader: DataLoader, *unused: Any, **unused_too: Any) -> Any:
        if getattr(loader, "_is_accelerate_prepared", False):
            return loader
        prepared = accelerate.data_loader.prepare_data_loader(
            loader,
            num_processes=groups.get_data_parallel_world_size(),
            process_index=groups.get_data_parallel_rank(),
            rng_types=list(accelerator.rng_types),
            even_batches=accelerator.even_batches,
            use_seedable_sampler=accelerator.use_seedable_sampler,
            data_seed=accelerator.dataloader_config.data_seed,
        )
        accelerator._dataloaders.append(prepared)
        return prepared

    for name in ("split_batches", "dispatch_batches"):
        if getattr(accelerator, name):
            raise ConfigError(f"accelerator_config.{name} is set, which sequence parallelism does not do; leave it out")
    vars(accelerator)["_prepare_deepspeed"] = prepare_deepspeed
    vars(accelerator)["prepare_data_loader"] = prepare_data_loader
