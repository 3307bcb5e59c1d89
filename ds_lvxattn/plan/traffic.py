"""Bytes that one rank receives in the attention exchange of one layer: pure functions, exact.

The main terms are those of LV-XAttn (arXiv 2502.02406), table 1, generalised to GQA and uneven shards. The
log-sum-exp is counted too. The communicator's count equals these figures; tests hold both to it.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LayerShape:
    """Sizes of one attention call of a group, as far as traffic depends on them.

    Attributes:
        batch: sequences in the micro-batch.
        heads, kv_heads, head_dim: query heads, key heads, head size.
        q_lengths, kv_lengths: query rows and keys of every rank.
        element: bytes of an element of ``q``, ``k``, ``v``.
        needs_out: the local kernel's backward pass takes the output instead of ``delta``.
        recompute: ``none``, ``kv`` or ``layer``: what the backward pass computes, and Ulysses sends, again.
    """

    batch: int
    heads: int
    kv_heads: int
    head_dim: int
    q_lengths: tuple[int, ...]
    kv_lengths: tuple[int, ...]
    element: int
    needs_out: bool = False
    recompute: str = "none"

    @property
    def ranks(self) -> int:
        return len(self.q_lengths)

    @property
    def statistic(self) -> int:
        """Bytes of a log-sum-exp or ``delta`` value."""
        return 8 if self.element == 8 else 4

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
    return _query_exchange(shape, sent=rows, returned=rows, queries_again=False)


def query_ring(shape: LayerShape, rank: int) -> Traffic:
    """Query exchange, schedule ``ring``: exact lengths; the queries travel again in the backward pass."""
    sent = sum(shape.q_lengths) - shape.q_lengths[rank]
    returned = (shape.ranks - 1) * shape.q_lengths[rank]
    return _query_exchange(shape, sent, returned, queries_again=True)


def _query_exchange(shape: LayerShape, sent: int, returned: int, queries_again: bool) -> Traffic:
    """``sent`` rows of other ranks come in; results for this rank's rows come back, ``returned`` in all."""
    forward = shape.query_bytes(sent) + shape.query_bytes(returned) + shape.statistic_bytes(returned)
    # Coming in: dO, L, and delta or O. Coming back: dQ.
    row_term = shape.query_bytes(sent) if shape.needs_out else shape.statistic_bytes(sent)
    backward = shape.query_bytes(sent) + shape.statistic_bytes(sent) + row_term + shape.query_bytes(returned)
    return Traffic(forward, backward + (shape.query_bytes(sent) if queries_again else 0))


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
    ("ulysses", "auto"): head_all_to_all,
    ("ring", "ring"): kv_ring,
}
