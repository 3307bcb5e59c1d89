"""Errors that are no fault of the program: one message each, and no traceback."""


class ConfigError(ValueError):
    """A setting that cannot work; the message names the key, the value and what to change. Exit code 2."""


class RunError(RuntimeError):
    """A run that cannot go on though its settings are right: disk full, diverged, a rank gone. Exit code 1."""
