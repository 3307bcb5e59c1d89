"""Ring Attention: keys and values visit the ranks; see ``exchange/strategies/kv_ring.py``."""

from __future__ import annotations

from collections.abc import Sequence

from ds_lvxattn.plan import network
from ds_lvxattn.plan.cost import Layer, Pass, Passes, kernel_times, moved, overlapped
from ds_lvxattn.plan.modes.mode import Mode, own_inputs, own_results
from ds_lvxattn.plan.profile import Profile
from ds_lvxattn.plan.traffic import LayerShape, Traffic, from_sources


def traffic(shape: LayerShape, rank: int) -> Traffic:
    """Keys and values of the other ranks; in the backward pass their gradients in float32 too."""
    n = shape.ranks
    per_key = shape.batch * shape.kv_heads * sum(shape.head_dims)
    others = sum(shape.kv_lengths) - shape.kv_lengths[rank]
    # Gradients come home last, so every shard but that of the rank before passes through here.
    gradients = sum(shape.kv_lengths) - shape.kv_lengths[(rank - 1) % n]

    def received(sources: Sequence[int]) -> tuple[int, int]:
        if (rank - 1) % n not in sources:  # everything comes from the rank before
            return 0, 0
        return per_key * others * shape.element, per_key * (others * shape.element + gradients * shape.statistic)

    return from_sources(shape, rank, received)


def passes(layer: Layer, profile: Profile) -> Passes:
    """The next keys travel while a kernel runs; in the backward pass float32 gradients follow a step later."""
    shape, mask = layer.shape, layer.mask
    n, own, keys = shape.ranks, max(shape.q_lengths), max(shape.kv_lengths)
    seen = mask.share * mask.busiest_step * keys
    kernels = kernel_times(layer, profile, own, keys, seen, mask.drift / n)
    query, output = shape.query_bytes(own), shape.output_bytes(own)
    key = network.send(profile, n, shape.kv_bytes(keys))
    gradient = network.send(profile, n, shape.kv_bytes(keys, shape.statistic))

    work = kernels.forward + moved(profile, 3 * output)
    total = (n - 1) * overlapped(profile, work, key) + work
    forward = Pass(n * kernels.forward, n * (work - kernels.forward), total - n * work)

    # Parts to float32 and added to what arrived: 2 bytes read and 4 written, then 8 read and 4 written.
    wide = moved(profile, 9 * shape.kv_bytes(keys), 4) + moved(profile, 5 * query)
    work = kernels.backward + wide
    if n == 1:
        total = work
    elif n == 2:
        total = overlapped(profile, work, key) + work + gradient
    else:
        total = 2 * overlapped(profile, work, key) + (n - 3) * overlapped(profile, work, key + gradient)
        total += overlapped(profile, work, gradient) + gradient
    return Passes(forward, Pass(n * kernels.backward, n * wide, total - n * work))


def workspace(layer: Layer, profile: Profile) -> float:
    shape, keys = layer.shape, max(layer.shape.kv_lengths)
    return 2 * shape.kv_bytes(keys) + 3 * shape.kv_bytes(keys, shape.statistic)


KV_RING = Mode(
    strategy="ring",
    schedule="ring",
    implementation="ds_lvxattn.exchange.strategies.kv_ring:kv_ring_attention",
    operators=("ds_lvxattn::kv_ring",),
    traffic=traffic,
    passes=passes,
    workspace=workspace,
    returned=own_results,
    inputs=own_inputs,
    colour="#b2182b",
    step_a_rank=True,
)
