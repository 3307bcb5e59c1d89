"""Start ranks through the DeepSpeed launcher, on a port that is free."""

from __future__ import annotations

import os
import random
import socket
import sys
from collections.abc import Sequence

import torch

from ds_lvxattn.errors import ConfigError

PORT = "--master_port"
RUNNER = "ds_lvxattn.training.runner"


def launch_command(program: Sequence[str], options: Sequence[str]) -> list[str]:
    """The launcher's command line for a ``program``, a script or ``--module`` and a module, with its arguments.

    Args:
        options: the launcher's own; without a port among them, one that is free on this machine is chosen.
    """
    port = [] if any(word.split("=")[0] == PORT for word in options) else [PORT, str(free_port())]
    return [sys.executable, "-m", RUNNER, *options, *port, *program]


def launch_environment() -> dict[str, str]:
    """The environment of the ranks: on a machine without a GPU, DeepSpeed's CPU accelerator and a thread a rank.

    Raises:
        ConfigError: GPUs are asked for that are not there.
    """
    if torch.cuda.is_available():
        return dict(os.environ)
    asked = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    if asked.strip() not in ("", "-1", "NoDevFiles") and os.environ.get("DS_ACCELERATOR") != "cpu":
        raise ConfigError(
            f"CUDA_VISIBLE_DEVICES is {asked!r}, and torch finds no such GPU; mend it, or set DS_ACCELERATOR=cpu "
            "to run on the CPU"
        )
    return {"OMP_NUM_THREADS": "1", **os.environ, "DS_ACCELERATOR": "cpu"}


def free_port() -> int:
    """A TCP port that nothing listens on, and that no connection is given before the ranks listen there: not one of
    those that systems give by themselves."""
    while True:
        with socket.socket() as probe:
            try:
                probe.bind(("", random.SystemRandom().randrange(10_000, 32_768)))
            except OSError:
                continue
            return int(probe.getsockname()[1])
