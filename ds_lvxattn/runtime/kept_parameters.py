"""Parameters that ZeRO-3 leaves whole: those that are frozen for a whole run, those that train for a step.

ZeRO-3 gathers the parameters of a module ahead of its call and releases them behind it, in both passes and by hooks
whose time is the host's. Parameters that do not train are the same in every step: where they fit, they can stay. Where
those that train fit beside them, they are gathered as the model's forward pass begins, all at once, and released as the
optimizer steps: layers go on while the parameters of later ones arrive, an encoder that is frozen in front of
all of them. No module needs hooks then: ZeRO-3 divides gradients and optimizer, and runs as ZeRO-2 does.
Linear layers leave DeepSpeed's product too, which spares the memory of weights that are released: it adds the bias in a
pass of its own, and its autograd function is Python.

DeepSpeed's partitions stay where they are, and are what the optimizer updates and checkpoints save and load: at each of
those, and wherever else DeepSpeed partitions parameters (``GatheredParameters``, ``empty_partition_cache``), the whole
ones are freed. The next call of a module that needs them gathers them again, from whatever the partitions hold by then.
"""

from __future__ import annotations

import functools
import logging
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from typing import Any

from deepspeed.runtime.zero.linear import zero3_linear_wrap
from deepspeed.runtime.zero.parameter_offload import ZeROOrderedDict
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.utils import z3_leaf_module
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.modeling_layers import GradientCheckpointingLayer

from ds_lvxattn.kernels.torch_internals import linear
from ds_lvxattn.runtime.batch import SequenceParallelBatch
from ds_lvxattn.runtime.gathers import Gathers, free
from ds_lvxattn.runtime.zero3 import of_zero3

logger = logging.getLogger(__name__)

UNUSED = "_ds_lvxattn_unused"  # an attribute of frozen parameters that no forward pass reads: nothing to keep


class _AtHand(ZeROOrderedDict):
    """A module's parameters that are always there: reading one is not DeepSpeed's to see."""

    __getitem__ = OrderedDict.__getitem__


