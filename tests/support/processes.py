"""Run a command to its end, with a time limit that tells where each of its processes hangs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from ds_lvxattn.training.launch import free_port
from tests.support.deadline import Deadline

REPOSITORY = Path(__file__).parents[2]
GRACE_SECONDS = 5.0  # for the processes to print their stacks


def finish(
    command: Sequence[Any], seconds: float = 300.0, cwd: Path | None = None, **environment: str | None
) -> subprocess.CompletedProcess[str]:
    """Run ``command`` to its end, the repository importable, ``environment`` over the test's (None unsets).

    Raises:
        TimeoutError: it did not end in ``seconds`` (see ``Deadline``); the message has the stacks of its Python
            processes.
    """
    variables = {**os.environ, "PYTHONFAULTHANDLER": "1", "PYTHONPATH": str(REPOSITORY), **environment}
    variables = {name: value for name, value in variables.items() if value is not None}
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = psutil.Popen(
            [str(word) for word in command], cwd=cwd, env=variables, stdout=out, stderr=err, start_new_session=True
        )

        def told() -> tuple[str, str]:
            out.seek(0)
            err.seek(0)
            return out.read(), err.read()

        deadline = Deadline(seconds)
        try:
            while True:
                try:
                    code = process.wait(timeout=1.0)
                    return subprocess.CompletedProcess(list(command), code, *told())
                except psutil.TimeoutExpired:
                    if deadline.passed(child.pid for child in _family(process)):
                        break
            _signal(_family(process), signal.SIGABRT)  # with Python's fault handler: prints the stacks, and ends
            psutil.wait_procs(_family(process), timeout=GRACE_SECONDS)
            raise TimeoutError(f"no end in {seconds:g} s: {command}\n" + "\n".join(told()))
        finally:
            _signal(_family(process), signal.SIGKILL)


def launch(
    script: Path, *arguments: Any, ranks: int = 2, cwd: Path | None = None, **environment: str | None
) -> subprocess.CompletedProcess[str]:
    """``deepspeed --num_gpus RANKS script`` on CPU ranks, on a free port, as a user without a wandb key."""
    settings: dict[str, str | None] = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "NETRC": os.devnull}
    settings |= {key: None for key in os.environ if key.startswith("WANDB_")}
    command = [Path(sys.executable).with_name("deepspeed"), "--num_gpus", ranks, "--master_port", free_port(), script]
    return finish((*command, *arguments), cwd=cwd, **{**settings, **environment})


def _family(process: psutil.Process) -> list[psutil.Process]:
    try:
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _signal(processes: Sequence[psutil.Process], number: int) -> None:
    for process in reversed(processes):
        try:
            process.send_signal(number)
        except psutil.NoSuchProcess:
            continue
