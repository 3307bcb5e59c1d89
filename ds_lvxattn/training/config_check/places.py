"""Where a key belongs that stands somewhere else, or under the name that it has in other tools."""

from __future__ import annotations

from ds_lvxattn.config import BESIDE, BLOCK_KEY, SIZE_KEY, SequenceParallelConfig
from ds_lvxattn.training import settings
from ds_lvxattn.training.ds_config import ACCUMULATION, MICRO_BATCH

FINETUNING = settings.BLOCK_KEY
LORA = f"{FINETUNING}.lora"
# Names of the keys that a block of this package has.
OWN_BLOCKS = {
    BLOCK_KEY: SequenceParallelConfig.model_fields.keys() - {"size", "offload"} | BESIDE.keys(),
    FINETUNING: settings.FinetuningConfig.model_fields.keys(),
    LORA: settings.LoraSettings.model_fields.keys(),
}
OPTIMIZER = ("lr", "betas", "eps", "weight_decay")
SCHEDULE = ("total_num_steps", "warmup_num_steps", "warmup_type", "warmup_min_lr", "warmup_max_lr", "cos_min_ratio")
ZERO = ("stage", "overlap_comm", "offload_optimizer", "offload_param", "reduce_bucket_size")
ARGUMENTS = ("model", "data", "output_dir", "seed", "resume")  # of the command line
# By the last part of a key's path: the whole path. Later ones count: what DeepSpeed and other tools call keys.
PLACES = {
    **{key: f"{LORA}.{key}" for key in OWN_BLOCKS[LORA]},
    **{key: f"{FINETUNING}.{key}" for key in OWN_BLOCKS[FINETUNING]},
    **{key: f"{BLOCK_KEY}.{key}" for key in OWN_BLOCKS[BLOCK_KEY] - BESIDE.keys()},
    **{key: f"optimizer.params.{key}" for key in OPTIMIZER},
    **{key: f"scheduler.params.{key}" for key in SCHEDULE},
    **{key: f"zero_optimization.{key}" for key in ZERO},
    SIZE_KEY: SIZE_KEY,
    "sp_size": SIZE_KEY,
    "lora_r": f"{LORA}.r",
    "lora_rank": f"{LORA}.r",
    "rank": f"{LORA}.r",
    "lora_alpha": f"{LORA}.alpha",
    "lora_dropout": f"{LORA}.dropout",
    "learning_rate": "optimizer.params.lr",
    "warmup_steps": "scheduler.params.warmup_num_steps",
    "max_grad_norm": "gradient_clipping",
    "per_device_train_batch_size": MICRO_BATCH,
    ACCUMULATION: ACCUMULATION,
    "max_steps": f"{FINETUNING}.steps",
    "num_train_epochs": f"{FINETUNING}.epochs",
    "save_steps": f"{FINETUNING}.save_every",
    "eval_steps": f"{FINETUNING}.eval_every",
    "save_total_limit": f"{FINETUNING}.keep_last",
    "max_frames": f"{FINETUNING}.frames",
    "num_frames": f"{FINETUNING}.frames",
    "max_length": f"{FINETUNING}.max_text_tokens",
    "max_seq_length": f"{FINETUNING}.max_text_tokens",
    "gradient_checkpointing": f"{BLOCK_KEY}.recompute",
}


def elsewhere(path: str) -> str:
    """What to do about a key that is unknown at ``path`` and known elsewhere; empty: it is not."""
    key = path.rpartition(".")[2]
    place = PLACES.get(key)
    if place is not None and place != path:
        return f"did you mean '{place}'?"
    return f"give it on the command line, as --{key}" if key in ARGUMENTS else ""
