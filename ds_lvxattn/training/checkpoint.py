"""Checkpoints that are whole or do not exist, and what they can be resumed with.

DeepSpeed writes the files of a checkpoint into ``step-N.partial``. When every rank has written its own, ``run.json``
beside them lists all with size and checksum, and the folder gets its name; ``latest``, which DeepSpeed's own tools
read, follows last. At resumption the ranks check the newest checkpoint against its list, each a share of the files,
and pass over one that does not agree.

Reading is safe: files hold tensors and plain values, and nothing else is unpickled.
"""

from __future__ import annotations

import hashlib
import json
import logging
import pickle
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed import DeepSpeedEngine, zero
from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine
from safetensors import SafetensorError
from torch import nn

from ds_lvxattn.batches.agreement import gather, on_all_ranks, raise_first
from ds_lvxattn.errors import ConfigError, RunError
from ds_lvxattn.training.files import (
    ASIDE,
    Digest,
    DigestingFile,
    aside,
    remove,
    replace_folder,
    replace_text,
    storage_problem,
    sync,
    sync_folder,
    writing,
)
from ds_lvxattn.training.metrics import METRICS, lines_of, text_digest
from ds_lvxattn.training.run_folder import RunFolder
from ds_lvxattn.training.secrets import without_secrets

logger = logging.getLogger(__name__)

FOLDER = "checkpoints"
LIST = "run.json"
OWN = "sha256"  # of the list, in itself
LATEST = "latest"
NAME = re.compile(r"step-(\d+)")


@dataclass(frozen=True)
class RunFacts:
    """What a checkpoint was made with, and can be resumed with.

    ``sequence_parallel_size`` may differ at resumption: ZeRO partitions over all ranks, whatever their groups.
    """

    world_size: int
    zero_stage: int
    train_batch_size: int
    seed: int
    sequence_parallel_size: int
    parameters: str
    data: str


MUST_AGREE = ("world_size", "zero_stage", "train_batch_size", "seed", "parameters", "data")


def parameter_digest(model: nn.Module) -> str:
    """Digest of the names and shapes of a model's parameters, and of which of them train."""
    lines = (
        f"{name} {tuple(getattr(p, 'ds_shape', p.shape))} {p.requires_grad}" for name, p in model.named_parameters()
    )
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def check_fresh(output_dir: Path) -> None:
    """Refuse to mix a new run with the checkpoints of an older one.

    Raises:
        ConfigError: the folder holds checkpoints.
    """
    if any(not name.endswith(ASIDE) for name in _names(output_dir / FOLDER)):
        raise ConfigError(
            f"--output_dir {output_dir} holds checkpoints of an earlier run; give --resume to go on with it, "
            "or another folder"
        )


def check_run_folder(output_dir: Path, resume: bool, known: Mapping[str, int], group: dist.ProcessGroup) -> None:
    """Refuse a folder in which a run cannot begin, or not go on; ahead of the model, which may take minutes to load.

    Args:
        known: facts of this run (``RunFacts``) that do not depend on the model.
        group: of all ranks, for host messages.

    Raises:
        ConfigError: on every rank: another run has it, it cannot be written, or it holds checkpoints and ``resume`` is
            not asked for; nothing to resume from, or a checkpoint of another kind of run.
    """

    def check() -> None:
        if dist.get_rank() == 0:
            RunFolder(output_dir).close()
        if not resume:
            check_fresh(output_dir)
        elif dist.get_rank() == 0:
            folder = output_dir / FOLDER
            if not list(_names(folder)):
                raise ConfigError(f"--resume: {folder} holds no checkpoint")
            found = ((folder / name, _read_list(folder / name)) for name in _whole_names(folder))
            path, read = next(((path, read) for path, read in found if isinstance(read, dict)), (folder, {}))
            for key, now in known.items():
                if key in read:
                    _check_agrees(path, key, read[key], now)

    on_all_ranks(check, group)


def _check_agrees(path: Path, key: str, was: Any, now: Any) -> None:
    """Refuse a checkpoint of another kind of run.

    Raises:
        ConfigError: naming what differs.
    """
    if was == now:
        return
    made = f"made with {key} {was}, this run has {now}; use {was}"
    if key == "parameters":
        made = "made with other parameters than this run's, or others of them train; use the same"
    if key == "data":
        made = (
            f"made on other data ({was}; this run has {now}); give that, or --new_data to go on with these "
            "rows from the place that the steps so far reach in them"
        )
    raise ConfigError(f"--resume: the checkpoint in {path} was {made}, or start a new run in another folder")


