"""Errors of the user's making: one message that names the key, the value and the remedy."""


class ConfigError(ValueError):
    """A setting that cannot work; the message names the key, the value and what to change."""
