"""The parameters that an engine trains: those that required a gradient when it was made, to its end."""

from __future__ import annotations

from typing import Any

from torch import nn

from ds_lvxattn.errors import ConfigError


def check_trains(model: nn.Module) -> None:
    """Raise ``ConfigError`` where nothing of ``model`` would train, on which ZeRO fails without a word."""
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError(
            "no parameter of the model requires a gradient, so nothing would train; adapters that "
            "PeftModel.from_pretrained loads do with is_trainable=True"
        )


class Trained:
    """Remembers what of ``model`` requires a gradient now, as an engine is made.

    ZeRO takes gradients of these parameters alone, by hooks: another one would not train, or would take a place in a
    bucket that is not there, and one that no longer requires a gradient would go on by its momentum.
    """

    def __init__(self, model: nn.Module) -> None:
        self._parameters = [(name, p, p.requires_grad) for name, p in model.named_parameters()]

    def begin(self) -> None:
        """Ahead of the backward pass of a micro-batch.

        DeepSpeed 0.19.8 overwrites a step's gradients under ZeRO-3 where a parameter has one in the first micro-batch.
        Others (adapters that are not active, an encoder without images) would train with that of the step before: at
        the first micro-batch gradients are set to 0, as those of the other stages are.

        Raises:
            ConfigError: other parameters require a gradient by now.
        """
        for name, parameter, trained in self._parameters:
            if parameter.requires_grad != trained:
                raise ConfigError(
                    f"{name} {'no longer requires' if trained else 'requires'} a gradient, other than when the engine "
                    "was made, which trains what did then. PEFT's set_adapter and disable_adapter switch gradients on "
                    "and off: set the adapter ahead of the engine; to train several in turn, give all of them "
                    "gradients there and after each such call (model.set_requires_grad(NAMES))"
                )
        optimizer: Any = getattr(self._parameters[0][1], "_z3_optimizer", None)
        if optimizer is not None and optimizer.micro_step_id == 0:
            optimizer.grad_partitions_flat_buffer.zero_()