class CheckpointFiles(TorchCheckpointEngine):
    """Writes and reads the files of DeepSpeed's checkpoints.

    A file that cannot be written is noted instead of raised: the other ranks wait for this one in DeepSpeed's barrier.

    Attributes:
        written: digests of the files of this rank since ``begin``.
        problem: what could not be written; None: nothing.
    """

    def __init__(self, zipped: bool, progress: Callable[[], None]) -> None:
        super().__init__()
        self.zipfile_serialization, self.progress = zipped, progress
        self.begin()

    def begin(self) -> None:
        """Forget the files of the checkpoint before."""
        self.written: dict[Path, Digest] = {}
        self.problem: str | None = None

    def save(self, state_dict: dict[str, Any], path: str) -> None:
        if self.problem:
            return
        if "ds_config" in state_dict:
            state_dict = {**state_dict, "ds_config": without_secrets(state_dict["ds_config"])}
        target, digesting = Path(path), None
        try:
            with target.open("wb") as file:
                digesting = DigestingFile(file, self.progress)
                torch.save(state_dict, digesting, _use_new_zipfile_serialization=self.zipfile_serialization)  # type: ignore[arg-type]
                sync(file)
        except (OSError, RuntimeError) as error:
            # torch's writer covers the error of a file with its own.
            cause = error if isinstance(error, OSError) else digesting and digesting.error
            if not isinstance(cause, OSError):
                raise
            self.problem = storage_problem(cause, path)
            target.unlink(missing_ok=True)  # room for the rank that writes something small beside it
        else:
            self.written[target] = digesting.digest

    def load(self, path: str, map_location: Any = None) -> Any:
        with torch.serialization.safe_globals(_plain_classes()):
            return torch.load(path, map_location=map_location, weights_only=True)


