"""PEFT's methods that do not fit a text whose rows are divided over ranks: refused by name.

Adapters that change a layer's output row by row train as on one rank. What reads a whole text, puts tokens of its own
into it or adds a term to the loss would do so on each rank's part.
"""

from __future__ import annotations

from torch import nn

from ds_lvxattn.errors import ConfigError

# By PEFT's name of the method: what it does.
_WHY = {
    "ADALORA": "adds a term to each rank's part of the loss, and ranks adapters by whole gradients, which ZeRO divides",
    "ADAPTION_PROMPT": "lets each rank's rows attend to tokens of its own",
    "LILY": "mixes its adapters by a mean over all rows, of which a rank has its own",
    "PVERA": "draws noise in the adapters, another on each rank",
    "SHADOW": "runs a second model over the rows that a rank has",
    "XLORA": "mixes its adapters by what a forward of its own reads in a whole text",
}
_PROMPTS = "puts tokens of its own ahead of the text, and each rank would ahead of its part"
_INVOCATION = "looks for its invocation tokens in the text, of which a rank has a part"


def refuse_methods(model: nn.Module) -> None:
    """Raise ``ConfigError`` where ``model`` has adapters of a method that divided text does not allow."""
    configs = getattr(model, "peft_config", None)
    for adapter, config in configs.items() if isinstance(configs, dict) else ():
        name = getattr(config.peft_type, "value", config.peft_type)
        why = _PROMPTS if config.is_prompt_learning else _WHY.get(name)
        if why is None and getattr(config, "alora_invocation_tokens", None) is not None:
            name, why = "LORA with alora_invocation_tokens", _INVOCATION
        if why is not None:
            raise ConfigError(
                f"the adapter {adapter!r} is {name}, which {why}; take a method that changes each row by itself (LoRA, "
                "DoRA, IA3, ...), or set 'sequence_parallel_size' to 1"
            )
