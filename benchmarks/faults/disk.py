"""A small disk of its own for a run: a file system in memory, which is really full."""

from __future__ import annotations

import subprocess
from pathlib import Path
from types import TracebackType


def can_mount(folder: Path) -> bool:
    """Whether this process may mount; elsewhere trials with full disks are left out."""
    place = folder / "mount"
    try:
        with SmallDisk(place, 64):
            return True
    except (OSError, subprocess.CalledProcessError):
        return False


class SmallDisk:
    """A disk of so many KiB at ``folder``, which goes at the end."""

    def __init__(self, folder: Path, kibibytes: int) -> None:
        self.folder, self.kibibytes = folder, kibibytes

    def __enter__(self) -> SmallDisk:
        self.folder.mkdir(parents=True, exist_ok=True)
        _call("mount", "-t", "tmpfs", "-o", f"size={self.kibibytes}k", "tmpfs", str(self.folder))
        return self

    def grow(self) -> None:
        """Make room."""
        _call("mount", "-o", "remount,size=256m", str(self.folder))

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        _call("umount", "-l", str(self.folder))


def _call(*words: str) -> None:
    subprocess.run(words, check=True, capture_output=True)
