"""Launches whose arguments are settled but for their tensors: the host binds and specialises them once.

Triton's JIT function looks at every argument of every call: whether integers are 1 or divide by 16, whether pointers
are aligned, which compiled kernel that makes. The layers of a model ask the same again and again. A ``Launch`` goes
that way once and then calls what is inside the compiled kernel's launcher, as the JIT function does in the end. Whoever
keeps one must find it by everything that the compiler looks at, which ``layout`` tells of a tensor. Triton's
interpreter compiles nothing: all launches go the usual way there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.tools.tensor_descriptor import TensorDescriptor

from ds_lvxattn.kernels.triton.launcher import Inside, addressed, inside
from ds_lvxattn.kernels.triton.tiles import split_head

KEPT = 512  # of the shapes of a kernel, those that were used last
ALIGNMENT = 16  # bytes, of pointers that the compiler takes for aligned
KEPT_ADDRESSES = 256  # of the tensors that a launch describes: the layers of a model have theirs step after step

Split = Callable[[int], tuple[int, int]]
Tiles = Callable[[Tensor], "tuple[TensorDescriptor | None, ...]"]
Layout = tuple[torch.dtype, tuple[int, ...], tuple[int, ...], bool]


def layout(x: Tensor) -> Layout:
    """What a kernel is compiled for, of a tensor: dtype, shape, strides, and whether its address is aligned."""
    return x.dtype, x.shape, x.stride(), x.data_ptr() % ALIGNMENT == 0


def place(x: Tensor) -> tuple[int, int]:
    """The device of a tensor and the one that Triton launches on, -1 for a CPU."""
    return (x.get_device(), torch.cuda.current_device()) if x.is_cuda else (-1, -1)


class Launch:
    """A kernel over a grid with its constants: ``launch(*args)`` is ``kernel[grid](*args, **constants)``.

    Args:
        kernel: a ``triton.jit`` function, whose constants come last.
        grid: of one to three dimensions.
        tiles: of the first arguments, which are tensors, what describes each: the kernel takes descriptors of them.
        constants: the constants and the compiler's options.
    """

    def __init__(self, kernel: Any, grid: tuple[int, ...], tiles: tuple[Tiles, ...] = (), **constants: Any) -> None:
        self._kernel, self._grid, self._tiles, self._constants = kernel, grid, tiles, constants
        self._size = (*grid, 1, 1)[:3]
        self._compiled: CompiledKernel | None = None
        self._inside: Inside | None = None
        self._start: Callable[[int, tuple[Any, ...]], None] | None = None
        self._expanded: dict[tuple[int, ...], tuple[Any, ...]] = {}  # addresses of the tensors -> what stands for them
        self._checked: list[tuple[dict[str, Any] | None, ...]] = []  # descriptors of each tensor, but for the tensor
        self._placeholders: tuple[Any, ...] = ()
        self._device = -1

    def __call__(self, *args: Any) -> None:
        """Launch on the current stream. Only tensors and floats may differ from the first call's arguments, and their
        layouts not."""
        if self._start is None or _watched():
            self._start_described(self.described(args))
            return
        tiles = len(self._tiles)
        addresses = tuple([x.data_ptr() for x in args[:tiles]])
        first = self._expanded.get(addresses)
        if first is None:
            first = self._expand(addresses, args)
        self._start(driver.active.get_current_stream(self._device), (*first, *args[tiles:], *self._placeholders))

    def described(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The kernel's arguments."""
        if not self._tiles:
            return args
        descriptors = [each for tiles, x in zip(self._tiles, args, strict=False) for each in tiles(x)]
        return *descriptors, *args[len(self._tiles) :]

    def _start_described(self, args: tuple[Any, ...]) -> None:
        """Launch with the kernel's arguments: by the JIT function at first, or by what it compiled."""
        compiled = self._compiled
        if compiled is None:
            compiled = self._kernel[self._grid](*args, **self._constants)
            if isinstance(compiled, CompiledKernel):
                self._placeholders = tuple(self._constants[name] for name in self._kernel.arg_names[len(args) :])
                self._compiled, self._device = compiled, driver.active.get_current_device()
                self._inside = inside(compiled, self._size, (*args, *self._placeholders))
                self._start = None if self._inside is None else self._inside.start
        elif _watched():
            compiled[self._size](*args, *self._placeholders)
        else:
            stream = driver.active.get_current_stream(self._device)
            launch = (*self._size, stream, compiled.function, compiled.packed_metadata, None, None, None)
            compiled.run(*launch, *args, *self._placeholders)

    def _expand(self, addresses: tuple[int, ...], args: tuple[Any, ...]) -> tuple[Any, ...]:
        """What the launcher makes of the tensors, which depends on nothing but their addresses."""
        assert self._inside is not None
        others = (*args[len(self._tiles) :], *self._placeholders)
        if not self._checked:
            made = [tiles(x) for tiles, x in zip(self._tiles, args, strict=False)]
            self._checked = [tuple([each and {**vars(each), "base": None} for each in of_x]) for of_x in made]
        descriptors = [each and _like(each, x) for of_x, x in zip(self._checked, args, strict=False) for each in of_x]
        expanded = self._inside.expand((*descriptors, *others))
        if len(self._expanded) >= KEPT_ADDRESSES:
            self._expanded.clear()
        first = self._expanded[addresses] = addressed(expanded[: len(expanded) - len(others)])
        return first


def _like(checked: dict[str, Any], base: Tensor) -> TensorDescriptor:
    """A descriptor of ``base`` that need not be checked again."""
    made = object.__new__(TensorDescriptor)
    made.__dict__.update(checked)
    made.base = base
    return made


def _watched() -> bool:
    """Whether somebody asked Triton to be told of launches, as its profiler does."""
    enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


def row_tiles(rows: int, split: Split = split_head, blocks: int = 2) -> Tiles:
    """What gives ``row_descriptors`` of a tensor: of both blocks of columns, or of the first."""
    return lambda x: row_descriptors(x, rows, split)[:blocks]


def row_descriptors(
    x: Tensor, rows: int, split: Split = split_head
) -> tuple[TensorDescriptor, TensorDescriptor | None]:  # fmt: skip
    """Descriptors of ``x [B, H, S, D]`` for tiles of ``rows`` rows and the two blocks of columns of ``split``.

    What lies past the end reads as 0.
    """
    shape, strides = list(x.shape), list(x.stride())
    first, second = (
        TensorDescriptor(x, shape, strides, [1, 1, rows, columns]) if columns else None
        for columns in split(x.shape[-1])
    )
    assert first is not None
    return first, second


def fits_copy_engine(of: Layout) -> bool:
    """Whether the tensor copy engine reads it: rows of unit stride that start at multiples of 16 bytes."""
    dtype, _, (*strides, last), aligned = of
    if not aligned or last != 1:
        return False
    unit = ALIGNMENT // dtype.itemsize
    for stride in strides:  # noqa: SIM110 (every call comes here, and a generator takes twice as long)
        if stride % unit:
            return False
    return True
