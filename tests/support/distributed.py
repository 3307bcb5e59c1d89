"""Run a function on every rank of a real process group, from an ordinary test.

    results = run(4, function, *args)   # [what rank 0 returned, ..., what rank 3 returned]

``function`` is a module-level function of a test module; it, its arguments and its results are pickled
(return CPU tensors). It is called on all ranks at once; inside, ``torch.distributed`` is initialised and
``dist.group.WORLD`` is the group of these ranks. The processes of one world size are started once and serve
every later call, so that importing torch and DeepSpeed is paid once. Whatever a function leaves behind in its
process (groups, module state) stays there: clean up.

If a rank raises, ``run`` raises ``RemoteError`` with its traceback; if the ranks do not finish in time (a
hang; see ``Deadline``), ``TimeoutError`` with the place where each rank hangs. Unless every rank raised, the
processes are then killed (the others may be left in a collective), and the next call starts fresh ones. They end
with the test process, however that ends.

The environment variable ``DS_LVXATTN_TEST_BACKEND`` chooses ``gloo`` (default: CPU) or ``nccl`` (one GPU a
rank; a test that asks for more ranks than there are GPUs is skipped).
"""

from __future__ import annotations

import atexit
import faulthandler
import functools
import logging
import multiprocessing
import os
import pickle
import select
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from tests.support.deadline import Deadline

BACKEND = os.environ.get("DS_LVXATTN_TEST_BACKEND", "gloo")
START_SECONDS = 120.0
GRACE_SECONDS = 2.0  # for the other ranks to report, once one has failed
STACK_SECONDS = 2.0  # for the ranks to write their stacks


class RemoteError(AssertionError):
    """A rank raised; the message is its traceback.

    Attributes:
        everywhere: every rank raised, so none of them waits for another.
    """

    def __init__(self, message: str, everywhere: bool) -> None:
        super().__init__(message)
        self.everywhere = everywhere


def run(ranks: int, function: Callable[..., Any], *args: Any, timeout: float = 120.0) -> list[Any]:
    """Call ``function(*args)`` on ``ranks`` ranks at once.

    Returns:
        What each rank returned, in rank order.

    Raises:
        RemoteError: a rank raised.
        TimeoutError: a rank did not return within ``timeout`` seconds, as ``Deadline`` counts them.
    """
    if BACKEND == "nccl" and ranks > torch.cuda.device_count():
        pytest.skip(f"needs {ranks} GPUs")
    pool = _pools.get(ranks)
    if pool is None:
        pool = _pools[ranks] = _Pool(ranks)
    try:
        return pool.call(function, args, timeout)
    except BaseException as error:
        if not isinstance(error, RemoteError | TimeoutError):
            print(pool.stacks(), file=sys.stderr)  # interrupted from outside, by the time limit of a test for one
        if not (isinstance(error, RemoteError) and error.everywhere):
            _pools.pop(ranks).kill()
        raise


