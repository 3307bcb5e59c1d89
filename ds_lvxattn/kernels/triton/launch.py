"""Launches whose arguments are settled but for their tensors: the host binds and specialises them once.

Triton's JIT function looks at every argument of every call: whether integers are 1 or divide by 16, whether pointers
are aligned, which compiled kernel that makes. The layers of a model ask the same again and again. A ``Launch`` goes
that way once and then calls the compiled kernel. Whoever keeps one must find it by everything that the compiler looks
at, which ``layout`` tells of a tensor. Triton's interpreter compiles nothing: all launches go the usual way there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from triton.compiler import CompiledKernel
from triton.tools.tensor_descriptor import TensorDescriptor

from ds_lvxattn.kernels.triton.tiles import split_head

KEPT = 512  # of the shapes of a kernel, those that were used last
ALIGNMENT = 16  # bytes, of pointers that the compiler takes for aligned

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

    __slots__ = ("_constants", "_grid", "_kernel", "_placeholders", "_run")

    def __init__(self, kernel: Any, grid: tuple[int, ...], **constants: Any) -> None:
        self._kernel, self._grid, self._constants = kernel, grid, constants
        self._run: Callable[..., None] | None = None
        self._placeholders: tuple[Any, ...] = ()

    def __call__(self, *args: Any) -> None:
        """Launch on the current stream. Only tensors and floats may differ from the first call's arguments, and their
        layouts not."""
        if self._run is not None:
            self._run(*args, *self._placeholders)
            return
        compiled = self._kernel[self._grid](*args, **self._constants)
        if isinstance(compiled, CompiledKernel):
            self._placeholders = tuple(self._constants[name] for name in self._kernel.arg_names[len(args) :])
            self._run = compiled[(*self._grid, 1, 1)[:3]]


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


def row_tiles(rows: int) -> Tiles:
    """``row_descriptors`` of tensors of one layout."""
    return Tiles(lambda x: row_descriptors(x, rows))


def _like(checked: dict[str, Any], base: Tensor) -> TensorDescriptor:
    """A descriptor of ``base`` that need not be checked again."""
    made = object.__new__(TensorDescriptor)
    made.__dict__.update(checked)
    made.base = base
    return made


def row_descriptors(x: Tensor, rows: int) -> tuple[TensorDescriptor, TensorDescriptor | None]:
    """Descriptors of ``x [B, H, S, D]`` for tiles of ``rows`` rows and the blocks of columns of ``split_head``.

    What lies past the end reads as 0.
    """
    shape, strides = list(x.shape), list(x.stride())
    first, second = (
        TensorDescriptor(x, shape, strides, [1, 1, rows, columns]) if columns else None
        for columns in split_head(x.shape[-1])
    )
    assert first is not None
    return first, second


def fits_copy_engine(of: Layout) -> bool:
    """Whether the tensor copy engine reads it: rows of unit stride that start at multiples of 16 bytes."""
    dtype, _, strides, aligned = of
    return aligned and strides[-1] == 1 and not any(stride * dtype.itemsize % ALIGNMENT for stride in strides[:-1])
