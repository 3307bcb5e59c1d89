"""Runs of ``train/finetune.py`` that are hurt on purpose: what happens to which rank, when, and what is left.

The ranks are forked from a process that has imported everything and decoded the clips, so that a run costs a second.
What is hurt finds its moment by the phases that a rank tells its watchdog of.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from ds_lvxattn.training.launch import free_port

ROOT = Path(__file__).parents[2]
# Timeouts of the runs, seconds: of one with a stopped rank, and of others, which a busy machine must not end.
TIMEOUT, PATIENCE = 20, 600
# A minute more than the timeout, in which the survivors have to be out; beside it the time that a start takes.
LIMIT, START = TIMEOUT + 60.0, 240.0
STEPS, SAVE_EVERY = 4, 2
HURT = "a fault begins:"  # what a rank prints where it is hurt
SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "terminate": signal.SIGTERM}


@dataclass(frozen=True)
class Fault:
    """What happens to one rank, or to all.

    Attributes:
        kind: ``kill``, ``stop``, ``terminate``, ``raise``, or the name of an error of the file system (``ENOSPC``).
            ``EFBIG`` is the system's own limit of a file's size; the others are raised where a checkpoint is written
            and where a file is synced.
        rank: which rank; None: all.
        phase: beginning of the phase, as the watchdog knows it.
        delay: seconds after the phase begins; for a file system, bytes after which it fails.
    """

    kind: str
    rank: int | None
    phase: str
    delay: float = 0.0

    def hurts(self, rank: int) -> bool:
        """Whether it happens to this rank."""
        return self.rank is None or self.rank == rank

    def install(self) -> None:
        """Let it happen in this process."""
        from ds_lvxattn.training import files
        from ds_lvxattn.training.watchdog import Watchdog

        enter, happened = Watchdog.enter, threading.Event()

        def entering(watchdog: Watchdog, phase: str) -> None:
            enter(watchdog, phase)
            if phase.startswith(self.phase) and not happened.is_set():
                happened.set()
                self._happen()

        Watchdog.enter = entering  # type: ignore[method-assign]
        if self.kind.startswith("E") and self.kind != "EFBIG":
            number = getattr(errno, self.kind)
            write, fsync, left = files.DigestingFile.write, os.fsync, [self.delay]

            def writing(file: files.DigestingFile, data: bytes) -> int:
                left[0] -= len(memoryview(data).cast("B")) * happened.is_set()
                if left[0] < 0:
                    file.error = OSError(number, os.strerror(number))
                    raise file.error
                return write(file, data)

            def syncing(handle: int) -> None:
                left[0] -= happened.is_set()
                if left[0] < 0 and not os.path.isdir(f"/proc/self/fd/{handle}"):
                    raise OSError(number, os.strerror(number))
                fsync(handle)

            files.DigestingFile.write = writing  # type: ignore[method-assign]
            os.fsync = syncing

    def _happen(self) -> None:
        print(HURT, self.kind, file=sys.stderr, flush=True)
        if self.kind == "raise":
            raise RuntimeError("a fault that was asked for")
        if self.kind == "EFBIG":
            # What the rank prints is a file too.
            smallest = os.fstat(2).st_size + (1 << 16)
            resource.setrlimit(resource.RLIMIT_FSIZE, (smallest + int(self.delay), resource.RLIM_INFINITY))
        number = SIGNALS.get(self.kind)
        if number is not None:
            timer = threading.Timer(self.delay, os.kill, (os.getpid(), number))
            timer.daemon = True
            timer.start()
            if not self.delay:
                timer.join()


@dataclass(frozen=True)
class Ended:
    """How a run ended.

    Attributes:
        codes: exit codes of the ranks; negative: the signal; None: it had to be killed.
        seconds: from the start to the end of the last rank that was not stopped.
        output: what the ranks printed.
    """

    codes: tuple[int | None, ...]
    seconds: float
    output: tuple[str, ...]

    @property
    def text(self) -> str:
        return "\n".join(self.output)


def ds_config(stage: int = 2, **finetuning: Any) -> dict[str, Any]:
    """The config of the runs: the quickstart's model on four small steps."""
    return {
        "train_batch_size": 2,
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": 1.0,
        "steps_per_print": 1_000_000,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
        "zero_optimization": {"stage": stage},
        "sequence_parallel_size": 2,
        "sequence_parallel": {"strategy": "lv_xattn", "schedule": "gather"},
        "finetuning": {
            "steps": STEPS, "save_every": SAVE_EVERY, "eval_examples": 2, "timeout_s": PATIENCE, "report_to": "none",
            **finetuning,
        },
    }  # fmt: skip


