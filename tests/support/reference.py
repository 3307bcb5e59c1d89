"""Dense attention on one device: what every sequence-parallel result is compared with."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


@dataclass
class Result:
    """Outputs of an attention and the gradients of a loss; whole sequences, in the global order."""

    out: Tensor
    lse: Tensor
    dq: Tensor
    dk: Tensor
    dv: Tensor

    def items(self) -> list[tuple[str, Tensor]]:
        return [(field.name, getattr(self, field.name)) for field in fields(self)]


def visible(start: Tensor | None, stop: Tensor | None, keys: int) -> Tensor | None:
    """Dense mask ``[B, 1, S_q, S_kv]``, True where a row sees a key; None when every key is visible.

    ``start, stop``: ``[B, S_q]``, or ``[B, S_q, ranges]`` where a row sees several ranges.
    """
    if start is None or stop is None:
        return None
    if start.dim() == 3:
        masks = [visible(*bounds, keys) for bounds in zip(start.unbind(-1), stop.unbind(-1), strict=True)]
        return torch.stack([mask for mask in masks if mask is not None]).any(dim=0)
    position = torch.arange(keys, device=start.device)
    return ((position >= start[..., None]) & (position < stop[..., None]))[:, None]


def scores_of(q: Tensor, k: Tensor, scale: float, softcap: float | None) -> Tensor:
    """``[B, H_q, S_q, S_kv]``, before any mask; ``k`` has as many heads as ``q``."""
    scores = q @ k.transpose(-1, -2) * scale
    return scores if softcap is None else softcap * torch.tanh(scores / softcap)


def dense_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """Attention by its definition, in the dtype of the inputs; rows that see nothing give 0 and ``-inf``."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = scores_of(q, k, scale, softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    lse = scores.logsumexp(dim=-1)
    probs = torch.exp(scores - lse.masked_fill(lse == float("-inf"), 0.0)[..., None])
    return probs @ v, lse


def loss_of(out: Tensor, lse: Tensor, dout: Tensor | None, dlse: Tensor | None) -> Tensor:
    """A loss with these gradients; the log-sum-exp of rows that see nothing is left out."""
    terms = []
    if dout is not None:
        terms.append((out.double() * dout).sum())
    if dlse is not None:
        terms.append((lse.masked_fill(lse == float("-inf"), 0.0).double() * dlse).sum())
    return torch.stack(terms).sum()


def exact(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float,
    dout: Tensor | None,
    dlse: Tensor | None,
    softcap: float | None = None,
) -> Result:
    """Outputs and gradients in float64, of the inputs as they were rounded to their dtype."""
    q, k, v = (x.detach().double().requires_grad_() for x in (q, k, v))
    out, lse = dense_attention(q, k, v, mask, scale, softcap)
    grads = torch.autograd.grad(loss_of(out, lse, dout, dlse), (q, k, v), materialize_grads=True)
    return Result(out.detach(), lse.detach(), *grads)


def one_device(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float,
    dout: Tensor | None,
    dlse: Tensor | None,
    softcap: float | None = None,
) -> Result:
    """Outputs and gradients by PyTorch's own attention with a dense mask, in the dtype of the inputs.

    With a soft cap, which it does not have, by the definition.

    PyTorch's attention has no log-sum-exp: it is that of the scores, in float32 or wider. Rows that see
    nothing see everything here and have no gradient; SDPA's NaN for them would hide the error of the others.
    """
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    wide = torch.promote_types(q.dtype, torch.float32)
    blind = None
    if mask is not None:
        blind = ~mask.any(dim=-1)
        mask = mask | blind[..., None]
        dout = None if dout is None else dout.masked_fill(blind[..., None], 0.0)
        dlse = None if dlse is None else dlse.masked_fill(blind, 0.0)
    keys, values = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    if softcap is None:
        out = scaled_dot_product_attention(q, keys, values, attn_mask=mask, scale=scale)
    else:
        out, _ = dense_attention(q, k, v, mask, scale, softcap)
    scores = scores_of(q.to(wide), keys.to(wide), scale, softcap)
    lse = (scores if mask is None else scores.masked_fill(~mask, float("-inf"))).logsumexp(dim=-1)
    grads = torch.autograd.grad(loss_of(out, lse, dout, dlse), (q, k, v), materialize_grads=True)
    out, lse = out.detach(), lse.detach()
    if blind is not None:
        out, lse = out.masked_fill(blind[..., None], 0.0), lse.masked_fill(blind, float("-inf"))
    return Result(out, lse, *grads)


def magnitudes(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float,
    dout: Tensor | None,
    dlse: Tensor | None,
    softcap: float | None = None,
) -> Result:
    """The same sums with the absolute value of every term: what rounding errors are relative to.

    Terms cancel: a row that sees one key has ``dq = 0``, computed as the difference of two rounded products.
    """
    q, k, v = (x.detach().double() for x in (q, k, v))
    out, lse = dense_attention(q, k, v, mask, scale, softcap)
    group = q.shape[1] // k.shape[1]
    keys, values = (x.repeat_interleave(group, dim=1) for x in (k, v))
    products = scale * q.abs() @ keys.abs().transpose(-1, -2)
    scores = scores_of(q, keys, scale, softcap)
    probs = torch.exp(scores - lse.masked_fill(lse == float("-inf"), float("inf"))[..., None])
    if mask is not None:
        probs, products = probs * mask, products * mask
    dout = torch.zeros_like(out) if dout is None else dout.abs()
    delta = (dout * out.abs()).sum(dim=-1) + (0.0 if dlse is None else dlse.abs())
    dscores = scale * probs * (dout @ values.abs().transpose(-1, -2) + delta[..., None])

    def sum_groups(x: Tensor) -> Tensor:
        return x.unflatten(1, (-1, group)).sum(dim=2)

    return Result(
        out=probs @ values.abs(),
        lse=products.sum(dim=-1) if products.shape[-1] == 0 else products.amax(dim=-1),
        dq=dscores @ keys.abs(),
        dk=sum_groups(dscores.transpose(-1, -2) @ q.abs()),
        dv=sum_groups(probs.transpose(-1, -2) @ dout),
    )
