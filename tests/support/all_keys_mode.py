"""The mode ``all_keys``, a strategy from outside the package: keys and values of all ranks are gathered on each.

Written after ``docs/adding-a-strategy.md``; its torch side is ``all_keys.py`` beside this file.
"""

from __future__ import annotations

from collections.abc import Sequence

from ds_lvxattn.plan import network
from ds_lvxattn.plan.cost import Layer, Pass, Passes, kernel_times, moved
from ds_lvxattn.plan.modes.gather import GATHER
from ds_lvxattn.plan.modes.mode import Mode, own_inputs, own_results
from ds_lvxattn.plan.profile import Profile
from ds_lvxattn.plan.traffic import LayerShape, Traffic, from_sources


def traffic(shape: LayerShape, rank: int) -> Traffic:
    """K and V in both passes, their gradients in the dtype of the log-sum-exp; shards are padded to the longest."""
    per_key = shape.batch * shape.kv_heads * sum(shape.head_dims)

    def received(sources: Sequence[int]) -> tuple[int, int]:
        keys = len(sources) * max(shape.kv_lengths)
        return per_key * keys * shape.element, per_key * keys * (shape.element + shape.statistic)

    return from_sources(shape, rank, received)


def passes(layer: Layer, profile: Profile) -> Passes:
    """Gather, attend; in the backward pass gather, attend, send the gradients home. Nothing overlaps."""
    shape, mask = layer.shape, layer.mask
    n, rows, keys = shape.ranks, max(shape.q_lengths), max(shape.kv_lengths)
    kernels = kernel_times(layer, profile, rows, n * keys, mask.share * n * keys, mask.drift)
    gathered, wide = shape.kv_bytes(n * keys), shape.kv_bytes(n * keys, shape.statistic)
    come = network.all_gather(profile, n, shape.kv_bytes(keys))
    home = network.all_to_all(profile, n, wide)
    return Passes(
        Pass(kernels.forward, moved(profile, 2 * gathered), come),
        Pass(kernels.backward, moved(profile, 2 * gathered + 3 * wide), come + home),
    )


def workspace(layer: Layer, profile: Profile) -> float:
    """K and V of all ranks, and their gradients, of which as many arrive as leave."""
    shape = layer.shape
    keys = shape.ranks * max(shape.kv_lengths)
    return shape.kv_bytes(keys) + 2 * shape.kv_bytes(keys, shape.statistic)


ALL_KEYS = Mode(
    strategy="all_keys",
    schedule="auto",
    implementation="tests.support.all_keys:all_keys_attention",
    operators=("ds_lvxattn::all_keys",),
    traffic=traffic,
    passes=passes,
    workspace=workspace,
    returned=own_results,
    inputs=own_inputs,
    colour="#e08214",
    host_like=(GATHER,),
)
