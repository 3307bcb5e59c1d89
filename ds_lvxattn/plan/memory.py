"""Memory of one rank: what each layer keeps for its backward pass, model states, and the frames that fit.

Pure functions of sizes; no torch. A layer is a whole decoder layer as in Llama: RMS norms (``runtime.norms``), one
attention (cross: queries and keys normalised too; self: rotary positions), a feed-forward part with a gate. For such
layers ``kept_bytes`` is exact when all parameters train, and tests hold it to what autograd saves; frozen parameters
keep less. Parameters, and what all layers share (visual features, rotary factors, intervals), are not in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from ds_lvxattn.plan.layer_sizes import FLOAT32, LayerSizes
from ds_lvxattn.plan.modes import mode_of
from ds_lvxattn.plan.tiling import LOGITS_VALUES, Tiles, rows_of_tile

POLICIES = ("none", "kv", "layer")
FITS = 5 / 6  # of the device's memory: allocators round, and later batches may be larger


def kept_bytes(sizes: LayerSizes, policy: str) -> int:
    """Bytes that a decoder layer keeps from its forward to its backward pass.

    Args:
        policy: ``none`` keeps all that autograd saves. ``kv``: a cross-attention module keeps its input rows and
            what the attention operator returns; self-attention layers keep all. ``layer``: every layer keeps its
            input rows and what the attention operator returns.
    """
    if policy not in POLICIES:
        raise ValueError(f"recompute policy is {policy!r}; choose one of {POLICIES}")
    if sizes.shares_layer:
        return returned_bytes(sizes) + (_second_attention_bytes(sizes) if policy == "none" else 0)
    rows = sizes.rows * sizes.row_bytes
    if policy == "layer":
        return rows + returned_bytes(sizes)
    outside = 2 * sizes.norm_bytes(sizes.rows, sizes.width) + _feed_forward_bytes(sizes)
    if sizes.role != "cross":
        return outside + _attention_bytes(sizes)
    # The two gates keep what they scale, and their own tanh.
    outside += 2 * (rows + sizes.element)
    return outside + (rows + returned_bytes(sizes) if policy == "kv" else _attention_bytes(sizes))


def returned_bytes(sizes: LayerSizes) -> int:
    """Bytes that the attention operator returns: output, log-sum-exp, and all ranks' queries where it keeps them.

    They are kept under every policy, so that nothing has to be attended to, or sent, again.
    """
    return mode_of((sizes.strategy, sizes.schedule)).returned(sizes)


def _attention_bytes(sizes: LayerSizes) -> int:
    """An attention module: input of the projections, norms of queries and keys, the operator's inputs and results.

    The operator's output is also the input of ``o_proj``.
    """
    kept = sizes.rows * sizes.row_bytes + returned_bytes(sizes)
    if sizes.role == "cross":
        kept += sizes.norm_bytes(sizes.rows * sizes.heads, sizes.head_dim)
        kept += sizes.norm_bytes(sizes.keys * sizes.kv_heads, sizes.head_dim)
    return kept + mode_of((sizes.strategy, sizes.schedule)).inputs(sizes)


def _second_attention_bytes(sizes: LayerSizes) -> int:
    """Keys and values, and of the features, which all layers share, their norm's output: the projection's input."""
    return sizes.kv_bytes + sizes.norm_bytes(sizes.keys, sizes.width)


def _feed_forward_bytes(sizes: LayerSizes) -> int:
    """Input; the gate before and after its activation, the value beside it, and their product.

    With tiles the input alone, since they are computed again.
    """
    inner = _feed_forward_values(sizes) if sizes.tiled_mlp is None else 0
    return sizes.rows * sizes.row_bytes + inner


def _feed_forward_values(sizes: LayerSizes) -> int:
    return sizes.feed_forward_tile * 4 * sizes.intermediate * sizes.element


@dataclass(frozen=True)
class ModelStates:
    """What ZeRO keeps of the model, in numbers of parameters.

    Attributes:
        parameters, trainable: of the model, and how many of them train.
        element: bytes of a parameter.
        stage: of ZeRO, 0 to 3.
        ranks: ranks that ZeRO partitions over: all of the run.
        offload_optimizer, offload_parameters: to the CPU.
        gathered: parameters that are whole on every rank beside their partitions, for most of a step of stage 3; the
            partitions of one rank are whole.
        gradient: bytes of an element of the gradients that travel: where ranks share a sequence DeepSpeed sends
            float32, unless the config's ``seq_parallel_communication_data_type`` says otherwise.
    """

    parameters: int
    trainable: int
    element: int
    stage: int
    ranks: int
    offload_optimizer: bool = False
    offload_parameters: bool = False
    gathered: int = 0
    gradient: int = FLOAT32

    @property
    def device_bytes(self) -> int:
        """Bytes on the device: parameters, their gradients, and Adam's states (with a float32 copy beside bf16)."""
        share = {stage: self.ranks if self.stage >= stage else 1 for stage in (1, 2, 3)}
        parameters = 0 if self.offload_parameters and self.stage == 3 else self.parameters * self.element // share[3]
        parameters += self.gathered * self.element if self.stage == 3 and self.ranks > 1 else 0
        if self.offload_optimizer:
            return parameters + (self.trainable * self.element if self.stage < 2 else 0)
        states = (2 if self.element >= FLOAT32 else 3) * max(self.element, FLOAT32)
        return parameters + self.trainable * self.element // share[2] + self.trainable * states // share[1]


