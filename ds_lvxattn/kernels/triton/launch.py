"""Launches whose arguments are settled but for their tensors: the host binds and specialises them once.

Triton's JIT function looks at every argument of every call: whether integers are 1 or divide by 16, whether pointers
are aligned, which compiled kernel that makes. The layers of a model ask the same again and again. A ``Launch`` goes
that way once and then calls the compiled kernel's launcher, as the JIT function does in the end. Whoever keeps one must
find it by everything that the compiler looks at, which ``layout`` tells of a tensor. Triton's interpreter compiles
nothing: all launches go the usual way there.
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

from ds_lvxattn.kernels.triton.tiles import split_head

KEPT = 512  # of the shapes of a kernel, those that were used last
ALIGNMENT = 16  # bytes, of pointers that the compiler takes for aligned

Split = Callable[[int], tuple[int, int]]
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
        constants: the constants and the compiler's options.
    """

    __slots__ = ("_compiled", "_constants", "_device", "_grid", "_kernel", "_placeholders", "_run", "_size")

    def __init__(self, kernel: Any, grid: tuple[int, ...], **constants: Any) -> None:
        self._kernel, self._grid, self._constants = kernel, grid, constants
        self._size = (*grid, 1, 1)[:3]
        self._compiled: CompiledKernel | None = None
        self._run: Callable[..., None] | None = None
        self._placeholders: tuple[Any, ...] = ()
        self._device = -1

    def __call__(self, *args: Any) -> None:
        """Launch on the current stream. Only tensors and floats may differ from the first call's arguments, and their
        layouts not."""
        compiled = self._compiled
        if compiled is None or self._run is None:
            compiled = self._kernel[self._grid](*args, **self._constants)
            if isinstance(compiled, CompiledKernel):
                self._placeholders = tuple(self._constants[name] for name in self._kernel.arg_names[len(args) :])
                self._compiled, self._run, self._device = compiled, compiled.run, driver.active.get_current_device()
        elif _watched():
            compiled[self._size](*args, *self._placeholders)
        else:
            self._run(
                *self._size, driver.active.get_current_stream(self._device), compiled.function,
                compiled.packed_metadata, None, None, None, *args, *self._placeholders,
            )  # fmt: skip


def _watched() -> bool:
    """Whether somebody asked Triton to be told of launches, as its profiler does."""
    enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


class Tiles:
    """Descriptors of tensors of one layout, checked once.

    Args:
        make: the descriptors of such a tensor.
    """

    __slots__ = ("_checked", "_make")

    def __init__(self, make: Callable[[Tensor], tuple[TensorDescriptor | None, ...]]) -> None:
        self._make = make
        self._checked: tuple[dict[str, Any] | None, ...] | None = None

    def __call__(self, x: Tensor) -> tuple[TensorDescriptor | None, ...]:
        if self._checked is None:
            made = self._make(x)
            self._checked = tuple(each and {**vars(each), "base": None} for each in made)  # holds no tensor
            return made
        return tuple([each and _like(each, x) for each in self._checked])


def row_tiles(rows: int, split: Split = split_head) -> Tiles:
    """``row_descriptors`` of tensors of one layout."""
    return Tiles(lambda x: row_descriptors(x, rows, split))


def _like(checked: dict[str, Any], base: Tensor) -> TensorDescriptor:
    """A descriptor of ``base`` that need not be checked again."""
    made = object.__new__(TensorDescriptor)
    made.__dict__.update(checked)
    made.base = base
    return made


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
