"""What is inside the launcher of a compiled kernel, which Triton does not promise, in its releases 3.6 to 3.9.

For every launch the launcher looks for descriptors among the arguments, makes a tensor map of each and calls a function
in C. That takes the host several times as long as the function alone, and the maps depend on nothing but addresses.
Where a release has another launcher, nothing is found here, and it is called as it is.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import CellType, FunctionType
from typing import Any, NamedTuple

from torch import Tensor

Arguments = tuple[Any, ...]

_ALLOCATES = ("global_scratch_size", "profile_scratch_size", "gsan_enabled")  # where one is set, a launch does


class Inside(NamedTuple):
    """A compiled kernel's launcher in two parts.

    Args:
        expand: a kernel's arguments as the function in C takes them, with tensor maps, shapes and strides in the place
            of descriptors.
        start: launches ``(stream, expanded arguments)``.
    """

    expand: Callable[[Arguments], Arguments]
    start: Callable[[int, Arguments], None]


def inside(compiled: Any, size: tuple[int, ...], args: Arguments) -> Inside | None:
    """What is inside the launcher of ``compiled`` over a grid of ``size``, or None where it is unlike those known.

    Args:
        args: arguments of a launch, which is not made.
    """
    run = compiled.run
    launch = getattr(run, "launch", None)
    if launch is None or any(getattr(run, name, 0) for name in _ALLOCATES):
        return None
    calls: list[Arguments] = []

    def record(*call: Any) -> None:
        calls.append(call)

    function, recording = launch, record
    if isinstance(launch, FunctionType):  # it takes descriptors apart, and calls ``launcher``
        cells = dict(zip(launch.__code__.co_freevars, launch.__closure__ or (), strict=True))
        if "launcher" not in cells:
            return None
        function = cells["launcher"].cell_contents
        cells["launcher"] = CellType(record)
        recording = FunctionType(
            launch.__code__, launch.__globals__, launch.__name__, launch.__defaults__, tuple(cells.values())
        )
    recorder = copy.copy(run)
    recorder.launch = recording
    stream, leave = object(), object()

    def call_of(args: Arguments) -> tuple[Arguments, Arguments, bool]:
        """What the function is called with ahead of the arguments, these, and whether they are one tuple."""
        calls.clear()
        recorder(*size, stream, compiled.function, compiled.packed_metadata, None, None, leave, *args)
        call = calls.pop()
        if isinstance(call[-1], (tuple, list)):
            return call[:-1], tuple(call[-1]), True
        first = next(i for i, x in enumerate(call) if x is leave) + 1
        return call[:first], call[first:], False

    before, _, as_one = call_of(args)
    if before[:5] != (*size, stream, compiled.function):
        return None
    ahead = tuple(None if x is leave else x for x in before[4:])

    def start(stream: int, args: Arguments) -> None:
        function(*size, stream, *ahead, args)

    def start_flat(stream: int, args: Arguments) -> None:
        function(*size, stream, *ahead, *args)

    return Inside(lambda args: call_of(args)[1], start if as_one else start_flat)


def addressed(args: Arguments) -> Arguments:
    """``args`` with addresses in the place of tensors, which they would keep alive."""
    return tuple(x.data_ptr() if isinstance(x, Tensor) else x for x in args)
