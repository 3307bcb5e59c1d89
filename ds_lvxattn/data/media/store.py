"""Indices of films on disk, so that no process reads a whole film again."""

from __future__ import annotations

import fcntl
import hashlib
import io
import os
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np

VERSION = 2  # of what is stored; another one is another entry
# Smaller files are read again faster than a folder of very many entries is kept.
WORTH_KEEPING = 4 << 20

Stored = TypeVar("Stored")


def cache_folder() -> Path:
    """``$XDG_CACHE_HOME/ds_lvxattn/media``, by default in ``~/.cache``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ds_lvxattn" / "media"


def fetch(
    key: tuple[str, int, int],
    size: int,
    make: Callable[[], Stored],
    to_arrays: Callable[[Stored], dict[str, np.ndarray]],
    from_arrays: Callable[[dict[str, np.ndarray]], Stored],
) -> Stored:
    """What is stored for a file, or what ``make`` returns, which is then stored.

    One process makes it; others on the host wait for that. Where the folder cannot be used, each makes its own.

    Args:
        key: path, time of the last change and size of the file.
        size: of the file in bytes.
    """
    if size < WORTH_KEEPING:
        return make()
    path, mtime_ns, _ = key
    name = repr((VERSION, os.path.abspath(path), mtime_ns, size)).encode(errors="surrogateescape")
    entry = cache_folder() / f"{hashlib.blake2b(name, digest_size=16).hexdigest()}.npz"
    found = _read(entry)
    if found is not None:
        return from_arrays(found)
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        lock = open(entry.with_suffix(".lock"), "w")  # noqa: SIM115
    except OSError:
        return make()
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError:
            return make()
        found = _read(entry)  # another process was first
        if found is not None:
            return from_arrays(found)
        made = make()
        _write(entry, to_arrays(made))
    entry.with_suffix(".lock").unlink(missing_ok=True)
    return made


def _read(entry: Path) -> dict[str, np.ndarray] | None:
    try:
        with np.load(entry, allow_pickle=False) as arrays:
            return dict(arrays)
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error):
        return None  # not there, or cut off where a disk was full


def _write(entry: Path, arrays: dict[str, np.ndarray]) -> None:
    """In one piece: a reader sees all of it or nothing. A full disk costs the entry, not the run."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
    try:
        with tempfile.NamedTemporaryFile(dir=entry.parent, delete=False) as file:
            file.write(buffer.getvalue())
        os.replace(file.name, entry)
    except OSError:
        return
