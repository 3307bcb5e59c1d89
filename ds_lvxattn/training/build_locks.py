"""Locks on DeepSpeed's compiled operators that nobody holds any more.

torch compiles an operator under a lock file. A process that is killed meanwhile leaves the file, and every later one
would wait for it for ever. So the ranks write into their locks which process they are, and a lock whose process is gone
is removed at once; one that says nothing, or is of another host or container, when its build stands still.
"""

from __future__ import annotations

import logging
import os
import time
from contextlib import suppress
from pathlib import Path

from torch.utils import cpp_extension
from torch.utils.file_baton import FileBaton

logger = logging.getLogger(__name__)

# Of a build whose folder has not changed for so long nothing is to be expected: a compiler writes a file earlier.
IDLE_SECONDS = 300.0
POLL_SECONDS = 1.0


class OwnedBaton(FileBaton):
    """torch's lock, with the process that holds it written inside."""

    def try_acquire(self) -> bool:
        acquired = bool(super().try_acquire())
        if acquired:
            Path(self.lock_file_path).write_text(_process(os.getpid()), encoding="ascii")
        return acquired

    def wait(self) -> None:
        """Until it is released. A process that is killed while another waits does not keep it waiting."""
        while (lock := Path(self.lock_file_path)).exists():
            remove_if_left(lock)
            time.sleep(self.wait_seconds)


def await_builds(root: Path | None = None, idle: float = IDLE_SECONDS) -> None:
    """Wait until nothing is being compiled; remove the locks of processes that are gone, and of builds that stand still
    for ``idle`` seconds. From now on the locks of this process say whose they are.

    Args:
        root: folder of the compiled operators; None: torch's, or ``TORCH_EXTENSIONS_DIR``.
    """
    vars(cpp_extension)["FileBaton"] = OwnedBaton
    if root is None:
        root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root())
    told = set[Path]()
    while locks := [lock for lock in root.glob("**/lock") if lock.is_file()]:
        for lock in locks:
            if remove_if_left(lock):
                continue
            if lock not in told:
                logger.warning("waiting for %s: another process compiles, or was killed while it did", lock)
                told.add(lock)
            if time.time() - _last_change(lock.parent) > idle:
                logger.warning("removing %s: nothing has been compiled there for %.0f s", lock, idle)
                with suppress(FileNotFoundError):
                    lock.unlink()
        if any(lock.exists() for lock in locks):
            time.sleep(POLL_SECONDS)


def remove_if_left(lock: Path) -> bool:
    """Remove a lock whose process is gone, if it says which."""
    try:
        owner = lock.read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError):
        return False
    boot, namespace, pid, *_ = *owner.split(), "", "", ""
    mine = _process(os.getpid()).split()
    if not mine or [boot, namespace] != mine[:2] or not pid.isdigit() or _process(int(pid)) == owner:
        return False
    logger.warning("removing %s: the process that compiled there is gone", lock)
    with suppress(FileNotFoundError):
        lock.unlink()
    return True


def _process(pid: int) -> str:
    """Names a process of this host or container: boot, namespace, number and start. Empty if there is none of it."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
        state, start = (stat.rpartition(")")[2].split()[place] for place in (0, 19))
        return "" if state in "ZX" else f"{boot} {os.readlink('/proc/self/ns/pid')} {pid} {start}"
    except OSError:
        return ""


def _last_change(folder: Path) -> float:
    times = [0.0]
    for path in (folder, *folder.iterdir()):
        with suppress(FileNotFoundError):
            times.append(path.stat().st_mtime)
    return max(times)
