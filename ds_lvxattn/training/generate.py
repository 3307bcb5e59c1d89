"""Answer a question about a video, with the video divided over the ranks.

    ds-lvxattn generate --num_gpus 2 --ds_config ds_configs/zero3.json --model runs/mine/model --video clip.mp4 \
      --question "What happens?"

From a checkout, ``deepspeed train/generate.py`` does the same.

All ranks share the one video, whatever the config's sequence_parallel_size; without the launcher it is one rank.
"""

from __future__ import annotations

import argparse
import functools
import logging
import os
import sys
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

from ds_lvxattn.batches.agreement import agree
from ds_lvxattn.batches.generation import generate
from ds_lvxattn.batches.prepare import Batches
from ds_lvxattn.batches.sequence_parallel import SequenceParallel
from ds_lvxattn.config import SIZE_KEY, load_ds_config, sequence_parallel_config
from ds_lvxattn.data.question import question_sample
from ds_lvxattn.errors import ConfigError
from ds_lvxattn.groups import SequenceParallelGroups, launched_ranks, start_distributed
from ds_lvxattn.training.build_locks import await_builds
from ds_lvxattn.training.config_check import check_ds_config, check_names
from ds_lvxattn.training.dataset import text_limit, text_of_model
from ds_lvxattn.training.ds_config import fill_model_sizes, zero_stage
from ds_lvxattn.training.engine import start_engine
from ds_lvxattn.training.launcher import follow_launcher
from ds_lvxattn.training.loading import LoadedModel, load_model, model_dtype, partition_over_all_ranks
from ds_lvxattn.training.rank import run_rank
from ds_lvxattn.training.run_settings import add_overrides
from ds_lvxattn.training.settings import finetuning_config
from ds_lvxattn.training.watchdog import Watchdog, group_timeout

# What of the DeepSpeed config says how the weights are held.
WEIGHTS = ("zero_optimization", "bf16", "fp16")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ds_config", required=True, help="DeepSpeed config file, as of finetuning")
    parser.add_argument("--model", required=True, help="local path (OUTPUT_DIR/model of a fine-tuning) or hub name")
    parser.add_argument("--video", help="video or image file; without it the question is text alone")
    parser.add_argument("--question", required=True)
    parser.add_argument("--max_new_tokens", type=int, default=64, help="(default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0, the default, takes the likeliest token")
    parser.add_argument("--seed", type=int, default=0, help="of the draws, where --temperature is above 0")
    parser.add_argument("--local_rank", type=int, default=0, help="given by the launcher")
    add_overrides(parser)
    return parser.parse_intermixed_args(arguments)


def answer(args: argparse.Namespace, watchdog: Watchdog | None = None) -> str:
    """The answer, on every rank."""
    if args.max_new_tokens < 1:
        raise ConfigError(f"--max_new_tokens is {args.max_new_tokens}; give at least 1")
    if args.temperature < 0:
        raise ConfigError(f"--temperature is {args.temperature}; give 0 or more")
    ranks = launched_ranks()
    ds_config = load_ds_config(args.ds_config, args.overrides)
    check_names(ds_config)
    config = sequence_parallel_config({**ds_config, SIZE_KEY: ranks}, ranks)
    finetuning = finetuning_config(ds_config)
    # DeepSpeed wants a batch size, though nothing is trained.
    ds_config = {"train_micro_batch_size_per_gpu": 1, **{key: ds_config[key] for key in WEIGHTS if key in ds_config}}
    check_ds_config(ds_config, trains=False)
    if ranks == 1:
        ds_config.pop("zero_optimization", None)  # nothing to partition over
    accelerator = get_accelerator()
    if "WORLD_SIZE" in os.environ:
        start_distributed(timeout=group_timeout(finetuning.timeout_s))
        (watchdog or Watchdog()).start(finetuning.timeout_s)
        if accelerator.device_name() != "cpu":
            accelerator.set_device(int(os.environ.get("LOCAL_RANK", args.local_rank)))
    await_builds()
    loaded = load_model(args.model, ds_config, args.seed)
    fill_model_sizes(ds_config, loaded.model.config)
    groups = SequenceParallelGroups(ranks) if ranks > 1 else None
    sample = agree(
        lambda: question_sample(
            args.question,
            args.video,
            loaded.tokenizer,
            text_of_model(loaded, finetuning.frame_limits),
            max_frames=finetuning.frames,
            max_text_tokens=text_limit(loaded.model) - args.max_new_tokens,
        ),
        lambda sample: f"{sample.name}: {len(sample.input_ids)} tokens, {sample.num_frames} frames",
        groups.get_sequence_parallel_group() if groups else None,
    )
    device = torch.device(accelerator.current_device_name())
    parallel = SequenceParallel(loaded.model, config, groups) if groups else None
    batches = Batches(
        loaded.model, loaded.processor, loaded.pad_token, loaded.image_id, device, model_dtype(ds_config), parallel,
        finetuning.frame_limits,
    )  # fmt: skip
    model = place(loaded, ds_config, groups, device)
    how: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if args.temperature:
        how = {"do_sample": True, "temperature": args.temperature}
    tokens = generate(model, batches, [sample], seed=args.seed, max_new_tokens=args.max_new_tokens, **how)
    if groups and parallel:
        parallel.close()
        groups.close()
    return str(loaded.tokenizer.decode(tokens[0], skip_special_tokens=True)).strip()


def place(
    loaded: LoadedModel, ds_config: dict[str, Any], groups: SequenceParallelGroups | None, device: torch.device
) -> Any:
    """The model where it runs: whole on every rank, or under ZeRO-3 partitioned over them."""
    if groups is None or zero_stage(ds_config) != 3:
        return torch.nn.Module.to(loaded.model, device)
    partition_over_all_ranks(loaded.model, ds_config, groups)
    return start_engine(model=loaded.model, config=ds_config, mpu=groups).module


def say_answer(args: argparse.Namespace, watchdog: Watchdog) -> None:
    """Print the answer, once."""
    text = answer(args, watchdog)
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(text)


def main() -> int:
    args = parse()
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    follow_launcher()
    return run_rank("generate", functools.partial(say_answer, args))


if __name__ == "__main__":
    sys.exit(main())
