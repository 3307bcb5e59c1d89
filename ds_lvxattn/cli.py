"""``ds-lvxattn``: the project's commands, from wherever the package is installed.

    ds-lvxattn finetune --ds_config zero3.json --model meta-llama/Llama-3.2-11B-Vision-Instruct --data my.jsonl
    ds-lvxattn finetune --num_gpus 4 --ds_config zero3.yaml sequence_parallel.strategy=ring finetuning.steps=500
    ds-lvxattn compare --ds_config zero3.json --steps 20 --output_dir runs/compare
    ds-lvxattn generate --ds_config zero3.json --model runs/mine/model --video clip.mp4 --question "What happens?"
    ds-lvxattn plan --model Llama-3.2-11B-Vision --text 2048 --frames 1024 --gpus 64
    ds-lvxattn calibrate --output profile.json
    ds-lvxattn data my.jsonl --model meta-llama/Llama-3.2-11B-Vision-Instruct

A command that runs on several ranks is started through the DeepSpeed launcher, whose options --num_gpus, --hostfile,
--include, --exclude, --num_nodes, --node_rank, --no_ssh, --master_addr and --master_port it takes too; without a port,
a free one is chosen. Under a launcher (deepspeed, torchrun) it runs on the rank at hand. Settings of the config can be
given behind it as key=value, with dots between the keys. ``ds-lvxattn COMMAND --help`` has the arguments of a command.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module

from ds_lvxattn.errors import ConfigError


@dataclass(frozen=True)
class Command:
    """A command: the module whose ``main`` it is, whether it runs on several ranks, and what it does."""

    module: str
    on_ranks: bool
    does: str


COMMANDS = {
    "finetune": Command("ds_lvxattn.training.finetune", True, "fine-tune a model on rows of video and conversation"),
    "compare": Command("ds_lvxattn.training.compare.command", False, "train with several strategies and report"),
    "generate": Command("ds_lvxattn.training.generate", True, "answer a question about a video"),
    "plan": Command("ds_lvxattn.plan.__main__", False, "predict what a cluster would do with a model"),
    "calibrate": Command("ds_lvxattn.calibrate", True, "measure this machine for the planner"),
    "data": Command("ds_lvxattn.training.check_data", False, "read every row as training would, and say which are bad"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; its exit code. 2 is a mistake of the user's."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    listing = "\n".join(f"  {name:<10} {command.does}" for name, command in COMMANDS.items())
    if not words or words[0] in ("-h", "--help"):
        print(f"{__doc__}\ncommands:\n{listing}")
        return 0 if words else 2
    name, *rest = words
    if name not in COMMANDS:
        print(f"ds-lvxattn: no command {name!r}; the commands are\n{listing}", file=sys.stderr)
        return 2
    command = COMMANDS[name]
    if command.on_ranks and "RANK" not in os.environ and not {"-h", "--help"} & set(rest):
        try:
            _start_ranks(command, rest)
        except ConfigError as error:
            print(f"{name}: {error}", file=sys.stderr)
            return 2
    sys.argv = [f"ds-lvxattn {name}", *rest]
    return int(import_module(command.module).main() or 0)


def _start_ranks(command: Command, arguments: Sequence[str]) -> None:
    """Become the launcher of the command's ranks; does not return.

    Raises:
        ConfigError: on a machine without a GPU, a config that cannot be read, which says how many ranks to start.
    """
    from ds_lvxattn.training.launch import launch_command, launch_environment

    options, rest = launcher_options(arguments)
    environment = launch_environment()
    if environment.get("DS_ACCELERATOR") == "cpu" and "--num_gpus" not in options and "--hostfile" not in options:
        options += ["--num_gpus", str(_group_size(rest))]
    words = launch_command(["--module", command.module, *rest], options)
    sys.stdout.flush()
    os.execvpe(words[0], words, environment)


def launcher_options(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """The launcher's options among the arguments, and the others."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for option in (
        "num_gpus",
        "num_nodes",
        "hostfile",
        "include",
        "exclude",
        "node_rank",
        "master_addr",
        "master_port",
    ):
        parser.add_argument(f"--{option}")
    parser.add_argument("--no_ssh", action="store_true")
    known, rest = parser.parse_known_args(arguments)
    options: list[str] = []
    for option, value in vars(known).items():
        if value is True:
            options.append(f"--{option}")
        elif value:
            options += [f"--{option}", value]
    return options, rest


def _group_size(arguments: Sequence[str]) -> int:
    """``sequence_parallel_size`` of the config that the arguments name; 1 without a config."""
    from ds_lvxattn.config import SIZE_KEY, load_ds_config

    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--ds_config")
    known, rest = parser.parse_known_args(arguments)
    if known.ds_config is None:
        return 1
    size = load_ds_config(known.ds_config, [word for word in rest if "=" in word and word[0] != "-"]).get(SIZE_KEY, 1)
    return size if isinstance(size, int) and size > 0 else 1  # the ranks say what is wrong with another


if __name__ == "__main__":
    sys.exit(main())
