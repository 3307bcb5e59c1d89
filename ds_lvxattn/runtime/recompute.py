"""Recomputation in the backward pass instead of storing: what a layer keeps, by torch's selective checkpointing.

LV-XAttn, section 3.3: the visual features are shared by all cross-attention layers, K and V of a layer are not, so
K and V are projected again in the backward pass. What the attention operators return is always kept, so nothing that
an operator sent is sent again.

Selective checkpointing is torch's ``checkpoint`` with a pair of dispatch modes, one for the forward pass and one for
the recomputation. torch's own pair keeps a record of every operator, to which those of ZeRO-3's gathering and
releasing would belong, though they run at other moments in the recomputation; this pair knows the attention operators
alone. What is kept goes through ``save_for_backward``, so that ``torch.autograd.graph.saved_tensors_hooks`` see it:
CPU offload is such a pair of hooks.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from ds_lvxattn.kernels.torch_internals import never_compiled
from ds_lvxattn.plan.modes import modes

logger = logging.getLogger(__name__)

RECOMPUTATION = "recomputation"


class Recomputation:
    """How the layers of one model recompute: by the config, and by transformers' own switch.

    ``kv``: an attention module keeps its input rows and what its operator returns, nothing else. Of what is computed
    again, projections and norms of the keys are all that has the length of the keys; those of the queries are small
    beside them. ``layer``: a decoder layer keeps its input rows and what its attention operator returns.

    transformers' switch (``activation_checkpointing_enable``, once ``gradient_checkpointing_enable``), before or
    after, means ``layer`` for the layers that it selects, unless the config names a policy, which then holds. What
    the switch would install is replaced, so that no layer is checkpointed twice or attends twice.

    Args:
        model: its ``GradientCheckpointingLayer`` modules obey the switch.
        cross: its cross-attention modules, which take their input rows as ``hidden_states``, by name or first.
        layers: its decoder layers.
        policy: ``none``, ``kv`` or ``layer``.
        chosen: whether the config names ``policy``, rather than leaving the default.
        offload: keep on the CPU what is kept. The visual features stay where they are: all layers share them.

    Attributes:
        policy: the policy in effect, by config and switch.
        offload: whether what is kept lies on the CPU.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        cross: Sequence[nn.Module],
        layers: Sequence[GradientCheckpointingLayer],
        policy: str,
        chosen: bool,
        offload: bool,
    ) -> None:
        self.layers, self.policy, self.offload = layers, policy, offload
        self._configured = (policy, chosen, offload)
        for module in cross:
            self._wrap(module)
        switch = model._set_gradient_checkpointing

        @functools.wraps(switch)
        def switch_and_adapt(*args: Any, **kwargs: Any) -> None:
            switch(*args, **kwargs)
            self._adapt()

        vars(model)["_set_gradient_checkpointing"] = switch_and_adapt
        self._adapt()

    def _adapt(self) -> None:
        """Put this recomputation where the switch put another, or take the switch back."""
        configured, chosen, offload = self._configured
        switched = [layer for layer in self.layers if layer.gradient_checkpointing]
        if switched and chosen and configured != "layer":
            logger.warning(
                "activation checkpointing is switched on, and 'sequence_parallel.recompute' is '%s', which holds; "
                "set it to 'layer', or leave it out", configured,
            )  # fmt: skip
        # transformers hands over a function of its own where it is asked to offload, and torch's otherwise.
        theirs = [getattr(layer, "_gradient_checkpointing_func", checkpoint) for layer in switched]
        ours = (checkpoint, recompute)
        self.offload = offload or any(getattr(function, "func", function) not in ours for function in theirs)
        self.policy = "layer" if switched and not chosen else configured
        whole = {*switched} if switched and not chosen else {*self.layers}
        for layer in self.layers:
            layer.gradient_checkpointing = self.policy == "layer" and layer in whole
            again = functools.partial(recompute, layer, offload=self.offload)
            vars(layer)["_gradient_checkpointing_func"] = again

    def _wrap(self, module: nn.Module) -> None:
        """Let an attention module recompute by policy ``kv``, unless its decoder layer is recomputed as a whole."""
        forward = module.forward
        around = next((layer for layer in self.layers if module in layer.modules()), None)

        @functools.wraps(forward)
        def recomputing(*args: Any, **kwargs: Any) -> Any:
            whole = around is not None and around.gradient_checkpointing
            if self.policy == "none" or whole or not module.training:
                return forward(*args, **kwargs)
            if "hidden_states" in kwargs:
                args = (kwargs.pop("hidden_states"), *args)
            return recompute(module, functools.partial(forward, **kwargs), *args, offload=self.offload)

        vars(module)["forward"] = recomputing


