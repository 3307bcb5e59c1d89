"""What can happen to the files of a run between its end and its resumption."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

# Names of what is done, and whether the newest checkpoint is then to be passed over.
Damage = Callable[[random.Random, Path], bool]


def _newest(folder: Path) -> Path:
    return max((folder / "checkpoints").glob("step-*"), key=lambda path: int(path.name.split("-")[1]))


def _shard(draw: random.Random, folder: Path) -> Path:
    return draw.choice(sorted(path for path in _newest(folder).glob("*.pt")))


def flip(draw: random.Random, folder: Path) -> bool:
    """One bit of a shard."""
    path = _shard(draw, folder)
    with path.open("r+b") as file:
        file.seek(draw.randrange(path.stat().st_size))
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 1 << draw.randrange(8)]))
    return True


def truncate(draw: random.Random, folder: Path) -> bool:
    path = _shard(draw, folder)
    with path.open("r+b") as file:
        file.truncate(draw.randrange(path.stat().st_size))
    return True


def zero(draw: random.Random, folder: Path) -> bool:
    """A page of zeros, as some file systems leave after a power cut."""
    path = _shard(draw, folder)
    with path.open("r+b") as file:
        file.seek(draw.randrange(max(1, path.stat().st_size - 4096)))
        file.write(bytes(4096))
    return True


def delete(draw: random.Random, folder: Path) -> bool:
    _shard(draw, folder).unlink()
    return True


def list_torn(draw: random.Random, folder: Path) -> bool:
    path = _newest(folder) / "run.json"
    path.write_text(path.read_text()[: draw.randrange(200)])
    return True


def list_gone(draw: random.Random, folder: Path) -> bool:
    (_newest(folder) / "run.json").unlink()
    return True


def not_named(draw: random.Random, folder: Path) -> bool:
    """A save that did not come to its end."""
    newest = _newest(folder)
    newest.rename(newest.with_name(newest.name + ".partial"))
    return True


def latest_gone(draw: random.Random, folder: Path) -> bool:
    (folder / "checkpoints" / "latest").unlink()
    return False


def latest_wrong(draw: random.Random, folder: Path) -> bool:
    (folder / "checkpoints" / "latest").write_text(draw.choice(["", "step-2", "step-9", "\0"]))
    return False


def metrics_torn(draw: random.Random, folder: Path) -> bool:
    """A line of a step after the checkpoint, which breaks off."""
    line = '{"step": 5, "loss": 2.5, "grad_norm": 1.0'
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(line[: draw.randrange(1, len(line))])
    return False


def model_half(draw: random.Random, folder: Path) -> bool:
    """An export that did not come to its end."""
    (folder / "model").rename(folder / "model.partial")
    (folder / "model.partial" / "model.safetensors").unlink()
    return False


def model_gone(draw: random.Random, folder: Path) -> bool:
    shutil.rmtree(folder / "model")
    (folder / "eval.json").unlink()
    return False


DAMAGES: dict[str, Damage] = {
    f.__name__.replace("_", " "): f
    for f in (
        flip, truncate, zero, delete, list_torn, list_gone, not_named, latest_gone, latest_wrong, metrics_torn,
        model_half, model_gone,
    )
}  # fmt: skip