class KeptParameters:
    """The parameters of a model in a ZeRO-3 engine that stay whole, from ``keep`` to ``release``.

    Args:
        model: what the engine trains, or a part of it.
        trained: whether also those that train do, from the beginning of a forward pass to the optimizer's step. If
            not, frozen ones of modules that also have some that train do not either: ZeRO-3 fetches for a module as a
            whole.

    Attributes:
        parameters: the frozen ones, in the model's order; empty for a model that is in no such engine.
        trained: those that train, likewise.
        kept: whether they are whole, at the moment or from their next use on.
    """

    def __init__(self, model: nn.Module, trained: bool = True) -> None:
        self.kept = False
        self._optimizer: Any = next((p._z3_optimizer for p in model.parameters() if hasattr(p, "_z3_optimizer")), None)
        if self._optimizer is not None:
            model = self._optimizer.parameter_offload.module
        self.model = model
        inside = [*model.modules()] if self._optimizer is not None else []
        hooked = [module for module in inside if of_zero3(module._forward_pre_hooks)]
        owned = {p for module in inside for p in module.parameters(recurse=False)}
        frozen = {p for p in owned if not p.requires_grad and not hasattr(p, UNUSED)}
        trains = {p for p in owned if p.requires_grad and trained}
        for module in hooked:
            fetched = _fetched_for(module)
            # The model itself keeps DeepSpeed's hooks, which begin a step.
            if (module is model or not trained) and any(p.requires_grad for p in fetched):
                frozen.difference_update(fetched)
                trains.difference_update(fetched)
        self.parameters = [p for p in model.parameters() if p in frozen]
        self.trained = [p for p in model.parameters() if p in trains]
        self._kept = frozen | trains
        # Modules for which there is nothing to fetch, a module's activation function among them.
        self._idle = [module for module in hooked if module is not model and self._needs_nothing(module)]
        self._hooks: list[tuple[dict[int, Any], dict[int, Any]]] = []  # of a module: all, and all of them before
        self._handles: list[RemovableHandle] = []
        self._gathers, self._later = Gathers(), _only_in_layers(model, self.trained)
        self._persistent: list[Any] = []  # as DeepSpeed has them

    def _needs_nothing(self, module: nn.Module) -> bool:
        # Of a module without parameters of its own, what is inside counts: its hooks find who uses whose parameters.
        return all(p in self._kept for p in _fetched_for(module) or module.parameters())

    @property
    def numel(self) -> int:
        """Elements of what is frozen and kept."""
        return sum(p.ds_numel for p in self.parameters)  # type: ignore[attr-defined]

    @property
    def buckets(self) -> dict[str, int]:
        """Elements that ZeRO-3 sends at once, by their keys in the config; empty for a model that is in no engine."""
        if self._optimizer is None:
            return {}
        gathered, reduced = self._optimizer.prefetch_elements, self._optimizer.reduce_bucket_size
        return {"reduce_bucket_size": reduced, "stage3_prefetch_bucket_size": gathered}

    def keep(self, portions: int | None = None) -> None:
        """Keep them from now on; all ranks call it, between steps.

        Args:
            portions: of the vision encoder, with which a batch fits beside them; before one with more they are
                released, for good. None: no limit.
        """
        if self.kept or not self.parameters:
            return
        self.kept = True
        model, optimizer = self.model, self._optimizer
        for module in self._idle:
            for hooks in (module._forward_pre_hooks, module._forward_hooks):
                self._hooks.append((hooks, dict(hooks)))
                for key in of_zero3(hooks):
                    del hooks[key]
        for module in model.modules():
            own = [*module.parameters(recurse=False)]
            if own and all(p in self._kept for p in own):
                _put_into(module, _AtHand)
                plain = isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward
                if plain and nn.functional.linear is zero3_linear_wrap:
                    vars(module)["forward"] = functools.partial(_linear, module)
        for module, parameters in self._users(model):
            self._handles.append(module.register_forward_pre_hook(_Gather(self, parameters), prepend=True))
        self._handles.append(model.register_forward_pre_hook(self._begin, prepend=True))
        self._handles.append(model.register_forward_hook(self._end, always_call=True))
        if portions is not None:
            watch = functools.partial(self._watch, portions)
            self._handles.append(model.register_forward_pre_hook(watch, prepend=True, with_kwargs=True))
        # DeepSpeed partitions everything at the end of a step, and at the beginning of a checkpoint by the same method;
        # and gathers small parameters one by one when a step has changed them.
        others = [(name, p) for name, p in model.named_parameters() if p not in self._kept]
        optimizer._partition_all_parameters = functools.partial(self._release_trained, _Others(model, others))
        optimizer.checkpoint_event_prologue = optimizer.parameter_offload.partition_all_parameters
        self._persistent = optimizer.persistent_parameters
        optimizer.persistent_parameters = [p for p in self._persistent if p not in self._kept]
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
        optimizer = self._optimizer
        del optimizer._partition_all_parameters, optimizer.checkpoint_event_prologue
        optimizer.persistent_parameters = self._persistent
        self._forget_trace()
        self._gathers.finish()
        free([*self.parameters, *self.trained])

    def _watch(self, most: int, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        batch = kwargs.get("sequence_parallel")
        if isinstance(batch, SequenceParallelBatch) and batch.portions > most:  # the same on all ranks of the run
            self.release()
            logger.warning(
                "a batch whose frames are encoded in %d portions does not fit beside frozen parameters that stay "
                "gathered (at most %d do): from here on ZeRO-3 gathers them for each use; "
                "'sequence_parallel.keep_frozen' true or false says otherwise", batch.portions, most,
            )  # fmt: skip

    def gather(self, now: bool = True) -> None:
        """Gather those that are not there; all ranks call it.

        Args:
            now: wait for all of them; otherwise layers wait for theirs as they are called.
        """
        later = [] if now else [p for p in self.trained if p in self._later]
        needed = [*self.parameters, *(p for p in self.trained if now or p not in self._later)]
        self._gathers.start([*needed, *later])
        self._gathers.wait(needed)

    def ready(self, parameters: Iterable[Any]) -> None:
        """Ahead of a use of some: all ranks have them gathered, and wait for theirs."""
        if any(p.ds_status is ZeroParamStatus.NOT_AVAILABLE for p in parameters):
            self.gather()
        self._gathers.wait(parameters)

    def _begin(self, model: nn.Module, args: Any) -> None:
        """Ahead of the model's forward pass."""
        missing = ZeroParamStatus.NOT_AVAILABLE
        if self.kept and any(p.ds_status is missing for p in (*self.parameters, *self.trained)):  # type: ignore[attr-defined]
            self.gather(now=False)

    def _end(self, *unused: Any) -> None:
        """Behind it: those of layers that were not called are waited for too."""
        self._gathers.finish()

    def _release_trained(self, others: _Others) -> None:
        """As the optimizer steps: partitions are about to change."""
        self._gathers.finish()
        free(self.trained)
        self._optimizer.parameter_offload.get_param_coordinator().release_and_reset_all(others)

    def _users(self, module: nn.Module) -> Iterator[tuple[nn.Module, list[nn.Parameter]]]:
        """The largest modules of which all is kept and frozen, or which are layers; and what of others is kept."""
        inside = [*module.parameters()]
        as_one = isinstance(module, GradientCheckpointingLayer) or not any(p.requires_grad for p in inside)
        if inside and as_one and all(p in self._kept for p in inside):
            yield module, inside
            return
        own = [p for p in module.parameters(recurse=False) if p in self._kept]
        if own:
            yield module, own
        for child in module.children():
            yield from self._users(child)

    def _forget_trace(self) -> None:
        """The order of the modules changes; DeepSpeed records it anew in the next step."""
        coordinator = self._optimizer.parameter_offload.get_param_coordinator()
        if not coordinator.is_invalid_trace():
            coordinator._invalidate_trace()


class _Gather:
    """A hook ahead of a module's forward pass: its parameters are there, whoever has partitioned them since."""

    def __init__(self, owner: KeptParameters, parameters: list[Any]) -> None:
        self.owner, self.parameters = owner, parameters

    def __call__(self, module: nn.Module, args: Any) -> None:
        available = ZeroParamStatus.AVAILABLE
        if any(parameter.ds_status is not available for parameter in self.parameters):
            self.owner.ready(self.parameters)


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


def _linear(module: Any, x: Tensor) -> Tensor:
    """PyTorch's own product, for which DeepSpeed's stands in ``torch.nn.functional``."""
    return linear(x, module.weight, module.bias)


def plain_linear(module: nn.Module) -> bool:
    """Whether a call of ``module`` is a matrix product and nothing else: no adapter, no hook."""
    hooks = (module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks)
    own = getattr(vars(module).get("forward", functools.partial(_linear)), "func", None) is _linear
    return type(module) is nn.Linear and own and not any(hooks)


def _only_in_layers(model: Any, parameters: Iterable[nn.Parameter]) -> set[nn.Parameter]:
    """Those of ``parameters`` that are used by calls of layers alone."""
    inside = {m for layer in model.modules() if isinstance(layer, GradientCheckpointingLayer) for m in layer.modules()}
    outside: set[nn.Parameter] = set()
    for module in model.modules():
        if module not in inside and hasattr(module, "ds_external_parameters"):
            outside.update(module.parameters(recurse=False), (p for _, p in module.ds_external_parameters()))
    return {*parameters} - outside


def _put_into(module: nn.Module, container: type[ZeROOrderedDict]) -> None:
    parameters = container(parent_module=module)
    for name, parameter in module._parameters.items():
        parameters[name] = parameter
    parameters._in_forward = getattr(module._parameters, "_in_forward", False)
    object.__setattr__(module, "_parameters", parameters)
