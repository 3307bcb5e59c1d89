"""ZeRO-3's gathers, fewer and larger: modules that it takes as a whole, and one gather for several calls of one.

Usually it gathers the parameters of each linear layer and norm ahead of its call and releases them behind it. A module
that it takes as a whole (a leaf, in its words) has its parameters gathered by one collective and its submodules called
without hooks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from deepspeed.runtime.zero import register_external_parameter
from deepspeed.utils import z3_leaf_module
from torch import nn

# Whose hooks they are: they are closures, some of them in a wrapper of another file.
HOOKS_OF = "deepspeed."


def is_partitioned(model: nn.Module) -> bool:
    """Whether ZeRO-3 has partitioned ``model``, and gathers what a module needs as it is called."""
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())


@contextlib.contextmanager
def gathered_once(module: nn.Module) -> Iterator[None]:
    """Calls of ``module`` inside, of any number, are one to ZeRO-3: it gathers once, and releases once behind them.

    It also expects the modules of a step in the order of the step before to gather ahead of their calls, and a batch
    with more frames calls an encoder more often. Only where it takes ``module`` as a whole, and without gradients;
    elsewhere nothing changes.
    """
    before = of_zero3(module._forward_pre_hooks) if z3_leaf_module(module) else {}
    behind = of_zero3(module._forward_hooks)
    if not before:
        yield
        return
    for hook in before.values():
        hook(module, ())
    try:
        with _without(module._forward_pre_hooks, before), _without(module._forward_hooks, behind):
            yield
    finally:
        for hook in behind.values():
            hook(module, (), None)


def gather_for(module: nn.Module, args: tuple[Any, ...]) -> None:
    """Before a forward pass, as a hook that is registered ahead of ZeRO-3's: those gather and release, for ``module``
    and in both passes, the parameters of what is inside it too. Their gradients go the usual way, unlike those of a
    module that ZeRO-3 takes as a whole."""
    if has_hooks_inside(module):
        for parameter in module.parameters():
            register_external_parameter(module, parameter)


@contextlib.contextmanager
def at_hand(module: nn.Module) -> Iterator[None]:
    """Calls of what is inside ``module``, of any number, are nothing to ZeRO-3; see ``gather_for``."""
    with contextlib.ExitStack() as stack:
        for child in module.modules():
            if child is not module:
                for hooks in (child._forward_pre_hooks, child._forward_hooks):
                    if some := of_zero3(hooks):
                        stack.enter_context(_without(hooks, some))
        yield


def has_hooks_inside(module: nn.Module) -> bool:
    """Whether DeepSpeed has hooks on submodules of ``module``: then it gathers them one by one."""
    children = (child for child in module.modules() if child is not module)
    return any(of_zero3(child._forward_pre_hooks) for child in children)


def of_zero3(hooks: dict[int, Callable[..., Any]]) -> dict[int, Callable[..., Any]]:
    return {key: hook for key, hook in hooks.items() if getattr(hook, "__module__", "").startswith(HOOKS_OF)}


@contextlib.contextmanager
def _without(hooks: dict[int, Callable[..., Any]], some: dict[int, Callable[..., Any]]) -> Iterator[None]:
    """``hooks`` without ``some`` of them, which have their places again afterwards."""
    every = dict(hooks)
    for key in some:
        del hooks[key]
    try:
        yield
    finally:
        hooks.clear()
        hooks.update(every)
