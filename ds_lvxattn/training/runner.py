"""DeepSpeed's runner, which starts a launcher and gives its exit code; but 0 where a signal killed it. Not here.

python -m ds_lvxattn.training.runner [options of deepspeed] PROGRAM [arguments]
"""

from __future__ import annotations

import signal
import subprocess

from deepspeed.launcher import runner

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


def main() -> None:
    """Run it with the arguments of this process, which does nothing else."""
    subprocess.Popen = Launcher  # type: ignore[misc]
    runner.main()


if __name__ == "__main__":
    main()
