"""What a Trainer is given that divided text has no room for: refused by name."""

from __future__ import annotations

from typing import Any

from transformers import TrainingArguments

from ds_lvxattn.errors import ConfigError
from ds_lvxattn.training.settings import BLOCK_KEY, finetuning_config

# What Trainers can be given and this one does not take: why.
REFUSED = {
    "data_collator": "micro-batches are made where the ranks of a group agree on them",
    "compute_loss_func": "a rank has the logits of its own rows alone; the model's own loss is taken",
    "model_init": "the model is attached when the Trainer is made; give the model",
    "peft_config": "adapters come with the model; give peft.get_peft_model(model, peft_config)",
    "formatting_func": "rows are conversations already; map the dataset",
}


def check_arguments(args: TrainingArguments) -> None:
    """Raise ``ConfigError`` for arguments that divided text has no room for."""
    refused = {
        "label_smoothing_factor": args.label_smoothing_factor != 0,
        "train_sampling_strategy": getattr(args, "train_sampling_strategy", "random") not in ("random", "sequential"),
        "include_num_input_tokens_seen": args.include_num_input_tokens_seen not in ("no", False),
        "parallelism_config": args.parallelism_config is not None,
        "auto_find_batch_size": args.auto_find_batch_size,
        # A rank saves at the step at which its own signal comes.
        "enable_jit_checkpoint": getattr(args, "enable_jit_checkpoint", False),
        # Its noise follows from the number of rows, of which a rank has a part.
        "neftune_noise_alpha": args.neftune_noise_alpha is not None,
        # It replaces forwards of a model that is attached by then.
        "use_liger_kernel": args.use_liger_kernel,
        # Evaluation computes in the dtype that trains.
        "bf16_full_eval": args.bf16_full_eval,
        "fp16_full_eval": args.fp16_full_eval,
    }
    for name, given in refused.items():
        if given:
            raise ConfigError(
                f"TrainingArguments.{name} is {getattr(args, name)!r}, which SequenceParallelTrainer does not do; "
                "leave it out"
            )
    accumulation = getattr(args.accelerator_config, "gradient_accumulation_kwargs", None) or {}
    if "num_steps" in accumulation:
        raise ConfigError(
            f"accelerator_config.gradient_accumulation_kwargs.num_steps is {accumulation['num_steps']}, which comes "
            "after the DeepSpeed config has been filled in; set TrainingArguments.gradient_accumulation_steps"
        )
    if args.n_gpu > 1:
        raise ConfigError(
            f"one process has {args.n_gpu} GPUs, over which the Trainer would copy the model (DataParallel) and divide "
            "samples that ranks divide here; start the script with deepspeed or torchrun, or show it one GPU "
            "(CUDA_VISIBLE_DEVICES=0)"
        )
    if args.optim == "adagrad" and args.deepspeed_plugin is not None:
        raise ConfigError(
            "TrainingArguments.optim is 'adagrad', which DeepSpeed's ZeRO makes anew with one group of parameters, and "
            "then fails on the others; choose adamw_torch or another optimizer"
        )


def packing_of(ds_config: dict[str, Any]) -> int | None:
    """``packing`` of the block of ``train/finetune.py``, of which the Trainer takes nothing else."""
    config = finetuning_config(ds_config)
    others = sorted(config.model_fields_set - {"packing"})
    if others:
        raise ConfigError(
            f"'{BLOCK_KEY}.{others[0]}' is in the DeepSpeed config, and of this block of train/finetune.py the Trainer "
            "takes 'packing' alone; give TrainingArguments and Rows the rest, and take it out"
        )
    return config.packing
