"""Triton kernels compiled for Hopper by processes that touch no GPU, into the cache on disk that launches look into.

For the sweep over tiles, whose hundreds of candidates compile while others are timed: the GPU is not to be disturbed,
and a candidate that cannot run is to say so. Calibration (``ds_lvxattn.calibration.compile_ahead``) compiles ahead of
all timing, so there the calls are simply made: that needs nothing inside Triton, and compiles FlashAttention-4 too.
"""

from __future__ import annotations

import multiprocessing
import os
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

MULTIPROCESSORS = 132  # of an H100 or H200
_wanted = ""  # the only kernel whose launches compile; empty: all


class _Hopper:
    """What Triton asks of a driver before it launches."""

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> Any:
        import torch

        return torch.device("cpu")


def compile_only() -> None:
    """From here on launches of this process only compile. Their tensors may lie on the CPU, and are never read."""
    import triton
    from triton.runtime.jit import JITFunction

    from ds_lvxattn.kernels.triton import backward, backward_launches, forward, launch

    triton.runtime.driver.set_active(_Hopper())
    run = JITFunction.run

    def compiled(self: Any, *args: Any, grid: Any, warmup: bool, **constants: Any) -> Any:
        return run(self, *args, grid=grid, warmup=True, **constants)

    def settled(self: Any, *args: Any) -> None:
        if _wanted in ("", self._kernel.__name__):
            self._kernel.run(*self.described(args), grid=self._grid, warmup=True, **self._constants)

    JITFunction.run = compiled
    launch.Launch.__call__ = settled
    for module in (backward, backward_launches, forward):
        module.units_to_fill = lambda device: MULTIPROCESSORS


def _compile(call: Callable[..., object], kernel: str, arguments: tuple[Any, ...]) -> tuple[float, str]:
    global _wanted
    _wanted, begin = kernel, time.monotonic()
    try:
        call(*arguments)
    except Exception:  # the launch tells the reason again
        return time.monotonic() - begin, traceback.format_exc()
    return time.monotonic() - begin, ""


class Compilers:
    """Processes that make calls, of which every launch only compiles.

    Args:
        call: a function of a module, which takes the arguments given to ``start``.
    """

    def __init__(self, call: Callable[..., object], processes: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._call, self._pool = call, ProcessPoolExecutor(processes, context, compile_only)

    def start(self, work: Sequence[tuple[str, tuple[Any, ...]]]) -> list[Any]:
        """Calls with these arguments, each for the kernel of that name alone or, where it is empty, for all.

        Returns:
            Futures of the seconds that each took and its error, if there was one; in the order of ``work``.
        """
        seen = os.environ.get("CUDA_VISIBLE_DEVICES")
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # of the processes that start now
        futures = [self._pool.submit(_compile, self._call, *each) for each in work]
        if seen is None:
            del os.environ["CUDA_VISIBLE_DEVICES"]
        else:
            os.environ["CUDA_VISIBLE_DEVICES"] = seen
        return futures

    def stop(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
