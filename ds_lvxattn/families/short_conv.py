"""Short convolutions along the text (``ShortConv`` of LFM2 and its kin) on divided text.

The module projects each token by itself to three vectors, the product of two of which a causal convolution takes,
channel by channel; its result, times the third, is projected again. So a rank convolves all tokens in a share of the
channels, exchanged as heads of one number each (``exchange/sequence_mixing.py``).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ds_lvxattn.exchange.sequence_mixing import heads_of_all_ranks, last_tokens, mixed_by_heads, of_documents
from ds_lvxattn.exchange.shards import runs, split_evenly
from ds_lvxattn.families.mixer_kind import Functions, MixerKind
from ds_lvxattn.runtime.batch import SequenceParallelBatch

CONVOLUTION = "causal_conv1d_fn"


def _sizes(module: Any) -> tuple[int, int, int, int]:
    channels = module.conv.out_channels
    return channels, channels, 1, 1


def _forward(module: Any, functions: Functions, hidden_states: Tensor, batch: SequenceParallelBatch) -> Tensor:
    """See ``MixerKind``."""
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


SHORT_CONVOLUTION = MixerKind(
    ("Lfm2ShortConv", "Lfm2MoeShortConv", "Lfm3ShortConv"), ("in_proj", "conv", "conv_kernel_size", "out_proj"),
    (CONVOLUTION,), _sizes, _forward,
)  # fmt: skip
