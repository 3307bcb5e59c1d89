"""Bytes that one rank receives in the attention exchange of one layer: pure functions, exact.

The main terms are those of LV-XAttn (arXiv 2502.02406), table 1, generalised to GQA and uneven shards. The
log-sum-exp is counted too. The communicator's count equals these figures; tests hold both to it.
"""

from __future__ import annotations

from dataclasses import dataclass

from ds_lvxattn.plan.pipeline import keeps_queries


@dataclass(frozen=True)
class LayerShape:
    """Sizes of one attention call of a group, as far as traffic depends on them.

    Attributes:
        batch: sequences in the micro-batch.
        heads, kv_heads, head_dim: query heads, key heads, head size.
        q_lengths, kv_lengths: query rows and keys of every rank.
        element: bytes of an element of ``q``, ``k``, ``v``.
        routed_rows: query rows, counted over the batch, that each rank sends to each rank by schedule ``routed``,
            ``[from][to]``; None where every row goes everywhere (nothing is masked).
        visible_work: pairs of a query row and a key it sees that each rank computes, for one head; None: all pairs.
        recompute: ``none``, ``kv`` or ``layer``: what the backward pass computes, and Ulysses sends, again.
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

    @property
    def ranks(self) -> int:
        return len(self.q_lengths)

    @property
    def statistic(self) -> int:
        """Bytes of a log-sum-exp or ``delta`` value."""
        return 8 if self.element == 8 else 4

    @property
    def balance(self) -> float:
        """Largest over mean work of a rank, where each rank computes what its own keys are part of."""
        work = self.kv_lengths if self.visible_work is None else self.visible_work
        return max(work) * len(work) / sum(work) if sum(work) else 1.0

    def query_bytes(self, rows: int) -> int:
        """Bytes of ``rows`` query rows (as of output rows)."""
        return self.batch * rows * self.heads * self.head_dim * self.element

    def statistic_bytes(self, rows: int) -> int:
        """Bytes of one statistic of ``rows`` rows."""
        return self.batch * rows * self.heads * self.statistic


@dataclass(frozen=True)
class Traffic:
    """Bytes received by a rank from other ranks."""

    forward: int
    backward: int

    @property
    def total(self) -> int:
        return self.forward + self.backward


def query_gather(shape: LayerShape, rank: int) -> Traffic:
    """Query exchange, schedule ``gather``: shards are padded to the longest."""
    rows = (shape.ranks - 1) * max(shape.q_lengths)
    return _query_exchange(shape, shape.batch * rows, shape.batch * rows, not _keeps_queries(shape))


def query_ring(shape: LayerShape, rank: int) -> Traffic:
    """Query exchange, schedule ``ring``: exact lengths; the queries travel again in the backward pass."""
    sent = sum(shape.q_lengths) - shape.q_lengths[rank]
    returned = (shape.ranks - 1) * shape.q_lengths[rank]
    return _query_exchange(shape, shape.batch * sent, shape.batch * returned, queries_again=True)


def query_routed(shape: LayerShape, rank: int) -> Traffic:
    """Query exchange, schedule ``routed``: only rows that see something, to where they see it."""
    rows = shape.routed_rows
    if rows is None:
        return query_gather(shape, rank)
    sent = sum(from_rank[rank] for from_rank in rows) - rows[rank][rank]
    returned = sum(rows[rank]) - rows[rank][rank]
    return _query_exchange(shape, sent, returned, not _keeps_queries(shape))


def _keeps_queries(shape: LayerShape) -> bool:
    return keeps_queries(shape.heads, shape.kv_heads, shape.q_lengths, shape.kv_lengths)


def _query_exchange(shape: LayerShape, sent: int, returned: int, queries_again: bool) -> Traffic:
    """``sent`` rows of other ranks come in; results for this rank's rows come back, ``returned`` in all."""
    row = shape.heads * shape.head_dim * shape.element
    statistic = shape.heads * shape.statistic
    forward = sent * row + returned * (row + statistic)
    # Coming in: dO, L and delta. Coming back: dQ.
    backward = sent * (row + 2 * statistic) + returned * row
    return Traffic(forward, backward + (sent * row if queries_again else 0))


def head_all_to_all(shape: LayerShape, rank: int) -> Traffic:
    """Ulysses: q, k, v and the output change hands, each gradient the same way back; the statistic forward only.

    Key heads fewer than ranks are repeated until each rank has one.
    """
    n = shape.ranks
    rows, keys = n * max(shape.q_lengths), n * max(shape.kv_lengths)
    kv_heads = max(shape.kv_heads, n)
    kv_bytes = shape.batch * keys * kv_heads * shape.head_dim * shape.element
    share = (n - 1) / n**2
    exchanged = round(share * 2 * (shape.query_bytes(rows) + kv_bytes))
    forward = exchanged + round(share * shape.statistic_bytes(rows))
    # DeepSpeed's exchange is no operator that checkpointing can keep: all of it runs again, whatever is recomputed.
    return Traffic(forward, exchanged + (forward if shape.recompute != "none" else 0))


def kv_ring(shape: LayerShape, rank: int) -> Traffic:
    """Ring Attention: keys and values of the other ranks; in the backward pass their gradients in float32 too."""
    n = shape.ranks
    per_key = 2 * shape.batch * shape.kv_heads * shape.head_dim
    others = sum(shape.kv_lengths) - shape.kv_lengths[rank]
    # Gradients come home last, so every shard but that of the rank before passes through here.
    gradients = sum(shape.kv_lengths) - shape.kv_lengths[(rank - 1) % n]
    return Traffic(per_key * others * shape.element, per_key * (others * shape.element + gradients * shape.statistic))


TRAFFIC = {
    ("lv_xattn", "gather"): query_gather,
    ("lv_xattn", "ring"): query_ring,
    ("lv_xattn", "routed"): query_routed,
    ("ulysses", "auto"): head_all_to_all,
    ("ring", "ring"): kv_ring,
}
