"""``merge_attention``: partial attentions over disjoint keys, merged exactly and differentiably."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ds_lvxattn.kernels.triton.merge import merge_partials


def merge_attention(partials: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Merge partial attentions of the same rows over disjoint keys into the attention over all of them.

    Args:
        partials: ``(out [B, H, S, D], lse [B, H, S])`` of each source, as ``sp_attention`` returns them.

    Returns:
        ``(out, lse)`` of the whole, differentiable in every partial output and log-sum-exp.

    Raises:
        ValueError: there is no partial, or their shapes differ.
    """
    if not partials:
        raise ValueError("merge_attention needs at least one (out, lse) pair")
    shapes = {(tuple(out.shape), tuple(lse.shape)) for out, lse in partials}
    if len(shapes) > 1:
        raise ValueError(f"merge_attention needs partials of one shape, not {sorted(shapes)}")
    outs, lses = zip(*partials, strict=True)
    return _merge(torch.stack(outs), torch.stack(lses))


@torch.library.custom_op("ds_lvxattn::merge_attention", mutates_args=())
def _merge(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    out, lse = merge_partials(outs, lses)
    return out.contiguous(), lse.contiguous()


@_merge.register_fake
def _(outs, lses):
    return outs.new_empty(outs.shape[1:]), lses.new_empty(lses.shape[1:])


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs, *output)
    ctx.set_materialize_grads(False)


def _backward(ctx, dout, dlse):
    """``dO_i = w_i dO`` and ``dl_i = w_i (dO . (o_i - O) + dL)`` with ``w_i = exp(l_i - L)``."""
    outs, lses, out, lse = ctx.saved_tensors
    weights = torch.exp(lses - lse.masked_fill(lse == float("-inf"), 0.0))
    if dout is None:
        return torch.zeros_like(outs), torch.zeros_like(lses) if dlse is None else weights * dlse
    wide = dout.to(lse.dtype)
    douts = (weights.unsqueeze(-1) * wide).to(outs.dtype)
    row_terms = ((outs.to(lse.dtype) - out.to(lse.dtype)) * wide).sum(dim=-1)
    return douts, weights * (row_terms if dlse is None else row_terms + dlse)


_merge.register_autograd(_backward, setup_context=_save)
