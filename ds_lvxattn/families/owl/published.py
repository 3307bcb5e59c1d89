"""The code that published mPLUG-Owl3 checkpoints come with: what its forward functions take no argument for.

Its language model takes neither ``sequence_parallel`` nor the loss arguments of transformers 5, and its layers hand
down no further keywords. So hooks take them off ahead of the language model, add the batch again ahead of each
attention, and compute the loss from the logits.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from transformers.loss.loss_utils import ForCausalLMLoss

LOSS = ("labels", "shift_labels", "num_items_in_batch")


class Running:
    """What the forward pass at hand was called with: the batch, for the attention modules, and the loss arguments."""

    def __init__(self) -> None:
        self.batch: Any = None
        self.loss: dict[str, Any] = {}

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Before the language model: keep what it has no argument for."""
        rest = dict(kwargs)
        self.batch = rest.pop("sequence_parallel", None)
        self.loss = {}
        if self.batch is None:
            return None
        self.loss = {key: rest.pop(key) for key in LOSS if key in rest}
        return args, rest

    def hand_down(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Before an attention module: give it the batch, as an argument, so that a recomputation has it too."""
        return args, {**kwargs, "sequence_parallel": self.batch}

    def end(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """After the language model: the loss, as transformers computes it."""
        if output is not None and self.loss.get("labels") is not None:
            output.loss = ForCausalLMLoss(output.logits, vocab_size=output.logits.shape[-1], **self.loss)
        self.batch, self.loss = None, {}
        return output


def fit(language_model: nn.Module, attention: Sequence[nn.Module]) -> None:
    """Install the hooks on a language model that takes no further keywords, none on others."""
    parameters = inspect.signature(language_model.forward).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return
    running = Running()
    language_model.register_forward_pre_hook(running.begin, with_kwargs=True)
    for module in attention:
        module.register_forward_pre_hook(running.hand_down, with_kwargs=True)
    language_model.register_forward_hook(running.end, always_call=True)


def vision_states(vision: nn.Module, pixel_values: Tensor) -> Tensor:
    """Of a vision encoder that no class of transformers is, what its last but one layer returns."""
    return vision(pixel_values, output_hidden_states=True).hidden_states[-2]
