"""RMS norms: rows by the root of the mean of their squares, times a weight.

Keys of a video are millions of rows of a head's size: a program takes as many rows as fill a tile, where PyTorch's
kernel has a block of threads for each row. The backward pass reads input and gradient once for both its results: each
program adds up its rows' part of the weight's gradient, and the parts are added up behind it, in one order.
"""

from __future__ import annotations

import functools
import itertools
import math

import torch
from torch import Tensor

from ds_lvxattn.kernels.torch_internals import missing_operator

try:
    import triton
    import triton.language as tl

    from ds_lvxattn.kernels.triton.launch import KEPT, Launch, Layout, layout, place
    from ds_lvxattn.kernels.triton.row_order import RowOrder, row_offset, row_order
except ImportError:  # no Triton on this platform: the torch path does every call
    triton = None

# Of a tile: the backward pass holds two and a sum in registers.
FORWARD_ELEMENTS, BACKWARD_ELEMENTS = 4096, 2048
# Rows of a program that adds up a part of the weight's gradient, so that the parts are small beside what it reads, and
# programs of a multiprocessor: few enough for that, and enough to keep its memory busy.
ROWS_OF_PART, FEWEST_PARTS, MOST_PARTS = 64, 2, 16
FEW = 1 << 22  # numbers, for which either kernel takes a few microseconds
ON_CPU = 3  # "multiprocessors" of Triton's interpreter
# Why PyTorch's kernels cannot do it; None where they can.
MISSING = missing_operator("_fused_rms_norm", "_fused_rms_norm_backward")

