"""What the families make of every class of the installed transformers that takes images and text.

    python benchmarks/image_text_models.py

Each class is built by the defaults of its config, without memory for its weights, in two layers where that goes.
A line says which family takes it, or why none does. Classes whose defaults build no model are listed with what
transformers says of them. The command fails where a family neither takes a model nor says why.
"""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from ds_lvxattn.errors import ConfigError
from ds_lvxattn.families import family_of, family_of_config

LAYERS = ("num_hidden_layers", "depth")
REMEDIES = ("; docs/adding-a-family.md", ". Set 'sequence_parallel_size'")  # behind the reason in an error


def parts(config: Any) -> Iterator[Any]:
    """``config`` and the configs in it."""
    yield config
    for part in vars(config).values():
        if isinstance(part, PreTrainedConfig):
            yield from parts(part)


def built(config_class: type[PreTrainedConfig]) -> Any:
    """A model of two layers, or as many as its config wants."""
    config = config_class()
    for part in parts(config):
        for name in LAYERS:
            # A list with an entry for each layer counts them as well.
            if isinstance(getattr(part, name, None), int) and getattr(part, "layer_types", None) is None:
                setattr(part, name, min(getattr(part, name), 2))
    made = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[config_class]
    try:
        with torch.device("meta"):
            return made(config)
    except Exception:  # some layers are counted elsewhere too
        with torch.device("meta"):
            return made(config_class())


def verdict(config_class: type[PreTrainedConfig]) -> tuple[str, str]:
    """``taken``, ``refused``, ``not built`` or ``fails``, and what there is to say of it."""
    try:
        model = built(config_class)
    except Exception as error:
        return "not built", f"{type(error).__name__}: {error}"
    try:
        family_of_config(model.config)
        family = family_of(model)
        family.attention_layers(model)
        family.trainable_by_default()
    except ConfigError as error:
        reason = str(error)
        for behind in REMEDIES:
            reason = reason.partition(behind)[0]
        return "refused", "no family knows it" if "belongs to no known model family" in reason else reason
    except Exception as error:
        return "fails", f"{type(error).__name__}: {error}"
    return "taken", family.name


def main() -> int:
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    failed = False
    for config_class in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        kind, text = verdict(config_class)
        failed |= kind == "fails"
        print(f"{config_class.__name__:34} {kind:9} {' '.join(text.split())[:200]}", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
