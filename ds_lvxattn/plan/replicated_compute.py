"""Whether a small batch, or its text alone, is better computed on every rank than divided over the ranks. No torch.

Dividing saves computation and costs exchanges, which for an image and a short text take longer to issue than the whole
batch takes to compute. Every rank then computes the same, and gradients are divided by the number of ranks instead.
Likewise short text with a long video: with all of it on every rank, its self-attention exchanges nothing, and
cross-attention merges partial results.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace

from ds_lvxattn.plan.choice import candidates
from ds_lvxattn.plan.cost import Layer
from ds_lvxattn.plan.modes import LOCAL, REPLICATED
from ds_lvxattn.plan.profile import Profile
from ds_lvxattn.plan.traffic import LayerShape
from ds_lvxattn.plan.visibility import of_shape

# Of a large matrix product's rate, what the products of a small batch reach.
DENSE_SHARE = 0.3
# The same of text by itself, whose products are larger.
TEXT_SHARE = 0.5
# What is predicted must be faster by this share: most of it is the host's time, which is not the same in every run.
MARGIN = 0.2
# Pixels that a rank's loader makes a second while the step before runs, at least: 24 frames of 1280 x 720, decoded too,
# in steps of 1.1 s that hardly waited (``docs/data_wait.json``).
PIXELS = 20e6


def replicating_is_faster(
    layers: Iterable[LayerShape], dense_operations: float, profile: Profile, pixels: float = 0.0
) -> bool:
    """Whether a step is predicted faster if every rank computes all of it.

    Args:
        layers: of each attention layer that would exchange, its sizes, divided.
        dense_operations: forward and backward operations of everything else, over all ranks.
        profile: the machine. Where the host's times are not known, nothing is gained for certain.
        pixels: of the pictures that are encoded. Every rank makes all of them then, and a step waits for what takes
            longer than the one before.
    """
    if f"{LOCAL.name} masked" not in profile.host:
        return False
    divided = whole = 0.0
    ranks = 1
    for shape, count in Counter(layers).items():
        ranks = shape.ranks
        if not sum(shape.kv_lengths):
            continue
        mask = of_shape(shape)
        divided += count * min(candidate.seconds for candidate in candidates(Layer(shape, mask), profile))
        alone = replace(
            shape, q_lengths=(sum(shape.q_lengths),), kv_lengths=(sum(shape.kv_lengths),), routed_rows=None,
            visible_work=None,
        )  # fmt: skip
        seen = replace(mask, busiest_keys=1.0, busiest_step=1.0, rows_seen=1.0)
        whole += count * LOCAL.cost(Layer(alone, seen), profile).total
    more = (1 - 1 / ranks) * dense_operations / (DENSE_SHARE * profile.matmul)
    made = pixels / PIXELS
    return max(whole + more, made) < (1 - MARGIN) * max(divided, made / ranks)


def copying_text_is_faster(
    layers: Iterable[tuple[str, LayerShape]], row_operations: float, rows: int, profile: Profile
) -> bool:
    """Whether a step is predicted faster if every rank computes all of its text, and its part of the frames.

    Args:
        layers: of each attention layer that would exchange, its role and its sizes, divided.
        row_operations: forward and backward operations of a row of text, attention left out.
        rows: of text, over all samples.
        profile: as in ``replicating_is_faster``.
    """
    if f"{LOCAL.name} masked" not in profile.host:
        return False
    divided = copied = 0.0
    ranks = element = 1
    for (role, shape), count in Counter(layers).items():
        ranks, element = shape.ranks, shape.element
        if not sum(shape.kv_lengths):
            continue
        mask, all_rows = of_shape(shape), sum(shape.q_lengths)
        divided += count * min(candidate.seconds for candidate in candidates(Layer(shape, mask), profile))
        if role == "cross":
            everywhere = replace(shape, q_lengths=(all_rows,) * ranks, routed_rows=None, visible_work=None)
            copied += count * REPLICATED.cost(Layer(everywhere, mask), profile).total
        else:
            alone = replace(shape, q_lengths=(all_rows,), kv_lengths=(all_rows,), routed_rows=None, visible_work=None)
            seen = replace(mask, busiest_keys=1.0, busiest_step=1.0, rows_seen=1.0)
            copied += count * LOCAL.cost(Layer(alone, seen), profile).total
    divided += text_seconds(row_operations, rows / ranks, element, profile)
    copied += text_seconds(row_operations, rows, element, profile)
    return copied < (1 - MARGIN) * divided


def text_seconds(row_operations: float, rows: float, element: int, profile: Profile) -> float:
    """Forward and backward pass of ``rows`` of text, attention left out; with few rows, the time to read the weights.

    Args:
        row_operations: of a row; two for each weight and product that it is in.
        element: bytes of a weight.
    """
    read = row_operations / 2 * element
    return max(row_operations * rows / (TEXT_SHARE * profile.matmul), read / profile.memory_bandwidth)
