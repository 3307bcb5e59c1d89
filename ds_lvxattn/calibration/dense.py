"""What a step does besides attention: times of matrix products by size, the host's time for the rest of a layer."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from deepspeed.runtime.zero.linear import zero3_linear_wrap
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm, apply_rotary_pos_emb

from ds_lvxattn.calibration.clock import Clock, host_seconds, slowest_of
from ds_lvxattn.calibration.extent import Extent
from ds_lvxattn.kernels.torch_internals import linear
from ds_lvxattn.plan.dense import ENCODER_LAYER, LINEAR, TEXT_LAYER
from ds_lvxattn.plan.profile import HostTime, Product
from ds_lvxattn.runtime.norms import fuse_norms

WEIGHTS = 1 << 28  # bytes of weights that calls take turns with: a step's weights are in no cache


def products(clock: Clock, extent: Extent, device: torch.device, dtype: torch.dtype) -> tuple[Product, ...]:
    """Matrix products of the extent's sizes, in its order."""
    times = []
    for rows, inputs, outputs in extent.products:
        count = max(WEIGHTS // (inputs * outputs * dtype.itemsize), 1) if device.type == "cuda" else 1
        weights = itertools.cycle(torch.randn(count, outputs, inputs, device=device, dtype=dtype))
        x = torch.randn(rows, inputs, device=device, dtype=dtype)

        def call(x: Tensor = x, weights: itertools.cycle[Tensor] = weights) -> Tensor:
            return nn.functional.linear(x, next(weights))

        times.append(clock.seconds(call, many=2.0 * rows * inputs * outputs < 3e11, apart=True))
    measured = slowest_of(times, device)
    return tuple(Product(*sizes, seconds) for sizes, seconds in zip(extent.products, measured, strict=True))


class TextLayer(nn.Module):
    """A frozen text layer of transformers without attention, keys and values: norms, queries, output, feed-forward."""

    def __init__(self, width: int, head_dim: int, **make: Any) -> None:
        super().__init__()
        config = LlamaConfig(hidden_size=width, intermediate_size=2 * width)
        self.head_dim = head_dim
        self.before, self.behind = LlamaRMSNorm(width), LlamaRMSNorm(width)
        self.queries, self.output = (nn.Linear(width, width, bias=False) for _ in range(2))
        self.feed_forward = LlamaMLP(config)
        self.to(**make).requires_grad_(False)
        fuse_norms(self)  # as in a model that trains

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """``[1, s, width]`` rows with rotary factors ``[1, s, head_dim]``."""
        q = self.queries(self.before(x)).unflatten(2, (-1, self.head_dim)).transpose(1, 2)
        q, _ = apply_rotary_pos_emb(q, q, cos, sin)
        x = x + self.output(q.transpose(1, 2).flatten(2))
        return x + self.feed_forward(self.behind(x))


class EncoderLayer(nn.Module):
    """A layer of a vision encoder of transformers without attention."""

    def __init__(self, width: int, **make: Any) -> None:
        super().__init__()
        self.before, self.behind = nn.LayerNorm(width), nn.LayerNorm(width)
        self.linear = nn.ModuleList(nn.Linear(width, width) for _ in range(4))
        self.feed_forward = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.to(**make).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.before(x)
        q, _, _ = (layer(h) for layer in list(self.linear)[:3])
        x = x + self.linear[3](q)
        return x + self.feed_forward(self.behind(x))


def layer_host_times(device: torch.device, dtype: torch.dtype) -> Mapping[str, HostTime]:
    """The host's seconds for the rest of a text layer and of an encoder layer, too small to keep the device busy; and
    how much longer a linear layer of ZeRO-3 takes than another."""
    width, head_dim, rows = 256, 64, 16
    make: dict[str, Any] = {"device": device, "dtype": dtype}
    text, encoder = TextLayer(width, head_dim, **make), EncoderLayer(width, **make)
    x = torch.randn(1, rows, width, requires_grad=True, **make)
    factors = torch.ones(1, rows, head_dim, **make)

    @torch.no_grad()
    def encode() -> None:
        encoder(x)

    @torch.no_grad()
    def forward() -> None:
        text(x, factors, factors)

    def both() -> None:
        out = text(x, factors, factors)
        torch.autograd.backward(out, torch.ones_like(out))
        x.grad = None

    weight, linears = text.output.weight, 16

    def products(product: Callable[..., Tensor], trains: bool) -> None:
        with torch.set_grad_enabled(trains):
            outs = [product(x, weight) for _ in range(linears)]
        if trains:
            torch.autograd.backward(outs, [torch.ones_like(out) for out in outs])
        x.grad = None

    calls: list[Callable[[], None]] = [encode, forward, both]
    calls += [
        functools.partial(products, product, trains)
        for trains in (False, True)
        for product in (linear, zero3_linear_wrap)
    ]
    times = slowest_of([host_seconds(call, device) for call in calls], device)
    encoded, one, two, first, first_zero3, each, each_zero3 = times
    forward_more, more = ((b - a) / linears for a, b in ((first, first_zero3), (each, each_zero3)))
    return {
        LINEAR: HostTime(max(forward_more, 0.0), max(more - forward_more, 0.0), 0.0),
        ENCODER_LAYER: HostTime(encoded, 0.0, 0.0),
        TEXT_LAYER: HostTime(one, max(two - one, 0.0), 0.0),
    }
