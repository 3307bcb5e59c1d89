"""Memory of one rank: what each layer keeps for its backward pass, model states, and the frames that fit.

Pure functions of sizes; no torch. A layer is a whole decoder layer as in Llama: RMS norms computed in float32, one
attention (cross: queries and keys normalised too; self: rotary positions), a feed-forward part with a gate. For such
layers ``kept_bytes`` is exact when all parameters train, and tests hold it to what autograd saves; frozen parameters
keep less. Parameters, and what all layers share (visual features, rotary factors, intervals), are not in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from ds_lvxattn.plan.pipeline import keeps_queries

POLICIES = ("none", "kv", "layer")
FLOAT32 = 4


@dataclass(frozen=True)
class LayerSizes:
    """Sizes of one decoder layer on one rank.

    Attributes:
        role: ``cross`` or ``self``.
        strategy, schedule: how its attention crosses the ranks; ``local`` where nothing is exchanged.
        batch: sequences in the micro-batch.
        ranks: ranks of the sequence-parallel group.
        rows, longest_rows, total_rows: query rows of this rank, of the rank with most, of all ranks.
        keys, total_keys: key rows that are projected on this rank, and on all ranks.
        heads, kv_heads, head_dim: query heads, key heads, head size.
        width: size of a text row (``d_model``), and of a visual feature.
        intermediate: inner size of the feed-forward part.
        element: bytes of an element.
        beside: whether this attention shares a decoder layer, its queries too, with another one, with which the rest of
            the layer is counted; its visual features pass the layer's norm.
    """

    role: str
    strategy: str
    schedule: str
    batch: int
    ranks: int
    rows: int
    longest_rows: int
    total_rows: int
    keys: int
    total_keys: int
    heads: int
    kv_heads: int
    head_dim: int
    width: int
    intermediate: int
    element: int
    beside: bool = False

    @property
    def statistic(self) -> int:
        """Bytes of a log-sum-exp value."""
        return 8 if self.element == 8 else FLOAT32

    @property
    def row_bytes(self) -> int:
        """Bytes of a text row of each sequence."""
        return self.batch * self.width * self.element

    @property
    def kv_bytes(self) -> int:
        """Bytes of this rank's keys, as of its values."""
        return self.batch * self.keys * self.kv_heads * self.head_dim * self.element

    def query_bytes(self, rows: int) -> int:
        """Bytes of ``rows`` query rows (as of output rows)."""
        return self.batch * rows * self.heads * self.head_dim * self.element

    def statistic_bytes(self, rows: int) -> int:
        """Bytes of the log-sum-exp of ``rows`` query rows."""
        return self.batch * rows * self.heads * self.statistic

    def norm_bytes(self, rows: int, width: int) -> int:
        """An RMS norm over vectors of ``width``: the float32 input, its inverse norm, the normalised input."""
        return self.batch * rows * (width * (FLOAT32 + self.element) + FLOAT32)


def kept_bytes(sizes: LayerSizes, policy: str) -> int:
    """Bytes that a decoder layer keeps from its forward to its backward pass.

    Args:
        policy: ``none`` keeps all that autograd saves. ``kv``: a cross-attention module keeps its input rows and
            what the attention operator returns; self-attention layers keep all. ``layer``: every layer keeps its
            input rows and what the attention operator returns.
    """
    if policy not in POLICIES:
        raise ValueError(f"recompute policy is {policy!r}; choose one of {POLICIES}")
    if sizes.beside:
        return returned_bytes(sizes) + (_beside_bytes(sizes) if policy == "none" else 0)
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
    if sizes.strategy == "ulysses":  # this rank's share of the heads, for all rows
        return (
            sizes.query_bytes(sizes.total_rows) // sizes.ranks + sizes.statistic_bytes(sizes.total_rows) // sizes.ranks
        )
    kept = sizes.query_bytes(sizes.rows) + sizes.statistic_bytes(sizes.rows)
    return kept + (sizes.query_bytes(sizes.ranks * sizes.longest_rows) if _keeps_gathered(sizes) else 0)


def _keeps_gathered(sizes: LayerSizes) -> bool:
    """Whether other ranks' queries are kept; ``routed`` keeps those that it received, at most all of them."""
    if sizes.strategy != "lv_xattn" or sizes.schedule == "ring" or sizes.ranks == 1:
        return False
    return keeps_queries(sizes.heads, sizes.kv_heads, (sizes.longest_rows,) * sizes.ranks, (sizes.keys,))


