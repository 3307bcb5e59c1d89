"""Train the same model on the same data with several sequence-parallel strategies, and compare the runs.

    ds-lvxattn compare --ds_config ds_configs/quickstart.json --steps 20 --output_dir runs/compare

The runs follow each other, each through the DeepSpeed launcher, and ``report.md`` tells the result. Of the
strategies, ``single`` is one rank without sequence parallelism and with the same global batch, and
``lv_xattn:ring`` is a strategy with a schedule.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from ds_lvxattn.config import SIZE_KEY, load_ds_config
from ds_lvxattn.errors import ConfigError
from ds_lvxattn.training.compare.report import COLUMNS, SINGLE, Run, compare, markdown, read_run, table_cells
from ds_lvxattn.training.compare.runs import train
from ds_lvxattn.training.compare.variants import derive_config, parse_variants
from ds_lvxattn.training.config_check import check_names
from ds_lvxattn.training.run_settings import add_overrides
from ds_lvxattn.training.settings import finetuning_config
from ds_lvxattn.training.trackers import start_tracker


def log_summary(runs: Sequence[Run], pictures: Sequence[Path], folder: Path, group: str, report_to: str | None) -> None:
    """A run of the tracker with the table and the pictures, in the group of the runs."""
    tracker = start_tracker(report_to, folder, {"runs": [run.name for run in runs]}, name="summary", group=group)
    tracker.table("comparison", COLUMNS, [table_cells(row) for row in compare(runs)])
    tracker.pictures(pictures)
    tracker.close()


def write_report(runs: Sequence[Run], folder: Path, setting: str) -> list[Path]:
    """Write ``report.md`` and its pictures.

    Args:
        runs: in the order of the table.
        folder: where they go.
        setting: a sentence on what was run, for the head of the report.

    Returns:
        The pictures.
    """
    from ds_lvxattn.training.compare.pictures import plot

    pictures = plot(runs, folder)
    (folder / "report.md").write_text(markdown(runs, setting, [picture.name for picture in pictures]))
    return pictures


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ds_config", required=True, help="DeepSpeed config file of the sequence-parallel runs")
    parser.add_argument(
        "--strategies", default="lv_xattn,ulysses,ring,auto,single", help="by comma (default: %(default)s)"
    )
    parser.add_argument("--steps", type=int, required=True, help="optimizer steps of each run")
    parser.add_argument("--output_dir", type=Path, required=True, help="a folder a run, and the report")
    parser.add_argument("--num_gpus", type=int, help="ranks (default: all GPUs; on CPU one group)")
    parser.add_argument("--model", default="quickstart", help="as of finetuning (default: %(default)s)")
    parser.add_argument("--data", default="needle", help="as of finetuning (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    add_overrides(parser)
    return parser.parse_intermixed_args(arguments)


def run_all(args: argparse.Namespace) -> list[Run]:
    """Run every variant and write the report.

    Raises:
        ConfigError: a setting that cannot work, before anything runs.
    """
    console = Console()
    ds_config = load_ds_config(args.ds_config, args.overrides)
    check_names(ds_config)
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
        failure = train(variant, args, config, group, console)
        runs.append(read_run(args.output_dir / variant.name, variant.name, failure))
        if runs[-1].failure:
            console.print(f"{variant.name}: {runs[-1].failure}", markup=False)
    setting = (
        f"Model `{args.model}`, data `{args.data}`, seed {args.seed}, {args.steps} steps with a global batch "
        f"of {configs[0]['train_batch_size']} on {args.num_gpus} ranks (`{SINGLE}`: 1), "
        f"`{SIZE_KEY}` {ds_config.get(SIZE_KEY, 1)}, from `{Path(args.ds_config).name}`."
    )
    pictures = write_report(runs, args.output_dir, setting)
    log_summary(runs, pictures, args.output_dir, group, finetuning_config(ds_config).report_to)
    table = Table(*COLUMNS)
    for row in compare(runs):
        table.add_row(*table_cells(row))
    console.print(table)
    console.print(f"report: {args.output_dir / 'report.md'}")
    return runs


def main(arguments: Sequence[str] | None = None) -> int:
    # As an exception, so that the run in progress is ended too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        runs = run_all(parse(arguments))
    except ConfigError as error:
        print(f"compare: {error}", file=sys.stderr)
        return 2
    return int(any(run.failure for run in runs))


if __name__ == "__main__":
    sys.exit(main())
