"""Operators of ``torch.library``, and who has to see one.

Registered without ``torch.library.custom_op``, whose checks of every call cost more host time than the operator itself.
The dispatcher costs as much again, only to arrive at the same function: where nothing looks on that has to see an
operator, its function is called.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ds_lvxattn.kernels.torch_internals import dispatch_modes, function_modes, profiler_looks

LIBRARY = torch.library.Library("ds_lvxattn", "FRAGMENT")

PLAIN = frozenset((Tensor, torch.nn.Parameter, type(None)))


def define_operator(
    name: str, parameters: dict[str, Any], results: Any, function: Callable[..., Any], fake: Callable[..., Any]
) -> Callable[..., Any]:
    """``ds_lvxattn::NAME``, for every device; it returns new tensors."""

    def prototype() -> None: ...

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    annotated = [inspect.Parameter(key, kind, annotation=hint) for key, hint in parameters.items()]
    setattr(prototype, "__signature__", inspect.Signature(annotated, return_annotation=results))  # noqa: B010
    LIBRARY.define(name + torch.library.infer_schema(prototype, mutates_args=()))
    LIBRARY.impl(name, function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"ds_lvxattn::{name}", fake, lib=LIBRARY)
    operator: Callable[..., Any] = getattr(torch.ops.ds_lvxattn, name).default
    return operator


def seen(tensors: tuple[Tensor | None, ...]) -> bool:
    """Whether something has to see the operator: a mode (tracing, selective checkpointing), the profiler, or a tensor
    that is not a plain one."""
    if dispatch_modes() or function_modes() or profiler_looks():
        return True
    return not PLAIN.issuperset(map(type, tensors))