def _plain_classes() -> list[Any]:
    """Classes of plain values that DeepSpeed puts in its files beside tensors."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]


class Checkpoints:
    """The checkpoints of one run; all ranks make it and call its methods.

    Args:
        engine: whose state they hold.
        output_dir: of the run.
        facts: of the run.
        group: of all ranks, for host messages.
        progress: called while files are written.
        new_data: whether a checkpoint may be of a run on other rows.
        trained_only: leave parameters that do not train out; they come from the model that is loaded anyway.
        keep_last: checkpoints that stay when another is saved; 0: all.

    Attributes:
        metrics: on rank 0, digest of the metrics up to the step that was resumed; None: nothing was.
    """

    def __init__(
        self,
        engine: DeepSpeedEngine,
        output_dir: Path,
        facts: RunFacts,
        group: dist.ProcessGroup,
        progress: Callable[[], None],
        new_data: bool = False,
        trained_only: bool = False,
        keep_last: int = 0,
    ) -> None:
        self.must_agree = [key for key in MUST_AGREE if not (new_data and key == "data")]
        self.engine, self.folder, self.facts, self.group = engine, output_dir / FOLDER, facts, group
        self.trained_only, self.keep_last = trained_only, keep_last
        self.metrics: str | None = None
        self.files = CheckpointFiles(engine.checkpoint_engine.zipfile_serialization, progress)
        engine.checkpoint_engine = self.files
        # DeepSpeed copies two scripts beside every checkpoint on one rank, between barriers; here a full disk is
        # found where all ranks learn of it.
        self._copy_scripts, engine._copy_recovery_script = engine._copy_recovery_script, lambda path: None

    def save(self, step: int, best: int = 0) -> None:
        """Save a checkpoint after ``step``; then those go that are neither among the last nor that of step ``best``.

        Raises:
            RunError: on every rank, when one could not write its files; the older checkpoints are whole.
        """
        name = f"step-{step}"
        partial = self.folder / (name + ASIDE)
        first = dist.get_rank() == 0
        try:
            on_all_ranks(lambda: self._make_room(partial) if first else None, self.group)
            self.files.begin()
            self.engine.save_checkpoint(
                str(self.folder), tag=partial.name, client_state={"step": step}, save_latest=False,
                exclude_frozen_parameters=self.trained_only,
            )  # fmt: skip
            raise_first(None if self.files.problem is None else (2, self.files.problem), self.group)
            written = gather({path.name: digest for path, digest in self.files.written.items()}, self.group)
            digests = {file: digest for found in written for file, digest in found.items()}
            digests |= self._digests_of_others(partial, digests)
            on_all_ranks(lambda: self._finish(partial, name, step, digests) if first else None, self.group)
        except RunError as error:
            if first:
                with suppress(OSError):
                    remove(partial)
            raise RunError(f"{error}; {self.newest()}") from error
        on_all_ranks(lambda: self._thin_out(best) if first else None, self.group)

    def _thin_out(self, best: int) -> None:
        whole = list(_whole_names(self.folder))
        for name in whole[self.keep_last :] if self.keep_last else ():
            if name != f"step-{best}":
                remove(self.folder / name)

    def load_step(self, step: int) -> None:
        """Take the parameters and the optimizer of the checkpoint of a step.

        Raises:
            RunError: on every rank: it is not whole any more.
        """
        name = f"step-{step}"
        if (problem := self._problem(name)) is not None:
            raise RunError(f"{self.folder / name} cannot be loaded: {problem}; {self.newest()}")
        on_all_ranks(lambda: self._load(name), self.group)

    def newest(self) -> str:
        """The newest whole checkpoint, in words."""
        names = list(_whole_names(self.folder))
        return f"the newest whole checkpoint is {self.folder / names[0]}" if names else "there is no checkpoint yet"

    def _make_room(self, partial: Path) -> None:
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            for left in (*self.folder.glob(f"*{ASIDE}"), *self.folder.glob("*.old")):  # of runs that ended in a save
                if left.is_dir():
                    remove(left)
            partial.mkdir()
            self._copy_scripts(str(self.folder))

    def _digests_of_others(self, partial: Path, known: dict[str, Digest]) -> dict[str, Digest]:
        """Digests of files that DeepSpeed copied by itself (offload to NVMe): each rank reads a share."""
        names = gather(_files_in(partial) if dist.get_rank() == 0 else None, self.group)[0]
        missing = [name for name in names if name not in known]
        if not missing:
            return {}
        mine = {name: Digest.of(partial / name) for name in self._share(missing)}
        return {name: digest for found in gather(mine, self.group) for name, digest in found.items()}

    def _share(self, names: list[str]) -> list[str]:
        return sorted(names)[dist.get_rank(self.group) :: dist.get_world_size(self.group)]

    def _finish(self, partial: Path, name: str, step: int, digests: dict[str, Digest]) -> None:
        """Rank 0: the list, the name, and ``latest``."""
        files = {file: asdict(digest) for file, digest in sorted(digests.items())}
        metrics = text_digest(lines_of(self.folder.parent / METRICS, step))
        content = {"step": step, **asdict(self.facts), "metrics": metrics, "files": files}
        replace_text(partial / LIST, json.dumps({**content, OWN: _checksum(content)}, indent=2) + "\n")
        sync_folder(partial)
        replace_folder(partial, self.folder / name)
        replace_text(self.folder / LATEST, name)

    def resume(self) -> int:
        """Load the newest whole checkpoint.

        Returns:
            The step after which it was saved.

        Raises:
            ConfigError: on every rank: there is none, or it was made with other ranks, ZeRO stage, batch, seed or
                parameters.
        """
        names = gather(list(_names(self.folder)) if dist.get_rank() == 0 else None, self.group)[0]
        passed: list[str] = []
        for name in names:
            problem = self._problem(name)
            if problem is None:
                break
            passed.append(f"{name}: {problem}")
            if dist.get_rank() == 0:
                logger.warning("passing over the checkpoint %s: %s", name, problem)
        else:
            detail = f" ({'; '.join(passed)})" if passed else ""
            raise ConfigError(
                f"--resume: {self.folder} holds no checkpoint that is whole{detail}; start without --resume in "
                "another folder"
                if passed
                else f"--resume: {self.folder} holds no checkpoint"
            )
        step = on_all_ranks(lambda: self._load(name), self.group)
        if dist.get_rank() == 0:
            read = _read_list(self.folder / name)
            self.metrics = read["metrics"] if isinstance(read, dict) else None
            print(f"resuming from {self.folder / name}", flush=True)
        return step

    def _problem(self, name: str) -> str | None:
        """What is wrong with a checkpoint, as all ranks find together.

        Raises:
            ConfigError: it is whole, but of another kind of run.
        """
        path = self.folder / name
        if name.endswith(ASIDE):
            return "the run ended while it was saved"
        read: Any = gather(_read_list(path) if dist.get_rank() == 0 else None, self.group)[0]
        if isinstance(read, str):
            return read
        for key in self.must_agree:
            _check_agrees(path, key, read[key], getattr(self.facts, key))
        files = read["files"]
        problems = [_damage(path / file, Digest(**files[file])) for file in self._share(list(files))]
        damage = [problem for found in gather([p for p in problems if p], self.group) for problem in found]
        return "; ".join(damage) or None

    def _load(self, name: str) -> int:
        try:
            path, state = self.engine.load_checkpoint(
                str(self.folder), tag=name, load_module_strict=not self.trained_only
            )
        except pickle.UnpicklingError as error:
            raise ConfigError(
                f"--resume: {self.folder / name} holds more than tensors and plain values, and is not loaded: {error}"
            ) from error
        except (OSError, RuntimeError, KeyError, ValueError, AssertionError) as error:
            raise ConfigError(f"--resume: {self.folder / name} cannot be loaded: {error}") from error
        if path is None:
            raise ConfigError(f"--resume: DeepSpeed finds no checkpoint in {self.folder / name}")
        return int(state["step"])


def _names(folder: Path) -> Iterator[str]:
    """Checkpoints in a folder, whole or not, newest first."""
    found = [path.name for path in folder.glob("step-*") if path.is_dir()]
    matched = [(int(m[1]), name) for name in found if (m := NAME.fullmatch(name.removesuffix(ASIDE)))]
    yield from (name for _, name in sorted(matched, reverse=True))


def _whole_names(folder: Path) -> Iterator[str]:
    """Checkpoints that were saved to their end, newest first."""
    return (name for name in _names(folder) if not name.endswith(ASIDE) and (folder / name / LIST).exists())


def _files_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def _read_list(path: Path) -> dict[str, Any] | str:
    """``run.json`` of a checkpoint, or what is wrong with it."""
    try:
        found = json.loads((path / LIST).read_text(encoding="utf-8"))
        if found.pop(OWN) != _checksum(found):
            return f"{LIST} is damaged (its checksum differs)"
        if not isinstance(found["files"], dict) or not found["files"]:
            return f"{LIST} lists no files"
        RunFacts(**{key: found[key] for key in RunFacts.__dataclass_fields__})
        for digest in found["files"].values():
            Digest(**digest)
        # DeepSpeed reads whatever has the right name.
        stray = [name for name in _files_in(path) if name.endswith(".pt") and name not in found["files"]]
        if stray:
            return f"it holds files that {LIST} does not name ({', '.join(stray)}); move them away"
    except OSError:
        return f"it has no {LIST}, with which a whole checkpoint ends"
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return f"{LIST} is damaged"
    return found


def _checksum(content: dict[str, Any]) -> str:
    """SHA-256 of what ``run.json`` says beside it."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _damage(path: Path, expected: Digest) -> str | None:
    """What is wrong with one file."""
    try:
        size = path.stat().st_size
        if size != expected.bytes:
            return f"{path.name} has {size} bytes instead of {expected.bytes}"
        if Digest.of(path) != expected:
            return f"{path.name} is damaged (its checksum differs)"
    except OSError as error:
        return f"{path.name} cannot be read ({error.strerror})"
    return None


