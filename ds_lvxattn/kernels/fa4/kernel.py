"""FlashAttention-4 as a ``Kernel``: the fastest on Hopper and Blackwell where rows see many keys."""

from __future__ import annotations

import functools
import importlib.util

import torch
from torch import Tensor

from ds_lvxattn.kernels.base import Call
from ds_lvxattn.kernels.pattern import GROWING, UNKNOWN

# From here on the work on a row outweighs moving it to another place, and back.
MANY_KEYS = 1 << 16


@torch.compiler.assume_constant_result  # torch.compile does not trace what looks for modules, nor looks at caches
def installed() -> bool:
    """Whether the extra ``fa4`` is installed."""
    return _installed()


@functools.cache
def _installed() -> bool:
    try:
        return all(importlib.util.find_spec(name) is not None for name in ("cutlass", "flash_attn.cute"))
    except ModuleNotFoundError:  # no ``flash_attn`` at all
        return False


class FlashAttention4Kernel:
    """FlashAttention-4 with intervals, bf16 and fp16, head sizes to 128; its backward pass takes ``delta``."""

    name = "fa4"
    needs_out = False
    sums_delta = False
    takes_intervals = True

    def splits_keys(self, call: Call) -> bool:
        return not call.masked

    def unsupported(self, call: Call) -> str | None:
        if call.device != "cuda":
            return f"it does not run on {call.device}"
        if not installed():
            return "flash-attn-4 is not installed (pip install 'ds-lvxattn[fa4]')"
        if call.other_values is not None:
            return call.other_values
        if call.dtype not in (torch.bfloat16, torch.float16):
            return f"it takes bfloat16 or float16, not {call.dtype}"
        if call.head_dim % 8 or not 16 <= call.head_dim <= 128:
            return f"it takes head sizes in multiples of 8, 16 to 128, not {call.head_dim}"
        major, minor = torch.cuda.get_device_capability()
        if major not in (9, 10, 11):
            return f"it has no kernels for compute capability {major}.{minor}, but for 9 to 11"
        if call.deterministic and call.masked and call.tiles is None and major == 9:
            return "on Hopper its backward pass with key ranges is not deterministic, as torch is told to be"
        return None

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
        from ds_lvxattn.kernels.fa4.attention import fa4_forward
        from ds_lvxattn.kernels.fa4.packed import last_rows_first

        if start is not None and stop is not None and pattern == GROWING and k.shape[2] >= MANY_KEYS:
            return last_rows_first(fa4_forward, q, k, v, start, stop, scale, softcap)
        return fa4_forward(q, k, v, start, stop, scale, softcap)

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
        from ds_lvxattn.kernels.fa4.attention import fa4_backward
        from ds_lvxattn.kernels.fa4.packed import packed_backward

        assert delta is not None
        given = (dout, q, k, v, lse, delta, start, stop, scale, softcap)
        return fa4_backward(*given) if q.shape[1] == k.shape[1] else packed_backward(fa4_backward, *given)
