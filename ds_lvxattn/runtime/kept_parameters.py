"""Frozen parameters that ZeRO-3 gathers once for a whole run.

ZeRO-3 gathers the parameters of a module ahead of its call and releases them behind it, in both passes and by hooks
whose time is the host's. Parameters that do not train are the same in every step: where they fit, they can stay, and
the modules that have no others need no hooks. Then ZeRO-3 divides what trains, and runs what does not as ZeRO-2.
Linear layers of theirs leave DeepSpeed's product too, which spares the memory of weights that are released: it adds
the bias in a pass of its own, and its autograd function is Python.

DeepSpeed's partitions of such parameters stay where they are, and are what checkpoints save and load: at each of those,
and wherever else DeepSpeed partitions them (``GatheredParameters``, ``empty_partition_cache``), the whole parameters
are freed. The next call of a module that needs them gathers them again, from whatever the partitions hold by then.
"""

from __future__ import annotations

import functools
import logging
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from deepspeed.runtime.zero.linear import zero3_linear_wrap
from deepspeed.runtime.zero.parameter_offload import ZeROOrderedDict
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.utils import z3_leaf_module
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ds_lvxattn.runtime.batch import SequenceParallelBatch
from ds_lvxattn.runtime.zero3 import of_zero3

logger = logging.getLogger(__name__)

# Limits of ZeRO-3 that DeepSpeed's coordinator reads in every step, in numbers of parameters.
LIMITS = {
    "stage3_max_reuse_distance": "_PartitionedParameterCoordinator__max_reuse_dist_in_numel",
    "stage3_max_live_parameters": "_PartitionedParameterCoordinator__max_n_available_params",
}


class _AtHand(ZeROOrderedDict):
    """A module's parameters that are always there: reading one is not DeepSpeed's to see."""

    __getitem__ = OrderedDict.__getitem__


