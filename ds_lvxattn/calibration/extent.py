"""How much calibration measures."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import NamedTuple


class HeadLayout(NamedTuple):
    """Heads of an attention layer."""

    heads: int
    kv_heads: int
    head_dim: int


@dataclass(frozen=True)
class Extent:
    """How much is measured.

    Attributes:
        rows, keys: of the kernel calls, every pair of them.
        operations: forward operations above which a kernel call is left out.
        messages: bytes of the collectives.
        repeats: measurements of which the median counts.
        products: rows, inputs and outputs of matrix products.
    """

    rows: tuple[int, ...]
    keys: tuple[int, ...]
    operations: float
    messages: tuple[int, ...]
    repeats: int
    products: tuple[tuple[int, int, int], ...] = ()


# Of a text layer, with few and with many rows, and of a vision encoder.
_TEXT = itertools.product((128, 512, 2048, 8192), ((4096, 4096), (4096, 14336), (14336, 4096)))
_VISION = itertools.product((2048, 8192, 32768), ((1280, 1280), (1280, 5120), (5120, 1280)))
PRODUCTS = tuple((rows, inputs, outputs) for rows, (inputs, outputs) in (*_TEXT, *_VISION))
GPU = Extent(
    (128, 512, 2048, 8192), (4096, 32768, 131072), 1.2e13, (1 << 12, 1 << 17, 1 << 20, 1 << 23, 1 << 26, 1 << 28), 5,
    PRODUCTS,
)  # fmt: skip
CPU = Extent((16, 128), (128, 1024), 4e8, (1 << 10, 1 << 16, 1 << 20, 1 << 22), 3, ((16, 256, 256), (128, 256, 1024)))

# The last is that of a vision encoder.
DEFAULT_LAYOUTS = (HeadLayout(32, 8, 128), HeadLayout(8, 8, 64), HeadLayout(16, 16, 80))
