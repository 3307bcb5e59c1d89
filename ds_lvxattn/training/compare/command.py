"""Train the same model on the same data with several sequence-parallel strategies, and compare the runs.

    python train/compare.py --ds_config ds_configs/quickstart.json --steps 20 --output_dir runs/compare

The runs follow each other, each through the DeepSpeed launcher, and ``report.md`` tells the result. Of the
strategies, ``single`` is one rank without sequence parallelism and with the same global batch, and
``lv_xattn:ring`` is a strategy with a schedule.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
import wandb
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from ds_lvxattn.config import (
    BLOCK_KEY,
    SIZE_KEY,
    ConfigError,
    StrategyChoice,
    load_ds_config,
    sequence_parallel_config,
)
from ds_lvxattn.training.compare.report import COLUMNS, SINGLE, Run, compare, read_run, table_cells, write_report
from ds_lvxattn.training.run_log import start_wandb

FINETUNE = Path(__file__).with_name("finetune.py")
# Beside the interpreter as called: in a virtual environment that is a link, and the launcher lies beside it.
LAUNCHER = Path(sys.executable).with_name("deepspeed")
POLL_SECONDS = 2.0
LOG_TAIL = 25  # lines of a failed run's log that are shown


@dataclass(frozen=True)
class Variant:
    """What one run trains with. ``strategy`` may be ``single``; ``schedule`` None leaves the config's own."""

    strategy: str
    schedule: str | None = None

    @property
    def name(self) -> str:
        """Name of the run and of its folder."""
        return self.strategy if self.schedule is None else f"{self.strategy}-{self.schedule}"

    def ranks(self, num_gpus: int) -> int:
        return 1 if self.strategy == SINGLE else num_gpus


def parse_variants(text: str) -> list[Variant]:
    """The variants of a list such as ``lv_xattn:ring,ulysses,single``.

    Raises:
        ConfigError: an unknown strategy, one given twice, or a schedule for ``single``.
    """
    accepted = [*get_args(StrategyChoice), SINGLE]
    variants = []
    for item in text.split(","):
        strategy, _, schedule = item.strip().partition(":")
        if strategy not in accepted:
            raise ConfigError(f"--strategies has {strategy!r}; choose from {accepted}")
        if strategy == SINGLE and schedule:
            raise ConfigError(f"--strategies has {item!r}; {SINGLE!r} exchanges nothing and has no schedule")
        variants.append(Variant(strategy, schedule or None))
    if len(set(variants)) < len(variants):
        raise ConfigError(f"--strategies {text} names a strategy twice; name each once")
    return variants


