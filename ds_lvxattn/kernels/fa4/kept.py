"""What FlashAttention-4 compiles, kept on this host for later processes: a masked kernel takes it 8 to 13 seconds.

It keeps nothing unless its environment says so when it is imported. The folder is of this host and this user alone:
what lies in it is loaded as code, and many hosts at one shared folder would wait for each other's locks.
"""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ENABLED, FOLDER = "FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "FLASH_ATTENTION_CUTE_DSL_CACHE_DIR"


def folder_of_user(name: str) -> Path | None:
    """A folder for temporary files of this host that nobody else can write to; None where there can be none."""
    folder = Path(tempfile.gettempdir()) / f"ds_lvxattn-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
            return None
        (folder / name).mkdir(exist_ok=True)
    except OSError:
        return None
    return folder / name


@contextmanager
def keeping_compiled() -> Iterator[None]:
    """While FlashAttention-4 is imported. Where the user's environment says what it keeps, that holds."""
    folder = None if ENABLED in os.environ else folder_of_user("fa4")
    if folder is None:
        yield
        return
    ours = {ENABLED: "1", **({} if FOLDER in os.environ else {FOLDER: str(folder)})}
    os.environ.update(ours)
    try:
        yield
    finally:
        for name in ours:
            del os.environ[name]
