"""Times of a cross-attention layer as a module: projecting K and V, and what the host takes to issue everything."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ds_lvxattn.calibration.clock import Clock, host_seconds, slowest_of
from ds_lvxattn.calibration.extent import HeadLayout
from ds_lvxattn.exchange.attention import sp_attention
from ds_lvxattn.exchange.comm import communicator
from ds_lvxattn.exchange.grid import node_size
from ds_lvxattn.exchange.interval import KVInterval
from ds_lvxattn.exchange.routes import Routes
from ds_lvxattn.exchange.shards import SequenceShards, ShardLayout
from ds_lvxattn.kernels.rms_norm import rms_norm
from ds_lvxattn.plan.cost import projection_seconds
from ds_lvxattn.plan.modes import LOCAL, eligible_modes
from ds_lvxattn.plan.profile import HostTime, Profile, Projection
from ds_lvxattn.runtime.recompute import recompute

EPSILON = 1e-5  # of the norm


class CrossAttention(nn.Module):
    """Projection of K and V, norm of K, attention: a cross-attention layer that trains, as far as strategies differ.

    Args:
        layout: its heads.
        features: width of the features that K and V are projected from.
        attend: called with q, k and v of this rank, ``[B, H, s, D]``; returns the output first.
    """

    def __init__(self, layout: HeadLayout, features: int, attend: Callable[..., tuple[Tensor, Any]], **make: Any):
        super().__init__()
        self.layout, self.attend = layout, attend
        width = layout.kv_heads * layout.head_dim
        self.k, self.v = (nn.Linear(features, width, bias=False, **make) for _ in range(2))
        self.norm = nn.Parameter(torch.ones(layout.head_dim, **make))

    def forward(self, hidden_states: Tensor, features: Tensor) -> Tensor:
        """``[B, s_q, H_q * D]`` rows and ``[B, s_kv, features]`` to the attention's output."""
        k, v = self.keys_and_values(features)
        q = hidden_states.unflatten(2, (self.layout.heads, self.layout.head_dim)).transpose(1, 2)
        return self.attend(q, k, v)[0]

    def keys_and_values(self, features: Tensor) -> tuple[Tensor, Tensor]:
        k, v = (p(features).unflatten(2, (self.layout.kv_heads, self.layout.head_dim)) for p in (self.k, self.v))
        return rms_norm(k.transpose(1, 2), self.norm, EPSILON), v.transpose(1, 2)


def layer_step(layer: CrossAttention, rows: Tensor, features: Tensor, recomputes: bool) -> Callable[[], None]:
    """A training step of the layer: forward and backward pass, gradients dropped."""
    leaves = (rows, features, *layer.parameters())

    def step() -> None:
        if recomputes:
            out = recompute(layer, functools.partial(layer, features=features), rows)
        else:
            out = layer(rows, features)
        torch.autograd.backward(out, torch.ones_like(out))
        for leaf in leaves:
            leaf.grad = None

    return step


def projections(
    profile: Profile, layouts: Sequence[HeadLayout], clock: Clock, device: torch.device, dtype: torch.dtype
) -> tuple[Projection, ...]:
    """For each width of K and V, how much longer than by the formula projecting them takes."""
    tokens, features = (32768, 4096) if device.type == "cuda" else (512, 256)
    make: dict[str, Any] = {"device": device, "dtype": dtype}
    found = []
    for layout in sorted(set(layouts)):
        layer = CrossAttention(layout, features, lambda q, k, v: (q, None), **make)
        x = torch.randn(1, tokens, features, requires_grad=True, **make)
        grads = [torch.ones_like(y) for y in layer.keys_and_values(x)]

        @torch.no_grad()
        def forward(layer: CrossAttention = layer, x: Tensor = x) -> None:
            layer.keys_and_values(x)

        def both(layer: CrossAttention = layer, x: Tensor = x, grads: list[Tensor] = grads) -> None:
            torch.autograd.backward(layer.keys_and_values(x), grads)
            for leaf in (x, *layer.parameters()):
                leaf.grad = None

        times = slowest_of([clock.seconds(call, apart=True) for call in (forward, both)], device)
        width = layout.kv_heads * layout.head_dim
        computed = projection_seconds(profile, tokens, features, width, dtype.itemsize)
        ratios = times[0] / computed[0], max(times[1] - times[0], 0.0) / computed[1]
        found.append(Projection(width, layout.head_dim, *ratios))
    return tuple(found)


def host_times(
    group: dist.ProcessGroup | None,
    ranks: int,
    layout: HeadLayout,
    device: torch.device,
    dtype: torch.dtype,
    inner_size: int | None = None,
) -> Mapping[str, HostTime]:
    """Host seconds of a layer by strategy and schedule, on sizes for which the device does next to nothing.

    Also of one that exchanges nothing (``local/auto``).
    """
    heads = layout.heads if layout.heads >= ranks else layout.heads * ranks
    comm = communicator(group)
    inner = inner_size or node_size(comm)
    every = [mode for mode in eligible_modes() if ranks > 1 and (not mode.two_levels or 1 < inner < ranks)]
    runs = all(mode.obstacle(heads, layout.kv_heads, ranks, inner) is None for mode in every)
    kv_heads = layout.kv_heads if runs else heads
    sizes = HeadLayout(heads, kv_heads, layout.head_dim)
    rows, keys, features = 16, 64, 64
    make: dict[str, Any] = {"device": device, "dtype": dtype}
    shards = ShardLayout(SequenceShards((rows,) * ranks), SequenceShards((keys,) * ranks))
    stop = torch.full((ranks, 1, rows), keys * ranks, dtype=torch.int32, device=device)
    interval = KVInterval(torch.zeros_like(stop), stop)
    routes = Routes.build(interval.start.cpu(), stop.cpu(), shards, comm.rank, device)
    x = torch.randn(1, rows, heads * layout.head_dim, requires_grad=True, **make)
    y = torch.randn(1, keys, features, requires_grad=True, **make)
    alone = ShardLayout(SequenceShards((rows,)), SequenceShards((keys,)))
    counts = comm.received.copy(), comm.between.copy()
    found: dict[str, HostTime] = {}
    for mode, masked in itertools.product((LOCAL, *every), (False, True)):
        if mode.routes_by_mask and not masked:
            continue
        if mode is LOCAL:
            seen = KVInterval(interval.start[:1], interval.stop[:1].clamp(max=keys))
            how: dict[str, Any] = {"interval": seen if masked else None, "shards": alone}
        else:
            flat_routes = routes if masked and not mode.two_levels else None
            how = {"group": group, "strategy": mode.strategy, "schedule": mode.schedule, "shards": shards}
            how |= {"interval": interval if masked else None, "routes": flat_routes, "inner_size": inner}
        attend = functools.partial(sp_attention, **how)
        layer = CrossAttention(sizes, features, attend, **make)

        @torch.no_grad()
        def forward(layer: CrossAttention = layer) -> None:
            layer(x, y)

        calls = (forward, layer_step(layer, x, y, False), layer_step(layer, x, y, True))
        one, both, again = slowest_of([host_seconds(call, device) for call in calls], device)
        name = mode.name + " masked" * masked
        found[name] = HostTime(one, max(both - one, 0.0), max(again - both, 0.0))
    comm.reset()
    comm.received.update(counts[0])
    comm.between.update(counts[1])
    return found
