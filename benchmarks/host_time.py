"""How long the host takes to issue one attention call, forward and backward, while the GPU is kept busy.

    torchrun --nproc_per_node 1 benchmarks/host_time.py --output FILE.json    every local kernel, and sp_attention alone
    torchrun --nproc_per_node 2 benchmarks/host_time.py --output FILE.json    every exchange

A step of a model is bound by the host where its layers take less time than this. The GPU waits in a kernel that only
waits, longer than the host needs for all calls of a turn, so that no call is held up by the one before. All candidates
take turns; a figure is the median of its calls, of the slowest rank, with the quartiles. The layers have the heads of
Llama-3.2-11B-Vision and few rows and keys: the host's time does not depend on sizes. Without a GPU the times include
the compute, and say nothing.

What a local call consists of: ``nothing`` is a differentiable function that only allocates what attention returns, and
what every figure is also given in multiples of, as hosts differ; ``triton launches`` are the launches with their
arguments at hand; ``KERNEL alone`` is the kernel, neither an operator nor differentiable; ``local, KERNEL`` is both;
``local, sp_attention`` adds the checks and the choice of a kernel.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from attention_layer import Layer, Shape, slowest
from torch import Tensor

from ds_lvxattn.kernels.base import Call, Kernel
from ds_lvxattn.kernels.dispatch import select_kernel, usable_kernels
from ds_lvxattn.kernels.operator import local_attention
from ds_lvxattn.kernels.triton.delta import attention_delta
from ds_lvxattn.plan.modes import Mode, eligible_modes

CALLS = 10  # of a turn
TURNS = 12
WARM_UP_TURNS = 2  # not counted
BUSY_CYCLES = 300_000_000  # about a sixth of a second
LOCAL_TARGETS = (60.0, 120.0)  # microseconds, forward and backward
EXCHANGE_TARGETS = (400.0, 800.0)

SHAPES = (Shape(128, 256, 32, 8, 128, "growing"), Shape(128, 256, 32, 8, 128))
LOCAL = "local"
NOTHING = "nothing"

# The forward pass, and the backward pass of what it returned.
Passes = tuple[Callable[[], Any], Callable[[Any], object]]
Spread = tuple[float, float, float]  # median, lower and upper quartile


@dataclass(frozen=True)
class Figure:
    """Microseconds of one call."""

    layer: str
    candidate: str
    forward_us: Spread
    backward_us: Spread
    targets_us: tuple[float, float]


class Allocates(torch.autograd.Function):
    """What any differentiable attention function costs the host."""

    @staticmethod
    def forward(ctx, q, k, v, start, stop):
        out, lse = torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)
        ctx.save_for_backward(q, k, v, out, lse, start, stop)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx, dout, dlse):
        q, k, v, *_ = ctx.saved_tensors
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), None, None


def calls_of(layer: Layer) -> dict[str, Passes]:
    """Each candidate's passes."""
    q, k, v, scale = layer.q, layer.k, layer.v, layer.shape.head_dim**-0.5
    start, stop = (None, None) if layer.interval is None else layer.interval.rows_of(layer.comm.rank, q.shape[2])

    def differentiable(forward: Callable[[], Tensor]) -> Passes:
        return forward, lambda out: torch.autograd.grad(out, (q, k, v), layer.dout)

    def local(kernel: str) -> Passes:
        return differentiable(lambda: local_attention(q, k, v, start, stop, scale, kernel)[0])

    def alone(kernel: Kernel) -> Passes:
        operands = [x.detach() for x in (q, k, v)]

        def backward(results: tuple[Tensor, Tensor]) -> None:
            out, lse = results
            own = kernel.needs_out or kernel.sums_delta
            delta = None if own else attention_delta(layer.dout, out, None)
            kernel.backward(layer.dout, *operands, out, lse, delta, start, stop, scale)

        return lambda: kernel.forward(*operands, start, stop, scale), backward

    def exchanged(mode: Mode) -> Passes:
        return differentiable(lambda: layer.attend(strategy=mode.strategy, schedule=mode.schedule))

    call = Call.forward(q, k, v, start is not None)
    calls = {NOTHING: differentiable(lambda: Allocates.apply(q, k, v, start, stop)[0])}
    calls |= {f"{LOCAL}, {kernel}": local(kernel) for kernel in usable_kernels(call)}
    if layer.comm.ranks == 1:
        calls |= {f"{kernel} alone": alone(select_kernel(kernel, call)) for kernel in usable_kernels(call)}
        if "triton" in usable_kernels(call):
            calls["triton launches"] = launches_of(alone(select_kernel("triton", call)))
        calls[f"{LOCAL}, sp_attention"] = differentiable(layer.attend)
    else:
        for mode in eligible_modes():
            if mode.adds(layer.costed) and mode.why_not(layer.costed.shape) is None:
                calls[f"{mode.strategy} {mode.schedule}"] = exchanged(mode)
    return calls


