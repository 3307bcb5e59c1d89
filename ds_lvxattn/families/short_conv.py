"""Short convolutions along the text (``ShortConv`` of LFM2 and its kin) on divided text.

The module projects each token by itself to three vectors, the product of two of which a causal convolution takes,
channel by channel; its result, times the third, is projected again. So a rank convolves all tokens in a share of the
channels, exchanged as heads of one number each (``exchange/sequence_mixing.py``).
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from ds_lvxattn.exchange.sequence_mixing import heads_of_all_ranks, last_tokens, mixed_by_heads, of_documents
from ds_lvxattn.exchange.shards import runs, split_evenly
from ds_lvxattn.families.handed_on import names, takes_others
from ds_lvxattn.kernels.torch_internals import never_compiled
from ds_lvxattn.plan.layer_plan import AttentionLayer
from ds_lvxattn.runtime.batch import SequenceParallelBatch

KNOWN = ("Lfm2ShortConv", "Lfm2MoeShortConv", "Lfm3ShortConv")
CONVOLUTION = "causal_conv1d_fn"  # the function that their forward calls, by name
PARTS = ("in_proj", "conv", "conv_kernel_size", "out_proj", "layer_idx", "layer_type")


def short_convolutions(model: nn.Module) -> dict[nn.Module, AttentionLayer]:
    """The modules of ``model`` that ``divide_short_convolutions`` takes, with their channels as heads."""
    found: dict[nn.Module, AttentionLayer] = {}
    module: Any
    for name, module in model.named_modules():
        if _functions_of(module) is not None:
            channels = module.conv.out_channels
            found[module] = AttentionLayer(name, "self", channels, channels, 1)
    return found


def divide_short_convolutions(model: nn.Module) -> None:
    """Let the modules ``short_convolutions(model)`` take divided text."""
    for module in model.modules():
        functions = _functions_of(module)
        if functions is not None:
            own = module.forward
            divided = functools.wraps(own)(functools.partial(_forward, module, functions, own))
            setattr(module, "forward", divided)  # noqa: B010


def _functions_of(module: nn.Module) -> Mapping[str, Any] | None:
    """What the forward of ``module`` finds by name; None: its class is not known, or written in another way."""
    if type(module).__name__ not in KNOWN or not all(hasattr(module, name) for name in PARTS):
        return None
    functions: Mapping[str, Any] = inspect.unwrap(type(module).forward).__globals__
    known = CONVOLUTION in functions and names(module, CONVOLUTION) and takes_others(module)
    return functions if known else None


@never_compiled
def _forward(
    module: Any,
    functions: Mapping[str, Any],
    own: Callable[..., Tensor],
    hidden_states: Tensor,
    past_key_values: Any = None,
    attention_mask: Tensor | None = None,
    sequence_parallel: Any = None,
    **kwargs: Any,
) -> Tensor:
    """The forward of ``module``, ``own`` where this rank has the whole text: ``hidden_states [B, s, d]``."""
    batch: SequenceParallelBatch | None = sequence_parallel
    # While text is generated, each new token is on every rank, and so are the states that it goes on from.
    if batch is None or not batch.brings_frames or batch.mixes_at_once:
        return own(hidden_states, past_key_values=past_key_values, attention_mask=attention_mask, **kwargs)
    before, behind, x = module.in_proj(hidden_states).chunk(3, dim=-1)
    channels = tuple(runs(split_evenly(module.conv.out_channels, batch.comm.ranks)))
    share = slice(channels[batch.comm.rank].start, channels[batch.comm.rank].stop)
    weight, bias = module.conv.weight.squeeze(1)[share], module.conv.bias
    bias = None if bias is None else bias[share]
    tails: list[Tensor] = []

    def convolve(x: Tensor) -> Tensor:
        """``[B, channels, S, 1]``."""
        if batch.states is not None:
            tails.append(last_tokens(x, module.conv_kernel_size))
        made: Tensor = functions[CONVOLUTION](x.squeeze(3), weight, bias)
        return made.unsqueeze(3)

    x = (before * x).transpose(1, 2).unsqueeze(3)
    convolved = mixed_by_heads([x], [channels], (channels, 1), batch.mixed_rows, convolve)
    if batch.states is not None:
        assert batch.documents is not None
        nothing = x.new_zeros(1, len(channels[batch.comm.rank]), module.conv_kernel_size, 1)
        own_tails = of_documents(tails, batch.documents, nothing)
        batch.states[module] = heads_of_all_ranks(own_tails, channels, batch.comm).squeeze(3), None
    made: Tensor = module.out_proj(behind * convolved.squeeze(3).transpose(1, 2))
    return made
