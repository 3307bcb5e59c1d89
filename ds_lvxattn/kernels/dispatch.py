"""The choice of a local attention kernel, per call."""

from __future__ import annotations

from ds_lvxattn.kernels.base import Call, Kernel
from ds_lvxattn.kernels.cudnn import CudnnKernel
from ds_lvxattn.kernels.fa4.kernel import FlashAttention4Kernel
from ds_lvxattn.kernels.flash import FlashKernel
from ds_lvxattn.kernels.math import MathKernel
from ds_lvxattn.kernels.pattern import FRAME, SLIDING, UNKNOWN
from ds_lvxattn.kernels.triton.kernel import TritonKernel

# Fastest first; ``math`` does every call, so the search always ends.
KERNELS: tuple[Kernel, ...] = (FlashAttention4Kernel(), CudnnKernel(), TritonKernel(), FlashKernel(), MathKernel())
# FlashAttention-4 behind Triton. Its tiles are large: where ranges move fast from row to row they compute much that is
# hidden, one frame a row takes the forward pass twice as long. Its backward pass does not divide few rows over the chip
# either, but where query heads share keys: they are rows of one tile then.
TRITON_FIRST = {"fa4": 1, "flash": 2, "math": 3}
FEW_ROWS = 1024
NARROW_HEAD = 64
# Half the multiprocessors of a Hopper chip: with fewer tiles of query rows a kernel that splits the keys is faster.
FEW_TILES = 66
KERNEL_NAMES = ("auto", *(kernel.name for kernel in KERNELS))
# What a run can force: its layers all have intervals.
INTERVAL_KERNELS = tuple(kernel.name for kernel in KERNELS if kernel.takes_intervals)


def select_kernel(name: str, call: Call) -> Kernel:
    """The kernel that ``name`` forces, or for ``auto`` the first that can do ``call``.

    Args:
        name: ``auto``, a kernel's name, or ``FORWARD/BACKWARD``, the names that ``auto`` prefers for each pass.

    Raises:
        ValueError: the name is unknown, or the forced kernel cannot do the call.
    """
    if "/" in name:
        wanted = name.split("/")[call.tiles is None]
        for kernel in KERNELS:
            if kernel.name == wanted and kernel.unsupported(call) is None:
                return kernel
        name = "auto"
    for kernel in fastest_first(call):
        if name not in ("auto", kernel.name):
            continue
        reason = kernel.unsupported(call)
        if reason is None:
            return _instead(kernel, call) if name == "auto" else kernel
        if name != "auto":
            raise ValueError(f"kernel '{name}' cannot do this call: {reason}; use 'auto' or one of {KERNEL_NAMES}")
    raise ValueError(f"kernel is '{name}'; choose one of {KERNEL_NAMES}")


def usable_kernels(call: Call) -> list[str]:
    """Names of the kernels that can do ``call``."""
    return [kernel.name for kernel in KERNELS if kernel.unsupported(call) is None]


def fastest_first(call: Call) -> list[Kernel]:
    """All kernels, in the order that they have on a Hopper chip where no profile knows better."""
    moving = call.masked and call.pattern in (SLIDING, FRAME)
    unknown = call.masked and call.pattern == UNKNOWN
    if call.tiles is None:
        triton_first = call.heads == call.kv_heads and (moving or unknown or call.rows <= FEW_ROWS)
    else:  # models of narrow heads have one frame a row
        triton_first = moving or (unknown and call.head_dim <= NARROW_HEAD)
    if triton_first:
        return sorted(KERNELS, key=lambda kernel: TRITON_FIRST.get(kernel.name, 0))
    return list(KERNELS)


def _instead(kernel: Kernel, call: Call) -> Kernel:
    """``kernel``, or one that splits the keys where ``kernel`` would leave half the chip idle."""
    if call.tiles is None or call.tiles >= FEW_TILES or call.device != "cuda":
        return kernel
    return next((other for other in KERNELS if other.splits_keys(call) and other.unsupported(call) is None), kernel)
