"""Times of attention layers inside real training steps, without holding up the device.

Each measured call puts marks on the device's own clock before and after its forward and backward pass; they are read a
few steps later, when the device has long passed them.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable

import torch
from torch import Tensor, nn


class LayerTimes:
    """Forward and backward time of attention, by module, over a few steps.

    Args:
        device: where attention runs.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._this_step: set[nn.Module] = set()
        self._spans: dict[nn.Module, dict[str, list[_Span]]] = defaultdict(lambda: defaultdict(list))

    def start_step(self) -> None:
        """A step begins: the first call of every layer in it is measured, later micro-batches are not."""
        self._this_step.clear()

    def measure(
        self, module: nn.Module, inputs: tuple[Tensor, ...], call: Callable[[], tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, Tensor]:
        """``call()``, between marks; its backward pass too, from the gradient of ``out`` to the last of ``inputs``.

        A recomputation in the backward pass calls again; only the first call of a step counts.
        """
        if module in self._this_step or not torch.is_grad_enabled():
            return call()
        self._this_step.add(module)
        forward, backward = _Span(self._cuda), _Span(self._cuda)
        forward.begin()
        out, lse = call()
        forward.end()
        self._spans[module]["forward"].append(forward)
        sources = [x for x in inputs if x.requires_grad]
        if out.requires_grad and sources:
            out.register_hook(lambda _: backward.begin())
            for source in sources:
                source.register_hook(lambda _: backward.end())
            self._spans[module]["backward"].append(backward)
        return out, lse

    def milliseconds(self) -> dict[nn.Module, dict[str, float]]:
        """Median of the finished measurements of every layer, ``forward`` and ``backward``."""
        found: dict[nn.Module, dict[str, float]] = {}
        for module, spans in self._spans.items():
            found[module] = {}
            for name, each in spans.items():
                times = [ms for span in each if (ms := span.milliseconds()) is not None]
                if times:
                    found[module][name] = statistics.median(times)
        return found


class _Span:
    """Two marks on the device's clock; ``end`` may be called again and the last counts."""

    def __init__(self, cuda: bool) -> None:
        self._cuda = cuda
        self._marks: list[torch.cuda.Event | float | None] = [None, None]

    def begin(self) -> None:
        self._marks[0] = self._mark()

    def end(self) -> None:
        self._marks[1] = self._mark()

    def _mark(self) -> torch.cuda.Event | float:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def milliseconds(self) -> float | None:
        """The time between the marks, or None where one is missing or still ahead of the device."""
        begin, end = self._marks
        if begin is None or end is None:
            return None
        if isinstance(begin, float) or isinstance(end, float):
            assert isinstance(begin, float) and isinstance(end, float)
            return (end - begin) * 1e3
        return begin.elapsed_time(end) if begin.query() and end.query() else None
