"""DeepSpeed's runner, which starts a launcher and gives its exit code; but 0 where a signal killed it. Not here.

What is wrong with a hostfile or with the number of ranks is one message and exit code 2; DeepSpeed would end with a
traceback, or go on with the ranks of this machine alone.

python -m ds_lvxattn.training.runner [options of deepspeed] PROGRAM [arguments]
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys

from deepspeed.accelerator import get_accelerator
from deepspeed.launcher import runner

from ds_lvxattn.errors import ConfigError

SECONDS_TO_END = 5


class Launcher(subprocess.Popen):
    """A process that the runner starts, which looks at ``returncode > 0`` for a failure."""

    def wait(self, timeout: float | None = None) -> int:
        try:
            code = super().wait(timeout)
        except KeyboardInterrupt:
            code = self._interrupted()
        if code < 0:  # the signal, as a shell has it
            self.returncode = 128 - code
        return self.returncode

    def _interrupted(self) -> int:
        """A terminal interrupts the launcher too, which ends its ranks; one that was left out is ended."""
        try:
            super().wait(SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            self.terminate()
            super().wait()
        return -signal.SIGINT


def check(options: argparse.Namespace) -> None:
    """Refuse options of the runner that it would pass over.

    Raises:
        ConfigError: a hostfile that is not there; a number of GPUs or nodes that is none, or more than there are.
    """
    if not os.path.isfile(options.hostfile):
        if options.hostfile != runner.DLTS_HOSTFILE:  # DeepSpeed's default, which need not be there
            raise ConfigError(f"--hostfile {options.hostfile}: no such file")
        accelerator = get_accelerator()
        if accelerator.device_name() != "cpu" and options.num_gpus > accelerator.device_count():
            raise ConfigError(
                f"--num_gpus is {options.num_gpus}, and this machine has {accelerator.device_count()}; give at most as "
                "many, or a --hostfile with the others"
            )
    for name in ("num_gpus", "num_nodes"):
        if getattr(options, name) not in (-1, *range(1, 1 << 20)):  # -1: all
            raise ConfigError(f"--{name} is {getattr(options, name)}; give at least 1, or leave it out for all")


def main() -> int:
    """Run it with the arguments of this process, which does nothing else; its exit code, where it does not leave."""
    subprocess.Popen = Launcher  # type: ignore[misc]
    try:
        check(runner.parse_args())
        runner.main()
    except (ConfigError, ValueError, RuntimeError, OSError, subprocess.CalledProcessError) as error:
        print(f"the ranks cannot be started: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