def derive_config(ds_config: dict[str, Any], variant: Variant, num_gpus: int) -> dict[str, Any]:
    """The DeepSpeed config of one run.

    A strategy holds for all layers, so ``layers`` stays only for ``auto``. ``single`` accumulates the
    micro-batches that the data-parallel groups run side by side: the same ones, so the same loss.

    Args:
        ds_config: the config to derive from, for ``num_gpus`` ranks.

    Raises:
        ConfigError: a sequence-parallel setting or a batch size that cannot work.
    """
    size = sequence_parallel_config(ds_config, num_gpus).size
    batch, micro_batch = _batch_sizes(ds_config, num_gpus // size)
    derived = copy.deepcopy(ds_config)
    if variant.strategy == SINGLE:
        size = 1
        derived.pop(SIZE_KEY, None)
        derived.pop(BLOCK_KEY, None)
    else:
        if size == 1:
            raise ConfigError(f"'{SIZE_KEY}' is 1, so there is no strategy to compare; set it to {num_gpus}")
        block = derived.setdefault(BLOCK_KEY, {})
        block["strategy"] = variant.strategy
        if variant.schedule is not None:
            block["schedule"] = variant.schedule
        if variant.strategy != "auto":
            block.pop("layers", None)
        sequence_parallel_config(derived, num_gpus)
    derived["train_batch_size"] = batch
    derived["train_micro_batch_size_per_gpu"] = micro_batch
    derived["gradient_accumulation_steps"] = batch // (micro_batch * (variant.ranks(num_gpus) // size))
    return derived


def _batch_sizes(ds_config: dict[str, Any], data_ranks: int) -> tuple[int, int]:
    """Global batch and micro-batch, which DeepSpeed infers from any that are given."""
    keys = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    batch, micro_batch, accumulation = (ds_config.get(key) for key in keys)
    if all(size is None or (type(size) is int and size > 0) for size in (batch, micro_batch, accumulation)):
        if micro_batch is None and batch is not None:
            micro_batch = batch // (data_ranks * (accumulation or 1))
        if batch is None and micro_batch is not None:
            batch = micro_batch * data_ranks * (accumulation or 1)
        if batch and micro_batch:
            steps, rest = divmod(batch, micro_batch * data_ranks)
            if not rest and accumulation in (None, steps):
                return batch, micro_batch
    given = ", ".join(f"'{key}' {ds_config.get(key)!r}" for key in keys)
    raise ConfigError(
        f"{given}: give whole numbers, the first the product of the other two and the {data_ranks} data-parallel ranks"
    )


def launch(
    variant: Variant, args: argparse.Namespace, ds_config: dict[str, Any], group: str, console: Console
) -> str | None:
    """Train one variant to its end; its output goes to ``log.txt`` of its folder.

    Returns:
        None, or what went wrong.
    """
    folder = args.output_dir / variant.name
    folder.mkdir(parents=True)
    config = folder / "ds_config.json"
    config.write_text(json.dumps(ds_config, indent=2) + "\n")
    command = [
        str(LAUNCHER), "--num_gpus", str(variant.ranks(args.num_gpus)), "--master_port", str(free_port()),
        str(FINETUNE), "--ds_config", str(config), "--model", args.model, "--data", args.data,
        "--steps", str(args.steps), "--seed", str(args.seed), "--output_dir", str(folder),
    ]  # fmt: skip
    environment = {**os.environ, "WANDB_RUN_GROUP": group, "WANDB_NAME": variant.name}
    if not torch.cuda.is_available():
        environment["DS_ACCELERATOR"] = "cpu"
    log = folder / "log.txt"
    with log.open("w") as output:
        # A process group of its own, so that nothing of a run outlives it when this script is interrupted.
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
    try:
        code = _follow(process, variant.name, folder / "metrics.jsonl", args.steps, console)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait()
    if code == 0:
        return None
    tail = "\n".join(log.read_text(errors="replace").splitlines()[-LOG_TAIL:])
    return f"exit code {code}; the last lines of {log}:\n{tail}"


def _follow(process: subprocess.Popen, name: str, metrics: Path, steps: int, console: Console) -> int:
    """Show the run's progress until it ends; its exit code."""
    columns = (TextColumn(name), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"))
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        task = progress.add_task(name, total=steps, note="starting")
        while True:
            try:
                code: int | None = process.wait(timeout=POLL_SECONDS)
            except subprocess.TimeoutExpired:
                code = None
            # The last line may be half written, the ones before it are whole.
            lines = metrics.read_text().split("\n")[:-1] if metrics.exists() else []
            if lines:
                last = json.loads(lines[-1])
                progress.update(task, completed=last["step"], note=f"loss {last['loss']:.4f}")
            if code is not None:
                if code:
                    progress.update(task, note=f"failed with exit code {code}")
                return code


def free_port() -> int:
    """A TCP port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def log_summary(runs: Sequence[Run], pictures: Sequence[Path], folder: Path, group: str) -> None:
    """A wandb run with the table and the pictures, in the group of the runs."""
    summary = start_wandb(folder, {"runs": [run.name for run in runs]}, name="summary", group=group)
    table = wandb.Table(columns=list(COLUMNS), data=[list(table_cells(row)) for row in compare(runs)])
    summary.log({"comparison": table, **{path.stem: wandb.Image(str(path)) for path in pictures}})
    summary.finish()


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ds_config", required=True, help="DeepSpeed config file of the sequence-parallel runs")
    parser.add_argument(
        "--strategies", default="lv_xattn,ulysses,ring,auto,single", help="by comma (default: %(default)s)"
    )
    parser.add_argument("--steps", type=int, required=True, help="optimizer steps of each run")
    parser.add_argument("--output_dir", type=Path, required=True, help="a folder a run, and the report")
    parser.add_argument("--num_gpus", type=int, help="ranks (default: all GPUs; on CPU one group)")
    parser.add_argument("--model", default="quickstart", help="as in finetune.py (default: %(default)s)")
    parser.add_argument("--data", default="needle", help="as in finetune.py (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


def run_all(args: argparse.Namespace) -> list[Run]:
    """Run every variant and write the report.

    Raises:
        ConfigError: a setting that cannot work, before anything runs.
    """
    console = Console()
    ds_config = load_ds_config(args.ds_config)
    if args.steps < 1:
        raise ConfigError(f"--steps is {args.steps}; give at least 1")
    if args.num_gpus is None:
        args.num_gpus = torch.cuda.device_count() or ds_config.get(SIZE_KEY, 1)
    variants = parse_variants(args.strategies)
    configs = [derive_config(ds_config, variant, args.num_gpus) for variant in variants]
    for variant in variants:
        if (args.output_dir / variant.name).exists():
            raise ConfigError(f"--output_dir {args.output_dir} holds a run {variant.name}; give another folder")
    group = f"compare-{args.output_dir.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    runs = []
    for variant, config in zip(variants, configs, strict=True):
        failure = launch(variant, args, config, group, console)
        runs.append(read_run(args.output_dir / variant.name, variant.name, failure))
        if runs[-1].failure:
            console.print(f"{variant.name}: {runs[-1].failure}", markup=False)
    setting = (
        f"Model `{args.model}`, data `{args.data}`, seed {args.seed}, {args.steps} steps with a global batch "
        f"of {configs[0]['train_batch_size']} on {args.num_gpus} ranks (`{SINGLE}`: 1), "
        f"`{SIZE_KEY}` {ds_config.get(SIZE_KEY, 1)}, from `{Path(args.ds_config).name}`."
    )
    pictures = write_report(runs, args.output_dir, setting)
    log_summary(runs, pictures, args.output_dir, group)
    table = Table(*COLUMNS)
    for row in compare(runs):
        table.add_row(*table_cells(row))
    console.print(table)
    console.print(f"report: {args.output_dir / 'report.md'}")
    return runs


def main(arguments: Sequence[str] | None = None) -> int:
    try:
        runs = run_all(parse(arguments))
    except ConfigError as error:
        print(f"compare: {error}", file=sys.stderr)
        return 2
    return int(any(run.failure for run in runs))


if __name__ == "__main__":
    # As an exception, so that the run in progress is ended too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    sys.exit(main())
