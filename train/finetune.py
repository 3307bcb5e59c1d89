"""Fine-tune a cross-attention video-language model under DeepSpeed, with sequence-parallel attention.

deepspeed train/finetune.py --ds_config ds_configs/quickstart.json
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from pathlib import Path

import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from transformers import set_seed

from ds_lvxattn.config import load_ds_config, sequence_parallel_config
from ds_lvxattn.data.sample import SampleError
from ds_lvxattn.errors import ConfigError
from ds_lvxattn.groups import start_distributed
from ds_lvxattn.training.dataset import load_sources
from ds_lvxattn.training.ds_config import resolve_ds_config
from ds_lvxattn.training.loading import QUICKSTART, load_model, select_trainable
from ds_lvxattn.training.loop import Job, Trainer
from ds_lvxattn.training.settings import finetuning_config


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ds_config", required=True, help="DeepSpeed config file")
    parser.add_argument("--model", default=QUICKSTART, help="local path or hub name (default: %(default)s)")
    parser.add_argument("--data", default="needle", help="'needle', a JSONL file or a hub dataset (%(default)s)")
    parser.add_argument("--steps", type=int, help="stop after so many steps (default: finetuning.steps of the config)")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/finetune"), help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="go on from the latest checkpoint in --output_dir")
    parser.add_argument("--local_rank", type=int, default=0, help="given by the launcher")
    return parser.parse_args(arguments)


def finetune(args: argparse.Namespace) -> None:
    """Set up and run one job on this rank."""
    start_distributed()
    accelerator = get_accelerator()
    if accelerator.device_name() != "cpu":
        accelerator.set_device(int(os.environ.get("LOCAL_RANK", args.local_rank)))
    ds_config = load_ds_config(args.ds_config)
    finetuning = finetuning_config(ds_config)
    steps = args.steps if args.steps is not None else finetuning.steps
    if steps < 1:
        raise ConfigError(f"--steps is {steps}; give at least 1")
    config = sequence_parallel_config(ds_config, dist.get_world_size())
    # Schedule and generated data have the length that the config says: a run that --steps ends earlier can be
    # resumed, and is then the same as one that was never interrupted.
    length = max(steps, finetuning.steps)
    ds_config = resolve_ds_config(ds_config, length, dist.get_world_size() // config.size)
    set_seed(args.seed)
    loaded = load_model(args.model, ds_config, args.seed)
    select_trainable(loaded.model, args.model, finetuning.trainable)
    train, evaluation = load_sources(args.data, loaded, finetuning, length * ds_config["train_batch_size"], args.seed)
    if dist.get_rank() == 0:
        args.output_dir.mkdir(parents=True, exist_ok=True)
    dist.barrier()
    job = Job(
        ds_config, config, finetuning, loaded, train, evaluation, steps, args.seed, args.output_dir, args.resume
    )  # fmt: skip
    Trainer(job).run()


def main() -> int:
    args = parse()
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        finetune(args)
    except (ConfigError, SampleError) as error:
        # The same on every rank, before any collective can wait for a rank that has left.
        print(f"finetune: {error}", file=sys.stderr)
        return 2
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