def launches_of(passes: Passes) -> Passes:
    """The launches of Triton kernels that both passes make, with the arguments of one call."""
    from ds_lvxattn.kernels.triton.launch import Launch

    forward, backward = passes
    backward(forward())  # what is made once a batch is made
    recorded: list[tuple[Launch, tuple[Any, ...]]] = []
    launch = Launch.__call__

    def record(self: Launch, *args: Any) -> None:
        recorded.append((self, args))
        launch(self, *args)

    setattr(Launch, "__call__", record)  # noqa: B010
    try:
        result = forward()
        count = len(recorded)
        backward(result)
    finally:
        setattr(Launch, "__call__", launch)  # noqa: B010
    of_forward, of_backward = recorded[:count], recorded[count:]

    def again(launches: list[tuple[Launch, tuple[Any, ...]]]) -> None:
        for each, args in launches:
            each(*args)

    return lambda: again(of_forward), lambda _: again(of_backward)


def issued(layer: Layer, passes: Passes) -> tuple[list[float], list[float]]:
    """Microseconds that the host takes to issue each of a turn's calls, forward and backward."""
    dist.barrier(layer.comm.group)
    if layer.q.is_cuda:
        torch.cuda.synchronize()
        torch.cuda._sleep(BUSY_CYCLES)
    ways: tuple[list[float], list[float]] = [], []
    forward, backward = passes
    for _ in range(CALLS):
        begin = time.perf_counter()
        result = forward()
        middle = time.perf_counter()
        backward(result)
        for way, seconds in zip(ways, (middle - begin, time.perf_counter() - middle), strict=True):
            way.append(seconds * 1e6)
    if layer.q.is_cuda:
        torch.cuda.synchronize()
    return ways


def measure(layer: Layer) -> list[Figure]:
    calls = calls_of(layer)
    times: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in calls}
    for turn in range(TURNS if layer.q.is_cuda else 3):
        for name, passes in calls.items():
            for kept, new in zip(times[name], issued(layer, passes), strict=True):
                kept += new if turn >= WARM_UP_TURNS else []
    return [
        Figure(
            str(layer.shape), name, *(spread(way, layer.comm.group) for way in ways),
            LOCAL_TARGETS if layer.comm.ranks == 1 or name.startswith((LOCAL, NOTHING)) else EXCHANGE_TARGETS,
        )
        for name, ways in times.items()
    ]  # fmt: skip


def spread(values: list[float], group: dist.ProcessGroup | None) -> Spread:
    """Median and quartiles, of the slowest rank each."""
    low, middle, high = (slowest(value, group) for value in statistics.quantiles(values, n=4))
    return middle, low, high


def report(figures: list[Figure]) -> None:
    for shape in dict.fromkeys(figure.layer for figure in figures):
        print(f"\n{shape}\n{'microseconds, median (quartiles)':32}{'forward':>36}{'backward':>36}")
        of_shape = [figure for figure in figures if figure.layer == shape]
        nothing = next(figure for figure in of_shape if figure.candidate == NOTHING)
        for figure in of_shape:
            ways = zip(
                (figure.forward_us, figure.backward_us), (nothing.forward_us, nothing.backward_us), figure.targets_us,
                strict=True,
            )  # fmt: skip
            texts = [
                f"{middle:.0f} ({low:.0f} to {high:.0f}) {middle / unit[0]:.1f}x{'' if middle <= target else ' missed'}"
                for (middle, low, high), unit, target in ways
            ]
            print(f"{figure.candidate:32}{texts[0]:>36}{texts[1]:>36}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="where to write the figures as JSON")
    args = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu", int(os.environ["LOCAL_RANK"]) if on_gpu else 0)
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpu else "gloo")
    figures = []
    for shape in SHAPES:
        figures += measure(Layer(shape, torch.bfloat16 if on_gpu else torch.float32, device))
    if dist.get_rank() == 0:
        chip = torch.cuda.get_device_name() if on_gpu else "CPU: times include the compute"
        print(f"{chip}, {dist.get_world_size()} ranks, torch {torch.__version__}")
        report(figures)
        if args.output is not None:
            about = {"device": chip, "ranks": dist.get_world_size(), "torch": torch.__version__}
            args.output.write_text(json.dumps({**about, "figures": [asdict(f) for f in figures]}, indent=1) + "\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
