"""The folder of a run, which belongs to one run at a time."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from pathlib import Path
from typing import IO

from ds_lvxattn.errors import ConfigError
from ds_lvxattn.training.files import storage_problem

LOCK = ".lock"
# Errors of file systems that have no locks; there the user has to see to it.
NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)


class RunFolder:
    """Makes a folder and locks it for this process, until ``close`` or the end of the process.

    The lock is the operating system's: it cannot outlive the run. Rank 0 takes it for all ranks.

    Raises:
        ConfigError: it cannot be written, or another run has it.
    """

    def __init__(self, path: Path) -> None:
        self._file: IO[str] | None = None
        try:
            path.mkdir(parents=True, exist_ok=True)
            file = (path / LOCK).open("a+", encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"--output_dir {storage_problem(error, path)}; give another folder") from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.seek(0)
            owner = file.read().strip() or "unknown"
            file.close()
            if error.errno in NO_LOCKS:
                return
            raise ConfigError(
                f"--output_dir {path} is in use by another run ({owner}); wait for its end, or give another folder"
            ) from error
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        self._file = file

    def close(self) -> None:
        """Let another run have the folder."""
        if self._file is not None:
            self._file.close()
            self._file = None
