"""What the device does in one training step: busy by part of the model, waiting, idle.

Marks on the device's stream say which part runs: tiny kernels, put there by hooks of the modules, which a profile
shows in order. So the profile need not record the host, which would slow it down. Between two marks, compute kernels
belong to the part, and an exchange that runs while none computes is waiting.
"""

from __future__ import annotations

import bisect
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

PARTS = ("encoder", "projection", "cross-attention", "text", "optimizer")
WAITS = ("exchange", "parameters and gradients", "idle")
START = "text"  # what is not one of the marked modules: self-attention and the rest of the language model
EXCHANGE = " exchange"  # behind the name of a part, while its attention operator runs
MARK_KERNEL = "spin"  # of ``torch.cuda._sleep``
HOST_COPIES = ("Memcpy HtoD", "Memcpy DtoH")

Interval = tuple[float, float]


class Marks:
    """Marks of one step, and the hooks that set them."""

    def __init__(self, cuda: bool) -> None:
        self.cuda = cuda
        self.labels: list[str] = []
        self.times: list[float] = []

    def set(self, label: str) -> None:
        """From now on the stream works for ``label``."""
        self.labels.append(label)
        self.times.append(time.perf_counter())
        if self.cuda:
            torch.cuda._sleep(1)

    @contextmanager
    def around(self, modules: Iterable[tuple[nn.Module, str]]) -> Iterator[None]:
        """Mark the forward and backward pass of ``modules`` as these parts."""
        handles: list[RemovableHandle] = []
        for module, label in modules:
            handles.append(module.register_forward_pre_hook(self._enter(label), with_kwargs=True))
            handles.append(module.register_forward_hook(self._leave(label)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, label: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            self.set(label)
            if args:
                return (self._through(args[0], START), *args[1:]), kwargs
            if "hidden_states" in kwargs:
                return args, {**kwargs, "hidden_states": self._through(kwargs["hidden_states"], START)}
            return None

        return hook

    def _leave(self, label: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            self.set(START)
            if isinstance(output, tuple):
                return (self._through(output[0], label), *output[1:])
            return self._through(output, label)

        return hook

    def _through(self, x: Any, behind: str) -> Any:
        """``x``, whose gradient sets the mark ``behind`` when it arrives."""
        return _Mark.apply(x, self, behind) if isinstance(x, Tensor) and x.requires_grad else x

    # Called in the place of ``LayerTimes``.

    def measure(
        self, module: nn.Module, inputs: tuple[Tensor, ...], call: Callable[[], tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, Tensor]:
        """``call()``, the attention operator of ``module``, marked as the exchange of its part."""
        label = "cross-attention" if "Cross" in type(module).__name__ else START
        self.set(label + EXCHANGE)
        out, lse = call()
        self.set(label)
        if out.requires_grad:
            out.register_hook(lambda _: self.set(label + EXCHANGE))
            for x in inputs:
                if x.requires_grad:
                    x.register_hook(lambda _: self.set(label))
        return out, lse


class _Mark(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, marks: Marks, behind: str) -> Tensor:
        ctx.marks, ctx.behind = marks, behind
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        ctx.marks.set(ctx.behind)
        return grad, None, None


def parts_of_profile(events: Iterable[Any], labels: Sequence[str]) -> dict[str, float]:
    """Seconds of each of ``PARTS`` and ``WAITS``, ``floor``, the time that compute kernels are busy, and ``kernels``.

    Args:
        events: of a profile of the device, by ``torch.profiler``; those ahead of the first mark are left out.
        labels: the marks of the profiled step.

    Raises:
        ValueError: the profile does not show as many marks as were set.
    """
    kernels = sorted(
        (e.time_range.start, e.time_range.end, e.name)
        for e in events
        if str(e.device_type).endswith("CUDA")
        and e.time_range.end > e.time_range.start
        and not e.name.startswith(("nccl:", "aten::", "ds_", "record", "ProfilerStep", *HOST_COPIES))
    )
    marks = [begin for begin, _, name in kernels if MARK_KERNEL in name]
    if len(marks) != len(labels):
        raise ValueError(f"the profile shows {len(marks)} marks of {len(labels)}")
    kernels = [kernel for kernel in kernels if kernel[0] >= marks[0]]

    def label_at(moment: float) -> str:
        return labels[max(bisect.bisect_right(marks, moment) - 1, 0)]

    compute = [(a, b) for a, b, name in kernels if "nccl" not in name.lower() and MARK_KERNEL not in name]
    exchanged = [(a, b) for a, b, name in kernels if "nccl" in name.lower() and label_at(a).endswith(EXCHANGE)]
    others = [(a, b) for a, b, name in kernels if "nccl" in name.lower() and not label_at(a).endswith(EXCHANGE)]
    found = dict.fromkeys((*PARTS, *WAITS), 0.0)
    for (begin, end), (first, _) in zip(*_united(compute), strict=True):
        found[label_at(first).removesuffix(EXCHANGE)] += (end - begin) / 1e6
    floor = sum(found.values())
    with_exchange = _length(compute + exchanged)
    busy = _length(compute + exchanged + others)
    whole = max(b for _, b, _ in kernels) - marks[0]
    found["exchange"] = with_exchange - floor
    found["parameters and gradients"] = busy - with_exchange
    found["idle"] = max(whole / 1e6 - busy, 0.0)
    return {**found, "floor": floor, "kernels": len(compute)}


def _united(intervals: Sequence[Interval]) -> tuple[list[Interval], list[Interval]]:
    """What each interval adds to the union of those before it, and the interval itself; without those that add none."""
    added, whole, end = [], [], float("-inf")
    for begin, stop in sorted(intervals):
        if stop > end:
            added.append((max(begin, end), stop))
            whole.append((begin, stop))
            end = stop
    return added, whole


def _length(intervals: Sequence[Interval]) -> float:
    """Seconds that any of the intervals, in microseconds, covers."""
    return sum(stop - begin for begin, stop in _united(intervals)[0]) / 1e6


def parts_of_host(marks: Marks, end: float) -> dict[str, float]:
    """On a CPU, where the host computes: the time between the marks."""
    found = dict.fromkeys((*PARTS, *WAITS), 0.0)
    for label, begin, stop in zip(marks.labels, marks.times, (*marks.times[1:], end), strict=True):
        found["exchange" if label.endswith(EXCHANGE) else label] += stop - begin
    return {**found, "floor": sum(found[part] for part in PARTS), "kernels": 0}
