"""Sizes of one attention layer, and the bytes that a rank receives in its exchange.

Each mode (``plan/modes``) gives its ``Traffic`` exactly: the communicator counts the same, and tests hold both to it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ds_lvxattn.plan.pipeline import keeps_queries, mean_head_dim


@dataclass(frozen=True)
class LayerShape:
    """Sizes of one attention call of a group, as far as traffic depends on them.

    Attributes:
        batch: sequences in the micro-batch.
        heads, kv_heads, head_dim: query heads, key heads, head size of queries and keys.
        q_lengths, kv_lengths: query rows and keys of every rank.
        element: bytes of an element of ``q``, ``k``, ``v``.
        routed_rows: query rows, counted over the batch, that each rank sends to each rank by schedule ``routed``,
            ``[from][to]``; None where every row goes everywhere (nothing is masked).
        visible_work: pairs of a query row and a key it sees that each rank computes, for one head; None: all pairs.
        recompute: ``none``, ``kv`` or ``layer``: what the backward pass computes, and Ulysses sends, again.
        inner_size: ranks of a node, consecutive ones; None: all are on one.
        routed_between: as ``routed_rows``, rows that each node sends to each node; None as there, or for one node.
        value_dim: head size of values and outputs; None: as that of the keys.
        drift: of the ranges of all keys, see ``Visibility``; None: it is not known.
    """

    batch: int
    heads: int
    kv_heads: int
    head_dim: int
    q_lengths: tuple[int, ...]
    kv_lengths: tuple[int, ...]
    element: int
    routed_rows: tuple[tuple[int, ...], ...] | None = None
    visible_work: tuple[int, ...] | None = None
    recompute: str = "none"
    inner_size: int | None = None
    routed_between: tuple[tuple[int, ...], ...] | None = None
    value_dim: int | None = None
    drift: float | None = None

    @property
    def head_dims(self) -> tuple[int, int]:
        """Head sizes of the keys and of the values."""
        return self.head_dim, self.head_dim if self.value_dim is None else self.value_dim

    @property
    def mean_head_dim(self) -> float:
        """Of both."""
        return mean_head_dim(self.head_dim, self.value_dim)

    @property
    def inner(self) -> int:
        """Ranks of a node."""
        return self.inner_size or self.ranks

    @property
    def nodes(self) -> int:
        return self.ranks // self.inner

    @property
    def ranks(self) -> int:
        return len(self.q_lengths)

    @property
    def statistic(self) -> int:
        """Bytes of a log-sum-exp or ``delta`` value."""
        return 8 if self.element == 8 else 4

    @property
    def keeps_queries(self) -> bool:
        """Whether the gathered queries stay in memory until the backward pass; see ``pipeline.keeps_queries``."""
        return keeps_queries(self.heads, self.kv_heads, self.q_lengths, self.kv_lengths)

    @property
    def balance(self) -> float:
        """Largest over mean work of a rank, where each rank computes what its own keys are part of."""
        work = self.kv_lengths if self.visible_work is None else self.visible_work
        return max(work) * len(work) / sum(work) if sum(work) else 1.0

    def query_bytes(self, rows: int) -> int:
        """Bytes of ``rows`` query rows, as of their gradients."""
        return self.batch * rows * self.heads * self.head_dim * self.element

    def output_bytes(self, rows: int) -> int:
        """Bytes of ``rows`` output rows, as of their gradients."""
        return self.batch * rows * self.heads * self.head_dims[1] * self.element

    def statistic_bytes(self, rows: int) -> int:
        """Bytes of one statistic of ``rows`` rows."""
        return self.batch * rows * self.heads * self.statistic

    def kv_bytes(self, keys: float, element: int | None = None) -> float:
        """Bytes of K and V of ``keys`` keys, in elements of another size if given."""
        return self.batch * keys * self.kv_heads * sum(self.head_dims) * (element or self.element)


@dataclass(frozen=True)
class CallShape:
    """What the attention calls of all layers of one kind have in common: ``LayerShape`` without heads and policy."""

    batch: int
    q_lengths: tuple[int, ...]
    kv_lengths: tuple[int, ...]
    element: int
    routed_rows: tuple[tuple[int, ...], ...] | None = None
    visible_work: tuple[int, ...] | None = None
    inner_size: int | None = None
    routed_between: tuple[tuple[int, ...], ...] | None = None
    drift: float | None = None

    @property
    def ranks(self) -> int:
        return len(self.q_lengths)

    def of_layer(
        self, heads: int, kv_heads: int, head_dim: int, recompute: str, value_dim: int | None = None
    ) -> LayerShape:
        """The call of a layer with these heads, whose policy is ``recompute``."""
        return LayerShape(
            self.batch, heads, kv_heads, head_dim, self.q_lengths, self.kv_lengths, self.element, self.routed_rows,
            self.visible_work, recompute, self.inner_size, self.routed_between, value_dim, self.drift,
        )  # fmt: skip


@dataclass(frozen=True)
class Traffic:
    """Bytes received by a rank from other ranks.

    Attributes:
        forward, backward: of each pass.
        between: of both, what comes from ranks on other nodes.
    """

    forward: int
    backward: int
    between: int = 0

    @property
    def total(self) -> int:
        return self.forward + self.backward


def from_sources(shape: LayerShape, rank: int, received: Callable[[Sequence[int]], tuple[int, int]]) -> Traffic:
    """What ``rank`` receives in all, and of it from other nodes.

    Args:
        received: bytes of the forward and of the backward pass that come from some other ranks.
    """
    others = [source for source in range(shape.ranks) if source != rank]
    far = [source for source in others if source // shape.inner != rank // shape.inner]
    return Traffic(*received(others), between=sum(received(far)) if far else 0)
