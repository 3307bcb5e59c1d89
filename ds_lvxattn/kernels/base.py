"""What a local attention kernel is, and what it is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ds_lvxattn.kernels.pattern import UNKNOWN


@dataclass(frozen=True)
class Call:
    """What the choice of a kernel for a call depends on.

    Attributes:
        device: device type.
        dtype: of ``q``, ``k``, ``v``.
        heads, kv_heads, head_dim: query heads, key heads, head size of queries and keys.
        masked: whether rows have key ranges.
        tiles: tiles of 128 query rows, over heads and batch, of a forward pass. None for a backward pass, whose work
            is divided over the keys, of which there are enough.
        rows: query rows of a sequence.
        capped: whether the scores have a soft cap.
        value_dim: head size of the values; None: as that of the keys.
        pattern: of the key ranges; see ``kernels/pattern.py``.
        deterministic: whether ``torch.use_deterministic_algorithms`` asks a backward pass for the same bits every time.
    """

    device: str
    dtype: torch.dtype
    heads: int
    kv_heads: int
    head_dim: int
    masked: bool
    tiles: int | None = None
    rows: int = 4096
    capped: bool = False
    value_dim: int | None = None
    pattern: str = UNKNOWN
    deterministic: bool = False

    @property
    def head_dims(self) -> tuple[int, int]:
        """Head sizes of the keys and of the values."""
        return self.head_dim, self.head_dim if self.value_dim is None else self.value_dim

    @property
    def other_values(self) -> str | None:
        """Why a kernel that takes one head size cannot do it, or None where it can."""
        key, value = self.head_dims
        return None if value == key else f"it takes values of the head size of the keys, not {value} beside {key}"

    @classmethod
    def forward(
        cls, q: Tensor, k: Tensor, v: Tensor, masked: bool, capped: bool = False, pattern: str = UNKNOWN
    ) -> Call:
        shapes = q.shape, k.shape, v.shape
        return cls.of_shapes(q.device.type, q.dtype, *shapes, masked, capped, backward=False, pattern=pattern)

    @classmethod
    def backward(
        cls, q: Tensor, k: Tensor, v: Tensor, masked: bool, capped: bool = False, pattern: str = UNKNOWN
    ) -> Call:
        shapes = q.shape, k.shape, v.shape
        return cls.of_shapes(q.device.type, q.dtype, *shapes, masked, capped, backward=True, pattern=pattern)

    @classmethod
    def of_shapes(
        cls, device: str, dtype: torch.dtype, q: Sequence[int], k: Sequence[int], v: Sequence[int], masked: bool,
        capped: bool, backward: bool, pattern: str = UNKNOWN, deterministic: bool = False,
    ) -> Call:  # fmt: skip
        """A call with tensors of these shapes, dtype and device type."""
        batch, heads, rows, _ = q
        tiles = None if backward else batch * heads * -(-rows // 128)
        return cls(device, dtype, heads, k[1], k[3], masked, tiles, rows, capped, v[3], pattern, deterministic)


class Kernel(Protocol):
    """One implementation of local attention.

    Attributes:
        name: the value of the configuration key ``kernel`` that forces it.
        needs_out: the backward pass takes the output instead of ``delta`` (and then cannot take the gradient
            of the log-sum-exp).
        sums_delta: the backward pass takes the output too, and sums up ``delta`` in a pass over the rows that it makes
            anyway.
        takes_intervals: does masked calls too, as every layer of a training run makes them.
    """

    name: str
    needs_out: bool
    sums_delta: bool
    takes_intervals: bool

    def splits_keys(self, call: Call) -> bool:
        """Whether the forward pass divides the keys over the chip where the tiles of query rows do not fill it."""

    def unsupported(self, call: Call) -> str | None:
        """Why this kernel cannot do ``call``, or None when it can."""

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        start: Tensor | None,
        stop: Tensor | None,
        scale: float,
        softcap: float | None = None,
        pattern: str = UNKNOWN,
    ) -> tuple[Tensor, Tensor]:
        """Attention of ``q [B, H_q, S_q, D]`` over ``k [B, H_kv, S_kv, D]``, ``v [B, H_kv, S_kv, D_v]``, not empty.

        ``start, stop`` are int32 ``[B, S_q]`` local key ranges, or None when every key is visible.
        Their ``pattern`` chooses tiles, and changes no result but its rounding.
        The scores are ``scale * q k``; of one above 0, ``softcap``, they are ``softcap * tanh(scale * q k / softcap)``.
        Returns ``out [B, H_q, S_q, D_v]`` (0 for rows that see nothing) and the natural log-sum-exp
        ``[B, H_q, S_q]`` in float32, float64 for float64 (``-inf`` for such rows).
        """

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor | None,
        lse: Tensor,
        delta: Tensor | None,
        start: Tensor | None,
        stop: Tensor | None,
        scale: float,
        softcap: float | None = None,
        pattern: str = UNKNOWN,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients from the log-sum-exp over *all* keys of the group, local or not.

        ``out`` is given to kernels with ``needs_out``, ``delta [B, H_q, S_q]`` to the others, or ``out`` instead to
        those with ``sums_delta``. Returns ``dq`` (the part that comes from these keys), ``dk`` and ``dv``, in the dtype
        of the inputs or wider.
        """


def lse_dtype(dtype: torch.dtype) -> torch.dtype:
    """dtype of the log-sum-exp of inputs in ``dtype``: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def empty_rows(x: Tensor, size: int, device: torch.device | str | None = None) -> Tensor:
    """``[B, H, S, size]`` in the dtype and, where they are dense, the order of the strides of ``x [B, H, S, D]``; not
    filled."""
    if size == x.shape[3]:
        return torch.empty_like(x, device=device)
    order = sorted(range(3), key=x.stride, reverse=True)
    return torch.empty_permuted((*x.shape[:3], size), (*order, 3), dtype=x.dtype, device=device or x.device)


def empty_results(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """``out`` as ``empty_rows`` of ``q`` in the head size of ``v``, and its log-sum-exp; not filled."""
    return empty_rows(q, v.shape[3]), q.new_empty(q.shape[:3], dtype=lse_dtype(q.dtype))