if triton is not None:
    # Strides of the inverse norms and sizes change with lengths: compiling again for them would stall a step.
    @triton.jit(
        do_not_specialize=["inverse_stride_0", "inverse_stride_1", "inverse_stride_2", "rows", "size_1", "size_2"]
    )
    def _forward_kernel(
        x_ptr, weight_ptr, out_ptr, inverse_ptr, epsilon,
        x_stride_0, x_stride_1, x_stride_2, out_stride_0, out_stride_1, out_stride_2,
        inverse_stride_0, inverse_stride_1, inverse_stride_2, rows, size_1, size_2,
        DIMS: tl.constexpr, SIZE: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr,
    ):  # fmt: skip
        """BLOCK_S rows."""
        row = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
        inside = row < rows
        dim = tl.arange(0, BLOCK_D)[None, :]
        inside_d = dim < SIZE
        mask = inside[:, None] & inside_d
        x = x_ptr + row_offset(row, size_1, size_2, x_stride_0, x_stride_1, x_stride_2, DIMS)[:, None] + dim
        x = tl.load(x, mask=mask, other=0.0).to(tl.float32)
        weight = tl.load(weight_ptr + dim, mask=inside_d, other=0.0).to(tl.float32)
        inverse = tl.rsqrt(tl.sum(x * x, 1) / SIZE + epsilon)
        out = out_ptr + row_offset(row, size_1, size_2, out_stride_0, out_stride_1, out_stride_2, DIMS)[:, None] + dim
        tl.store(out, (x * inverse[:, None] * weight).to(out_ptr.dtype.element_ty), mask=mask)
        at = row_offset(row, size_1, size_2, inverse_stride_0, inverse_stride_1, inverse_stride_2, DIMS)
        tl.store(inverse_ptr + at, inverse, mask=inside)

    @triton.jit(
        do_not_specialize=["inverse_stride_0", "inverse_stride_1", "inverse_stride_2", "rows", "size_1", "size_2"]
    )
    def _backward_kernel(
        grad_ptr, x_ptr, weight_ptr, inverse_ptr, of_x_ptr, parts_ptr,
        grad_stride_0, grad_stride_1, grad_stride_2, x_stride_0, x_stride_1, x_stride_2,
        of_x_stride_0, of_x_stride_1, of_x_stride_2, inverse_stride_0, inverse_stride_1, inverse_stride_2,
        rows, size_1, size_2,
        DIMS: tl.constexpr, SIZE: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr,
        OF_X: tl.constexpr, OF_WEIGHT: tl.constexpr,
    ):  # fmt: skip
        """Every so many tiles of BLOCK_S rows, and their part of the weight's gradient."""
        dim = tl.arange(0, BLOCK_D)[None, :]
        inside_d = dim < SIZE
        weight = tl.load(weight_ptr + dim, mask=inside_d, other=0.0).to(tl.float32)
        part = tl.zeros([BLOCK_S, BLOCK_D], tl.float32)
        for first in tl.range(tl.program_id(0) * BLOCK_S, rows, tl.num_programs(0) * BLOCK_S):
            row = first + tl.arange(0, BLOCK_S)
            inside = row < rows
            mask = inside[:, None] & inside_d
            grad = grad_ptr + dim
            grad += row_offset(row, size_1, size_2, grad_stride_0, grad_stride_1, grad_stride_2, DIMS)[:, None]
            grad = tl.load(grad, mask=mask, other=0.0).to(tl.float32)
            x = x_ptr + dim + row_offset(row, size_1, size_2, x_stride_0, x_stride_1, x_stride_2, DIMS)[:, None]
            x = tl.load(x, mask=mask, other=0.0).to(tl.float32)
            at = row_offset(row, size_1, size_2, inverse_stride_0, inverse_stride_1, inverse_stride_2, DIMS)
            inverse = tl.load(inverse_ptr + at, mask=inside, other=0.0)[:, None]
            unit = x * inverse
            if OF_WEIGHT:
                part += grad * unit
            if OF_X:
                through = grad * weight
                mean = tl.sum(through * unit, 1)[:, None] / SIZE
                of_x = of_x_ptr + dim
                of_x += row_offset(row, size_1, size_2, of_x_stride_0, of_x_stride_1, of_x_stride_2, DIMS)[:, None]
                tl.store(of_x, (inverse * (through - unit * mean)).to(of_x_ptr.dtype.element_ty), mask=mask)
        if OF_WEIGHT:
            sums = tl.sum(part, 0)
            column = tl.arange(0, BLOCK_D)
            tl.store(parts_ptr + tl.program_id(0).to(tl.int64) * SIZE + column, sums, mask=column < SIZE)

    def rms_norm_triton(x: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
        """``rms_norm`` in one pass over memory, for inputs narrower than float64."""
        out, inverse = empty_norms(x, weight)
        if out.numel() == 0:
            return out, inverse
        x, weight = _rows(x), weight.contiguous()
        launch, integers = _plan(place(x), layout(x), layout(weight), layout(out), layout(inverse))
        launch(x, weight, out, inverse, epsilon, *integers)
        return out, inverse

    def rms_norm_backward_triton(
        grad: Tensor, x: Tensor, weight: Tensor, inverse: Tensor, wanted: tuple[bool, bool]
    ) -> tuple[Tensor | None, Tensor | None]:
        """``rms_norm_backward`` in one pass over memory, for inputs narrower than float64."""
        of_x = empty_like_rows(x, x.dtype) if wanted[0] else None
        if x.numel() == 0 or not any(wanted):
            return of_x, torch.zeros_like(weight) if wanted[1] else None
        grad, x, weight = _rows(grad), _rows(x), weight.contiguous()
        launch, integers, programs = _backward_plan(
            place(x), layout(grad), layout(x), layout(weight), layout(inverse), None if of_x is None else layout(of_x),
            wanted[1],
        )  # fmt: skip
        parts = x.new_empty(programs, x.shape[-1], dtype=torch.float32) if wanted[1] else None
        launch(grad, x, weight, inverse, of_x, parts, *integers)
        return of_x, None if parts is None else parts.sum(0).to(weight.dtype)

    @functools.lru_cache(maxsize=KEPT)
    def _plan(
        where: tuple[int, int], x: Layout, weight: Layout, out: Layout, inverse: Layout
    ) -> tuple[Launch, tuple[int, ...]]:
        """The kernel and its integers."""
        rows, order = _order(x, out, inverse)
        size = x[1][-1]
        block_d = triton.next_power_of_2(size)
        block_s = max(1, FORWARD_ELEMENTS // block_d)
        launch = Launch(
            _forward_kernel, (triton.cdiv(rows, block_s),),
            DIMS=order.dims, SIZE=size, BLOCK_D=block_d, BLOCK_S=block_s, num_warps=_warps(block_d // 1024),
        )  # fmt: skip
        return launch, (*itertools.chain(*order.strides), rows, *order.sizes)

    @functools.lru_cache(maxsize=KEPT)
    def _backward_plan(
        where: tuple[int, int], grad: Layout, x: Layout, weight: Layout, inverse: Layout, of_x: Layout | None,
        of_weight: bool,
    ) -> tuple[Launch, tuple[int, ...], int]:  # fmt: skip
        """The kernel, its integers and its programs."""
        rows, order = _order(x, grad, x if of_x is None else of_x, inverse)
        of_rows, of_grad, of_result, of_inverse = order.strides
        size = x[1][-1]
        block_d = triton.next_power_of_2(size)
        block_s = max(1, BACKWARD_ELEMENTS // block_d)
        programs = triton.cdiv(rows, block_s)
        if of_weight:
            multiprocessors = _multiprocessors(where[0])
            each = rows // (ROWS_OF_PART * multiprocessors)
            programs = min(programs, multiprocessors * min(max(each, FEWEST_PARTS), MOST_PARTS))
        launch = Launch(
            _backward_kernel, (programs,),
            DIMS=order.dims, SIZE=size, BLOCK_D=block_d, BLOCK_S=block_s, OF_X=of_x is not None, OF_WEIGHT=of_weight,
            num_warps=_warps(block_d // 512),
        )  # fmt: skip
        return launch, (*of_grad, *of_rows, *of_result, *of_inverse, rows, *order.sizes), programs

    def _order(x: Layout, *others: Layout) -> tuple[int, RowOrder]:
        """How many rows, and in which order: that of ``x`` in memory, which all programs of both passes follow."""
        sizes = x[1][:-1]
        missing = (0,) * (3 - len(sizes))
        strides = [(missing + of[2])[:3] for of in (x, *others)]
        return math.prod(sizes), row_order((1,) * len(missing) + sizes, *strides)

    def _warps(wanted: int) -> int:
        return min(max(wanted, 4), 16)

    @functools.cache
    def _multiprocessors(device: int) -> int:
        return torch.cuda.get_device_properties(device).multi_processor_count if device >= 0 else ON_CPU


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """``x`` by the root of the mean of its squares, times ``weight``; computed in float32, rounded once.

    Args:
        x: ``[..., D]`` of up to four dimensions, any strides; float64, float32, bfloat16 or float16.
        weight: ``[D]``, any of these dtypes.
        epsilon: is added to the mean.

    Returns:
        ``[..., D]`` in the wider dtype of ``x`` and ``weight`` and, where its rows are, with the strides of ``x`` made
        dense; and ``[...]``, each row's inverse root, in float32 (float64 for float64 inputs).
    """
    if by_torch(x, weight):
        if not x.is_contiguous():
            out, inverse = rms_norm(x.transpose(1, 2), weight, epsilon)
            return out.transpose(1, 2), inverse.transpose(1, 2)
        out, inverse = torch.ops.aten._fused_rms_norm(x, weight.shape, weight, epsilon)
        return out, inverse.squeeze(-1)
    if triton is not None and x.is_cuda and torch.float64 not in (x.dtype, weight.dtype):
        return rms_norm_triton(x, weight, epsilon)
    out, inverse = empty_norms(x, weight)
    wide = x.to(inverse.dtype)
    inverse.copy_(torch.rsqrt(wide.pow(2).mean(-1) + epsilon))
    return out.copy_(wide * inverse.unsqueeze(-1) * weight), inverse


def rms_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, inverse: Tensor, wanted: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of ``x`` and ``weight``, each where it is ``wanted``, in their dtypes.

    Args:
        grad: ``[..., D]``, gradient of the norm, any strides.
        x, weight: as given to ``rms_norm``.
        inverse: ``[...]``, as it returned it; other strides are as well.
    """
    if by_torch(x, weight):
        if not x.is_contiguous():
            grad, x, inverse = (each.transpose(1, 2) for each in (grad, x, inverse))
            of_x, of_weight = rms_norm_backward(grad, x, weight, inverse, wanted)
            return None if of_x is None else of_x.transpose(1, 2), of_weight
        backward = torch.ops.aten._fused_rms_norm_backward
        inverse = inverse.unsqueeze(-1).contiguous()
        of_x, of_weight = backward(grad.contiguous(), x, weight.shape, inverse, weight, wanted)
        return of_x if wanted[0] else None, of_weight if wanted[1] else None
    if triton is not None and x.is_cuda and inverse.dtype == torch.float32:
        return rms_norm_backward_triton(grad, x, weight, inverse, wanted)
    inverse = inverse.unsqueeze(-1)
    unit, wide = x * inverse, grad.to(inverse.dtype)
    through = wide * weight
    of_x = empty_like_rows(x, x.dtype) if wanted[0] else None
    if of_x is not None:
        of_x.copy_(inverse * (through - unit * (through * unit).mean(-1, keepdim=True)))
    return of_x, (wide * unit).sum_to_size(weight.shape).to(weight.dtype) if wanted[1] else None


def by_torch(x: Tensor, weight: Tensor) -> bool:
    """Whether PyTorch's kernels are to do it, which the host issues in less time: of few rows, dense or keys of all
    heads row by row."""
    if MISSING is not None or not x.is_cuda or x.dtype != weight.dtype or x.dtype == torch.float64:
        return False
    few = x.numel() > 0 and (triton is None or x.numel() < FEW)
    return few and (x.is_contiguous() or (x.dim() == 4 and x.transpose(1, 2).is_contiguous()))


def empty_norms(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """What ``rms_norm`` returns, not filled."""
    dtype = torch.promote_types(x.dtype, weight.dtype)
    out = empty_like_rows(x, dtype)
    return out, torch.empty_like(out[..., 0], dtype=torch.promote_types(dtype, torch.float32))


def empty_like_rows(x: Tensor, dtype: torch.dtype) -> Tensor:
    """As ``x``, dense, the numbers of a row beside each other."""
    if x.stride(-1) == 1:
        return torch.empty_like(x, dtype=dtype)
    return torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()