def _attention_bytes(sizes: LayerSizes) -> int:
    """An attention module: input of the projections, norms of queries and keys, the operator, queries and keys.

    The operator's output is also the input of ``o_proj``; Ulysses' makes its way back first.
    """
    kept = sizes.rows * sizes.row_bytes + returned_bytes(sizes)
    if sizes.role == "cross":
        kept += sizes.norm_bytes(sizes.rows * sizes.heads, sizes.head_dim)
        kept += sizes.norm_bytes(sizes.keys * sizes.kv_heads, sizes.head_dim)
    if sizes.strategy == "ulysses":
        # Its share of the heads; key heads are repeated until each rank has one. Two int32 a row say what it sees.
        heads = max(sizes.kv_heads, sizes.ranks)
        keys = sizes.batch * sizes.total_keys * heads * sizes.head_dim * sizes.element // sizes.ranks
        kept += sizes.query_bytes(sizes.rows) + sizes.query_bytes(sizes.total_rows) // sizes.ranks
        return kept + 2 * keys + 8 * sizes.batch * sizes.total_rows
    return kept + 2 * sizes.kv_bytes + (0 if _keeps_gathered(sizes) else sizes.query_bytes(sizes.rows))


def _beside_bytes(sizes: LayerSizes) -> int:
    """Keys and values; of the features, what their norm keeps and its output, which is the input of the projection."""
    normed = sizes.norm_bytes(sizes.keys, sizes.width) + sizes.batch * sizes.keys * sizes.width * sizes.element
    return 2 * sizes.kv_bytes + normed


def _feed_forward_bytes(sizes: LayerSizes) -> int:
    """Input; the gate before and after its activation, the value beside it, and their product."""
    return sizes.batch * sizes.rows * (sizes.width + 4 * sizes.intermediate) * sizes.element


@dataclass(frozen=True)
class ModelStates:
    """What ZeRO keeps of the model, in numbers of parameters.

    Attributes:
        parameters, trainable: of the model, and how many of them train.
        element: bytes of a parameter.
        stage: of ZeRO, 0 to 3.
        ranks: ranks that ZeRO partitions over: all of the run.
        offload_optimizer, offload_parameters: to the CPU.
    """

    parameters: int
    trainable: int
    element: int
    stage: int
    ranks: int
    offload_optimizer: bool = False
    offload_parameters: bool = False

    @property
    def device_bytes(self) -> int:
        """Bytes on the device: parameters, their gradients, and Adam's states (with a float32 copy beside bf16)."""
        share = {stage: self.ranks if self.stage >= stage else 1 for stage in (1, 2, 3)}
        parameters = 0 if self.offload_parameters and self.stage == 3 else self.parameters * self.element // share[3]
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
    if sizes.role != "cross":
        return 2 * sizes.kv_bytes
    features = 2 * sizes.batch * sizes.keys * sizes.width * sizes.element if features_train else 0
    if policy != "none":
        return 5 * sizes.kv_bytes + features
    freed = 2 * sizes.kv_bytes + sizes.norm_bytes(sizes.keys * sizes.kv_heads, sizes.head_dim)
    return max(2 * sizes.kv_bytes, features + sizes.kv_bytes - freed)


def step_bytes(
    layers: Iterable[LayerSizes], policy: str, states: ModelStates, shared: int, features_train: bool
) -> int:
    """Peak device bytes of a training step.

    Args:
        layers: the decoder layers.
        states: model, gradients and optimizer.
        shared: bytes that all layers share: the visual features, and what their projector keeps.
        features_train: whether the features need a gradient.
    """
    kept, work = 0, 0
    for layer in layers:
        kept += kept_bytes(layer, policy)
        work = max(work, workspace_bytes(layer, policy, features_train))
    return states.device_bytes + shared + kept + work


def frames_that_fit(step: Callable[[int], int], capacity: int, most: int = 1 << 24) -> int:
    """The largest number of frames, at most ``most``, whose ``step`` (bytes, growing) fits ``capacity`` bytes."""
    low, high = 0, most + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if step(middle) <= capacity else (low, middle)
    return low
