"""Language models without images: causal self-attention over a text that is divided over the ranks.

Any causal language model of transformers whose attention goes through transformers' registry is of this family. What
it is like is read off its config and its modules; where division over ranks would change what it computes, it is
refused, with the reason.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from ds_lvxattn.errors import ConfigError
from ds_lvxattn.families.family import Family
from ds_lvxattn.families.handed_on import MASK, around, drops_arguments, hand_down, makes_masks, names
from ds_lvxattn.families.mixers import divide, mixers, types_of_layers
from ds_lvxattn.families.rotary import (
    self_attention_chunk,
    self_attention_role,
    self_attention_sizes,
    self_attention_window,
    window_is_unknown,
)
from ds_lvxattn.plan.layer_plan import AttentionLayer
from ds_lvxattn.runtime.recompute import Recomputation

# Types of layers, by transformers' names, whose attention is intervals.
INTERVALS = ("full_attention", "sliding_attention", "chunked_attention")
ROW_BY_ROW = ("mlp", "moe")  # of layers with neither attention nor anything else that reaches beyond a row
# Modules that hand something from one token to the next besides attention; a rank has only its part of the tokens. What
# those in ``families/mixers.py`` hand on is exchanged by heads.
RECURRENT = ("mamba", "rwkv", "recurrent", "lightningattention", "gateddeltanet", "shortconv")


class TextOnly(Family):
    """Causal language models of transformers; see ``Family``. Samples with frames are refused."""

    name = "text only"
    model_class = PreTrainedModel
    keys_in_text = True

    @classmethod
    def has_model(cls, model: nn.Module) -> bool:
        return isinstance(model, PreTrainedModel) and cls.has_config(model.config) and model.can_generate()

    @classmethod
    def has_config(cls, config: Any) -> bool:
        return isinstance(config, PreTrainedConfig) and type(config) in MODEL_FOR_CAUSAL_LM_MAPPING

    def role_of(self, module: nn.Module) -> str | None:
        return self_attention_role(module)

    def sizes_of(self, module: Any) -> tuple[int, int, int]:
        return self_attention_sizes(module)

    def window_of(self, module: Any) -> int | None:
        return self_attention_window(module)

    def chunk_of(self, module: Any) -> int | None:
        return self_attention_chunk(module)

    def attention_layers(self, model: nn.Module) -> dict[nn.Module, AttentionLayer]:
        """See ``Family``. A model that would be wrong on a part of its text is refused, with the reason."""
        refuse(model, (hinders(model) for hinders in OBSTACLES))
        return super().attention_layers(model)

    def reach_attention(self, model: nn.Module) -> None:
        divide(model)

    def mixers(self, model: nn.Module) -> dict[nn.Module, AttentionLayer]:
        return mixers(model)

    def install_hooks(self, model: nn.Module, recomputation: Recomputation) -> None:
        """The model takes the rank's tokens and positions as they are; where its layers do not hand on what says how
        they are divided (Nemotron), it goes the way of a mask."""
        hand_down(model, self.role_of)

    def trainable_by_default(self) -> tuple[str, ...]:
        return ("*",)

    def load_model(self, name: str, dtype: torch.dtype) -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(name, dtype=dtype, trust_remote_code=False)


def refuse(model: nn.Module, reasons: Iterable[str | None]) -> None:
    """Raise ``ConfigError`` with the first of ``reasons`` why ``model`` would be computed wrongly, if there is one."""
    for reason in reasons:
        if reason is not None:
            raise ConfigError(
                f"{type(model).__name__} cannot be sequence-parallel: {reason}. Set 'sequence_parallel_size' to 1, "
                "or write a family for it (docs/adding-a-family.md)"
            )


def _registry(model: Any) -> str | None:
    # Models with other layers beside attention do not say so (Qwen3.5).
    named = [names(attention, "ALL_ATTENTION_FUNCTIONS") for _, attention in _attentions(model)]
    if not model._supports_attention_backend and not (named and all(named)):
        return "its attention does not look up transformers' registry of attention functions"
    return None


def _arguments(model: Any) -> str | None:
    parameters = inspect.signature(model.forward).parameters
    if "position_ids" not in parameters:
        return "its forward takes no position_ids, so a rank cannot tell it where its tokens stand"
    if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return "its forward takes no further arguments, so none reach its attention"
    return None


def _chosen_keys(model: nn.Module) -> str | None:
    for name, module in model.named_modules():
        kind = type(module).__name__
        if "indexer" in kind.lower():
            return f"module {name} ({kind}) chooses the keys that a row attends to, and a rank has a part of them"
    return None


def _attentions(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    return ((name, module) for name, module in model.named_modules() if self_attention_role(module) == "self")


def _not_handed_on(model: nn.Module) -> str | None:
    for path, attention in _attentions(model):
        if drops_arguments(attention):
            return f"{type(attention).__name__} hands no further arguments on to transformers' attention functions"
        dropping = [(name, module) for name, module in around(model, path) if drops_arguments(module)]
        for name, module in dropping:
            # One layer alone can bring the batch in the place of a mask.
            if len(dropping) > 1 or MASK not in inspect.signature(type(module).forward).parameters:
                return f"module {name} ({type(module).__name__}) hands no further arguments on to its attention"
    divided = mixers(model)
    for path, mixer in model.named_modules():
        for name, module in around(model, path) if mixer in divided else ():
            if drops_arguments(module):
                return f"module {name} ({type(module).__name__}) hands no further arguments on to what is in it"
    return None


def _masks_of_its_own(model: nn.Module) -> str | None:
    for _, attention in _attentions(model):
        if (mask := makes_masks(attention)) is not None:
            kind = type(attention).__name__
            return f"{kind} makes a dense mask itself ('{mask}'), and attention of divided text takes intervals"
    return None


def _windows_of_masks(model: nn.Module) -> str | None:
    for _, attention in _attentions(model):
        if window_is_unknown(attention):
            return f"{type(attention).__name__} does not hand its sliding window on, which only the model's masks say"
    return None


def _kinds_of_layers(model: Any) -> str | None:
    supported = [*INTERVALS, *types_of_layers(model)]
    kinds = sorted({*(getattr(model.config, "layer_types", None) or ())} - {*supported, *ROW_BY_ROW})
    return f"it has layers of the types {kinds}, and only {supported} are supported" if kinds else None


def _recurrence(model: nn.Module) -> str | None:
    divided = {part for module in mixers(model) for part in module.modules()}
    for name, module in model.named_modules():
        kind = type(module).__name__
        if module in divided:
            continue
        if isinstance(module, nn.Conv1d) or any(word in kind.lower() for word in RECURRENT):
            return f"module {name} ({kind}) mixes neighbouring tokens outside attention, and a rank has a part of them"
    return None


def mixing(model: nn.Module) -> str | None:
    """Why a family that does not divide ``mixers`` would compute them wrongly."""
    for module, layer in mixers(model).items():
        return f"module {layer.name} ({type(module).__name__}) mixes neighbouring tokens outside attention"
    return None


def causality(model: Any) -> str | None:
    """Why a row may see what follows it; a family that knows of it may take such a model."""
    config = model.config
    both_ways = getattr(config, "use_bidirectional_attention", False)
    if not getattr(config, "is_causal", True) or both_ways not in (None, False, "vision"):  # "vision": of images alone
        return "its attention is not causal"
    return None


def _auxiliary_loss(model: Any) -> str | None:
    if getattr(model.config, "output_router_logits", False):
        return "its loss balances experts over all tokens ('output_router_logits' is true; set it to false)"
    return None


# What hinders of a model's layers, whatever calls them.
OF_LAYERS: tuple[Callable[[Any], str | None], ...] = (
    _chosen_keys, _not_handed_on, _masks_of_its_own, _windows_of_masks, _kinds_of_layers, _recurrence,
)  # fmt: skip
OBSTACLES = (_registry, _arguments, *OF_LAYERS, causality, _auxiliary_loss)
