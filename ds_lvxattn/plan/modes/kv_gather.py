"""Keys and values gathered on every rank; see ``exchange/strategies/kv_gather.py``.

Not a mode that can be chosen by itself, where a ring needs less memory: ``hybrid`` runs it between nodes.
"""

from __future__ import annotations

from collections.abc import Sequence

from ds_lvxattn.plan import network
from ds_lvxattn.plan.cost import Layer, Pass, Passes, kernel_times, moved, overlapped
from ds_lvxattn.plan.layer_sizes import LayerSizes
from ds_lvxattn.plan.modes.mode import Mode, own_inputs, own_results
from ds_lvxattn.plan.pipeline import NVLINK, keeps_keys, key_groups
from ds_lvxattn.plan.profile import Profile
from ds_lvxattn.plan.traffic import LayerShape, Traffic, from_sources


def keeps(shape: LayerShape) -> bool:
    return keeps_keys(shape.heads, shape.kv_heads, shape.q_lengths, shape.kv_lengths)


def groups_of(layer: Layer, profile: Profile) -> tuple[int, int]:
    """Groups of the forward and of the backward pass, given how fast the machine's links carry K and V."""
    if layer.groups is not None:
        return layer.groups
    shape = layer.shape
    own = shape.kv_bytes(max(shape.kv_lengths))
    seconds = network.all_gather(profile, shape.ranks, own)
    return key_groups(
        shape.batch, shape.heads, shape.kv_heads, shape.mean_head_dim, shape.element, shape.q_lengths, shape.kv_lengths,
        (shape.ranks - 1) * own / seconds if seconds else NVLINK,
    )  # fmt: skip


def traffic(shape: LayerShape, rank: int) -> Traffic:
    """K and V, and the parts of their gradients; shards are padded to the longest."""
    per_key = shape.batch * shape.kv_heads * sum(shape.head_dims) * shape.element

    def received(sources: Sequence[int]) -> tuple[int, int]:
        keys = per_key * len(sources) * max(shape.kv_lengths)
        return keys, keys if keeps(shape) else 2 * keys

    return from_sources(shape, rank, received)


def passes(layer: Layer, profile: Profile) -> Passes:
    """All-gather K and V, attend, all-to-all their gradients; groups of heads follow each other in a pipeline."""
    shape, mask = layer.shape, layer.mask
    n, rows, keys = shape.ranks, max(shape.q_lengths), max(shape.kv_lengths)
    groups, later = groups_of(layer, profile)
    seen = mask.share * mask.busiest_step * n * keys
    own, gathered = shape.kv_bytes(keys), shape.kv_bytes(n * keys)

    kernels = kernel_times(layer, profile, rows, n * keys, seen, mask.drift, divide=groups)
    come = network.all_gather(profile, n, own / groups)
    copied = moved(profile, 2 * own, 2 * groups)
    work = groups * kernels.forward + copied
    total = come + overlapped(profile, work, (groups - 1) * come)
    forward = Pass(groups * kernels.forward, copied, total - work)

    kernels = kernel_times(layer, profile, rows, n * keys, seen, mask.drift, divide=later)
    come = 0.0 if keeps(shape) else network.all_gather(profile, n, own / later)
    go = network.all_to_all(profile, n, gathered / later)
    copied = moved(profile, 2 * gathered, 2 * later) + moved(profile, (n + 1) * own, 2 * later)
    work = later * kernels.backward + copied
    total = come + go + overlapped(profile, work, (later - 1) * (come + go))
    return Passes(forward, Pass(later * kernels.backward, copied, total - work))


def workspace(layer: Layer, profile: Profile) -> float:
    """K and V of all ranks, and of two groups in flight their gradients, out and back."""
    shape, groups = layer.shape, groups_of(layer, profile)[1]
    gathered = shape.kv_bytes(shape.ranks * max(shape.kv_lengths))
    return gathered * (1 + 2 * min(2, groups) / groups)


def returned(sizes: LayerSizes) -> int:
    """Output, log-sum-exp, and K and V of all ranks where they are kept."""
    lengths = (sizes.longest_rows,) * sizes.ranks, (sizes.keys,) * sizes.ranks
    kept = keeps_keys(sizes.heads, sizes.kv_heads, *lengths)
    return own_results(sizes) + (sizes.ranks * sizes.kv_bytes if kept else 0)


KV_GATHER = Mode(
    strategy="ring",
    schedule="kv_gather",
    implementation="ds_lvxattn.exchange.strategies.kv_gather:kv_gather_attention",
    operators=("ds_lvxattn::kv_gather",),
    traffic=traffic,
    passes=passes,
    workspace=workspace,
    returned=returned,
    inputs=own_inputs,
    colour="#d6604d",
    pipeline=groups_of,
    eligible=False,
)
