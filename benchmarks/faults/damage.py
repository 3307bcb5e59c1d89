"""What can happen to the files of a run between its end and its resumption."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

Damage = Callable[[random.Random, Path], None]


def _newest(folder: Path) -> Path:
    """The newest checkpoint with content, whole or not."""
    found = [path.parent for path in (folder / "checkpoints").glob("step-*/*.pt")]
    return max(found, key=lambda path: int(path.name.split(".")[0].split("-")[1]))


def _shard(draw: random.Random, folder: Path) -> Path:
    return draw.choice(sorted(_newest(folder).glob("*.pt")))


def _any(draw: random.Random, folder: Path) -> Path:
    """Any file of the run: a folder first, so that the many small files of one do not outweigh the others."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    parent = draw.choice(sorted({path.parent for path in files}))
    return draw.choice(sorted(path for path in files if path.parent == parent))


def _flip(draw: random.Random, path: Path) -> None:
    if size := path.stat().st_size:
        with path.open("r+b") as file:
            file.seek(draw.randrange(size))
            byte = file.read(1)[0]
            file.seek(-1, 1)
            file.write(bytes([byte ^ 1 << draw.randrange(8)]))


def _cut(draw: random.Random, path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(draw.randrange(path.stat().st_size + 1))


def flip(draw: random.Random, folder: Path) -> None:
    """One bit of a shard."""
    _flip(draw, _shard(draw, folder))


def truncate(draw: random.Random, folder: Path) -> None:
    path = _shard(draw, folder)
    with path.open("r+b") as file:
        file.truncate(draw.randrange(path.stat().st_size))


def zero(draw: random.Random, folder: Path) -> None:
    """A page of zeros, as some file systems leave after a power cut."""
    path = _shard(draw, folder)
    with path.open("r+b") as file:
        file.seek(draw.randrange(max(1, path.stat().st_size - 4096)))
        file.write(bytes(4096))


def delete(draw: random.Random, folder: Path) -> None:
    _shard(draw, folder).unlink()


def shards_exchanged(draw: random.Random, folder: Path) -> None:
    """Two files under each other's names."""
    one, other = draw.sample(sorted(_newest(folder).glob("*.pt")), 2)
    aside = one.with_name("aside")
    one.rename(aside)
    other.rename(one)
    aside.rename(other)


def shard_of_older(draw: random.Random, folder: Path) -> None:
    """A file of the checkpoint before in the place of a newer one, of the same size."""
    newest = _newest(folder)
    older = [path for path in sorted((folder / "checkpoints").glob("step-*")) if path != newest]
    path = _shard(draw, folder)
    if older and (older[0] / path.name).exists():
        shutil.copy(older[0] / path.name, path)


def further_shard(draw: random.Random, folder: Path) -> None:
    """A file as of a further rank."""
    path = _shard(draw, folder)
    shutil.copy(path, path.with_name(path.name.replace("rank_0", "rank_2", 1).replace("rank_1", "rank_2", 1)))


def folder_for_shard(draw: random.Random, folder: Path) -> None:
    path = _shard(draw, folder)
    path.unlink()
    path.mkdir()


def dangling_link(draw: random.Random, folder: Path) -> None:
    path = _shard(draw, folder)
    path.unlink()
    path.symlink_to("gone")


def stray_checkpoint(draw: random.Random, folder: Path) -> None:
    """A newer checkpoint without content, as a copy that broke off leaves."""
    (folder / "checkpoints" / "step-9").mkdir(exist_ok=True)
    (folder / "checkpoints" / "step-best").mkdir(exist_ok=True)
    (folder / "checkpoints" / "step-7").write_text("")


def list_flipped(draw: random.Random, folder: Path) -> None:
    _flip(draw, _newest(folder) / "run.json")


def list_torn(draw: random.Random, folder: Path) -> None:
    path = _newest(folder) / "run.json"
    path.write_text(path.read_text()[: draw.randrange(200)])


def list_gone(draw: random.Random, folder: Path) -> None:
    (_newest(folder) / "run.json").unlink()


def not_named(draw: random.Random, folder: Path) -> None:
    """A save that did not come to its end."""
    newest = _newest(folder)
    if not newest.name.endswith(".partial"):
        newest.rename(newest.with_name(newest.name + ".partial"))


def newest_gone(draw: random.Random, folder: Path) -> None:
    shutil.rmtree(_newest(folder))


def latest_gone(draw: random.Random, folder: Path) -> None:
    (folder / "checkpoints" / "latest").unlink()


def latest_wrong(draw: random.Random, folder: Path) -> None:
    (folder / "checkpoints" / "latest").write_text(draw.choice(["", "step-2", "step-9", "\0"]))


def metrics_torn(draw: random.Random, folder: Path) -> None:
    """A line of a step after the checkpoint, which breaks off."""
    line = '{"step": 5, "loss": 2.5, "grad_norm": 1.0'
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(line[: draw.randrange(1, len(line))])


def metrics_flipped(draw: random.Random, folder: Path) -> None:
    _flip(draw, folder / "metrics.jsonl")


def metrics_gone(draw: random.Random, folder: Path) -> None:
    (folder / "metrics.jsonl").unlink()


def model_half(draw: random.Random, folder: Path) -> None:
    """An export that did not come to its end."""
    shutil.rmtree(folder / "model.partial", ignore_errors=True)
    (folder / "model").rename(folder / "model.partial")
    (folder / "model.partial" / "model.safetensors").unlink()


def model_gone(draw: random.Random, folder: Path) -> None:
    shutil.rmtree(folder / "model")
    (folder / "eval.json").unlink()


def any_flipped(draw: random.Random, folder: Path) -> None:
    _flip(draw, _any(draw, folder))


def any_truncated(draw: random.Random, folder: Path) -> None:
    _cut(draw, _any(draw, folder))


def any_deleted(draw: random.Random, folder: Path) -> None:
    _any(draw, folder).unlink()


def any_zeroed(draw: random.Random, folder: Path) -> None:
    path = _any(draw, folder)
    path.write_bytes(bytes(path.stat().st_size))


DAMAGES: dict[str, Damage] = {
    f.__name__.replace("_", " "): f
    for f in (
        flip, truncate, zero, delete, shards_exchanged, shard_of_older, further_shard, folder_for_shard, dangling_link,
        stray_checkpoint, list_flipped, list_torn, list_gone, not_named, newest_gone, latest_gone, latest_wrong,
        metrics_torn, metrics_flipped, metrics_gone, model_half, model_gone, any_flipped, any_truncated, any_deleted,
        any_zeroed,
    )
}  # fmt: skip


def hurt(name: str, draw: random.Random, folder: Path) -> bool:
    """Damage the files of a run; whether there was anything to damage."""
    try:
        DAMAGES[name](draw, folder)
    except (OSError, ValueError, IndexError):  # what it hurts is not there
        return False
    return True
