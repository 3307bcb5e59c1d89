"""Launches whose arguments are settled: the JIT function once, then its compiled kernel; checked descriptors."""

from __future__ import annotations

import weakref
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from ds_lvxattn.kernels.settled import KEPT_TABLES, forget_tables, settled, settled_tables
from ds_lvxattn.kernels.triton import launch as launches
from ds_lvxattn.kernels.triton.launch import Launch, fits_copy_engine, layout, row_descriptors, row_tiles

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Compiled:
    """Stands for a compiled kernel."""

    function, packed_metadata = "function", "metadata"

    def __init__(self):
        self.calls, self.watched = [], []

    def run(self, *args):
        *grid, stream, function, metadata, of_launch, enter, leave = args[:9]
        assert (function, metadata, of_launch, enter, leave) == ("function", "metadata", None, None, None)
        self.calls.append((tuple(grid), stream, args[9:]))

    def __getitem__(self, grid):
        return lambda *args: self.watched.append((grid, args))


class Driver:
    """Stands for Triton's driver."""

    def get_current_device(self):
        return 3

    def get_current_stream(self, device):
        return f"stream of {device}"


class Kernel:
    """Stands for a JIT function whose call gives ``compiled``."""

    arg_names = ("x", "n", "BLOCK", "FLAG")

    def __init__(self, compiled):
        self.compiled, self.calls = compiled, []

    def __getitem__(self, grid):
        def call(*args, **constants):
            self.calls.append((grid, args, constants))
            return self.compiled

        return call


def test_the_jit_function_is_called_once(monkeypatch):
    monkeypatch.setattr(launches, "CompiledKernel", Compiled)
    monkeypatch.setattr(launches, "driver", SimpleNamespace(active=Driver()))
    kernel = Kernel(Compiled())
    launch = Launch(kernel, (5, 2), num_warps=4, FLAG=True, BLOCK=64)
    for name in ("first", "second", "third"):
        launch(name, 7)
    assert kernel.calls == [((5, 2), ("first", 7), {"num_warps": 4, "FLAG": True, "BLOCK": 64})]
    # Constants stand in the kernel's own order; options are none of its arguments.
    assert kernel.compiled.calls == [((5, 2, 1), "stream of 3", (name, 7, 64, True)) for name in ("second", "third")]
    # Whoever asked to be told of launches is.
    monkeypatch.setattr(launches.knobs.runtime.launch_enter_hook, "calls", [print])
    launch("fourth", 7)
    assert len(kernel.compiled.calls) == 2 and kernel.compiled.watched == [((5, 2, 1), ("fourth", 7, 64, True))]


def test_the_interpreter_is_called_every_time():
    kernel = Kernel(None)
    launch = Launch(kernel, (5,), BLOCK=64, FLAG=False)
    for name in ("first", "second"):
        launch(name, 7)
    assert [args for _, args, _ in kernel.calls] == [("first", 7), ("second", 7)]


@pytest.mark.parametrize("head_dim", (64, 80))
def test_descriptors_are_those_of_the_tensor(head_dim):
    tiles = row_tiles(32)
    for seed in range(3):
        x = torch.full((1, 2, 40, head_dim), float(seed), device=DEVICE)
        for made, want in zip(tiles(x), row_descriptors(x, 32), strict=True):
            assert (made is None) == (want is None)
            if made is not None:
                assert made.base is x and {**vars(made), "base": None} == {**vars(want), "base": None}
    forgotten = weakref.ref(x)
    del x, made, want
    assert forgotten() is None


def test_layouts_tell_apart_what_is_compiled_apart():
    x = torch.zeros(1, 2, 16, 64, dtype=torch.bfloat16, device=DEVICE)
    assert layout(x) == layout(torch.ones_like(x))
    flat = torch.zeros(x.numel() + 1, dtype=x.dtype, device=DEVICE)
    others = (x.transpose(1, 2), x.float(), x[:, :1], flat[1:].view(x.shape))
    assert len({layout(x), *map(layout, others)}) == 5
    assert fits_copy_engine(layout(x)) and not fits_copy_engine(layout(others[-1]))
    assert not fits_copy_engine(layout(x.transpose(2, 3)))


def test_settled_functions_run_once_and_keep_no_error():
    calls = []

    @settled
    def half(n: int) -> int:
        calls.append(n)
        if n % 2:
            raise ValueError(f"{n} is odd")
        return n // 2

    for _ in range(2):
        assert half(4) == 2
        with pytest.raises(ValueError, match="3 is odd"):
            half(3)
    assert calls == [4, 3, 3]


def test_settled_tables_are_few_and_freed():
    made = []

    @settled_tables
    def table(n: int) -> torch.Tensor:
        made.append(weakref.ref(kept := torch.full((2,), n)))
        return kept

    with torch.inference_mode():
        assert table(0) is table(0) and not table(0).is_inference()
    for n in range(2 * KEPT_TABLES):
        table(n)
    assert sum(each() is not None for each in made) == KEPT_TABLES
    forget_tables()
    assert not any(each() is not None for each in made)
    assert table(0).tolist() == [0, 0]
