"""Files that are whole or not there: written aside, synced, and put in place by a rename."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from ds_lvxattn.errors import RunError

ASIDE = ".partial"
CHUNK = 1 << 22  # bytes read at a time

# What people call the errors of a file system.
NAMES = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file is larger than allowed",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "no permission to write there",
    errno.EPERM: "no permission to write there",
    errno.EIO: "the disk or its connection fails",
    errno.ESTALE: "the network file system lost the file",
}


def storage_problem(error: OSError, path: Path | str) -> str:
    """An error of the file system in words: what could not be written, and why."""
    why = NAMES.get(error.errno or 0, error.strerror or str(error))
    return f"{path} cannot be written: {why} ({errno.errorcode.get(error.errno or 0, 'unknown error')})"


@contextmanager
def writing(path: Path | str) -> Iterator[None]:
    """Errors of the file system as ``RunError`` that names them."""
    try:
        yield
    except OSError as error:
        raise RunError(storage_problem(error, path)) from error


def aside(path: Path) -> Path:
    """Where ``path`` is written before it is whole."""
    return path.with_name(path.name + ASIDE)


def replace_text(path: Path, text: str) -> None:
    """Write a file as a whole: after a crash at any moment it holds the old text or the new one."""
    with writing(path), aside(path).open("w", encoding="utf-8") as file:
        file.write(text)
        sync(file)
    with writing(path):
        os.replace(aside(path), path)
        sync_folder(path.parent)


def replace_folder(new: Path, path: Path) -> None:
    """Put the folder ``new`` in the place of ``path``, which may exist."""
    old = path.with_name(path.name + ".old")
    with writing(path):
        remove(old)
        if path.exists():
            os.rename(path, old)
        os.rename(new, path)
        sync_folder(path.parent)
        remove(old)


def remove(path: Path) -> None:
    """Remove a folder and what is in it, or what stands in its place, if it is there."""
    with suppress(FileNotFoundError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def sync(file: IO) -> None:
    """Bring a file that is open for writing to the disk."""
    file.flush()
    os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk, where its file system can."""
    with suppress(OSError):  # some network file systems cannot, and have no need
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@dataclass(frozen=True)
class Digest:
    """Size in bytes and SHA-256 of a file."""

    bytes: int
    sha256: str

    @classmethod
    def of(cls, path: Path) -> Digest:
        """That of a file on the disk."""
        size, checksum = 0, hashlib.sha256()
        with path.open("rb") as file:
            while chunk := file.read(CHUNK):
                size += len(chunk)
                checksum.update(chunk)
        return cls(size, checksum.hexdigest())


class DigestingFile:
    """A file opened for writing in order, whose digest is known at the end without reading it again.

    Args:
        progress: called whenever something is written.

    Attributes:
        error: what the file system said, since a caller may hide it behind an error of its own.
    """

    def __init__(self, file: IO[bytes], progress: Callable[[], None]) -> None:
        self._file, self._progress, self._size, self._checksum = file, progress, 0, hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        view = memoryview(data).cast("B")
        try:
            self._file.write(view)
        except OSError as error:
            self.error = error
            raise
        self._size += len(view)
        self._checksum.update(view)
        self._progress()
        return len(view)

    def flush(self) -> None:
        self._file.flush()

    @property
    def digest(self) -> Digest:
        """Of what has been written so far."""
        return Digest(self._size, self._checksum.hexdigest())
