"""Launches whose arguments are settled: the JIT function once, then its compiled kernel; checked descriptors."""

from __future__ import annotations

import weakref
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from triton.tools.tensor_descriptor import TensorDescriptor

from ds_lvxattn.kernels.settled import KEPT_TABLES, forget_tables, settled, settled_tables
from ds_lvxattn.kernels.triton import launch as launches
from ds_lvxattn.kernels.triton.launch import Launch, fits_copy_engine, layout, row_tiles
from ds_lvxattn.kernels.triton.launcher import inside

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


def in_parts(launcher, as_one):
    """A launcher that takes descriptors apart, as Triton's does; its arguments as one tuple or not."""

    def launch(*call):
        ahead, args = (call[:-1], call[-1]) if as_one else (call[:11], call[11:])
        parts = tuple(part for x in args for part in ((x.base, "map") if isinstance(x, TensorDescriptor) else (x,)))
        return launcher(*ahead, parts) if as_one else launcher(*ahead, *parts)

    return launch


class Run:
    """Stands for the launcher of a compiled kernel: before Triton 3.7, and since (``as_one``)."""

    global_scratch_size = profile_scratch_size = 0

    def __init__(self, function, as_one):
        self.launch, self.as_one = in_parts(function, as_one), as_one

    def __call__(self, x, y, z, stream, function, metadata, of_launch, enter, leave, *args):
        hooks = (metadata, of_launch, enter, leave)
        if self.as_one:
            self.launch(x, y, z, stream, function, False, *hooks, None, args)
        else:
            self.launch(x, y, z, stream, function, False, None, *hooks, *args)


@pytest.mark.parametrize("as_one", (False, True))
def test_what_is_inside_the_launcher_is_called(monkeypatch, as_one):
    """With the arguments that the launcher makes; what it makes of tensors is made once an address."""
    calls, described = [], []
    compiled = Compiled()
    compiled.run = Run(lambda *call: calls.append(call), as_one)
    monkeypatch.setattr(launches, "CompiledKernel", Compiled)
    monkeypatch.setattr(launches, "driver", SimpleNamespace(active=Driver()))

    def tiles(x):
        described.append(x.data_ptr())
        return TensorDescriptor.from_tensor(x, [8]), None

    kernel = Kernel(compiled)
    launch = Launch(kernel, (5,), (tiles,), FLAG=True, BLOCK=64)
    x, other = torch.zeros(2, 8).unbind(0)
    launch(x, 7)
    assert not calls  # the JIT function launched
    described.clear()
    kernel.calls.clear()
    for tensor in (x, other, x, other):
        launch(tensor, 7)
    assert described == [x.data_ptr()]  # another tensor's differs by its address
    for tensor, call in zip((x, other, x, other), calls, strict=True):
        args = call[-1] if as_one else call[11:]
        assert call[:5] == (5, 1, 1, "stream of 3", "function")
        assert args[:4] == (tensor.data_ptr(), "map", None, 7)
    forgotten = weakref.ref(x)
    del x, tensor
    assert forgotten() is None


def test_launchers_of_other_releases_are_called_as_they_are():
    compiled = Compiled()
    assert inside(compiled, (5, 1, 1), ("x", 7)) is None
    compiled.run = Run(lambda *call: None, True)
    assert inside(compiled, (5, 1, 1), ("x", 7)) is not None
    compiled.run.global_scratch_size = 64
    assert inside(compiled, (5, 1, 1), ("x", 7)) is None
    compiled.run = Run(lambda *call: None, True)
    compiled.run.launch = lambda *call: None  # a function that calls no ``launcher``
    assert inside(compiled, (5, 1, 1), ("x", 7)) is None


@pytest.mark.parametrize("head_dim", (64, 80))
def test_descriptors_are_those_of_the_tensor(head_dim):
    x = torch.zeros(1, 2, 40, head_dim, device=DEVICE)
    columns = [made and made.block_shape[3] for made in row_tiles(32)(x)]
    assert columns == [64, 16 if head_dim == 80 else None]
    assert [made.base is x for made in row_tiles(32, blocks=1)(x)] == [True]


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
