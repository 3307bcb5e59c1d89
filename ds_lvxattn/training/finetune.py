"""Fine-tune a cross-attention video-language model under DeepSpeed, with sequence-parallel attention.

    ds-lvxattn finetune --num_gpus 2 --ds_config ds_configs/quickstart.json
    ds-lvxattn finetune --ds_config zero3.yaml --model runs/mine/model --data my.jsonl sequence_parallel.strategy=ring

From a checkout, ``deepspeed train/finetune.py`` does the same.
"""

from __future__ import annotations

import argparse
import functools
import logging
import os
import random
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

from ds_lvxattn.groups import launched_ranks, start_distributed
from ds_lvxattn.training.build_locks import await_builds
from ds_lvxattn.training.checkpoint import check_run_folder
from ds_lvxattn.training.dataset import check_files, load_sources
from ds_lvxattn.training.ds_config import BATCH, fill_model_sizes, zero_stage
from ds_lvxattn.training.launcher import follow_launcher
from ds_lvxattn.training.loading import QUICKSTART, load_model, select_trainable
from ds_lvxattn.training.loop import Job, Trainer
from ds_lvxattn.training.lora import add_adapters
from ds_lvxattn.training.phases import begin
from ds_lvxattn.training.rank import run_rank
from ds_lvxattn.training.run_settings import add_overrides, read_settings
from ds_lvxattn.training.watchdog import Watchdog, group_timeout


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ds_config", required=True, help="DeepSpeed config file, JSON or YAML")
    parser.add_argument("--model", default=QUICKSTART, help="local path or hub name (default: %(default)s)")
    parser.add_argument("--data", default="needle", help="'needle', a JSONL file or a hub dataset (%(default)s)")
    parser.add_argument("--steps", type=int, help="stop after so many steps (default: finetuning.steps of the config)")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/finetune"), help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="go on from the latest checkpoint in --output_dir")
    parser.add_argument("--new_data", action="store_true", help="with --resume, let --data be another than before")
    parser.add_argument("--local_rank", type=int, default=0, help="given by the launcher")
    add_overrides(parser)
    return parser.parse_intermixed_args(arguments)


def finetune(args: argparse.Namespace, watchdog: Watchdog | None = None) -> None:
    """Set up and run one job on this rank."""
    settings = read_settings(args.ds_config, args.steps, args.seed, launched_ranks(), args.overrides)
    check_files(args.data, settings.finetuning)
    timeout = settings.finetuning.timeout_s
    start_distributed(timeout=group_timeout(timeout))
    watchdog = watchdog or Watchdog()
    watchdog.start(timeout)
    accelerator = get_accelerator()
    if accelerator.device_name() != "cpu":
        accelerator.set_device(int(os.environ.get("LOCAL_RANK", args.local_rank)))
    ds_config = settings.ds_config
    known = {
        "world_size": dist.get_world_size(), "zero_stage": zero_stage(ds_config),
        "train_batch_size": ds_config[BATCH], "seed": args.seed,
    }  # fmt: skip
    check_run_folder(args.output_dir, args.resume, known, dist.new_group(backend="gloo"))
    await_builds()
    _seed(args.seed)
    begin(watchdog, "loading the model")
    loaded = load_model(args.model, ds_config, args.seed)
    loaded.limits = settings.finetuning.frame_limits
    fill_model_sizes(ds_config, loaded.model.config)
    if (lora := settings.finetuning.lora) is not None:
        add_adapters(loaded.model, lora, args.model, known["zero_stage"], accelerator.current_device_name())
    else:
        select_trainable(loaded.model, args.model, settings.finetuning.trainable)
    begin(watchdog, "reading the data")
    rows = settings.length * ds_config[BATCH]
    train, evaluation = load_sources(args.data, loaded, settings.finetuning, rows, args.seed)
    steps = settings.steps_of(len(train))
    job = Job(
        ds_config, settings.parallel, settings.finetuning, loaded, train, evaluation, steps, args.seed,
        args.output_dir, args.resume, watchdog, args.new_data,
    )  # fmt: skip
    Trainer(job).run()


def _seed(seed: int) -> None:
    """Of everything that draws (transformers' own function for this brings PEFT and more with it)."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def main() -> int:
    args = parse()
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    follow_launcher()
    return run_rank("finetune", functools.partial(finetune, args))


if __name__ == "__main__":
    sys.exit(main())