def write_config(folder: Path, config: dict[str, Any] | None = None) -> Path:
    """A config file in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "ds_config.json"
    path.write_text(json.dumps(config or ds_config()))
    return path


def run(words: Sequence[object], logs: Path, fault: Fault | None = None, ranks: int = 2) -> Ended:
    """``train/finetune.py`` with the arguments ``words`` on ``ranks`` processes.

    Args:
        logs: folder for what they print.
        fault: what happens to them.
    """
    logs.mkdir(parents=True, exist_ok=True)
    files = [logs / f"rank-{rank}.txt" for rank in range(ranks)]
    while True:
        ended = _run_once(words, files, fault)
        if "EADDRINUSE" not in ended.text:  # another process was faster to take the port
            return ended


def _run_once(words: Sequence[object], files: Sequence[Path], fault: Fault | None) -> Ended:
    for file in files:
        file.write_text("")  # nothing of an earlier run
    port, began = free_port(), time.monotonic()
    pids = [
        nursery().start(
            rank=rank, ranks=len(files), port=port, words=[str(word) for word in words], log=str(file),
            fault=asdict(fault) if fault is not None and fault.hurts(rank) else None,
        )
        for rank, file in enumerate(files)
    ]  # fmt: skip
    codes = nursery().codes

    def awaited(rank: int) -> bool:
        """Whether a rank has still to end: not one that is stopped, which the others must not wait for."""
        stops = fault is not None and fault.kind == "stop" and fault.hurts(rank)
        return pids[rank] not in codes and not (stops and HURT in files[rank].read_text(errors="replace"))

    while any(map(awaited, range(len(pids)))) and time.monotonic() - began < START + LIMIT:
        time.sleep(0.05)
        nursery().look()
    seconds = time.monotonic() - began
    late = [pid for pid in pids if pid not in codes]
    for pid in late:
        os.kill(pid, signal.SIGKILL)
    while any(pid not in codes for pid in pids):
        nursery().look()
    ends = tuple(None if pid in late else codes[pid] for pid in pids)
    return Ended(ends, seconds, tuple(file.read_text(errors="replace") for file in files))


class Nursery:
    """A process that has imported everything and starts ranks: each a fork of it. Threads may share it.

    Attributes:
        codes: exit codes of the ranks that have ended, by process; negative: the signal.
    """

    def __init__(self) -> None:
        environment = {
            **os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled",
            "HF_HUB_OFFLINE": "1", "PYTHONPATH": python_path(),
        }  # fmt: skip
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.faults.ranks"], cwd=ROOT, env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        self._lock, self.codes = threading.Lock(), dict[int, int]()
        self._ask("")  # it is ready

    def _ask(self, request: Any) -> Any:
        assert self._process.stdin is not None and self._process.stdout is not None
        with self._lock:
            print(json.dumps(request), file=self._process.stdin, flush=True)
            return json.loads(self._process.stdout.readline())

    def start(self, **rank: Any) -> int:
        """Start a rank; its process id."""
        pid = int(self._ask(rank))
        self.codes.pop(pid, None)  # of an older process with this number
        return pid

    def look(self) -> None:
        """See which ranks have ended."""
        self.codes.update({int(pid): code for pid, code in self._ask(None).items()})


@functools.cache
def nursery() -> Nursery:
    """The one of this process; it ends with it, at the end of its input."""
    return Nursery()


def serve() -> None:
    """Life of the nursery: one answer for each line."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # nothing else may write among the answers
    import torch

    torch.set_num_threads(1)
    from ds_lvxattn.training import finetune

    _warm()
    for line in sys.stdin:
        request = json.loads(line)
        answer: Any = {}
        if request is None:
            with contextlib.suppress(ChildProcessError):
                while (found := os.waitpid(-1, os.WNOHANG))[0]:
                    answer[found[0]] = os.waitstatus_to_exitcode(found[1])
        elif request:
            answer = os.fork()
            if answer == 0:
                _rank(finetune, **request)
        print(json.dumps(answer), file=answers, flush=True)


