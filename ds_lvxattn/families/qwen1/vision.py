"""The vision encoder of Qwen-VL and its resampler, with the parameter names of published checkpoints."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, linear, scaled_dot_product_attention

EPSILON = 1e-6  # of the layer norms


class VisionAttention(nn.Module):
    """Attention among the patches of an image; queries, keys and values of a head lie side by side in ``in_proj``."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim = heads, width // heads
        self.in_proj = nn.Linear(width, 3 * width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """``x [f, patches, width]``."""
        heads = self.in_proj(x).unflatten(-1, (self.num_heads, 3 * self.head_dim)).transpose(1, 2)
        made = scaled_dot_product_attention(*heads.split(self.head_dim, dim=-1))
        projected: Tensor = self.out_proj(made.transpose(1, 2).flatten(2))
        return projected


class VisionBlock(nn.Module):
    """A layer of the vision encoder."""

    def __init__(self, width: int, heads: int, mlp_width: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width, eps=EPSILON)
        self.attn = VisionAttention(width, heads)
        self.ln_2 = nn.LayerNorm(width, eps=EPSILON)
        layers = (("c_fc", nn.Linear(width, mlp_width)), ("gelu", nn.GELU()), ("c_proj", nn.Linear(mlp_width, width)))
        self.mlp = nn.Sequential(OrderedDict(layers))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        made: Tensor = x + self.mlp(self.ln_2(x))
        return made


class VisionLayers(nn.Module):
    """The layers of the vision encoder."""

    def __init__(self, layers: int, width: int, heads: int, mlp_width: int) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList([VisionBlock(width, heads, mlp_width) for _ in range(layers)])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.resblocks:
            x = block(x)
        return x


class PoolAttention(nn.Module):
    """Attention of the resampler's queries over an image, with the parameters of ``nn.MultiheadAttention``.

    That would read the weights of ``out_proj`` past their module, where ZeRO-3 has not gathered them.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim = heads, width // heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """``query [f, queries, width]`` over ``key, value [f, patches, width]``."""
        weights, biases = self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3)
        q, k, v = (
            linear(x, weight, bias).unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)
            for x, weight, bias in zip((query, key, value), weights, biases, strict=True)
        )
        made: Tensor = self.out_proj(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return made


class VisionResampler(nn.Module):
    """A square number of learned queries, which attend once over an image."""

    def __init__(self, queries: int, width: int, heads: int, features: int) -> None:
        super().__init__()
        self.pos_embed = nn.Parameter(sincos_positions(math.isqrt(queries), width), requires_grad=False)
        self.query = nn.Parameter(torch.empty(queries, width))
        self.kv_proj = nn.Identity() if features == width else nn.Linear(features, width, bias=False)
        self.attn = PoolAttention(width, heads)
        self.ln_q = nn.LayerNorm(width, eps=EPSILON)
        self.ln_kv = nn.LayerNorm(width, eps=EPSILON)

    def forward(self, x: Tensor) -> Tensor:
        """``[f, queries, width]`` of ``x [f, patches, features]``."""
        x = self.ln_kv(self.kv_proj(x))
        query = (self.ln_q(self.query) + self.pos_embed).expand(len(x), -1, -1)
        made: Tensor = self.attn(query, x + resized_positions(self.pos_embed, x.shape[1]), x)
        return made


class VisionTransformer(nn.Module):
    """Visual tokens of an image, in the space of the language model.

    Args:
        visual: ``VISUAL`` of the config.
    """

    def __init__(self, visual: Mapping[str, Any]) -> None:
        super().__init__()
        width, out, patch = visual["width"], visual["output_dim"], visual["patch_size"]
        self.conv1 = nn.Conv2d(3, width, kernel_size=patch, stride=patch, bias=False)
        # Of images of 224 pixels in published checkpoints, with which the encoder was trained at first.
        self.positional_embedding = nn.Parameter(torch.empty(visual["n_queries"], width))
        self.ln_pre = nn.LayerNorm(width, eps=EPSILON)
        mlp_width = int(width * visual["mlp_ratio"])
        self.transformer = VisionLayers(visual["layers"], width, visual["heads"], mlp_width)
        self.attn_pool = VisionResampler(visual["n_queries"], out, max(out // 128, 1), width)
        self.ln_post = nn.LayerNorm(out, eps=EPSILON)
        self.proj = nn.Parameter(torch.empty(out, out))

    def forward(self, pixel_values: Tensor) -> Tensor:
        """``[f, queries, output_dim]`` of ``pixel_values [f, 3, H, W]``."""
        patches = self.conv1(pixel_values.to(self.conv1.weight.dtype)).flatten(2).transpose(1, 2)
        x = self.ln_pre(patches + resized_positions(self.positional_embedding, patches.shape[1]))
        made: Tensor = self.ln_post(self.attn_pool(self.transformer(x))) @ self.proj
        return made


def resized_positions(positions: Tensor, tokens: int) -> Tensor:
    """Positions ``[n * n, width]`` of a square image, as those of one with ``tokens`` tokens."""
    size, wanted = math.isqrt(len(positions)), math.isqrt(tokens)
    if size == wanted:
        return positions
    # In float32 at least, as the code that the weights come with.
    grid = positions.to(torch.promote_types(positions.dtype, torch.float32)).T.unflatten(1, (size, size))[None]
    resized = interpolate(grid, size=(wanted, wanted), mode="bicubic", align_corners=False)
    return resized[0].flatten(1).T.to(positions.dtype)


def sincos_positions(side: int, width: int) -> Tensor:
    """Sines and cosines of the places in a square: those of columns in the first half of ``[side * side, width]``, and
    of rows in the second."""
    steps = torch.arange(width // 4, dtype=torch.float64) / (width // 4)
    angles = torch.outer(torch.arange(side, dtype=torch.float64), 10000.0**-steps)
    waves = torch.cat((angles.sin(), angles.cos()), dim=1)
    columns, rows = waves.repeat(side, 1), waves.repeat_interleave(side, dim=0)
    return torch.cat((columns, rows), dim=1).float()
