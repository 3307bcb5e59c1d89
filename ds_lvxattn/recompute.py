"""Recomputation in the backward pass instead of storing: what a layer keeps, by torch's selective checkpointing.

LV-XAttn, section 3.3: the visual features are shared by all cross-attention layers, K and V of a layer are not, so
K and V are projected again in the backward pass. The attention operators' outputs are always kept, so nothing that
query exchange sent is sent again.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable
from typing import Any

from deepspeed import DeepSpeedEngine
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from transformers.modeling_layers import GradientCheckpointingLayer

from ds_lvxattn.batch import SequenceParallelBatch

ATTENTION_OPERATORS = ("local_attention", "query_gather", "query_ring", "query_routed", "query_replicated", "kv_ring")


def enable_recompute(layers: Iterable[GradientCheckpointingLayer], policy: str) -> None:
    """Make transformers' checkpointed ``layers`` recompute by ``policy``.

    Args:
        layers: decoder layers (``GradientCheckpointingLayer``): those with cross-attention for ``kv``, all for
            ``layer``.
        policy: ``kv`` recomputes what has the length of the keys (projections and norms of K and V); ``layer``
            everything but the attention operators.
    """
    keep = {"kv": _keep_all_but_keys, "layer": _keep_attention}[policy]
    for layer in layers:
        setattr(layer, "_gradient_checkpointing_func", functools.partial(_checkpoint, keep))  # noqa: B010
        layer.gradient_checkpointing = True


def _checkpoint(keep: Callable[..., CheckpointPolicy], function: functools.partial, *args: Any) -> Any:
    """What a transformers layer calls in place of its own forward."""
    batch: SequenceParallelBatch | None = function.keywords.get("sequence_parallel")
    key_rows = batch.key_rows if batch is not None else frozenset()
    contexts = functools.partial(create_selective_checkpoint_contexts, functools.partial(keep, key_rows))
    # ZeRO-3 releases a module's parameters in its post-forward hook: a recomputation that stops early, inside a
    # module, would leave them gathered.
    return checkpoint(function, *args, use_reentrant=False, context_fn=contexts, early_stop=False)


def keep_zero3_outside(engine: DeepSpeedEngine) -> None:
    """Hide ZeRO-3's gathering and releasing of parameters from selective checkpointing.

    It happens in hooks of the modules inside a checkpointed layer, and at other moments when the layer is computed
    again, for parameters are fetched ahead by what came before. Selective checkpointing would take those operations
    for the layer's own and give back what they returned in the forward pass.
    """
    offload = getattr(engine.optimizer, "parameter_offload", None)
    if offload is None:
        return
    for moment in ("pre_sub_module_forward", "post_sub_module_forward", "pre_sub_module_backward",
                   "post_sub_module_backward"):  # fmt: skip
        setattr(offload, f"{moment}_function", _outside_modes(getattr(offload, f"{moment}_function")))


def _outside_modes(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def outside(*args: Any, **kwargs: Any) -> Any:
        with _disable_current_modes():
            return function(*args, **kwargs)

    return outside


def _is_attention(operator: Any) -> bool:
    return operator.namespace == "ds_lvxattn" and operator._opname in ATTENTION_OPERATORS


def _keep_attention(rows: frozenset[int], context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if _is_attention(operator) else CheckpointPolicy.PREFER_RECOMPUTE


def _keep_all_but_keys(
    rows: frozenset[int], context: Any, operator: Any, *args: Any, **kwargs: Any
) -> CheckpointPolicy:
    if not _is_attention(operator) and any(isinstance(arg, Tensor) and _has_rows(arg, rows) for arg in args):
        return CheckpointPolicy.PREFER_RECOMPUTE
    return CheckpointPolicy.MUST_SAVE


def _has_rows(x: Tensor, rows: frozenset[int]) -> bool:
    """Whether one or two adjacent dimensions of ``x`` count visual tokens.

    A dimension that has that size by chance is recomputed too, which costs time but is right.
    """
    sizes = x.shape
    return any(size in rows for size in sizes) or any(a * b in rows for a, b in itertools.pairwise(sizes))
