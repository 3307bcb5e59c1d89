"""What the code of a model's layers hands on to their attention, read off its bytecode.

Models of transformers are copies of one another, and what a layer does not hand on is no error there: its attention
would be computed without it.
"""

from __future__ import annotations

import dis
import inspect
from collections.abc import Callable, Iterator
from types import CodeType
from typing import Any

from torch import nn

MASK = "attention_mask"


def drops_arguments(module: nn.Module) -> bool:
    """Whether the forward of ``module`` does nothing with the further arguments that it takes, or takes none."""
    forward = _forward(module)
    kinds = inspect.signature(forward).parameters.values()
    others = next((p.name for p in kinds if p.kind is inspect.Parameter.VAR_KEYWORD), None)
    return others is None or not any(
        "LOAD" in step.opname and others in (step.argval if isinstance(step.argval, tuple) else (step.argval,))
        for step in dis.get_instructions(forward)
    )


def takes_others(module: nn.Module) -> bool:
    """Whether the forward of ``module`` takes further arguments; the layer around one that does not hands none on."""
    kinds = inspect.signature(_forward(module)).parameters.values()
    return any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in kinds)


def makes_masks(module: nn.Module) -> str | None:
    """The variable of an attention's forward that is a mask beside the one that it is given; None: there is none."""
    forward = _forward(module)
    given = inspect.signature(forward).parameters
    return next((name for name in forward.__code__.co_varnames if "mask" in name and name not in given), None)


def names(module: nn.Module, name: str) -> bool:
    """Whether the forward of ``module`` has an attribute, a keyword or a string of that name."""
    return name in _named(_forward(module).__code__)


def around(model: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    """The modules inside ``model`` that the module called ``name`` is called by, with their names."""
    parts = name.split(".")
    for count in range(1, len(parts)):
        outer = ".".join(parts[:count])
        module = model.get_submodule(outer)
        if type(module).forward is not nn.Module.forward:  # a list of modules, or around one that is compiled
            yield outer, module


def hand_down(model: nn.Module, role_of: Callable[[nn.Module], str | None]) -> None:
    """Let layers that hand a mask on to their self-attention, and nothing further, bring the batch in its place."""
    for name, attention in model.named_modules():
        if role_of(attention) == "self":
            for _, layer in around(model, name):
                if drops_arguments(layer):
                    layer.register_forward_pre_hook(_as_mask, with_kwargs=True)
                    attention.register_forward_pre_hook(_from_mask, with_kwargs=True)


def _as_mask(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    batch = kwargs.get("sequence_parallel")
    return None if batch is None else (args, {**kwargs, MASK: batch})  # no mask is made beside a batch


def _from_mask(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    batch = kwargs.get(MASK)
    return (args, {**kwargs, MASK: None, "sequence_parallel": batch}) if hasattr(batch, "plans") else None


def _forward(module: nn.Module) -> Any:
    return inspect.unwrap(type(module).forward)


def _named(code: CodeType) -> set[str]:
    found = {*code.co_names}
    for each in code.co_consts:
        if isinstance(each, CodeType):
            found |= _named(each)
        else:
            found |= {x for x in (each if isinstance(each, tuple) else (each,)) if isinstance(x, str)}
    return found