def full_state_dict(engine: DeepSpeedEngine, trained_only: bool = False) -> dict[str, torch.Tensor]:
    """All parameters on the CPU of rank 0, gathered one at a time under ZeRO-3; empty on other ranks.

    Args:
        trained_only: leave out those that do not train.
    """
    state: dict[str, torch.Tensor] = {}
    for name, parameter in engine.module.named_parameters():
        if trained_only and not parameter.requires_grad:
            continue
        with zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            if dist.get_rank() == 0:
                state[name] = parameter.detach().cpu().clone()
    return state


def export(output_dir: Path, name: str, write: Callable[[Path], None]) -> Path:
    """Rank 0: the folder ``name`` in ``output_dir``, whole or not there; an earlier one is replaced.

    Its files are readable by whom the umask lets, as those of the run are: safetensors makes weights their owner's.

    Args:
        write: fills the folder that it is given.

    Raises:
        RunError: it cannot be written.
    """
    folder = output_dir / name
    partial = aside(folder)
    with writing(folder):
        remove(partial)
        partial.mkdir(parents=True)
        try:
            write(partial)
        except SafetensorError as error:  # holds the words of the file system
            raise RunError(f"{folder} cannot be written: {error}") from error
        shared = partial.stat().st_mode & 0o666
        for path in partial.rglob("*"):
            if path.is_file():
                path.chmod(path.stat().st_mode | shared)
                with path.open("rb+") as file:
                    sync(file)
    replace_folder(partial, folder)
    return folder
