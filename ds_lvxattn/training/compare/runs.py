"""The runs that are compared, one after another, each through the DeepSpeed launcher."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ds_lvxattn.training.compare.report import unfinished
from ds_lvxattn.training.compare.variants import Variant
from ds_lvxattn.training.launch import launch_command, launch_environment

FINETUNE = ("--module", "ds_lvxattn.training.finetune")
POLL_SECONDS = 2.0
END_SECONDS = 60.0  # for a run to end when it is told to
LOG_TAIL = 25  # lines of a failed run's log that are shown


def train(
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
    options = {
        "ds_config": config, "model": args.model, "data": args.data, "steps": args.steps, "seed": args.seed,
        "output_dir": folder,
    }  # fmt: skip
    words = [word for option, value in options.items() for word in (f"--{option}", str(value))]
    command = launch_command([*FINETUNE, *words], ["--num_gpus", str(variant.ranks(args.num_gpus))])
    environment = {**launch_environment(), "WANDB_RUN_GROUP": group, "WANDB_NAME": variant.name}
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
            try:
                process.wait(END_SECONDS)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
    if code == 0:
        # A code says what the processes of this machine did; the files say whether the run is whole.
        return unfinished(folder, args.steps)
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
