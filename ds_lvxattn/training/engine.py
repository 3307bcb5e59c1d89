"""The DeepSpeed engine, whose refusals are those of the config."""

from __future__ import annotations

import logging
from typing import Any

import deepspeed
from deepspeed import DeepSpeedEngine
from deepspeed.runtime.config import DeepSpeedConfigError
from deepspeed.runtime.zero.utils import ZeRORuntimeException

from ds_lvxattn.errors import ConfigError

logger = logging.getLogger(__name__)

# What DeepSpeed raises for settings that do not go together, or not on this device.
REFUSALS = (
    AssertionError, AttributeError, DeepSpeedConfigError, ImportError, NotImplementedError, TypeError, ValueError,
    ZeRORuntimeException,
)  # fmt: skip


def start_engine(**arguments: Any) -> DeepSpeedEngine:
    """``deepspeed.initialize``; its engine.

    Raises:
        ConfigError: DeepSpeed refuses the config. The config is that of all ranks, and so is the refusal.
    """
    try:
        engine, *_ = deepspeed.initialize(**arguments)
    except REFUSALS as error:
        logger.debug("deepspeed.initialize", exc_info=True)
        raise ConfigError(f"DeepSpeed refuses the config: {type(error).__name__}: {error}") from error
    return engine
