"""The faults of a fixed list on 2 GPUs with NCCL, each started as a user starts a run: by the DeepSpeed launcher.

A trial runs this file as the ranks' program, with the fault in the environment. Trials run several at a time and share
the two GPUs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

from benchmarks.faults.ranks import (
    LIMIT,
    ROOT,
    TIMEOUT,
    Fault,
    ds_config,
    left_in,
    python_path,
    write_config,
)
from ds_lvxattn.training.launch import free_port

VARIABLE = "CAMPAIGN_FAULT"
AT_A_TIME = 9
START_SECONDS = 90.0  # of the launcher, CUDA and NCCL, many at a time
FAULTS = [
    Fault(kind, rank, phase, 0.0)
    for kind, rank in (("kill", 1), ("stop", 0), ("raise", 1))
    for phase in ("step 3", "saving the checkpoint of step 2", "evaluating")
]


def gpu_trials(folder: Path) -> Iterator[tuple[str, str, float]]:
    """Every fault under ZeRO 2 and 3: its name, what is wrong with the outcome, and the seconds to the end."""
    cases = [(stage, fault) for stage in (2, 3) for fault in FAULTS]
    with ThreadPoolExecutor(AT_A_TIME) as pool:
        yield from pool.map(lambda case: _trial(folder, *case), cases)


def _trial(folder: Path, stage: int, fault: Fault) -> tuple[str, str, float]:
    name = f"ZeRO-{stage}, {fault.kind} rank {fault.rank} in {fault.phase}"
    here = folder / name.replace(" ", "-").replace(",", "")
    settings = {**ds_config(stage, timeout_s=TIMEOUT), "bf16": {"enabled": True}}
    settings["sequence_parallel"]["kernel"] = "math"  # nothing to compile
    config = write_config(here, settings)
    out = here / "out"
    command = [
        sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", str(free_port()),
        "--module", "benchmarks.faults.gpu", "--ds_config", str(config), "--output_dir", str(out),
    ]  # fmt: skip
    environment = {
        **os.environ, VARIABLE: json.dumps(asdict(fault)), "WANDB_MODE": "disabled", "PYTHONPATH": python_path(),
    }  # fmt: skip
    began = time.monotonic()
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=START_SECONDS + LIMIT
        )
    except subprocess.TimeoutExpired:
        return name, "ranks are left", time.monotonic() - began
    seconds, text = time.monotonic() - began, done.stdout + done.stderr
    (here / "log.txt").write_text(text)
    whole = left_in(out).checkpoints
    expected = ("step-2",) if fault.phase == "step 3" else ("step-4", "step-2") if fault.phase == "evaluating" else ()
    if done.returncode == 0:
        return name, "exit code 0", seconds
    if whole != expected:
        return name, f"checkpoints {whole} instead of {expected}: {text[-500:]}", seconds
    if fault.kind == "stop" and f"rank {fault.rank} gives no sign of life" not in text:
        return name, f"the stopped rank is not named: {text[-500:]}", seconds
    if fault.kind == "raise" and "a fault that was asked for" not in text:
        return name, f"the error is not told: {text[-500:]}", seconds
    return name, "", seconds


def main() -> int:
    """Life of a rank."""
    from ds_lvxattn.training.finetune import main as finetune

    fault = Fault(**json.loads(os.environ[VARIABLE]))
    if fault.hurts(int(os.environ["RANK"])):
        fault.install()
    return finetune()


if __name__ == "__main__":
    sys.exit(main())
