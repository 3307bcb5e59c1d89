"""Attention to the keys at hand by the kernel that a call asks for: what operators are given in either pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ds_lvxattn.kernels.base import Call, Kernel, empty_results
from ds_lvxattn.kernels.derived import derived_of
from ds_lvxattn.kernels.dispatch import fastest_first, select_kernel
from ds_lvxattn.kernels.pattern import UNKNOWN
from ds_lvxattn.kernels.settled import settled
from ds_lvxattn.kernels.triton.delta import attention_delta
from ds_lvxattn.kernels.triton.merge import merge_partials
from ds_lvxattn.kernels.triton.surrogate import output_with_delta


@dataclass(slots=True)
class LocalAttention:
    """Attention of some rows over the keys at hand.

    Attributes:
        start, stop: int32, the key ranges that the operator was called with; None when every key is visible.
        scale: factor of the scores.
        softcap: soft cap of the scores; None: none.
        kernel: ``auto``, a kernel's name, or ``FORWARD/BACKWARD``; see ``dispatch.select_kernel``.
        pattern: of the ranges; see ``kernels/pattern.py``.
    """

    start: Tensor | None
    stop: Tensor | None
    scale: float
    softcap: float | None
    kernel: str
    pattern: str = UNKNOWN

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *ranges: Tensor | None) -> tuple[Tensor, Tensor]:
        """Output and log-sum-exp of ``q`` over the keys at hand, which may be none; see ``Kernel.forward``.

        Args:
            ranges: ``start, stop`` of these rows and keys where they are not those of the call: ``[B, S_q]``, or
                ``[B, S_q, ranges]``, each of which is attended to by itself before the results are merged.
        """
        start, stop = ranges or (self.start, self.stop)
        if q.numel() == 0 or k.shape[2] == 0:
            out, lse = empty_results(q, v)
            return out.zero_(), lse.fill_(float("-inf"))
        chosen = _forward_kernel(
            self.kernel, q.device, q.dtype, q.shape, k.shape, v.shape, None if start is None else self.pattern,
            self.softcap is not None,
        )  # fmt: skip
        how = self.scale, self.softcap, self.pattern
        if start is None or stop is None or start.dim() == 2:
            return chosen.forward(q, k, v, start, stop, *how)
        results = (chosen.forward(q, k, v, first, last, *how) for first, last in _each_range(start, stop))
        outs, lses = zip(*results, strict=True)
        return merge_partials(torch.stack(outs), torch.stack(lses))


class BackwardPass:
    """Gradients of an operator's results, what its forward pass left, and attention's gradients over keys at hand.

    The kernel is the one that the call asks for, unless it cannot take the gradient of the log-sum-exp.

    Attributes:
        dout: ``[B, H_q, s_q, D_v]``, gradient of the output.
        dlse: ``[B, H_q, s_q]``, gradient of the log-sum-exp; None where nobody uses it.
        q, k, v: inputs of the forward pass; where ``kept`` holds the queries, ``q`` is ``out``.
        kept: third result of the forward pass; None of operators that have none.
        out, lse: the other results. ``lse`` is over the keys of the whole group; gradients are summed in its dtype.
        start, stop: as in ``LocalAttention``.
    """

    def __init__(
        self, dout: Tensor, dlse: Tensor | None, q: Tensor, kept: Any, k: Tensor, v: Tensor, out: Tensor,
        lse: Tensor, local: LocalAttention,
    ) -> None:  # fmt: skip
        self.dout, self.dlse, self.out, self.lse = dout, dlse, out, lse
        self.q, self.kept, self.k, self.v = q, kept, k, v
        self.start, self.stop, self.scale, self.softcap = local.start, local.stop, local.scale, local.softcap
        self.pattern = local.pattern
        self.kernel = _backward_kernel(
            local.kernel, q.device, q.dtype, q.shape, k.shape, v.shape,
            None if local.start is None else local.pattern, local.softcap is not None, dlse is not None,
            torch.are_deterministic_algorithms_enabled(),
        )  # fmt: skip
        self._own: tuple[Any, ...] = ()

    def delta(self) -> Tensor:
        """``[B, H_q, s_q]``, the row term of the own rows, which travels with them instead of ``out``."""
        return attention_delta(self.dout, self.out, self.dlse)

    def of_own_rows(
        self, k: Tensor, v: Tensor, *ranges: Tensor | None, heads: slice | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients ``(dq, dk, dv)`` of the own rows over the keys ``k, v``, in the dtype of the inputs or wider.

        Args:
            ranges: ``start, stop`` over these keys where they are not those of the call.
            heads: query heads, those of the key heads in ``k``; None: all.
        """
        if not self._own:
            row_terms = (self.out, self.lse, None) if self.kernel.needs_out else (None, self.lse, self.delta())
            self._own = self.dout, self.q, *row_terms
        own: Any = self._own if heads is None else [None if x is None else x[:, heads] for x in self._own]
        dout, q, out, lse, delta = own
        return self._gradients(dout, q, k, v, out, lse, delta, *(ranges or (self.start, self.stop)))

    def local(self) -> tuple[Tensor, Tensor, Tensor]:
        """The same over the call's own keys, which are all that there are."""
        if self.kernel.sums_delta and self.dlse is None:
            return self._gradients(
                self.dout, self.q, self.k, self.v, self.out, self.lse, None, self.start, self.stop
            )  # fmt: skip
        return self.of_own_rows(self.k, self.v)

    def of_rows(
        self, dout: Tensor, q: Tensor, lse: Tensor, delta: Tensor, k: Tensor, v: Tensor, *ranges: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The same of rows that came from other ranks with their ``lse`` and ``delta``."""
        return self._gradients(dout, q, k, v, None, lse, delta, *(ranges or (self.start, self.stop)))

    def _gradients(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor | None, lse: Tensor, delta: Tensor | None,
        start: Tensor | None, stop: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        if q.numel() == 0 or k.shape[2] == 0:
            return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        if self.kernel.needs_out and out is None:
            assert delta is not None
            out = output_with_delta(dout, delta)

        def over(start: Tensor | None, stop: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
            return self.kernel.backward(
                dout, q, k, v, out, lse, delta, start, stop, self.scale, self.softcap, self.pattern
            )  # fmt: skip

        if start is None or stop is None or start.dim() == 2:
            return over(start, stop)
        # The log-sum-exp is that over all ranges, so the gradients of the ranges add up.
        first, *others = _each_range(start, stop)
        dq, dk, dv = (x.to(lse.dtype) for x in over(*first))
        for each in others:
            dq, dk, dv = (whole.add_(part) for whole, part in zip((dq, dk, dv), over(*each), strict=True))
        return dq, dk, dv


def _each_range(start: Tensor, stop: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Of ``[B, S_q, ranges]`` each range ``[B, S_q]``, cut out once for the layers of a batch."""

    def cut() -> list[tuple[Tensor, Tensor]]:
        return [(start[..., i].clone(), stop[..., i].clone()) for i in range(start.shape[-1])]

    return derived_of(start, stop, "each range", cut)


@settled
def _forward_kernel(
    name: str, device: torch.device, dtype: torch.dtype, q: torch.Size, k: torch.Size, v: torch.Size,
    pattern: str | None, capped: bool,
) -> Kernel:  # fmt: skip
    """The kernel of the forward pass for tensors of these shapes; ``pattern`` is None where all is visible."""
    return select_kernel(name, _call(device, dtype, q, k, v, pattern, capped, backward=False))


@settled
def _backward_kernel(
    name: str, device: torch.device, dtype: torch.dtype, q: torch.Size, k: torch.Size, v: torch.Size,
    pattern: str | None, capped: bool, with_dlse: bool, deterministic: bool,
) -> Kernel:  # fmt: skip
    """The kernel of the backward pass: the chosen one, unless it cannot take the log-sum-exp's gradient."""
    call = _call(device, dtype, q, k, v, pattern, capped, backward=True, deterministic=deterministic)
    kernel = select_kernel(name, call)
    if not (kernel.needs_out and with_dlse):
        return kernel
    return next(other for other in fastest_first(call) if not other.needs_out and other.unsupported(call) is None)


def _call(
    device: torch.device, dtype: torch.dtype, q: torch.Size, k: torch.Size, v: torch.Size, pattern: str | None,
    capped: bool, backward: bool, deterministic: bool = False,
) -> Call:  # fmt: skip
    masked = pattern is not None
    return Call.of_shapes(device.type, dtype, q, k, v, masked, capped, backward, pattern or UNKNOWN, deterministic)
