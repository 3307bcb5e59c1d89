"""Runs of ``train/finetune.py`` that are hurt on purpose: what happens to which rank, when, and what is left.

The ranks are forked from a process that has imported everything, so that a run costs a few seconds. What is hurt finds
its moment by the phases that a rank tells its watchdog of.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).parents[2]
# Timeouts of the runs, seconds: of one with a stopped rank, and of others, which a busy machine must not end.
TIMEOUT, PATIENCE = 20, 600
# A minute more than the timeout, in which the survivors have to be out; beside it the time that a start takes.
LIMIT, START = TIMEOUT + 60.0, 240.0
STEPS, SAVE_EVERY = 4, 2


@dataclass(frozen=True)
class Fault:
    """What happens to one rank.

    Attributes:
        kind: ``kill``, ``stop``, ``raise``, or the name of an error of the file system (``ENOSPC``).
        rank: which rank.
        phase: beginning of the phase, as the watchdog knows it.
        delay: seconds after the phase begins; for a file system, bytes after which it fails.
    """

    kind: str
    rank: int
    phase: str
    delay: float = 0.0

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
        if self.kind.startswith("E"):
            write, left = files.DigestingFile.write, [self.delay]

            def writing(file: files.DigestingFile, data: bytes) -> int:
                left[0] -= len(memoryview(data).cast("B")) * happened.is_set()
                if left[0] < 0:
                    number = getattr(errno, self.kind)
                    file.error = OSError(number, os.strerror(number))
                    raise file.error
                return write(file, data)

            files.DigestingFile.write = writing  # type: ignore[method-assign]

    def _happen(self) -> None:
        if self.kind == "raise":
            raise RuntimeError("a fault that was asked for")
        number = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}.get(self.kind)
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
            "steps": STEPS, "save_every": SAVE_EVERY, "eval_examples": 2, "timeout_s": PATIENCE, **finetuning,
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
        fault: what happens to one of them.
    """
    logs.mkdir(parents=True, exist_ok=True)
    port, files = free_port(), [logs / f"rank-{rank}.txt" for rank in range(ranks)]
    began = time.monotonic()
    pids = [
        nursery().start(
            rank=rank, ranks=ranks, port=port, words=[str(word) for word in words], log=str(files[rank]),
            fault=asdict(fault) if fault is not None and fault.rank == rank else None,
        )
        for rank in range(ranks)
    ]  # fmt: skip
    stopped = pids[fault.rank] if fault is not None and fault.kind == "stop" else None
    codes: dict[int, int] = {}
    while len(set(pids) - set(codes) - {stopped}) and time.monotonic() - began < START + LIMIT:
        time.sleep(0.05)
        codes.update(nursery().ended())
    seconds = time.monotonic() - began
    late = [pid for pid in pids if pid not in codes]
    for pid in late:
        os.kill(pid, signal.SIGKILL)
    while not set(pids) <= set(codes):
        codes.update(nursery().ended())
    ends = tuple(None if pid in late else codes[pid] for pid in pids)
    return Ended(ends, seconds, tuple(file.read_text(errors="replace") for file in files))


class Nursery:
    """A process that has imported everything and starts ranks: each a fork of it."""

    def __init__(self) -> None:
        environment = {
            **os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled",
            "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT),
        }  # fmt: skip
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.faults.ranks"], cwd=ROOT, env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        self._ask("")  # it is ready

    def _ask(self, request: Any) -> Any:
        assert self._process.stdin is not None and self._process.stdout is not None
        print(json.dumps(request), file=self._process.stdin, flush=True)
        return json.loads(self._process.stdout.readline())

    def start(self, **rank: Any) -> int:
        """Start a rank; its process id."""
        return int(self._ask(rank))

    def ended(self) -> dict[int, int]:
        """Exit codes of the ranks that have ended since the question before; negative: the signal."""
        return {int(pid): code for pid, code in self._ask(None).items()}


@functools.cache
def nursery() -> Nursery:
    """The one of this process; it ends with it, at the end of its input."""
    return Nursery()


def serve() -> None:
    """Life of the nursery: one answer for each line."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # nothing else may write among the answers
    import torch
    import torch._dynamo
    from transformers.models.mllama import modeling_mllama  # noqa: F401

    from ds_lvxattn.needle import source  # noqa: F401

    torch.set_num_threads(1)
    from sklearn.datasets import load_digits

    from ds_lvxattn.training import finetune

    load_digits()
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


def free_port() -> int:
    """A TCP port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


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


def left_in(folder: Path) -> Left:
    """What is in the folder of a run; fails on files that are torn."""
    metrics, weights = folder / "metrics.jsonl", folder / "model" / "model.safetensors"
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    objects = [json.loads(line) for line in lines]
    if (folder / "eval.json").exists():
        json.loads((folder / "eval.json").read_text())
    model = hashlib.sha256(weights.read_bytes()).hexdigest() if weights.exists() else None
    if (folder / "model").exists() and model is None:
        raise AssertionError(f"{folder / 'model'} holds no weights")
    whole = [path.parent.name for path in (folder / "checkpoints").glob("step-*/run.json")]
    names = sorted((name for name in whole if not name.endswith(".partial")), key=lambda n: -int(n.split("-")[1]))
    return Left({o["step"]: o["loss"] for o in objects}, model, tuple(names))


if __name__ == "__main__":
    serve()
