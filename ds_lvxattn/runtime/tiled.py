"""Feed-forward parts and logits, a tile of rows at a time: what they make of a long text is larger than all that its
layers keep.

A module with all of its tiles is one autograd function: its backward pass computes a tile again, and gives every
parameter one gradient, summed over the tiles in float32. So ZeRO sees one call of the module and one gradient of each
parameter, whatever the number of tiles, and ranks whose rows differ in number, or that have none, run the same
collectives. (DeepSpeed's ``TiledMLP`` and ``TiledFusedLogitsLoss`` give a gradient a tile, and mark the last one; where
a rank has fewer rows than tiles the mark never comes, and under ZeRO-3 it gathers less often than the others.)
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import cross_entropy, pad
from transformers import PreTrainedModel

from ds_lvxattn.data.sample import IGNORE
from ds_lvxattn.errors import ConfigError
from ds_lvxattn.kernels.torch_internals import never_compiled
from ds_lvxattn.plan.tiling import FEED_FORWARD_VALUES, LOGITS_VALUES, Tiles, rows_of_tile
from ds_lvxattn.runtime.copies import refuse_copies
from ds_lvxattn.runtime.dropout import drop_rate
from ds_lvxattn.runtime.zero3 import at_hand, gather_for

# What models call the feed-forward part of a layer, and what one is that sends its rows to experts: which of them is
# asked for depends on the rows, and some balance over all rows.
FEED_FORWARD = ("mlp", "ffn", "feed_forward")
EXPERTS = re.compile("moe|expert|router|sparse", re.IGNORECASE)
# Settings of a model by which its logits are changed between its output layer and its loss.
CHANGES_LOGITS = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier")


@dataclass(frozen=True)
class _Call:
    """A call of ``run(x, *others)`` by tiles.

    Attributes:
        module: holds the parameters.
        run: of tiles ``[1, t, ...]`` gives ``[1, t, d]``; row by row.
        tile: rows of a tile.
        others: ``[n, ...]`` each, rows that need no gradient.
    """

    module: nn.Module
    run: Callable[..., Tensor]
    tile: int
    others: tuple[Tensor, ...]

    def of(self, x: Tensor, first: int) -> Tensor:
        """The tile whose first row is ``first``: ``x [t, d]`` are its rows."""
        others = (other[first : first + len(x)][None] for other in self.others)
        return self.run(x[None], *others)[0]


def in_tiles(module: nn.Module, run: Callable[..., Tensor], tile: int, x: Tensor, *others: Tensor) -> Tensor:
    """``run(x, *others)``, at most ``tile`` rows at a time, and again so in the backward pass.

    Args:
        module: holds the parameters that ``run`` uses, whole while it runs (``gather_for``).
        run: row by row, of ``[1, t, ...]`` gives ``[1, t, d]``.
        x, others: ``[B, s, ...]``.

    Returns:
        ``[B, s, d]``.
    """
    batch = x.shape[:2]
    rows, *beside = (each.flatten(0, 1) for each in (x, *others))
    call = _Call(module, run, tile, tuple(beside))
    with at_hand(module):
        out = _Tiled.apply(call, rows, *(p for p in module.parameters() if p.requires_grad))
    return out.unflatten(0, batch)


class _Tiled(torch.autograd.Function):
    """See ``in_tiles``; parameters are arguments, so that their gradients go where they would go without tiles.

    And come in one order, by which ZeRO puts them together. So a single tile is computed again too: ranks must not
    differ in that.
    """

    @staticmethod
    def forward(ctx: Any, call: _Call, x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.call, ctx.parameters, ctx.random = call, parameters, _random_state(call.module, x.device)
        ctx.save_for_backward(x)
        out = None
        for first, tile in _tiles(x, call.tile):
            part = call.of(tile, first)
            if out is None:
                out = part.new_empty(len(x), *part.shape[1:])
            out[first : first + len(tile)] = part
        assert out is not None
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        call, parameters, wants_x = ctx.call, ctx.parameters, ctx.needs_input_grad[1]
        (x,) = ctx.saved_tensors
        grad_x = torch.empty_like(x) if wants_x else None
        sums: list[Tensor | None] = [None] * len(parameters)
        with at_hand(call.module), _drawn_again(ctx.random, x.device):
            for first, tile in _tiles(x, call.tile):
                rows = slice(first, first + len(tile))
                with torch.enable_grad():
                    tile = tile.detach().requires_grad_(wants_x)
                    out = call.of(tile, first)
                wanted = [tile, *parameters] if wants_x else list(parameters)
                grads = list(torch.autograd.grad(out, wanted, grad[rows], allow_unused=True))
                if grad_x is not None:
                    grad_x[rows] = grads.pop(0)
                for i, part in enumerate(grads):
                    sums[i] = _sum(sums[i], part)
        of_parameters = (None if s is None else s.to(p.dtype) for s, p in zip(sums, parameters, strict=True))
        return None, grad_x, *of_parameters


def _tiles(x: Tensor, tile: int) -> Iterator[tuple[int, Tensor]]:
    for first in range(0, max(len(x), 1), tile):  # a rank without rows has an empty tile
        yield first, x[first : first + tile]


def _sum(total: Tensor | None, part: Tensor | None) -> Tensor | None:
    """In float32, as the matrix product of all rows adds them up."""
    if part is None:
        return total
    if total is None:
        return part.to(torch.promote_types(part.dtype, torch.float32))
    return total.add_(part)


def _random_state(module: nn.Module, device: torch.device) -> tuple[Tensor, Tensor | None] | None:
    """State of the generators, where ``module`` draws from them."""
    if not any(m.training and drop_rate(m) > 0 for m in module.modules()):
        return None
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


@contextlib.contextmanager
def _drawn_again(state: tuple[Tensor, Tensor | None] | None, device: torch.device) -> Iterator[None]:
    if state is None:
        yield
        return
    host, of_device = state
    with torch.random.fork_rng([] if of_device is None else [device]):
        torch.set_rng_state(host)
        if of_device is not None:
            torch.cuda.set_rng_state(of_device, device)
        yield


def tile_feed_forward(layers: Iterable[nn.Module], tiles: Tiles) -> None:
    """Let the feed-forward part of each layer run by tiles.

    Raises:
        ConfigError: a layer has none by itself, or one of experts.
    """
    for layer in layers:
        part = next((getattr(layer, name) for name in FEED_FORWARD if hasattr(layer, name)), None)
        if not isinstance(part, nn.Module):
            raise ConfigError(
                f"'sequence_parallel.tiled_mlp' is {tiles!r}, and a {type(layer).__name__} has no feed-forward module "
                f"of its own (one of {', '.join(FEED_FORWARD)}); leave it out"
            )
        if found := next((type(m).__name__ for m in part.modules() if EXPERTS.search(type(m).__name__)), None):
            raise ConfigError(
                f"'sequence_parallel.tiled_mlp' is {tiles!r}, and the feed-forward part of a {type(layer).__name__} "
                f"sends its rows to experts ({found}), which tiles would not see whole; leave it out"
            )
        part.register_forward_pre_hook(gather_for)
        vars(part)["forward"] = _in_tiles(part, tiles)
        refuse_copies([part])


def _in_tiles(part: nn.Module, tiles: Tiles) -> Callable[[Tensor], Tensor]:
    plain = part.forward
    width = max(getattr(module, "out_features", 1) for module in part.modules())

    @never_compiled  # an autograd function that calls autograd
    @functools.wraps(plain)
    def forward(x: Tensor) -> Tensor:
        rows = x.shape[0] * x.shape[1]
        return in_tiles(part, plain, rows_of_tile(rows, width, tiles, FEED_FORWARD_VALUES), x)

    return forward


class TiledLogits:
    """A model that computes its loss a tile of rows at a time, and gives no logits beside it.

    Its output layer, told the labels, returns the loss of each row in the place of its logits, and the model's
    ``loss_function`` adds them up: in float32, as transformers computes it. Without labels nothing changes. While no
    gradient is wanted, the output has ``first_choices``, int64 ``[B, s]``: the token with the largest logit.

    Args:
        model: computes its loss by ``loss_function`` from what its output layer gives.

    Raises:
        ConfigError: it does not.
    """

    def __init__(self, model: PreTrainedModel, tiles: Tiles) -> None:
        self._tiles, self._whole = tiles, False
        self._name = f"'sequence_parallel.tiled_logits' is {tiles!r}, and {type(model).__name__}"
        head: nn.Module | None = model.get_output_embeddings()
        if head is None:
            raise ConfigError(f"{self._name} does not say which its output layer is; leave it out")
        text = model.config.get_text_config()
        for key in CHANGES_LOGITS:
            if getattr(text, key, None) not in (None, 1, 1.0):
                raise ConfigError(f"{self._name} changes its logits ahead of the loss ({key}); leave it out")
        self._head, self._plain, self._usual = head, head.forward, model.loss_function
        self._vocabulary = max(getattr(head, "out_features", 0), text.vocab_size)
        self._targets: Tensor | None = None
        self._losses: Tensor | None = None
        self._choices: Tensor | None = None
        self._added = False
        head.register_forward_pre_hook(gather_for)
        vars(head)["forward"] = self._row_losses
        refuse_copies([head])
        model.loss_function = self._loss
        model.register_forward_pre_hook(self._begin, with_kwargs=True)
        model.register_forward_hook(self._end)

    @contextlib.contextmanager
    def whole_logits(self) -> Iterator[None]:
        """The model gives its logits as without tiles."""
        self._whole = True
        try:
            yield
        finally:
            self._whole = False

    def _begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before the model: keep the labels that its rows predict."""
        self._losses = self._choices = None
        self._added = False
        if model.get_output_embeddings() is not self._head:  # type: ignore[operator]
            raise ConfigError(f"{self._name} had its output layer replaced after that was set; replace it ahead of it")
        self._targets = None if self._whole else kwargs.get("shift_labels")
        if self._targets is None and not self._whole and kwargs.get("labels") is not None:
            self._targets = pad(kwargs["labels"], (0, 1), value=IGNORE)[..., 1:]

    def _row_losses(self, hidden: Tensor) -> Tensor:
        """In the place of the output layer: ``[B, s, 1]``, the loss of each row."""
        if self._targets is None:
            with at_hand(self._head):
                return self._plain(hidden)
        if hidden.shape[:-1] != self._targets.shape:
            raise ValueError(
                f"labels of shape {list(self._targets.shape)} for {list(hidden.shape[:-1])} rows of the output layer"
            )
        tile = rows_of_tile(self._targets.numel(), self._vocabulary, self._tiles, LOGITS_VALUES)
        # Tokens as float32 beside the losses: all are below 2 ** 24.
        run = self._losses_of if torch.is_grad_enabled() else self._losses_and_choices_of
        found = in_tiles(self._head, run, tile, hidden, self._targets)
        self._losses = found[..., :1]
        if found.shape[-1] > 1:
            self._choices = found[..., 1].long()
        return self._losses

    def _losses_of(self, hidden: Tensor, targets: Tensor) -> Tensor:
        return self._cross_entropy(self._plain(hidden), targets)

    def _losses_and_choices_of(self, hidden: Tensor, targets: Tensor) -> Tensor:
        logits = self._plain(hidden)
        return torch.cat([self._cross_entropy(logits, targets), logits.argmax(-1, keepdim=True).float()], -1)

    def _cross_entropy(self, logits: Tensor, targets: Tensor) -> Tensor:
        rows = logits.float().flatten(0, 1)
        losses = cross_entropy(rows, targets.flatten(), ignore_index=IGNORE, reduction="none")
        return losses.view(*targets.shape, 1)

    def _loss(self, *args: Any, **kwargs: Any) -> Tensor:
        """In the place of ``loss_function``."""
        if self._losses is None or self._targets is None:
            return self._usual(*args, **kwargs)
        given = kwargs["logits"] if "logits" in kwargs else args[0]
        if given.shape != self._losses.shape or given.data_ptr() != self._losses.data_ptr():
            raise ConfigError(f"{self._name} changes its logits ahead of the loss; leave it out")
        self._added = True
        items = kwargs.get("num_items_in_batch")
        if items is None:
            return given.sum() / (self._targets != IGNORE).sum()
        return given.sum() / (items.to(given.device) if isinstance(items, Tensor) else items)

    def _end(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """After the model: no logits, and what is kept no longer."""
        if self._targets is None:
            return None
        choices, added, self._targets, self._losses, self._choices = self._choices, self._added, None, None, None
        if not added:
            raise ConfigError(f"{self._name} does not compute its loss by its loss_function; leave it out")
        if not isinstance(output, dict):
            raise ConfigError(f"{self._name} was called with return_dict=False, and gives no logits; leave that out")
        kept = type(output)(**{key: value for key, value in output.items() if key != "logits"})
        if choices is not None:
            vars(kept)["first_choices"] = choices
        return kept


def first_choices(output: Any) -> Tensor:
    """int64 ``[B, s]``, the token that each row of a model's output finds likeliest."""
    found = getattr(output, "first_choices", None)
    return output.logits.argmax(dim=-1) if found is None else found