@never_compiled  # its dispatch modes would see the operators of a graph, not those of the layer
def recompute(
    module: nn.Module, function: Callable[..., Any], *args: Any, offload: bool = False, keep: bool = True
) -> Any:
    """``function(*args)``, computed again in the backward pass but for the attention operators in it.

    Args:
        module: holds the parameters that ``function`` uses.
        function: what it closes over is neither kept by this call nor offloaded.
        args: kept, tensors on the CPU if ``offload``.
        keep: whether what attention operators return is kept; an encoder's send nothing, and its layers keep nothing.
    """
    if not torch.is_grad_enabled():
        return function(*args)
    kept = _Kept()

    def modes() -> tuple[Any, Any]:
        return (_Keep(kept), _Reuse(kept, module)) if keep else (contextlib.nullcontext(), _InUse(module))

    with _OnCPU() if offload else contextlib.nullcontext():
        # A recomputation that stops early, inside a module, would skip the module's post-forward hooks.
        result = checkpoint(function, *args, use_reentrant=False, early_stop=False, context_fn=modes)
        kept.save()
    return result


class _Kept:
    """What the attention operators of one checkpointed call returned, in their order."""

    def __init__(self) -> None:
        self.fresh: list[tuple[Tensor, ...]] = []
        self.counts: list[int] = []
        self.saver: Tensor | None = None

    def save(self) -> None:
        """Hand the tensors to autograd, after the forward pass, when the checkpoint's own hooks are off."""
        self.counts = [len(outputs) for outputs in self.fresh]
        if self.fresh:
            tensors = [x for outputs in self.fresh for x in outputs]
            anchor = torch.empty(0, requires_grad=True)
            self.saver = _Save.apply(anchor, *tensors)
        self.fresh = []

    def outputs(self) -> list[tuple[Tensor, ...]]:
        """What each operator returned."""
        node: Any = None if self.saver is None else self.saver.grad_fn
        tensors = iter(() if node is None else node.saved_tensors)
        return [tuple(next(tensors) for _ in range(count)) for count in self.counts]


class _Save(torch.autograd.Function):
    """A node that saves tensors; it is no part of the graph that runs backward."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        return anchor.clone()

    @staticmethod
    def backward(ctx: Any, *unused: Any) -> Any:
        raise AssertionError("kept tensors are read, never differentiated")


class _Keep(TorchDispatchMode):
    """Forward pass: remember what attention operators return."""

    def __init__(self, kept: _Kept) -> None:
        super().__init__()
        self.kept = kept
        self.operators = _attention_operators()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        returned = func(*args, **(kwargs or {}))
        if func._schema.name in self.operators:
            # Detached: autograd gives the returned tensors a history, which would keep the graph alive through itself.
            self.kept.fresh.append(tuple(x.detach() for x in returned))
        return returned


class _InUse(contextlib.AbstractContextManager[None]):
    """Recomputation: ZeRO-3 leaves the parameters of ``module`` gathered."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __enter__(self) -> None:
        for users in _zero3_users(self.module):
            users.add(RECOMPUTATION)

    def __exit__(self, *error: object) -> None:
        for users in _zero3_users(self.module):
            users.discard(RECOMPUTATION)


class _Reuse(TorchDispatchMode):
    """Recomputation: attention operators return what they returned in the forward pass."""

    def __init__(self, kept: _Kept, module: nn.Module) -> None:
        super().__init__()
        self.kept = kept
        self.in_use = _InUse(module)
        self.operators = _attention_operators()
        self.outputs: list[tuple[Tensor, ...]] = []

    def __enter__(self) -> Any:
        self.outputs = self.kept.outputs()
        self.in_use.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> Any:
        self.outputs = []
        self.in_use.__exit__()
        return super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.outputs.pop(0) if func._schema.name in self.operators else func(*args, **(kwargs or {}))


def _zero3_users(module: nn.Module) -> list[set[Any]]:
    """For each parameter that ZeRO-3 partitions, the set of the modules that use it at the moment.

    ZeRO-3 releases a parameter after a module's forward pass unless the set names somebody. In a recomputation that
    would be too early: the module may have begun its backward pass, which set the recomputation off, and still need
    the parameter for its gradient. So the recomputation counts as a user too, and the parameters are released by
    the backward passes of their modules.
    """
    return [p.ds_active_sub_modules for p in module.parameters() if hasattr(p, "ds_active_sub_modules")]


def _attention_operators() -> frozenset[str]:
    """Registered names of the operators whose results are kept."""
    return frozenset(name for mode in modes() for name in mode.operators)


class _OnCPU(saved_tensors_hooks):
    """Saved tensors lie on the CPU, in pinned memory, until they are needed.

    Unlike ``torch.autograd.graph.save_on_cpu`` the host does not wait for the copies: they are in the order of the
    stream.
    """

    def __init__(self) -> None:
        super().__init__(_to_cpu, _from_cpu)


def _to_cpu(x: Tensor) -> tuple[torch.device, Tensor]:
    if x.device.type == "cpu":
        return x.device, x
    host = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
    return x.device, host.copy_(x, non_blocking=True)


def _from_cpu(saved: tuple[torch.device, Tensor]) -> Tensor:
    device, host = saved
    return host.to(device, non_blocking=True)