def device() -> torch.device:
    """Where tensors go: on a rank its own GPU or the CPU, in the test process the first GPU or the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if BACKEND == "nccl" else torch.device("cpu")


class _Pool:
    """The processes of one world size."""

    def __init__(self, ranks: int) -> None:
        # The store lives here and picks its own free port: no race for one.
        self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        context = _processes()
        self.folder = tempfile.TemporaryDirectory()
        self.pipes: list[Connection] = []
        self.processes = []
        for rank in range(ranks):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(rank, ranks, self.store.port, there, self._stack_file(rank)))
            process.start()
            there.close()
            self.pipes.append(here)
            self.processes.append(process)
        try:
            self._results(START_SECONDS)
        except BaseException:
            self.kill()
            raise

    def call(self, function: Callable[..., Any], args: tuple[Any, ...], timeout: float) -> list[Any]:
        request = pickle.dumps((function, args))
        for pipe in self.pipes:
            pipe.send_bytes(request)
        return self._results(timeout)

    def _results(self, timeout: float) -> list[Any]:
        results: dict[int, Any] = {}
        failures: dict[int, str] = {}
        deadline = Deadline(timeout)
        while pending := [p for r, p in enumerate(self.pipes) if r not in results and r not in failures]:
            ready = wait(pending, 1.0)
            if deadline.passed(process.pid for process in self.processes) and not ready:
                break
            for pipe in ready:
                rank = self.pipes.index(pipe)  # type: ignore[arg-type]
                try:
                    failed, value = pickle.loads(self.pipes[rank].recv_bytes())
                except EOFError:
                    self.processes[rank].join(GRACE_SECONDS)
                    failed, value = True, f"the process ended with code {self.processes[rank].exitcode}"
                if failed:
                    deadline.left = min(deadline.left, GRACE_SECONDS)
                (failures if failed else results)[rank] = value
        if failures:
            rank, report = next(iter(failures.items()))
            raise RemoteError(
                f"rank {rank} of {len(self.pipes)} (failed: {sorted(failures)}):\n{report}",
                everywhere=len(failures) == len(self.pipes) and all(p.is_alive() for p in self.processes),
            )
        if len(results) < len(self.pipes):
            missing = sorted(set(range(len(self.pipes))) - set(results))
            raise TimeoutError(f"ranks {missing} of {len(self.pipes)} gave no result in {timeout:g} s\n{self.stacks()}")
        return [results[rank] for rank in range(len(self.pipes))]

    def _stack_file(self, rank: int) -> str:
        return str(Path(self.folder.name) / f"{rank}.txt")

    def stacks(self) -> str:
        """Where each rank is at the moment."""
        for process in self.processes:
            if process.is_alive():
                os.kill(process.pid, signal.SIGUSR1)
        time.sleep(STACK_SECONDS)
        files = [Path(self._stack_file(rank)) for rank in range(len(self.processes))]
        return "\n".join(f"rank {n}:\n{f.read_text() if f.exists() else 'gone'}" for n, f in enumerate(files))

    def close(self) -> None:
        for pipe in self.pipes:
            pipe.close()  # the processes see the end of their input and leave
        for process in self.processes:
            process.join(GRACE_SECONDS)
        self.kill()

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        self.folder.cleanup()


def fork_the_server() -> None:
    """Fork the process that ranks are forked from off this one, which has imported what the tests need.

    A new process would import all of it again, in some 13 seconds. Call it ahead of the first test: ranks must come of
    a process that has started no threads of its own and made no gradients. Nothing happens there until the first rank
    is asked for. With CUDA, which forbids this, it does nothing.
    """
    if torch.cuda.is_available():
        return
    _processes()
    resource_tracker.ensure_running()  # which is a process of its own
    with mock.patch("multiprocessing.util.spawnv_passfds", _fork):
        forkserver.ensure_running()


def _fork(_path: str, arguments: list[str], files: list[int]) -> int:
    """In place of starting Python anew: the last argument is the code that it would run, with these open files."""
    process = os.fork()
    if process:
        return process
    try:
        # What else is open belongs to the test process. It is not closed: objects that are still here would close it
        # once more, when another file has its number.
        nothing = os.open(os.devnull, os.O_RDWR)
        for name in os.listdir("/proc/self/fd"):
            if (file := int(name)) > 2 and file not in (nothing, *files):
                os.dup2(nothing, file)
        sys.stdout, sys.stderr = (os.fdopen(file, "w", buffering=1, closefd=False) for file in (1, 2))
        logging.getLogger().handlers.clear()  # those of pytest
        asked, ended = files[:2]
        if asked in select.select((asked, ended), (), ())[0]:  # by the first rank; or the test process has ended
            exec(arguments[-1], {})
    finally:
        os._exit(1)


@functools.cache
def _processes() -> Any:
    """How processes start: forked from one that imported the slow modules; spawned where CUDA forbids it."""
    if BACKEND == "nccl":
        return multiprocessing.get_context("spawn")
    os.environ["DS_ACCELERATOR"] = "cpu"  # inherited; DeepSpeed reads it when it is imported
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.support.preloaded"])
    return context


_pools: dict[int, _Pool] = {}


@atexit.register
def _close_pools() -> None:
    while _pools:
        _pools.popitem()[1].close()


def _end_with_the_test_process() -> None:
    """A rank that waits in a collective would outlive a test process that was killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


class _GlooOfOneLoop:
    """In place of the class ``ProcessGroupGloo``: every group of the process uses one device.

    A gloo device is a thread that wakes a hundred times a second; each group would have its own, and the ranks of a
    test process, with the groups of all tests, a thousand of them: a third of the machine.
    """

    def __init__(self) -> None:
        self._made = dist.ProcessGroupGloo
        self._device = self._made.create_default_device()

    def __call__(self, store: dist.Store, rank: int, size: int, timeout: timedelta) -> dist.ProcessGroupGloo:
        options = self._made._Options()
        options._devices = [self._device]
        options._timeout = timeout
        return self._made(store, rank, size, options)

    def __instancecheck__(self, group: object) -> bool:
        return isinstance(group, self._made)


def _serve(rank: int, ranks: int, port: int, pipe: Connection, stack_file: str) -> None:
    """Life of one rank: answer requests until the test process closes the pipe."""
    threading.Thread(target=_end_with_the_test_process, daemon=True).start()
    own = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": ranks,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    os.environ.update({name: str(value) for name, value in own.items()})
    faulthandler.register(signal.SIGUSR1, file=open(stack_file, "w"))  # noqa: SIM115 (open as long as the process)
    torch.set_num_threads(1)
    if BACKEND == "nccl":
        torch.cuda.set_device(rank)
    else:
        import deepspeed

        # DeepSpeed would compile its shared-memory collectives; a process killed meanwhile leaves a lock file
        # behind, on which every later process waits for ever. Without them it uses gloo.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        dist.distributed_c10d.ProcessGroupGloo = _GlooOfOneLoop()  # type: ignore[assignment,misc]
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group(
        BACKEND,
        store=store,
        rank=rank,
        world_size=ranks,
        timeout=timedelta(hours=1),  # a hang ends by the timeout of ``run``
        device_id=device() if BACKEND == "nccl" else None,
    )
    pipe.send_bytes(pickle.dumps((False, None)))
    while True:
        try:
            request = pipe.recv_bytes()
        except EOFError:
            # No clean-up: destroying a group can wait for ranks that are gone.
            os._exit(0)
        try:
            function, args = pickle.loads(request)
            answer = pickle.dumps((False, function(*args)))
        except BaseException:
            answer = pickle.dumps((True, traceback.format_exc()))
        pipe.send_bytes(answer)