class KeptParameters:
    """The frozen parameters of a model in a ZeRO-3 engine, kept from ``keep`` to ``release``.

    All of them but those of modules that also have some that train: ZeRO-3 fetches for a module as a whole.

    Args:
        model: what the engine trains, or a part of it.
        raise_limits: whether also those that train stay gathered from their forward to their backward pass.

    Attributes:
        parameters: what is kept, in the model's order; empty for a model that is in no such engine.
        kept: whether they are, at the moment or from their next use on.
    """

    def __init__(self, model: nn.Module, raise_limits: bool = True) -> None:
        self.kept, self._raises = False, raise_limits
        self._optimizer: Any = next((p._z3_optimizer for p in model.parameters() if hasattr(p, "_z3_optimizer")), None)
        if self._optimizer is not None:
            model = self._optimizer.parameter_offload.module
        self.model = model
        inside = [*model.modules()] if self._optimizer is not None else []
        hooked = [module for module in inside if of_zero3(module._forward_pre_hooks)]
        frozen = {p for module in inside for p in module.parameters(recurse=False) if not p.requires_grad}
        for module in hooked:
            fetched = _fetched_for(module)
            if any(p.requires_grad for p in fetched):
                frozen.difference_update(fetched)
        self.parameters = [p for p in model.parameters() if p in frozen]
        self._kept = frozen
        # Modules for which there is nothing to fetch, a module's activation function among them.
        self._idle = [module for module in hooked if module is not model and self._needs_nothing(module)]
        self._hooks: list[tuple[dict[int, Any], dict[int, Any]]] = []  # of a module: all, and all of them before
        self._handles: list[RemovableHandle] = []
        self._limits: dict[str, Any] = {}

    def _needs_nothing(self, module: nn.Module) -> bool:
        # Of a module without parameters of its own, what is inside counts: its hooks find who uses whose parameters.
        return all(p in self._kept for p in _fetched_for(module) or module.parameters())

    @property
    def numel(self) -> int:
        """Elements of what is kept."""
        return sum(p.ds_numel for p in self.parameters)  # type: ignore[attr-defined]

    def keep(self, portions: int | None = None) -> None:
        """Keep them from now on; all ranks call it, between steps.

        Args:
            portions: of the vision encoder, with which a batch fits beside them; before one with more they are
                released, for good. None: no limit.
        """
        if self.kept or not self.parameters:
            return
        self.kept = True
        if portions is not None:
            watch = functools.partial(self._watch, portions)
            self._handles.append(self.model.register_forward_pre_hook(watch, prepend=True, with_kwargs=True))
        for module in self._idle:
            for hooks in (module._forward_pre_hooks, module._forward_hooks):
                self._hooks.append((hooks, dict(hooks)))
                for key in of_zero3(hooks):
                    del hooks[key]
        for module in self.model.modules():
            own = [*module.parameters(recurse=False)]
            if own and all(p in self._kept for p in own):
                _put_into(module, _AtHand)
                plain = isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward
                if plain and nn.functional.linear is zero3_linear_wrap:
                    vars(module)["forward"] = functools.partial(_linear, module)
        for module, parameters in self._outermost(self.model):
            hook = _Gather(self, parameters)
            self._handles.append(module.register_forward_pre_hook(hook, prepend=True))
        offload, optimizer = self._optimizer.parameter_offload, self._optimizer
        coordinator = offload.get_param_coordinator()
        others = _Others(self.model, [(n, p) for n, p in self.model.named_parameters() if p not in self._kept])
        # DeepSpeed partitions everything at the end of a step, and at the beginning of a checkpoint by the same method.
        optimizer._partition_all_parameters = lambda: coordinator.release_and_reset_all(others)
        optimizer.checkpoint_event_prologue = offload.partition_all_parameters
        if self._raises:
            for name in LIMITS.values():
                self._limits[name] = getattr(coordinator, name)
                setattr(coordinator, name, max(self._limits[name], _numel(self.model.parameters())))
        self._forget_trace()
        self.gather()

    def release(self) -> None:
        """Leave them to ZeRO-3 again, partitioned; all ranks call it, between steps or ahead of a forward pass."""
        if not self.kept:
            return
        self.kept = False
        for hooks, before in self._hooks:
            ours = of_zero3(before)
            still = {key: hook for key, hook in before.items() if key in ours or key in hooks}
            added = {key: hook for key, hook in hooks.items() if key not in before}
            hooks.clear()
            hooks.update({**still, **added})
        self._hooks = []
        for module in self.model.modules():
            if isinstance(module._parameters, _AtHand):
                _put_into(module, ZeROOrderedDict)
                if getattr(vars(module).get("forward"), "func", None) is _linear:
                    del vars(module)["forward"]
        for handle in self._handles:
            handle.remove()
        self._handles = []
        del self._optimizer._partition_all_parameters, self._optimizer.checkpoint_event_prologue
        coordinator = self._optimizer.parameter_offload.get_param_coordinator()
        for name, value in self._limits.items():
            setattr(coordinator, name, value)
        self._forget_trace()
        there = [p for p in self.parameters if p.ds_status == ZeroParamStatus.AVAILABLE]  # type: ignore[attr-defined]
        if there:
            there[0].partition(there)  # type: ignore[attr-defined]

    def _watch(self, most: int, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        batch = kwargs.get("sequence_parallel")
        if isinstance(batch, SequenceParallelBatch) and batch.portions > most:  # the same on all ranks of the run
            self.release()
            logger.warning(
                "a batch whose frames are encoded in %d portions does not fit beside frozen parameters that stay "
                "gathered (at most %d do): from here on ZeRO-3 gathers them for each use; "
                "'sequence_parallel.keep_frozen' true or false says otherwise", batch.portions, most,
            )  # fmt: skip

    def gather(self) -> None:
        """Gather those that are not there; all ranks call it."""
        self.parameters[0].all_gather(self.parameters)  # type: ignore[attr-defined]

    def _outermost(self, module: nn.Module) -> Iterator[tuple[nn.Module, list[nn.Parameter]]]:
        """The largest modules of which all is kept, and what of others is."""
        inside = [*module.parameters()]
        if inside and all(p in self._kept for p in inside):
            yield module, inside
            return
        own = [p for p in module.parameters(recurse=False) if p in self._kept]
        if own:
            yield module, own
        for child in module.children():
            yield from self._outermost(child)

    def _forget_trace(self) -> None:
        """The order of the modules changes; DeepSpeed records it anew in the next step."""
        coordinator = self._optimizer.parameter_offload.get_param_coordinator()
        if not coordinator.is_invalid_trace():
            coordinator._invalidate_trace()


class _Gather:
    """A hook ahead of a module's forward pass: what DeepSpeed has partitioned since is gathered again."""

    def __init__(self, owner: KeptParameters, parameters: list[Any]) -> None:
        self.owner, self.parameters = owner, parameters

    def __call__(self, module: nn.Module, args: Any) -> None:
        available = ZeroParamStatus.AVAILABLE
        for parameter in self.parameters:
            if parameter.ds_status is not available:
                self.owner.gather()
                return


class _Others:
    """The model as DeepSpeed's coordinator is to see it when it releases all parameters: without what is kept."""

    def __init__(self, model: Any, named: list[tuple[str, nn.Parameter]]) -> None:
        self._named = named
        self.ds_external_parameters = model.ds_external_parameters

    def named_parameters(self, recurse: bool = True) -> list[tuple[str, nn.Parameter]]:
        return self._named


def _fetched_for(module: Any) -> list[nn.Parameter]:
    """What ZeRO-3 gathers for a call of ``module``."""
    own = module.parameters(recurse=z3_leaf_module(module))
    return [*own, *(parameter for _, parameter in module.ds_external_parameters())]


def _linear(module: nn.Module, x: Tensor) -> Tensor:
    """PyTorch's own product, for which DeepSpeed's stands in ``torch.nn.functional``."""
    product: Tensor = torch._C._nn.linear(x, module.weight, module.bias)  # type: ignore[arg-type]
    return product


def _put_into(module: nn.Module, container: type[ZeROOrderedDict]) -> None:
    parameters = container(parent_module=module)
    for name, parameter in module._parameters.items():
        parameters[name] = parameter
    parameters._in_forward = getattr(module._parameters, "_in_forward", False)
    object.__setattr__(module, "_parameters", parameters)


def _numel(parameters: Iterable[Any]) -> int:
    return sum(getattr(p, "ds_numel", p.numel()) for p in parameters)