def workspace_bytes(sizes: LayerSizes, policy: str, features_train: bool) -> int:
    """Peak of what a layer's backward pass needs beside what was kept, as far as it grows with the keys.

    ``dK`` and ``dV``; recomputed, ``K`` before and after its norm, and ``V``. Where the visual features train, their
    gradient, the sum so far and the part of one projection; by then a layer that kept ``K`` and ``V`` has freed them.
    An estimate: allocators round, and kernels have workspaces.
    """
    # A tile that is computed again, with its gradients.
    tile = 2 * _feed_forward_values(sizes) if sizes.tiled_mlp is not None else 0
    if sizes.role != "cross":
        return max(sizes.kv_bytes, tile)
    return max(_cross_attention_workspace(sizes, policy, features_train), tile)


def _cross_attention_workspace(sizes: LayerSizes, policy: str, features_train: bool) -> int:
    features = 2 * sizes.batch * sizes.keys * sizes.width * sizes.element if features_train else 0
    if policy != "none":
        return 2 * sizes.kv_bytes + sizes.key_bytes + features
    freed = sizes.kv_bytes + sizes.norm_bytes(sizes.keys * sizes.kv_heads, sizes.head_dim)
    return max(sizes.kv_bytes, features + sizes.key_bytes - freed)


def logits_bytes(rows: int, vocabulary: int, element: int, tiles: Tiles) -> int:
    """Peak of the logits of ``rows`` rows: as the model gives them, and in float32 their logarithms and gradients."""
    return rows_of_tile(rows, vocabulary, tiles, LOGITS_VALUES) * vocabulary * (element + 2 * FLOAT32)


def step_bytes(
    layers: Iterable[LayerSizes], policy: str, states: ModelStates, shared: int, features_train: bool, logits: int = 0
) -> int:
    """Peak device bytes of a training step.

    Args:
        layers: the decoder layers.
        states: model, gradients and optimizer.
        shared: bytes that all layers share: the visual features, and what their projector keeps.
        features_train: whether the features need a gradient.
        logits: by ``logits_bytes``; they are there before any layer's backward pass begins.
    """
    kept, work = 0, logits
    for layer in layers:
        kept += kept_bytes(layer, policy)
        work = max(work, workspace_bytes(layer, policy, features_train))
    return states.device_bytes + shared + kept + work


def largest_that_fits(step: Callable[[int], int], capacity: int, most: int = 1 << 24) -> int:
    """The largest number of frames, at most ``most``, whose ``step`` (bytes, growing) fits ``capacity`` bytes."""
    low, high = 0, most + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if step(middle) <= capacity else (low, middle)
    return low
