"""Locks on DeepSpeed's compiled operators that nobody holds any more.

torch compiles an operator under a lock file. A process that is killed meanwhile leaves the file, and every later one
would wait for it for ever.
"""

from __future__ import annotations

import logging
import os
import time
from contextlib import suppress
from pathlib import Path

from torch.utils import cpp_extension

logger = logging.getLogger(__name__)

# Of a build whose folder has not changed for so long nothing is to be expected: a compiler writes a file earlier.
IDLE_SECONDS = 300.0
POLL_SECONDS = 1.0


def await_builds(root: Path | None = None, idle: float = IDLE_SECONDS) -> None:
    """Wait until nothing is being compiled; remove the locks of builds that stand still for ``idle`` seconds.

    Args:
        root: folder of the compiled operators; None: torch's, or ``TORCH_EXTENSIONS_DIR``.
    """
    if root is None:
        root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root())
    told = set[Path]()
    while locks := [lock for lock in root.glob("**/lock") if lock.is_file()]:
        for lock in locks:
            if lock not in told:
                logger.warning("waiting for %s: another process compiles, or was killed while it did", lock)
                told.add(lock)
            if time.time() - _last_change(lock.parent) > idle:
                logger.warning("removing %s: nothing has been compiled there for %.0f s", lock, idle)
                with suppress(FileNotFoundError):
                    lock.unlink()
        if any(lock.exists() for lock in locks):
            time.sleep(POLL_SECONDS)


def _last_change(folder: Path) -> float:
    times = [0.0]
    for path in (folder, *folder.iterdir()):
        with suppress(FileNotFoundError):
            times.append(path.stat().st_mtime)
    return max(times)
