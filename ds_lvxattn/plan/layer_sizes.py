"""Sizes of one decoder layer on one rank, as far as what it keeps for its backward pass depends on them. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from ds_lvxattn.plan.tiling import FEED_FORWARD_VALUES, Tiles, rows_of_tile

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
        heads, kv_heads, head_dim: query heads, key heads, head size of queries and keys.
        width: size of a text row (``d_model``), and of a visual feature.
        intermediate: inner size of the feed-forward part.
        element: bytes of an element.
        shares_layer: whether this attention shares a decoder layer, its queries too, with another one, with which the
            rest of the layer is counted; its visual features pass the layer's norm.
        inner_size: ranks of a node; None: all are on one.
        tiled_mlp: tiles of the feed-forward part, as in the config.
        value_dim: head size of values and outputs; None: as that of the keys.
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
    shares_layer: bool = False
    inner_size: int | None = None
    tiled_mlp: Tiles = None
    value_dim: int | None = None

    @property
    def inner(self) -> int:
        """Ranks of a node."""
        return self.inner_size or self.ranks

    @property
    def statistic(self) -> int:
        """Bytes of a log-sum-exp value."""
        return 8 if self.element == 8 else FLOAT32

    @property
    def row_bytes(self) -> int:
        """Bytes of a text row of each sequence."""
        return self.batch * self.width * self.element

    @property
    def feed_forward_tile(self) -> int:
        """Rows that the feed-forward part takes at once, over all sequences."""
        return rows_of_tile(self.batch * self.rows, self.intermediate, self.tiled_mlp, FEED_FORWARD_VALUES)

    @property
    def key_bytes(self) -> int:
        """Bytes of this rank's keys."""
        return self.batch * self.keys * self.kv_heads * self.head_dim * self.element

    @property
    def value_bytes(self) -> int:
        """Bytes of this rank's values."""
        return self.batch * self.keys * self.kv_heads * self._value_dim * self.element

    @property
    def kv_bytes(self) -> int:
        """Bytes of both."""
        return self.key_bytes + self.value_bytes

    @property
    def _value_dim(self) -> int:
        return self.head_dim if self.value_dim is None else self.value_dim

    def query_bytes(self, rows: int) -> int:
        """Bytes of ``rows`` query rows."""
        return self.batch * rows * self.heads * self.head_dim * self.element

    def output_bytes(self, rows: int) -> int:
        """Bytes of ``rows`` output rows."""
        return self.batch * rows * self.heads * self._value_dim * self.element

    def statistic_bytes(self, rows: int) -> int:
        """Bytes of the log-sum-exp of ``rows`` query rows."""
        return self.batch * rows * self.heads * self.statistic

    def norm_bytes(self, rows: int, width: int) -> int:
        """An RMS norm over vectors of ``width``: its input, and their inverse norms in float32."""
        return self.batch * rows * (width * self.element + FLOAT32)
