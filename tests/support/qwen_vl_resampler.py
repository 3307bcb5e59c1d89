"""An adapter that computes what Qwen-VL's ``Resampler`` does, whose code comes with its checkpoint."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def get_abs_pos(abs_pos: Tensor, tokens: int) -> Tensor:
    """Positions ``[n * n, d]`` of a square image, resized for one of ``tokens`` tokens."""
    size, target = round(abs_pos.shape[0] ** 0.5), round(tokens**0.5)
    if size == target:
        return abs_pos
    grid = abs_pos.float().T.unflatten(1, (size, size))[None]
    resized = nn.functional.interpolate(grid, size=(target, target), mode="bicubic", align_corners=False)
    return resized[0].flatten(1).T.to(abs_pos.dtype)


class Resampler(nn.Module):
    """``grid_size ** 2`` learned queries attend once over an image's features ``[B, tokens, kv_dim]``."""

    def __init__(self, grid_size: int, embed_dim: int, num_heads: int, kv_dim: int) -> None:
        super().__init__()
        self.num_queries = grid_size**2
        self.pos_embed = nn.Parameter(torch.randn(self.num_queries, embed_dim), requires_grad=False)
        self.query = nn.Parameter(torch.randn(self.num_queries, embed_dim))
        self.kv_proj = nn.Linear(kv_dim, embed_dim, bias=False)
        self.attn = nn.MultiheadAttention(embed_dim, num_heads)
        self.ln_q = nn.LayerNorm(embed_dim)
        self.ln_kv = nn.LayerNorm(embed_dim)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        positions = get_abs_pos(self.pos_embed, x.shape[1])[:, None]
        values = self.ln_kv(self.kv_proj(x)).transpose(0, 1)
        queries = (self.ln_q(self.query) + self.pos_embed)[:, None].repeat(1, x.shape[0], 1)
        return self.attn(queries, values + positions, values, attn_mask=attn_mask)[0].transpose(0, 1)
