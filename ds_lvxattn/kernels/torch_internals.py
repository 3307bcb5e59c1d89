"""Names that torch does not promise, each here alone, with what stands in for it in a release that lacks it.

What stands in gives the same results, in more time on the host. Where nothing can, a warning says what is no longer
refused; without what everything rests on, the import fails and says so.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import forward_ad

Function = TypeVar("Function", bound=Callable[..., Any])


def _find(name: str) -> Any:
    """``torch.NAME``; None where this release has none."""
    found: Any = torch
    for part in name.split("."):
        found = getattr(found, part, None)
    return found


def _find_or_say(name: str, what: str) -> Callable[..., bool]:
    """``torch.NAME``, which tells ``what`` there is to refuse; where there is none, a warning, and never."""
    found: Callable[..., bool] | None = _find(name)
    if found is not None:
        return found
    warnings.warn(
        f"torch {torch.__version__} has no torch.{name}, so that {what} is not refused; do without", stacklevel=2
    )
    return lambda *args: False


# ``torch.compiler.disable`` is the same, but imports the compiler together with the module that uses it.
_never_compiled = _find("_disable_dynamo") or torch.compiler.disable

# ``(x, weight, bias)``: torch's own product, also where DeepSpeed's stands in ``torch.nn.functional``.
linear: Callable[..., Tensor] = _find("_C._nn.linear") or torch.ops.aten.linear

# How many modes look at the operators that are called.
dispatch_modes: Callable[[], int] = _find("_C._len_torch_dispatch_stack") or (lambda: 1)
function_modes: Callable[[], int] = _find("_C._len_torch_function_stack") or (lambda: 1)
profiler_looks: Callable[[], bool] = _find("autograd._profiler_enabled") or (lambda: True)

# A context in which an operator is called without its part in autograd.
below_autograd = _find("_C._AutoDispatchBelowAutograd")
if below_autograd is None:
    raise ImportError(
        f"torch {torch.__version__} has no torch._C._AutoDispatchBelowAutograd, on which the attention operators rest; "
        "take one that this package was tested with, see constraints.txt"
    )

# The handle of the stream that is current on a CUDA device.
current_stream: Callable[[int], int] = _find("_C._cuda_getCurrentRawStream") or (
    lambda device: torch.cuda.current_stream(device).cuda_stream
)

_transforms = _find_or_say("_C._are_functorch_transforms_active", "attention inside a transform of torch.func")
_batched = _find_or_say("_C._functorch.is_batchedtensor", "a batch of gradients at once (vmap)")
_legacy_batched = _find_or_say(
    "_C._functorch.is_legacy_batchedtensor", "a batch of gradients at once (is_grads_batched)"
)
_in_one_launch = _find("distributed.distributed_c10d._coalescing_manager")
_assert_on_device = _find("_assert_async")


def never_compiled(function: Function) -> Function:
    """``function``, which is part of no compiled graph, nor is what it calls."""
    return _never_compiled(function)


def transforms_active() -> bool:
    """Whether this is inside a transform of ``torch.func`` or forward-mode differentiation."""
    return _transforms() or getattr(forward_ad, "_current_level", -1) >= 0


def is_batched(x: Tensor) -> bool:
    """Whether ``x`` stands for a batch of tensors, in ``vmap`` or where gradients come several at once."""
    return _batched(x) or _legacy_batched(x)


def start(
    calls: Sequence[Callable[[], dist.Work | None]],
    group: dist.ProcessGroup | None,
    together: bool,
    device: torch.device | None = None,
) -> list[dist.Work]:
    """Start collectives or messages of ``group``.

    Args:
        calls: start one each, asynchronously.
        together: as one launch of NCCL, as DeepSpeed and ``batch_isend_irecv`` do; gloo has none.
        device: of their tensors, if together; None: they are all-gathers, which NCCL takes as one collective.

    Returns:
        What is waited for.
    """
    if _in_one_launch is None or not together:
        return [work for call in calls if (work := call()) is not None]
    with _in_one_launch(group, device=device, async_ops=True) as launch:
        for call in calls:
            call()
    return launch.works


def raise_if(wrong: Tensor, message: str) -> None:
    """Fail where one of ``wrong`` is true: on the device, which the host does not wait for.

    Raises:
        RuntimeError: later; in a release that cannot, now, and then the host has waited.
    """
    if _assert_on_device is not None:
        _assert_on_device(~wrong.any(), message)
    elif wrong.any():
        raise RuntimeError(message)


def missing_operator(*names: str) -> str | None:
    """Why a kernel cannot run that calls these operators of ATen; None where it can."""
    missing = [name for name in names if not hasattr(torch.ops.aten, name)]
    return f"torch {torch.__version__} has no operator aten::{missing[0]}" if missing else None
