"""Which modules draw at random what they drop."""

from __future__ import annotations

from torch import nn

DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


def drop_rate(module: nn.Module) -> float:
    """Probability with which a dropout module of torch drops a value in training; 0 for any other module."""
    return module.p if isinstance(module, DROPOUTS) else 0.0
