"""What kernels derive from the key ranges of the query rows, once for all layers of a batch.

The layers of a batch share its range tensors, so what was made for one layer is found by their identity. It lives as
long as they do, and is made anew after they were written to.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch
from torch import Tensor

from ds_lvxattn.kernels.torch_internals import current_stream

T = TypeVar("T")
# By the identity of ``start``, with a reference to it: {key: (reference to stop, versions of both, what was made)}.
_derived: dict[int, tuple[weakref.ref[Tensor], dict[Hashable, Any]]] = {}


def _made_from(start: Tensor) -> dict[Hashable, Any]:
    """What was made from ``start``; a ``WeakTensorKeyDictionary`` takes the host three times as long."""
    key = id(start)
    known = _derived.get(key)
    if known is None or known[0]() is not start:

        def forget(gone: weakref.ref[Tensor]) -> None:
            if key in _derived and _derived[key][0] is gone:
                del _derived[key]

        known = _derived[key] = weakref.ref(start, forget), {}
    return known[1]


def derived_of(start: Tensor, stop: Tensor, key: Hashable, make: Callable[[], T]) -> T:
    """``make()``, or what it returned before for these very tensors and ``key``.

    What is made must not hold ``start`` or a view of it, else neither would ever be freed. Nothing is kept in a CUDA
    graph, which has to make it again at every replay, nor for inference tensors, which do not count writes.
    """
    if start.is_inference() or stop.is_inference():
        return make()
    if start.is_cuda:
        if torch.cuda.is_current_stream_capturing():
            return make()
        # What another stream makes may not be done.
        key = key, current_stream(start.get_device())
    made = _made_from(start)
    versions = start._version, stop._version
    known = made.get(key)
    if known is not None and known[0]() is stop and known[1] == versions:
        return known[2]
    result = make()
    made[key] = weakref.ref(stop), versions, result
    return result