def _warm() -> None:
    """Do beforehand, without a thread that a fork would lose, what takes a rank longest: imports and decoding."""
    import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401  compiles functions, which imports the compiler
    import wandb  # noqa: F401
    from PIL import Image

    from ds_lvxattn.needle.task import ClipCache
    from ds_lvxattn.training.dataset import load_sources
    from ds_lvxattn.training.loading import QUICKSTART, load_model
    from ds_lvxattn.training.settings import finetuning_config

    Image.init()
    settings = ds_config()
    decode, decoded = ClipCache._decode, dict[tuple[int, str], Any]()

    def once(cache: ClipCache, name: str) -> Any:
        key = cache.image_size, name
        if key not in decoded:
            decoded[key] = decode(cache, name)
        return decoded[key]

    ClipCache._decode = once  # type: ignore[method-assign]
    loaded = load_model(QUICKSTART, settings, 0)
    for source in load_sources("needle", loaded, finetuning_config(settings), STEPS * 2, 0):
        for row in range(len(source or ())):
            sample = source.sample(row)  # type: ignore[union-attr]
            sample.pictures(range(sample.num_frames))
    with tempfile.TemporaryDirectory() as folder:
        loaded.save(Path(folder), dict(loaded.model.state_dict()))


def _rank(command: ModuleType, rank: int, ranks: int, port: int, words: list[str], log: str, fault: Any) -> None:
    """One rank, in a process of its own."""
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for number in (1, 2):
        os.dup2(handle, number)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    if fault is not None:
        Fault(**fault).install()
    sys.argv = ["finetune.py", *words]
    code = 1
    try:
        code = command.main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    finally:
        sys.stdout.flush()
        os._exit(code)


def python_path() -> str:
    """``PYTHONPATH`` of processes that import this project, the caller's own behind it."""
    return os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))


@dataclass(frozen=True)
class Left:
    """What a run left in its folder.

    Attributes:
        losses: by step.
        model: digest of the exported weights; None: there is none.
        checkpoints: names of the whole ones, newest first.
    """

    losses: dict[int, float]
    model: str | None
    checkpoints: tuple[str, ...]


def left_in(folder: Path, torn: bool = False) -> Left:
    """What is in the folder of a run; fails on files that are torn.

    Args:
        torn: whether files of the run were damaged on purpose: what cannot be read is then left out.
    """
    metrics, weights = folder / "metrics.jsonl", folder / "model" / "model.safetensors"
    losses: dict[int, float] = {}
    for line in metrics.read_text(errors="replace").splitlines() if metrics.is_file() else []:
        try:
            found = json.loads(line)
            losses[found["step"]] = found["loss"]
        except (ValueError, TypeError, KeyError):
            if not torn:
                raise
    if (folder / "eval.json").exists() and not torn:
        json.loads((folder / "eval.json").read_text())
    model = hashlib.sha256(weights.read_bytes()).hexdigest() if weights.is_file() else None
    if (folder / "model").exists() and model is None and not torn:
        raise AssertionError(f"{folder / 'model'} holds no weights")
    named = [path.name for path in (folder / "checkpoints").glob("step-*") if path.name[5:].isdecimal()]
    names = sorted((name for name in named if is_whole(folder / "checkpoints" / name)), key=lambda n: -int(n[5:]))
    return Left(losses, model, tuple(names))


def is_whole(checkpoint: Path) -> bool:
    """Whether a checkpoint is what its list says; found here without the code that is tried."""
    try:
        found = json.loads((checkpoint / "run.json").read_text())
        own = found.pop("sha256")
        if own != hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest():
            return False
        listed = {path.name for path in checkpoint.glob("*.pt")} <= set(found["files"])
        return listed and all(
            hashlib.sha256((checkpoint / name).read_bytes()).hexdigest() == digest["sha256"]
            for name, digest in found["files"].items()
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False


if __name__ == "__main__":
    serve()
